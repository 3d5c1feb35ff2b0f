"""Turns of the Messages API, and what chat templates take in their place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from modelpack_engine.errors import RequestError
from modelpack_server.api.anthropic.content import (
    plain_text,
    shown,
    system_text,
    text_of,
    unknown_block,
)
from modelpack_server.api.anthropic.requests import MessageFields
from modelpack_server.api.carried import carried


def template_messages(
    system: str | Sequence[Mapping[str, Any]] | None, messages: Sequence[MessageFields]
) -> list[dict[str, Any]]:
    """Return the conversation as chat templates take it.

    Results of tools come before the text of their turn, as their own messages. Raises
    `RequestError`, naming the block, for what cannot be shown to the model.
    """
    turns: list[dict[str, Any]] = []
    if instructions := system_text(system):
        turns.append({"role": "system", "content": instructions})
    for i, message in enumerate(messages):
        where = f"messages.{i}.content"
        if isinstance(message.content, str):
            turns.append({"role": message.role, "content": message.content})
        elif message.role == "user":
            turns += _user(message.content, where)
        elif message.role == "assistant":
            turns.append(_assistant(message.content, where))
        else:
            turns.append({"role": "system", "content": system_text(message.content)})
    return turns


def _user(blocks: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    results, texts = [], []
    for i, block in enumerate(blocks):
        place = f"{where}.{i}"
        if block.get("type") == "tool_result":
            results.append(_result(block, place))
        else:
            texts.append(shown(block, place))
    if texts or not results:
        results.append({"role": "user", "content": "\n\n".join(texts)})
    return results


def _result(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = block.get("content")
    if content is not None and not isinstance(content, (str, list)):
        raise RequestError(f"{where}.content is neither text nor blocks", param=where)
    text = plain_text(content, f"{where}.content")
    if block.get("is_error") is True:
        text = f"Error: {text}"
    call = text_of(block, "tool_use_id", where)
    return {"role": "tool", "tool_call_id": call, "content": text}


def _assistant(blocks: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(blocks):
        place = f"{where}.{i}"
        match block.get("type"):
            case "text":
                texts.append(text_of(block, "text", place))
            case "thinking":
                thought = text_of(block, "thinking", place) or carried(block.get("signature"))
                thoughts.append(thought or "")
            case "redacted_thinking":
                pass  # none of ours: nobody here can read it
            case "tool_use":
                calls.append(_call(block, place))
            case _:
                raise unknown_block(block, place)
    turn: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if calls:
        turn["tool_calls"] = calls
    if any(thoughts):
        turn["reasoning_content"] = "\n\n".join(thought for thought in thoughts if thought)
    return turn


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = block.get("input")
    if not isinstance(given, dict):
        raise RequestError(f"{where}.input is no object", param=f"{where}.input")
    function = {
        "name": text_of(block, "name", where),
        "arguments": json.dumps(given, ensure_ascii=False),
    }
    return {"id": text_of(block, "id", where), "type": "function", "function": function}
