"""Input items of the Responses API, converted to messages for the chat template."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modelpack_engine.errors import RequestError
from modelpack_server.api.continuation import carried
from modelpack_server.api.openai.responses.requests import joined_name

Item = dict[str, Any]
_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal",
          "reasoning_text": "text", "summary_text": "text"}  # fmt: skip


def new_id(prefix: str) -> str:
    """Return a new id, as the API's are: what it is of, and then nothing to be read."""
    return f"{prefix}_{uuid.uuid4().hex}"


def items_of(
    given: str | Sequence[Mapping[str, Any]], find: Callable[[str], Item | None]
) -> list[Item]:
    """Return the items of an `input`, each checked and with an id.

    `find` gives what an `item_reference` refers to. Raises `RequestError`, naming the item.
    """
    if isinstance(given, str):
        return [_message({"role": "user", "content": given}, "input")] if given else []
    references = Counter(
        str(item.get("id")) for item in given if item.get("type") == "item_reference"
    )
    for name, count in references.items():
        if count > 1:  # small references to a large item would make a prompt without bound
            raise RequestError(f"the item {name!r} is referred to {count} times", param="input")
    return [_item(item, f"input[{i}]", find) for i, item in enumerate(given)]


def _item(given: Mapping[str, Any], where: str, find: Callable[[str], Item | None]) -> Item:
    kind = given.get("type") or ("message" if "role" in given else None)
    match kind:
        case "message":
            return _message(given, where)
        case "function_call":
            texts = {key: _text_field(given, key, where) for key in ("call_id", "name")}
            call = {"arguments": _text_field(given, "arguments", where) or "{}"}
            if isinstance(given.get("namespace"), str):
                call["namespace"] = given["namespace"]
            return _with_id(given, "fc") | {"type": kind, **texts, **call, "status": "completed"}
        case "function_call_output":
            call_id = _text_field(given, "call_id", where)
            output = given.get("output")
            if not isinstance(output, (str, list)):
                raise RequestError("the output is neither text nor a list", param=f"{where}.output")
            plain_text(output, f"{where}.output")
            return _with_id(given, "fco") | {"type": kind, "call_id": call_id, "output": output}
        case "reasoning":
            return _reasoning(given, where)
        case "item_reference":
            found = find(str(given.get("id")))
            if found is None:
                raise RequestError(f"no such item: {given.get('id')!r}", param=f"{where}.id")
            return found
    raise RequestError(f"an item of the type {kind!r} is not supported", param=f"{where}.type")


def _message(given: Mapping[str, Any], where: str) -> Item:
    role = given.get("role")
    if role not in _ROLES:
        raise RequestError(f"the role is {role!r}", param=f"{where}.role")
    content = given.get("content")
    plain_text(content, f"{where}.content")
    if isinstance(content, str):
        said = role == "assistant"
        part: Item = {"type": "output_text" if said else "input_text", "text": content}
        content = [part | ({"annotations": []} if said else {})]
    item = {"type": "message", "role": role, "status": "completed", "content": content}
    return _with_id(given, "msg") | item


def _reasoning(given: Mapping[str, Any], where: str) -> Item:
    item = _with_id(given, "rs") | {"type": "reasoning"}
    for key in ("summary", "content"):
        parts = given.get(key) or []
        plain_text(parts, f"{where}.{key}")
        item[key] = parts
    if given.get("encrypted_content"):
        item["encrypted_content"] = given["encrypted_content"]
    return item


def _with_id(given: Mapping[str, Any], prefix: str) -> Item:
    known = given.get("id")
    return {"id": known if isinstance(known, str) and known else new_id(prefix)}


def _text_field(given: Mapping[str, Any], key: str, where: str) -> str:
    text = given.get(key)
    if not isinstance(text, str):
        raise RequestError(f"{key} is missing or no text", param=f"{where}.{key}")
    return text


def plain_text(content: Any, where: str) -> str:
    """Return the text of content that has nothing but text; `where` names it in errors."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError("content is neither text nor a list of parts", param=where)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get(_TEXTS[kind]) if isinstance(kind, str) and kind in _TEXTS else None
        if not isinstance(text, str):
            raise RequestError(f"this model takes text only, not {kind!r}", param=f"{where}[{i}]")
        texts.append(text)
    return "".join(texts)


def template_messages(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """Return a conversation as chat templates take it.

    What the model thought, said and called in one turn becomes one message.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    turn: dict[str, Any] | None = None
    for item in items:
        if item["type"] == "function_call_output" or item.get("role", "assistant") != "assistant":
            turn = None
            messages.append(_others(item))
            continue
        if turn is None or _is_begun(turn, item):
            turn = {"role": "assistant", "content": [], "reasoning_content": []}
            messages.append(turn)
        _add(turn, item)
    return [_with_texts(message) for message in messages]


def _with_texts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with one text where its turn collected several."""
    if not isinstance(message["content"], list):
        return message
    thoughts = "".join(message.pop("reasoning_content"))
    message["content"] = "".join(message["content"])
    return message | ({"reasoning_content": thoughts} if thoughts else {})


def _others(item: Item) -> dict[str, Any]:
    if item["type"] == "function_call_output":
        text = plain_text(item["output"], "input")
        return {"role": "tool", "tool_call_id": item["call_id"], "content": text}
    role = "system" if item["role"] == "developer" else item["role"]
    return {"role": role, "content": plain_text(item["content"], "input")}


def _is_begun(turn: Mapping[str, Any], item: Item) -> bool:
    """Tell whether a turn has what stands behind `item` in one: it belongs to the next."""
    if item["type"] == "function_call":
        return False
    if item["type"] == "message":
        return "tool_calls" in turn
    return "tool_calls" in turn or bool(turn["content"])


def _add(turn: dict[str, Any], item: Item) -> None:
    match item["type"]:
        case "message":
            if text := plain_text(item["content"], "input"):
                turn["content"].append(text)
        case "function_call":
            name = joined_name(item.get("namespace"), item["name"])
            function = {"name": name, "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            turn.setdefault("tool_calls", []).append(call)
        case "reasoning":
            text = (
                plain_text(item["content"], "input")
                or carried(item.get("encrypted_content"))
                or plain_text(item["summary"], "input")
            )
            if text:
                turn["reasoning_content"].append(text)
