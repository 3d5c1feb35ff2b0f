"""Readers for calls in tags: each argument is plain text in its own tag.

mlx-lm has parsers for these formats (qwen3_coder, minimax_m2, glm47), but they accept only complete
blocks, so arguments cannot be streamed. They also turn the string "null" into null, drop a call for
one invalid number, and return calls of unknown tools.
"""

from __future__ import annotations

import re
from functools import partial

from modelpack_server.tool_parsers.calls import Found, Members, read_each, read_object
from modelpack_server.tool_parsers.json_calls import read_json_block
from modelpack_server.tool_parsers.source import Broken, Reading, Source, stops
from modelpack_server.tool_parsers.typed_values import (
    is_string,
    json_or_text,
    parameter_schema,
    typed,
)

NAME = re.compile(r"[^\s<>\"'{}\[\]()]")
_GLM_NAME = re.compile(r"[^\s<>\"'{}\[\]]")
_QUOTED_NAME = re.compile(r"[^\"<>]")


def _trimmed(value: str) -> str:
    """Remove the line breaks that templates put around a value."""
    return value.removeprefix("\n").removesuffix("\n")


_VALUE_END = stops("</parameter>", "</function>")


def read_function_tag(source: Source, found: Found) -> Reading[None]:
    """Read NAME><parameter=P>VALUE</parameter></function>, or NAME>{JSON}</function>."""
    name = yield from source.word(NAME)
    tool = found.known(name)
    yield from source.spaces()
    yield from source.expect(">")
    yield from source.spaces()
    if (yield from source.peek()) == "{":
        if not (yield from read_object(source, found, name)):
            raise Broken
        yield from source.spaces()
        yield from source.close("</function>")
        return
    members = Members(found, name)
    while True:
        yield from source.spaces()
        if (yield from source.close("</function>")):
            members.end()
            return
        with members.completed():
            yield from source.expect("<parameter=")
            key = (yield from source.word(_QUOTED_NAME)).strip()
            yield from source.expect(">")
            schema = parameter_schema(tool, key)
            if is_string(schema):
                stop = yield from members.read_string(source, key, _VALUE_END, trims=True)
            else:
                value, stop = yield from source.until(_VALUE_END)
                value = _trimmed(value)
                members.add(key, typed(value, schema), value)
        source.forget()
        if stop == "</function>":  # the parameter has no closing tag
            members.end()
            return


def read_qwen_block(source: Source, found: Found) -> Reading[None]:
    """Read the text after <tool_call>: function tags up to </tool_call>."""
    yield from source.spaces()
    yield from source.expect("<function=")
    yield from read_functions(source, found)


def read_functions(source: Source, found: Found) -> Reading[None]:
    """Read the text after <function=, with further functions; models may omit <tool_call>."""
    while True:
        yield from read_function_tag(source, found)
        source.forget()
        yield from source.spaces()
        if (yield from source.close("</tool_call>")) or not (
            yield from source.accept("<function=")
        ):
            return


def read_invokes(prefix: str, closing: str, source: Source, found: Found) -> Reading[None]:
    """Read any number of <invoke name="N"><parameter name="P">VALUE</parameter></invoke>.

    `prefix` precedes each tag's name (DeepSeek's ｜DSML｜). The optional attribute string="true" or
    "false" of a parameter says whether its value is text or JSON.
    """
    opening = f"<{prefix}invoke name="
    yield from read_each(partial(_read_invoke, prefix), opening, closing, source, found)


def _read_invoke(prefix: str, source: Source, found: Found) -> Reading[None]:
    name = yield from _attribute(source)
    tool = found.known(name)
    yield from source.spaces()
    yield from source.expect(">")
    members = Members(found, name)
    value_end = stops(f"</{prefix}parameter>")
    while True:
        yield from source.spaces()
        if (yield from source.close(f"</{prefix}invoke>")):
            members.end()
            return
        with members.completed():
            yield from source.expect(f"<{prefix}parameter name=")
            key = yield from _attribute(source)
            yield from source.spaces()
            kind = ""
            if (yield from source.accept("string=")):
                kind = yield from _attribute(source)
                yield from source.spaces()
            yield from source.expect(">")
            schema = parameter_schema(tool, key)
            if kind == "true" or (not kind and is_string(schema)):
                yield from members.read_string(source, key, value_end, trims=not kind)
                continue
            value, _ = yield from source.until(value_end)
        if kind:
            members.add(key, json_or_text(value), value)
        else:
            value = _trimmed(value)
            members.add(key, typed(value, schema), value)
        source.forget()


def _attribute(source: Source) -> Reading[str]:
    """Read an attribute's value, with or without quotes."""
    if (yield from source.accept('"')):
        value = yield from source.word(_QUOTED_NAME)
        yield from source.expect('"')
        return value
    if (yield from source.accept("'")):
        value = yield from source.word(re.compile("[^'<>]"))
        yield from source.expect("'")
        return value
    return (yield from source.word(NAME))


_GLM_KEY_END = stops("</arg_key>")
_GLM_VALUE_END = stops("</arg_value>")


def read_glm_block(source: Source, found: Found) -> Reading[None]:
    """Read NAME <arg_key>K</arg_key><arg_value>V</arg_value> ... </tool_call>.

    The block may also contain a JSON call, which smaller models of the family write.
    """
    yield from source.spaces()
    if (yield from source.peek()) == "{":
        yield from read_json_block("</tool_call>", source, found)
        return
    name = yield from source.word(_GLM_NAME)
    tool = found.known(name)
    members = Members(found, name)
    while True:
        yield from source.spaces()
        if (yield from source.close("</tool_call>")):
            members.end()
            return
        with members.completed():
            yield from source.expect("<arg_key>")
            key = (yield from source.until(_GLM_KEY_END))[0].strip()
            yield from source.spaces()
            yield from source.expect("<arg_value>")
            schema = parameter_schema(tool, key)
            if is_string(schema):
                yield from members.read_string(source, key, _GLM_VALUE_END)
                continue
            value, _ = yield from source.until(_GLM_VALUE_END)
        members.add(key, typed(value, schema), value)
        source.forget()
