"""Truncation: conversations that are longer than the context lose their oldest turns."""

from __future__ import annotations

from dataclasses import replace

from modelpack_engine.errors import ContextLengthError
from modelpack_server.conversation.chat import count_prompt
from modelpack_server.conversation.served import ServedModel
from modelpack_server.conversation.spec import ChatSpec

# Tokens that the answer is left, where the request does not say, and no more than this part of the
# context.
_ROOM = 1024
_PART = 4


async def fitted(model: ServedModel, spec: ChatSpec) -> ChatSpec:
    """Return `spec` without as many of its oldest turns as do not fit; instructions stay.

    Turns begin with the user: no result is left without its call. The last one always stays.
    """
    context = model.max_model_len
    most = context - min(spec.max_tokens or _ROOM, context // _PART)
    if await _fits(model, spec, most):
        return spec
    messages = list(spec.messages)
    head = 1 if messages[0]["role"] == "system" else 0
    starts = [i for i in range(head, len(messages)) if messages[i]["role"] == "user"]
    if not starts:
        return spec
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        shorter = replace(spec, messages=messages[:head] + messages[starts[middle] :])
        if await _fits(model, shorter, most):
            high = middle
        else:
            low = middle + 1
    return replace(spec, messages=messages[:head] + messages[starts[low] :])


async def _fits(model: ServedModel, spec: ChatSpec, most: int) -> bool:
    try:
        return await count_prompt(model, spec) <= most
    except ContextLengthError:
        return False
