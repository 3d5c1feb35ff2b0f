"""Calls between special tokens: a name, a separator, and a JSON object that streams.

mlx-lm's parsers for these (json_tools, mistral, kimi_k2) take finished blocks, so that nothing
streams; a marker in a JSON string ends a block early. Where both read a block, they agree.
"""

from __future__ import annotations

import re

from modelpack_server.tool_parsers.calls import Found, read_object
from modelpack_server.tool_parsers.json_calls import read_json_calls
from modelpack_server.tool_parsers.source import MAX_NAME, Broken, NotACall, Reading, Source, stops

NAME = re.compile(r"[\w.\-]")


def read_hermes_block(source: Source, found: Found) -> Reading[None]:
    """Read what follows <tool_call>: an object, several, or a list of them, up to </tool_call>."""
    yield from source.spaces()
    yield from read_json_calls(source, found)
    yield from source.spaces()
    yield from source.close("</tool_call>")


def read_json_block(closing: str, source: Source, found: Found) -> Reading[None]:
    """Read JSON calls up to `closing`, which may be missing."""
    yield from source.spaces()
    yield from read_json_calls(source, found)
    yield from source.spaces()
    if closing:
        yield from source.close(closing)


def read_mistral_calls(source: Source, found: Found) -> Reading[None]:
    """Read what follows [TOOL_CALLS], in any of the three generations.

    [{"name": .., "arguments": ..}], name{..}, or name[CALL_ID]id[ARGS]{..}. Names without a marker
    before them go on with the list, as long as an object follows.
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


_SEPARATOR = "<｜tool▁sep｜>"
_CALL_BEGIN = "<｜tool▁call▁begin｜>"
_CALL_END = "<｜tool▁call▁end｜>"
_CALLS_END = "<｜tool▁calls▁end｜>"


def read_deepseek_calls(source: Source, found: Found) -> Reading[None]:
    """Read what follows <｜tool▁calls▁begin｜>: calls as V3 and R1, or as V3.1 write them."""
    read = 0
    while True:
        yield from source.spaces()
        if read and (yield from source.close(_CALLS_END)):
            return
        if not (yield from source.accept(_CALL_BEGIN)):
            if read:
                return
            raise NotACall
        yield from read_deepseek_call(source, found)
        source.forget()
        read += 1


def read_deepseek_call(source: Source, found: Found) -> Reading[None]:
    """Read function<sep>NAME, line break, ```json {..} ``` (V3, R1), or NAME<sep>{..} (V3.1)."""
    head = (yield from source.until(stops(_SEPARATOR), MAX_NAME))[0].strip()
    yield from source.spaces()
    if (yield from source.peek()) == "{":
        name = head
        complete = yield from read_object(source, found, name)
    else:
        name = yield from source.word(NAME)
        yield from source.spaces()
        if (yield from source.accept("```")):
            yield from source.accept("json")
            yield from source.spaces()
        complete = yield from read_object(source, found, name)
    if not complete:
        raise Broken
    yield from source.spaces()
    yield from source.accept("```")
    yield from source.spaces()
    yield from source.close(_CALL_END)


_KIMI_ARGUMENTS = "<|tool_call_argument_begin|>"


def read_kimi_calls(source: Source, found: Found) -> Reading[None]:
    """Read what follows <|tool_calls_section_begin|>; a call's id is functions.NAME:NUMBER."""
    read = 0
    while True:
        yield from source.spaces()
        if read and (yield from source.close("<|tool_calls_section_end|>")):
            return
        if not (yield from source.accept("<|tool_call_begin|>")):
            if read:
                return
            raise NotACall
        head = (yield from source.until(stops(_KIMI_ARGUMENTS), MAX_NAME))[0].strip()
        name = re.sub(r":[0-9]+$", "", head).removeprefix("functions.")
        whole = re.fullmatch(r"functions\..+:[0-9]+", head)
        call_id = head if whole else f"functions.{name}:{found.calls}"
        yield from source.spaces()
        if not (yield from read_object(source, found, name, call_id)):
            raise Broken
        yield from source.spaces()
        yield from source.close("<|tool_call_end|>")
        source.forget()
        read += 1


_CONTENT = "<|content|>"


def read_functionary_turn(source: Source, found: Found) -> Reading[None]:
    """Read what follows <|recipient|>: NAME, line break, <|content|>{..}; or text to all."""
    recipient = yield from source.word(NAME)
    yield from source.spaces()
    yield from source.expect(_CONTENT)
    if recipient in ("all", "user"):
        yield from source.accept(" ")
        return
    yield from source.spaces()
    if (yield from source.peek()) != "{":  # no arguments, or a code interpreter's code
        found.known(recipient)
        found.whole(recipient, {})
        return
    if not (yield from read_object(source, found, recipient)):
        raise Broken


def read_python_tag(source: Source, found: Found) -> Reading[None]:
    """Read what follows Llama's <|python_tag|>: JSON calls, between them semicolons."""
    yield from source.spaces()
    yield from read_json_calls(source, found)
