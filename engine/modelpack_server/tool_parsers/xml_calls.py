"""Readers for calls in tags: each argument is plain text in its own tag.

mlx-lm has parsers for these formats (qwen3_coder, minimax_m2, glm47), but they accept only complete
blocks, so arguments cannot be streamed. They also turn the string "null" into null, drop a call for
one invalid number, and return calls of unknown tools.
"""

from __future__ import annotations

import re

from modelpack_server.tool_parsers.calls import Found, Members, read_object
from modelpack_server.tool_parsers.json_calls import read_json_calls
from modelpack_server.tool_parsers.source import Broken, NotACall, Reading, Source, stops
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
        try:
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
        except NotACall:
            if not members.begun:
                raise
            members.end()
            raise Broken from None
        source.forget()
        if stop == "</function>":  # the parameter has no closing tag
            members.end()
            return


def read_qwen_block(source: Source, found: Found) -> Reading[None]:
    """Read the text after <tool_call>: function tags up to </tool_call>."""
    yield from source.spaces()
    yield from source.expect("<function=")
    yield from read_function_tag(source, found)
    yield from _more_functions(source, found)


def read_bare_function(source: Source, found: Found) -> Reading[None]:
    """Read the text after <function= if the model omitted <tool_call>."""
    yield from read_function_tag(source, found)
    yield from _more_functions(source, found)


def _more_functions(source: Source, found: Found) -> Reading[None]:
    while True:
        source.forget()
        yield from source.spaces()
        if (yield from source.close("</tool_call>")):
            return
        if not (yield from source.accept("<function=")):
            return
        yield from read_function_tag(source, found)


def read_invokes(prefix: str, closing: str, source: Source, found: Found) -> Reading[None]:
    """Read any number of <invoke name="N"><parameter name="P">VALUE</parameter></invoke>.

    `prefix` precedes each tag's name (DeepSeek's ｜DSML｜). The optional attribute string="true" or
    "false" of a parameter says whether its value is text or JSON.
    """
    read = 0
    while True:
        yield from source.spaces()
        if read and (yield from source.close(closing)):
            return
        if not (yield from source.accept(f"<{prefix}invoke name=")):
            if read:
                return
            raise NotACall
        yield from _read_invoke(prefix, source, found)
        source.forget()
        read += 1


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
        try:
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
        except NotACall:
            if not members.begun:
                raise
            members.end()
            raise Broken from None
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
        yield from read_json_calls(source, found)
        yield from source.spaces()
        yield from source.close("</tool_call>")
        return
    name = yield from source.word(_GLM_NAME)
    tool = found.known(name)
    members = Members(found, name)
    while True:
        yield from source.spaces()
        if (yield from source.close("</tool_call>")):
            members.end()
            return
        try:
            yield from source.expect("<arg_key>")
            key = (yield from source.until(_GLM_KEY_END))[0].strip()
            yield from source.spaces()
            yield from source.expect("<arg_value>")
            schema = parameter_schema(tool, key)
            if is_string(schema):
                yield from members.read_string(source, key, _GLM_VALUE_END)
                continue
            value, _ = yield from source.until(_GLM_VALUE_END)
        except NotACall:
            if not members.begun:
                raise
            members.end()
            raise Broken from None
        members.add(key, typed(value, schema), value)
        source.forget()
