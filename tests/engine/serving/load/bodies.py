"""Hostile bodies, each for every route with a body."""

from __future__ import annotations

from typing import Any

_FIELDS: dict[str, Any] = {
    "model": b'"m"',
    "messages": b'[{"role":"user","content":"x"}]',
    "prompt": b'"x"',
    "input": b'"x"',
    "max_tokens": b"5",
}
_LONG = b"9" * 400
_LONGER = b"9" * 5000  # Python limits integers to 4300 digits
_LONE = rb'"\ud800"'


def _nested(depth: int, inside: bytes = b"") -> bytes:
    return b"[" * depth + inside + b"]" * depth


def _schema(depth: int) -> bytes:
    return b'{"items":' * depth + b"{}" + b"}" * depth


def _with(**fields: bytes) -> bytes:
    """Return a request with the fields of all families, some of them replaced."""
    given = _FIELDS | fields
    return b"{" + b",".join(b'"%s":%s' % (key.encode(), given[key]) for key in given) + b"}"


def _tool(name: bytes, schema: bytes) -> bytes:
    function = b'{"name":%s,"description":%s,"parameters":%s}' % (name, name, schema)
    return b'[{"type":"function","name":%s,"input_schema":%s,"parameters":%s,"function":%s}]' % (
        name, schema, schema, function,
    )  # fmt: skip


def _formats(schema: bytes) -> dict[str, bytes]:
    """Return the fields that set a schema for the reply, for all families."""
    named = b'{"type":"json_schema","name":"x","schema":%s,"json_schema":{"name":"x","schema":%s}}'
    one = named % (schema, schema)
    inside = b'{"format":%s}' % one
    return {"response_format": one, "format": schema, "text": inside, "output_config": inside}


#: Those that are no JSON object at all.
NO_OBJECT = {
    "nothing": b"",
    "null": b"null",
    "list": b"[]",
    "text": b'"x"',
    "number": b"1e999",
    "half": b'{"model":',
    "not utf-8": b"\xff\xfe\xff",
    "deep list": b"[" * 200_000,
    "deep object": b'{"a":' * 200_000,
    "closed list": _nested(900),
    "tail": _with() + b"}",
    "too long an integer": _with(max_tokens=_LONGER),
    "single quotes": b"{'model':'m'}",
    "form": b"model=m&messages=x",
}

#: Objects with something in them.
ODD = {
    "as it should be": _with(),
    "byte order mark": b"\xef\xbb\xbf" + _with(),
    "utf-16": _with().decode().encode("utf-16"),
    "keys twice": b'{"model":"n","model":"m","messages":1,' + _with()[1:],
    "deep schema": _with(**_formats(_schema(300))),
    "deeper schema": _with(**_formats(_schema(900))),
    "schema that is none": _with(**_formats(b'{"type":"nothing","pattern":"("}')),
    "deep options": _with(chat_template_kwargs=b'{"a":%s}' % _nested(900), options=_nested(900)),
    "deep tool": _with(tools=_tool(b'"f"', b'{"type":"object","x":%s}' % _nested(900))),
    "deep content": _with(messages=b'[{"role":"user","content":%s}]' % _nested(900)),
    "not a number": _with(temperature=b"NaN", options=b'{"temperature":NaN}', keep_alive=b"NaN"),
    "no numbers": _with(top_p=b"-Infinity", options=b'{"top_p":1e999}', keep_alive=b"Infinity"),
    "large keep_alive": _with(keep_alive=_LONG),
    "large duration": _with(keep_alive=b'"%ss"' % _LONG),
    "large limit": _with(max_tokens=_LONG, options=b'{"num_predict":%s}' % _LONG),
    "large seed": _with(seed=_LONG, top_k=_LONG, options=b'{"seed":%s,"num_ctx":%s}'
                        % (_LONG, _LONG)),
    "large float": _with(temperature=_LONG, options=b'{"temperature":%s}' % _LONG),
    "large bias": _with(logit_bias=b'{"%s":1}' % _LONG),
    "larger bias": _with(logit_bias=b'{"%s":1}' % _LONGER),
    "large ids": _with(prompt=b"[%s]" % _LONG, input=b"[%s]" % _LONG, context=b"[%s]" % _LONG),
    "large n": _with(n=_LONG, top_logprobs=_LONG, logprobs=_LONG),
    "negative": _with(max_tokens=b"-1", n=b"-1", seed=b"-%s" % _LONG, top_n=b"-1", context=b"[-1]",
                      dimensions=b"-1", max_output_tokens=b"-1"),
    "lone name": _with(**{"model": _LONE, "name": _LONE, "from": _LONE, "source": _LONE,
                          "destination": _LONE}),
    "lone text": _with(messages=b'[{"role":"user","content":%s}]' % _LONE, prompt=_LONE,
                       input=_LONE, query=_LONE, documents=b"[%s]" % _LONE, text_1=_LONE,
                       text_2=_LONE, system=_LONE, instructions=_LONE),
    "lone stop": _with(stop=_LONE, stop_sequences=b"[%s]" % _LONE,
                       options=b'{"stop":[%s]}' % _LONE),
    "lone words": _with(preset=_LONE, reasoning_effort=_LONE, think=_LONE, suffix=_LONE,
                        previous_response_id=_LONE, keep_alive=_LONE, user=_LONE),
    "lone tool": _with(tools=_tool(_LONE, b'{"type":"object","properties":{%s:{}}}' % _LONE)),
    "lone schema": _with(**_formats(b'{"type":"object","properties":{%s:{}}}' % _LONE)),
    "lone regex": _with(response_format=rb'{"type":"regex","regex":"\ud800"}'),
    "lone key": b"{%s:1," % _LONE + _with()[1:],
    "lone role": _with(messages=b'[{"role":%s,"content":"x",%s:1}]' % (_LONE, _LONE)),
    "zero byte": _with(**{"model": rb'"\u0000"', "from": rb'"\u0000"', "source": rb'"\u0000"',
                          "messages": rb'[{"role":"user","content":"\u0000"}]'}),
    "everything null": b"{" + b",".join(b'"%s":null' % key.encode() for key in _FIELDS) + b"}",
    "everything true": b"{" + b",".join(b'"%s":true' % key.encode() for key in _FIELDS) + b"}",
    "everything a list": b"{" + b",".join(b'"%s":[[]]' % key.encode() for key in _FIELDS) + b"}",
    "everything an object": b"{" + b",".join(b'"%s":{}' % key.encode() for key in _FIELDS) + b"}",
    "many messages": _with(messages=b"[%s]" % b",".join([b'{"role":"user","content":""}'] * 3000)),
    "streamed": _with(stream=b"true"),
    "streamed from nowhere": _with(model=b'"nothing"', stream=b"true"),
}  # fmt: skip
