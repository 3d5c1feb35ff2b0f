"""Readers for calls that are JSON objects, alone or in lists: {"name", "arguments"}."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelpack_server.tool_parsers.calls import Found, read_object, read_value
from modelpack_server.tool_parsers.json_text import load_object
from modelpack_server.tool_parsers.parts import described
from modelpack_server.tool_parsers.source import MAX_NAME, Broken, NotACall, Reading, Source, stops

_NAME_KEYS = ("name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters")


def read_json_call(source: Source, found: Found) -> Reading[None]:
    """Read one object; its arguments are emitted piece by piece if the name precedes them.

    `arguments` and `parameters` are synonyms: an object, a string with the JSON of an object, or
    missing. Raises `NotACall` if it does not call a known tool, `Broken` if it is incomplete.
    """
    yield from source.expect("{")
    name = call_id = held = None
    started = False
    while True:
        yield from source.spaces()
        if (yield from source.accept("}")):
            break
        if started and (yield from source.peek()) not in ('"', ","):
            return  # the closing brace is missing, so the call ends here
        yield from source.accept(",")
        yield from source.spaces()
        if (yield from source.peek()) != '"':
            raise NotACall
        key = yield from read_value(source)
        yield from source.spaces()
        yield from source.expect(":")
        yield from source.spaces()
        if key in _ARGUMENT_KEYS and name is not None and (yield from source.peek()) == "{":
            if not (yield from read_object(source, found, name, call_id)):
                raise Broken
            started = True
            continue
        value = yield from read_value(source)
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


def read_json_calls(source: Source, found: Found) -> Reading[None]:
    """Read a list of objects, or objects separated by whitespace, commas and semicolons."""
    in_list = yield from source.accept("[")
    read = 0
    while True:
        yield from source.spaces()
        if in_list and (yield from source.accept("]")):
            if not read:
                raise NotACall
            return
        character = yield from source.peek()
        if read and not in_list and character not in ("{", ",", ";"):
            return
        if read and character in (",", ";"):
            source.advance(1)
            yield from source.spaces()
            if not in_list and (yield from source.peek()) != "{":
                return
        yield from read_json_call(source, found)
        source.forget()
        read += 1


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


_MAX_BLOCK = 1 << 15  # characters; mlx-lm's regular expressions take quadratic time at worst
_PACKAGE = "modelpack_server.tool_parsers._mlx_lm_tool_parsers"


@functools.cache
def tool_parser(name: str) -> types.ModuleType | None:
    """Return mlx-lm's parser module with this name; None if this version of mlx-lm has none."""
    try:
        installed = importlib.util.find_spec("mlx_lm")
    except ValueError:  # `sys.modules` has another module under this name
        return None
    if installed is None or not installed.submodule_search_locations:
        return None
    folder = Path(installed.submodule_search_locations[0]) / "tool_parsers"
    if _PACKAGE not in sys.modules:  # an empty package, so that the parsers can import each other
        package = types.ModuleType(_PACKAGE)
        package.__path__ = [str(folder)]
        sys.modules[_PACKAGE] = package
    try:
        return importlib.import_module(f"{_PACKAGE}.{name}")
    except Exception:  # noqa: BLE001 - foreign code, and a format less is no reason to fail
        return None


def read_mlx_lm_block(parser: str, closing: str, source: Source, found: Found) -> Reading[None]:
    """Read a block up to `closing` and parse it with mlx-lm's parser."""
    text, _ = yield from source.until(stops(closing), _MAX_BLOCK)
    module = tool_parser(parser)
    if module is None:
        raise NotACall
    try:
        parsed = module.parse_tool_call(text, [described(tool) for tool in found.tools.values()])
    except Exception:  # noqa: BLE001 - foreign code: whatever it raises, this is not a call
        raise NotACall from None
    calls = parsed if isinstance(parsed, list) else [parsed]
    for call in calls:
        _check(call, found)
    for call in calls:
        found.whole(call["name"], call["arguments"], call.get("id"))


def _check(call: Any, found: Found) -> None:
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise NotACall
    if not isinstance(call.get("arguments"), Mapping):
        raise NotACall
    found.known(call["name"])


NAME = re.compile(r"[\w.\-]")


def read_json_block(closing: str, source: Source, found: Found) -> Reading[None]:
    """Read one or more JSON calls, or a list of them, up to `closing`, which is optional."""
    yield from source.spaces()
    yield from read_json_calls(source, found)
    yield from source.spaces()
    if closing:
        yield from source.close(closing)


def read_mistral_calls(source: Source, found: Found) -> Reading[None]:
    """Read the text after [TOOL_CALLS], in any of Mistral's three formats.

    These are [{"name": .., "arguments": ..}], name{..}, and name[CALL_ID]id[ARGS]{..}. A name
    without a marker continues the list if an object follows.
    """
    yield from source.spaces()
    if (yield from source.peek()) in ("[", "{"):
        yield from read_json_calls(source, found)
        return
    name = yield from source.word(NAME)
    found.known(name)
    yield from source.spaces()
    call_id = None
    if (yield from source.accept("[CALL_ID]")):
        call_id = yield from source.word(NAME)
        yield from source.spaces()
    yield from source.accept("[ARGS]")
    yield from source.spaces()
    if not (yield from read_object(source, found, name, call_id)):
        raise Broken


def read_deepseek_call(source: Source, found: Found) -> Reading[None]:
    """Read function<sep>NAME, line break, ```json {..} ``` (V3, R1), or NAME<sep>{..} (V3.1)."""
    name = (yield from source.until(stops("<｜tool▁sep｜>"), MAX_NAME))[0].strip()
    yield from source.spaces()
    if (yield from source.peek()) != "{":
        name = yield from source.word(NAME)
        yield from source.spaces()
        if (yield from source.accept("```")):
            yield from source.accept("json")
            yield from source.spaces()
    if not (yield from read_object(source, found, name)):
        raise Broken
    yield from source.spaces()
    yield from source.accept("```")
    yield from source.spaces()
    yield from source.close("<｜tool▁call▁end｜>")


def read_kimi_call(source: Source, found: Found) -> Reading[None]:
    """Read ID<|tool_call_argument_begin|>{..}<|tool_call_end|>; the id is functions.NAME:NUMBER."""
    head = (yield from source.until(stops("<|tool_call_argument_begin|>"), MAX_NAME))[0].strip()
    name = re.sub(r":[0-9]+$", "", head).removeprefix("functions.")
    whole = re.fullmatch(r"functions\..+:[0-9]+", head)
    call_id = head if whole else f"functions.{name}:{found.calls}"
    yield from source.spaces()
    if not (yield from read_object(source, found, name, call_id)):
        raise Broken
    yield from source.spaces()
    yield from source.close("<|tool_call_end|>")


def read_functionary_turn(source: Source, found: Found) -> Reading[None]:
    """Read the text after <|recipient|>: NAME, line break, <|content|>{..}; or a text to `all`."""
    recipient = yield from source.word(NAME)
    yield from source.spaces()
    yield from source.expect("<|content|>")
    if recipient in ("all", "user"):
        yield from source.accept(" ")
        return
    yield from source.spaces()
    if (yield from source.peek()) != "{":  # no arguments, or code for a code interpreter
        found.known(recipient)
        found.whole(recipient, {})
        return
    if not (yield from read_object(source, found, recipient)):
        raise Broken


def read_python_tag(source: Source, found: Found) -> Reading[None]:
    """Read the text after Llama's <|python_tag|>: JSON calls separated by semicolons."""
    yield from source.spaces()
    yield from read_json_calls(source, found)
