"""Readers for calls that resemble code: Gemma's call:NAME{...} and Python's [f(a=1)]."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from modelpack_server.tool_parsers.calls import Found, Members, read_each, read_value
from modelpack_server.tool_parsers.json_calls import NAME, read_json_block
from modelpack_server.tool_parsers.source import MAX_HELD, NotACall, Reading, Source, stops
from modelpack_server.tool_parsers.typed_values import (
    parameter_schema,
    parse_python,
    python_literal,
    typed,
)

_KEY = re.compile(r"[^\s:{}\[\],<>\"']")
_ATOM = re.compile(r"[^,{}\[\]<\n]")
_MAX_DEPTH = 64


def read_gemma_block(quote: str, closing: str, source: Source, found: Found) -> Reading[None]:
    """Read any number of calls call:NAME{key:value,...} up to `closing`.

    `quote` is the token around strings, which are emitted piece by piece; other arguments are
    emitted whole. (mlx-lm's parsers accept complete blocks only; the one of function_gemma ends at
    the first brace and loses nested values, the one of gemma4 rejects keys with a dash.)
    """
    yield from read_each(partial(_read_gemma_call, quote), "call:", closing, source, found)


def _read_gemma_call(quote: str, source: Source, found: Found) -> Reading[None]:
    name = yield from source.word(NAME)
    tool = found.known(name)
    yield from source.spaces()
    yield from source.expect("{")
    members = Members(found, name)
    with members.completed():
        while True:
            yield from source.spaces()
            if (yield from source.accept("}")):
                break
            key = yield from _key(quote, source)
            yield from source.spaces()
            if (yield from source.accept(quote)):
                yield from members.read_string(source, key, stops(quote))
                yield from _separator(source, "}")
                continue
            value = yield from _value(quote, source, parameter_schema(tool, key), 0)
            yield from _separator(source, "}")
            members.add(key, value, str(value))
            source.forget()
    members.end()


def _separator(source: Source, closing: str) -> Reading[None]:
    """Read a comma, or nothing before `closing`; raises `NotACall` for anything else."""
    yield from source.spaces()
    if not (yield from source.accept(",")) and (yield from source.peek()) != closing:
        raise NotACall


def _key(quote: str, source: Source) -> Reading[str]:
    if (yield from source.accept(quote)):
        key, _ = yield from source.until(stops(quote))
    elif (yield from source.peek()) == '"':
        key = yield from read_value(source)
    else:
        key = yield from source.word(_KEY)
    yield from source.spaces()
    yield from source.expect(":")
    return key


def _value(quote: str, source: Source, schema: Mapping[str, Any], depth: int) -> Reading[Any]:
    if depth > _MAX_DEPTH:
        raise NotACall
    yield from source.spaces()
    if (yield from source.accept(quote)):
        return (yield from source.until(stops(quote)))[0]
    character = yield from source.peek()
    if character == '"':
        return (yield from read_value(source))
    if character == "{":
        source.advance(1)
        members: dict[str, Any] = {}
        while True:
            yield from source.spaces()
            if (yield from source.accept("}")):
                return members
            key = yield from _key(quote, source)
            members[key] = yield from _value(quote, source, {}, depth + 1)
            yield from _separator(source, "}")
    if character == "[":
        source.advance(1)
        items: list[Any] = []
        while True:
            yield from source.spaces()
            if (yield from source.accept("]")):
                return items
            items.append((yield from _value(quote, source, {}, depth + 1)))
            yield from _separator(source, "]")
    atom = (yield from source.word(_ATOM, 1 << 16)).strip()
    if not atom:
        raise NotACall
    return typed(atom, schema)


def read_python_block(closing: str, source: Source, found: Found) -> Reading[None]:
    """Read [f(a=1), g()], or JSON calls, up to `closing`."""
    yield from source.spaces()
    start = source.position
    if (yield from source.peek()) == "{" or (yield from _json_list(source)):
        source.back_to(start)
        yield from read_json_block(closing, source, found)
        return
    source.back_to(start)
    text, _ = yield from source.until(stops(closing))
    hand_out_python(text, found)


def _json_list(source: Source) -> Reading[bool]:
    if not (yield from source.accept("[")):
        return False
    yield from source.spaces()
    return (yield from source.peek()) == "{"


def read_python_list(source: Source, found: Found) -> Reading[None]:
    """Read [f(a=1), g()] without a marker."""
    start = source.position
    yield from source.expect("[")
    yield from source.spaces()
    found.known((yield from source.word(NAME)))
    yield from _balanced(source)
    yield from _until_closed(source, "]")
    hand_out_python(source.since(start), found)


def _until_closed(source: Source, closing: str) -> Reading[None]:
    """Read through `closing`, ignoring it within strings and brackets."""
    while (character := (yield from source.peek())) != closing:
        if not character or character in ")]}":
            raise NotACall
        if character in "([{\"'":
            yield from _balanced(source)
        else:
            source.advance(1)
    source.advance(1)


def _balanced(source: Source) -> Reading[None]:
    """Read a string, or brackets with their content; raises `NotACall` if they do not end."""
    start = source.position
    depth, quote = 0, ""
    while True:
        character = yield from source.peek()
        if not character or source.position - start > MAX_HELD:
            raise NotACall
        source.advance(1)
        if quote:
            if character == "\\":
                if not (yield from source.peek()):
                    raise NotACall
                source.advance(1)
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if depth <= 0 and not quote:
            if depth < 0 or character not in ")]}\"'":
                raise NotACall
            return


def read_tool_code(source: Source, found: Found) -> Reading[None]:
    """Read the text after ```tool_code: one call per line, up to ```; ignores print() around it."""
    text, _ = yield from source.until(stops("```"))
    lines = [line for line in text.strip().splitlines() if line.strip()]
    try:
        hand_out_python("[" + ",".join(lines) + "]", found)
    except NotACall:
        hand_out_python(text, found)  # one call on several lines


def read_text_call(source: Source, found: Found) -> Reading[None]:
    """Read the text after `call:` in call:NAME(a="b")."""
    start = source.position
    found.known((yield from source.word(NAME)))
    if (yield from source.peek()) != "(":
        raise NotACall
    yield from _balanced(source)
    hand_out_python(source.since(start), found)


def hand_out_python(text: str, found: Found) -> None:
    """Emit a Python call, or a list of calls, without evaluating anything.

    Raises `NotACall` unless each calls a known tool with literal keyword arguments.
    """
    try:
        node = parse_python(text)
        nodes = node.elts if isinstance(node, (ast.List, ast.Tuple)) else [node]
        calls = [_call(n) for n in nodes]
    except ValueError:
        raise NotACall from None
    if not calls:
        raise NotACall
    for name, _ in calls:
        found.known(name)
    for name, arguments in calls:
        found.whole(name, arguments)


def _call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call):
        raise ValueError("an expression is not a call")
    name = _dotted(node.func)
    if name == "print" and len(node.args) == 1 and isinstance(node.args[0], ast.Call):
        return _call(node.args[0])
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("a call has a positional argument")
    arguments = {str(k.arg): python_literal(k.value) for k in node.keywords}
    return name.removeprefix("default_api."), arguments


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ValueError("no name")
