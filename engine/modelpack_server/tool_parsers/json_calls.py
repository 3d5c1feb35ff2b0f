"""Calls that are JSON objects: {"name": ..., "arguments": {...}}, alone or in a list."""

from __future__ import annotations

import json
from typing import Any

from modelpack_server.tool_parsers.calls import Found, capture_value, read_object
from modelpack_server.tool_parsers.json_text import load_object
from modelpack_server.tool_parsers.source import MAX_HELD, Broken, NotACall, Reading, Source

_NAME_KEYS = ("name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters")


def read_json_call(source: Source, found: Found) -> Reading[None]:
    """Read one object; its arguments stream if its name comes before them.

    `arguments` and `parameters` mean the same; they may be an object, the JSON of one in a string,
    or missing. Raises `NotACall` if it is no call of an offered tool, `Broken` if it breaks off.
    """
    yield from source.expect("{")
    name = call_id = held = None
    started = False
    while True:
        yield from source.spaces()
        if (yield from source.accept("}")):
            break
        if started and (yield from source.peek()) not in '",':
            return  # the closing brace is missing: what follows is not ours
        yield from source.accept(",")
        yield from source.spaces()
        key = yield from _string(source)
        yield from source.spaces()
        yield from source.expect(":")
        yield from source.spaces()
        if key in _ARGUMENT_KEYS and name is not None and (yield from source.peek()) == "{":
            if not (yield from read_object(source, found, name, call_id)):
                raise Broken
            started = True
            continue
        value = json.loads((yield from capture_value(source, MAX_HELD)))
        if key in _ARGUMENT_KEYS:
            held = value
        elif key in _NAME_KEYS and isinstance(value, str):
            name = value
        elif key == "function" and isinstance(value, dict) and isinstance(value.get("name"), str):
            name = value["name"]
            held = value.get("arguments", value.get("parameters"))
        elif key == "id" and isinstance(value, str):
            call_id = value
    if not started:
        if name is None:
            raise NotACall
        found.known(name)
        found.whole(name, _arguments(held), call_id)


def read_json_calls(source: Source, found: Found, separators: str = ",;") -> Reading[None]:
    """Read a list of objects, or objects one after another, between them whitespace and
    `separators`."""
    in_list = yield from source.accept("[")
    read = 0
    while True:
        yield from source.spaces()
        if in_list and (yield from source.accept("]")):
            if not read:
                raise NotACall
            return
        character = yield from source.peek()
        if read and not in_list and character != "{" and character not in tuple(separators):
            return
        if read and character in tuple(separators):
            source.advance(1)
            yield from source.spaces()
            if not in_list and (yield from source.peek()) != "{":
                return
        yield from read_json_call(source, found)
        source.forget()
        read += 1


def _string(source: Source) -> Reading[str]:
    if (yield from source.peek()) != '"':
        raise NotACall
    text = json.loads((yield from capture_value(source, MAX_HELD)))
    assert isinstance(text, str)
    return text


def _arguments(value: Any) -> dict[str, Any]:
    if value is None or value == "":
        return {}
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        try:
            return load_object(value)
        except ValueError:
            pass
    raise NotACall
