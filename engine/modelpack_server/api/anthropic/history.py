"""System text, messages and content blocks of the Messages API, as template messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from modelpack_engine.errors import RequestError
from modelpack_server.api.anthropic.requests import MessageFields
from modelpack_server.api.continuation import carried

# Claude Code puts such a line before its instructions, with another number in each request.
_BILLING = "x-anthropic-billing-header:"


def system_text(system: str | Sequence[Mapping[str, Any]] | None) -> str:
    """Return the instructions; what changes with each request is left out.

    A prompt that begins differently each time would never be found in the prefix cache.
    """
    if system is None:
        return ""
    if isinstance(system, str):
        return _without_billing(system)
    texts = []
    for i, block in enumerate(system):
        if block.get("type") != "text":
            raise unknown_block(block, f"system.{i}")
        texts.append(_without_billing(text_of(block, "text", f"system.{i}")))
    return "\n\n".join(text for text in texts if text)


def _without_billing(text: str) -> str:
    if not text.startswith(_BILLING):
        return text
    return text.partition("\n")[2].lstrip("\n")


def plain_text(content: str | Sequence[Any] | None, where: str) -> str:
    """Return the text of content that has nothing but text; `where` names it in errors."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for i, block in enumerate(content):
        place = f"{where}.{i}"
        if not isinstance(block, Mapping):
            raise RequestError(f"{place}: expected an object", param=place)
        texts.append(shown(block, place))
    return "\n\n".join(text for text in texts if text)


def shown(block: Mapping[str, Any], where: str) -> str:
    """Return the text of a block: text, a document of text, a search result.

    Raises `RequestError`, naming its type, for any other.
    """
    match block.get("type"):
        case "text":
            return text_of(block, "text", where)
        case "document":
            return _document(block, where)
        case "search_result":
            head = [str(block[key]) for key in ("title", "source") if block.get(key)]
            return "\n".join([*head, plain_text(block.get("content"), f"{where}.content")])
    raise unknown_block(block, where)


def _document(block: Mapping[str, Any], where: str) -> str:
    source = block.get("source")
    kind = source.get("type") if isinstance(source, Mapping) else None
    if not isinstance(source, Mapping) or kind not in ("text", "content"):
        raise RequestError(
            f"{where}: this model takes documents of text only, not {kind!r}", param=where
        )
    if kind == "text":
        text = text_of(source, "data", f"{where}.source")
    else:
        text = plain_text(source.get("content"), f"{where}.source.content")
    head = [str(block[key]) for key in ("title", "context") if block.get(key)]
    return "\n".join([*head, text])


def text_of(block: Mapping[str, Any], key: str, where: str) -> str:
    """Return a field that has to be text."""
    text = block.get(key)
    if not isinstance(text, str):
        raise RequestError(f"{where}.{key} is not a string", param=f"{where}.{key}")
    return text


def unknown_block(block: Mapping[str, Any], where: str) -> RequestError:
    """Return the error for a block that cannot be shown to the model."""
    return RequestError(
        f"{where}: a block of the type {block.get('type')!r} is not supported here", param=where
    )


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
        raise RequestError(f"{where}.input is not an object", param=f"{where}.input")
    function = {
        "name": text_of(block, "name", where),
        "arguments": json.dumps(given, ensure_ascii=False),
    }
    return {"id": text_of(block, "id", where), "type": "function", "function": function}
