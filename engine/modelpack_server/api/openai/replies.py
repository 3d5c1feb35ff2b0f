"""Common parts of the OpenAI API's responses: usage, envelope, log-probabilities."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from json.encoder import encode_basestring
from typing import Any

from modelpack_engine.outputs import TokenLogprob, Usage
from modelpack_server.api.vocabulary import Vocabulary
from modelpack_server.conversation.spec import ChatUsage


def total_usage(usages: Sequence[Usage], prompts: int = 1) -> dict[str, Any]:
    """Return the total counts of several choices; a prompt counts once for all its choices."""
    per_prompt = max(1, len(usages) // prompts) if prompts else 1
    firsts = usages[::per_prompt]
    asked = sum(usage.prompt_tokens for usage in firsts)
    generated = sum(usage.completion_tokens for usage in usages)
    reasoning = sum(usage.reasoning_tokens for usage in usages if isinstance(usage, ChatUsage))
    details = {"reasoning_tokens": reasoning}
    predicted = {
        "accepted_prediction_tokens": sum(usage.accepted_tokens for usage in usages),
        "rejected_prediction_tokens": sum(usage.rejected_tokens for usage in usages),
    }
    return {
        "prompt_tokens": asked,
        "completion_tokens": generated,
        "total_tokens": asked + generated,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in firsts)},
        "completion_tokens_details": details | (predicted if any(predicted.values()) else {}),
    }


def list_object(data: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """Return a page of a list of objects, each of which has an `id`."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


#: Returns text as a JSON string.
quoted: Callable[[str], str] = encode_basestring


class Envelope:
    """The common fields of all objects of one response, encoded once for streams."""

    def __init__(self, prefix: str, kind: str, model: str, *, chunk_kind: str = "") -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._kind = kind
        self._model = model
        self._created = int(time.time())
        self._chunk_head = (
            f'data: {{"id":"{self.id}","object":"{chunk_kind or kind}","created":{self._created},'
            f'"model":{quoted(model)},"choices":['
        )

    def body(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the object of a response that is not streamed."""
        return {"id": self.id, "object": self._kind, "created": self._created,
                "model": self._model, "choices": choices, "usage": usage}  # fmt: skip

    def chunk(self, choices: str, usage: str = "") -> str:
        """Return a stream event; `choices` is JSON without its brackets, `usage` is JSON."""
        tail = f'],"usage":{usage}}}\n\n' if usage else "]}\n\n"
        return self._chunk_head + choices + tail


def chat_logprobs(logprobs: Sequence[TokenLogprob], words: Vocabulary) -> dict[str, Any]:
    """Return the log-probabilities of a chat choice."""
    return {
        "content": [
            _entry(words, item.token_id, item.logprob, item.data)
            | {"top_logprobs": [_entry(words, token, value) for token, value in item.top]}
            for item in logprobs
        ],
        "refusal": None,
    }


def completion_logprobs(
    prompt: Sequence[tuple[int, TokenLogprob | None]],
    logprobs: Sequence[TokenLogprob],
    words: Vocabulary,
    offset: int,
) -> dict[str, Any]:
    """Return the log-probabilities of a text choice, whose text begins at character `offset`.

    `prompt` are the tokens of an echoed prompt, the first without a log-probability.
    """
    texts = [words.text(token_id) for token_id, _ in prompt]
    texts += [words.shown(item.token_id, item.data)[0] for item in logprobs]
    items = [*(item for _, item in prompt), *logprobs]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [item.logprob if item else None for item in items],
        "top_logprobs": [
            {words.text(token): value for token, value in item.top} if item and item.top else None
            for item in items
        ],
        "text_offset": offsets,
    }


def _entry(
    words: Vocabulary, token_id: int, logprob: float, data: bytes | None = None
) -> dict[str, Any]:
    text, raw = words.shown(token_id, data)
    return {"token": text, "logprob": logprob, "bytes": raw}
