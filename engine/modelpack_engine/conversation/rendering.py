"""From a conversation to a prompt, by the model's chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from modelpack_engine.conversation.spec import ChatSpec
from modelpack_engine.errors import RequestError
from modelpack_engine.loaders.tokenizer import Tokenizer

# Templates that write arguments as JSON themselves, or go through them, want an object.
_WANTS_OBJECT = re.compile(
    r"arguments\s*\|\s*(?:tojson|items|dictsort)|arguments\.items|arguments\s+is\s+(?:not\s+)?"
    r"(?:mapping|string)|in\s+[\w.]*arguments\b|_args\s*\|\s*(?:tojson|items)"
)


def render(spec: ChatSpec, tokenizer: Tokenizer) -> str:
    """Return the prompt text of a conversation.

    Tools are shown unless none may be called. Raises `RequestError`, whose text has the word
    "template", if the template fails.
    """
    options = dict(spec.template_options)
    if spec.reasoning is not None:  # what templates call the switch
        options.setdefault("enable_thinking", spec.reasoning)
        options.setdefault("thinking", spec.reasoning)
    tools = None
    if spec.tools and spec.tool_choice.mode != "none":
        tools = [_described(tool) for tool in spec.tools]

    def rendered(messages: Sequence[dict[str, Any]]) -> str:
        return tokenizer.render_chat(messages, tools=tools, **options)

    if not any(message.get("tool_calls") for message in spec.messages):
        return rendered(spec.messages)
    as_objects = [_with_objects(message) for message in spec.messages]
    source = tokenizer.chat_template or ""
    first: Sequence[dict[str, Any]] = as_objects
    second: Sequence[dict[str, Any]] = spec.messages
    if "arguments" in source and not _WANTS_OBJECT.search(source):
        first, second = spec.messages, as_objects
    try:
        return rendered(first)
    except RequestError:
        return rendered(second)


def _described(tool: Any) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    function["parameters"] = dict(tool.parameters)
    return {"type": "function", "function": function}


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with the arguments of its calls as objects."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    changed = []
    for call in calls:
        function = dict(call["function"])
        if isinstance(function.get("arguments"), str):
            with suppress(ValueError):  # what a model wrote once need not be JSON
                function["arguments"] = json.loads(function["arguments"] or "{}")
        changed.append({**call, "function": function})
    return {**message, "tool_calls": changed}
