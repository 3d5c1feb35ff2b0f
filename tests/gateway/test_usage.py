"""Token usage is read only from the fields in which an API reports it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modelpack_server.gateway import usage as json_fields
from modelpack_server.gateway.families import Family
from modelpack_server.gateway.traces import Trace
from modelpack_server.gateway.usage import MOST_TOKENS, JsonFields, ReplyReader

JSON, SSE, NDJSON = "application/json", "text/event-stream", "application/x-ndjson"
#: A usage that a client makes the upstream repeat, to be charged less.
ONE = {"prompt_tokens": 1, "completion_tokens": 1, "input_tokens": 1, "output_tokens": 1}
ECHO = {"usage": ONE, **ONE, "prompt_eval_count": 1, "eval_count": 1}
CHAT = {"prompt_tokens": 120, "completion_tokens": 34, "prompt_tokens_details": None}
RESPONSES = {"input_tokens": 120, "output_tokens": 34, "input_tokens_details": {"cached_tokens": 9}}


def events(*documents: Any) -> str:
    return "".join(f"data: {json.dumps(document)}\n\n" for document in documents)


def lines(*documents: Any) -> str:
    return "".join(json.dumps(document) + "\n" for document in documents)


def read(media_type: str, text: str, size: int = 1 << 30) -> Trace:
    trace = Trace("id", "POST", "/", Family.OPENAI, started=0.0)
    trace.status = 200
    reader = ReplyReader(trace, media_type)
    content = text.encode()
    for at in range(0, len(content), size):
        reader.feed(content[at : at + size], 1.0)
    return trace


REPLIES = {
    "chat": (JSON, json.dumps({"usage": CHAT, "metadata": ECHO, "choices": [{"message": ECHO}]})),
    "chat, usage first": (JSON, json.dumps({"metadata": ECHO, "usage": CHAT})),
    "response": (JSON, json.dumps({"metadata": ECHO, "usage": RESPONSES, "tools": [ECHO, [ECHO]]})),
    "response, usage before": (JSON, json.dumps({"usage": RESPONSES, "metadata": ECHO})),
    "message": (JSON, json.dumps({
        "content": [{"type": "tool_use", "input": ECHO}], "metadata": ECHO,
        "usage": {"input_tokens": 20, "cache_read_input_tokens": 90,
                  "cache_creation_input_tokens": 10, "output_tokens": 34},
    })),
    "ollama": (JSON, json.dumps({
        "message": {"tool_calls": [{"function": {"arguments": ECHO}}]}, "metadata": ECHO,
        "prompt_eval_count": 120, "eval_count": 34, "options": ECHO,
    })),
    "chat stream": (SSE, events(
        {"choices": [{"delta": {"content": json.dumps(ECHO)}}], "metadata": ECHO},
        {"choices": [], "usage": CHAT, "metadata": ECHO},
        {"metadata": ECHO},
    ) + "data: [DONE]\n\n"),
    "response stream": (SSE, events(
        {"type": "response.created", "response": {"metadata": ECHO, "usage": ONE}},
        {"type": "response.output_text.delta", "delta": json.dumps(ECHO)},
        {"response": {"metadata": ECHO, "usage": RESPONSES, "output": [ECHO], "tools": [ECHO]},
         "type": "response.completed"},
    )),
    "message stream": (SSE, events(
        {"type": "message_start", "message": {"metadata": ECHO, "usage": {
            "input_tokens": 20, "cache_read_input_tokens": 100, "output_tokens": 1}}},
        {"type": "content_block_delta", "delta": {"text": json.dumps(ECHO)}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"},
         "usage": {"output_tokens": 34}, "metadata": ECHO},
    )),
    "ollama stream": (NDJSON, lines(
        {"message": {"content": json.dumps(ECHO)}, "done": False},
        {"message": ECHO, "done": True, "prompt_eval_count": 120, "eval_count": 34},
    )),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 13, 1 << 30])
@pytest.mark.parametrize("name", REPLIES)
def test_what_an_upstream_repeats_is_not_usage(name: str, size: int) -> None:
    media_type, text = REPLIES[name]
    trace = read(media_type, text, size)
    assert (trace.prompt_tokens, trace.completion_tokens) == (120, 34)
    assert trace.spent(1000, 1000) == 154


@pytest.mark.parametrize("size", [1, 1 << 30])
@pytest.mark.parametrize(
    "count", [-5, -1, MOST_TOKENS + 1, 10**40, 1.5, True, "7", None, [7], {"prompt_tokens": 7}]
)
def test_a_count_that_is_no_number_of_tokens_is_estimated(count: Any, size: int) -> None:
    usage = {"prompt_tokens": count, "completion_tokens": count}
    trace = read(JSON, json.dumps({"usage": usage}), size)
    assert (trace.prompt_tokens, trace.completion_tokens) == (None, None)
    assert trace.spent(100, 256) is None  # so the reservation is charged
    half = read(JSON, json.dumps({"usage": {**usage, "prompt_tokens": 120}}), size)
    assert half.spent(100, 256) == 376
    stream = read(SSE, events({"choices": [{"delta": {"content": "a"}}]}, {"usage": usage}), size)
    assert stream.spent(100, 256) == 101


def test_a_rerank_reports_its_total() -> None:
    assert read(JSON, json.dumps({"usage": {"total_tokens": 9}})).spent(100) == 9


def test_a_stream_that_was_left_after_its_beginning_is_counted() -> None:
    start = {"type": "message_start",
             "message": {"usage": {"input_tokens": 120, "output_tokens": 1}}}  # fmt: skip
    pieces = [{"type": "content_block_delta", "delta": {"text": "a"}}] * 40
    assert read(SSE, events(start, *pieces)).spent(1000) == 160


@pytest.mark.parametrize(
    "text",
    [
        'data: {"usage":\ndata: {"prompt_tokens": 3,\ndata: "completion_tokens": 4}}\n\n',
        ': hello\r\nevent: x\r\ndata: {"usage": {"prompt_tokens": 3,'
        ' "completion_tokens": 4}}\r\n\r\n',
        'data:{"usage":{"prompt_tokens":3,"completion_tokens":4}}\r\rdata: [DONE]\r\r',
        'data: {"usage": {"prompt_tokens": 9, \n\ndata: {"usage": {"prompt_tokens": 3,'
        ' "completion_tokens": 4}}\n\n',
        'data: nonsense"\n\ndata: {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\n',
    ],
)
@pytest.mark.parametrize("size", [1, 2, 5, 1 << 30])
def test_events_however_they_are_written(text: str, size: int) -> None:
    assert read(SSE, text, size).spent(100) == 7


def test_memory_does_not_grow_with_a_reply() -> None:
    import tracemalloc

    trace = Trace("id", "POST", "/", Family.OPENAI, started=0.0)
    trace.status = 200
    reader = ReplyReader(trace, SSE)
    pieces = [
        b'data: {"response":{"metadata":{', b'"a":"' + b'\\"x' * 30_000 + b'",',
        b'"b":' + b'[{"c":' * 20_000, b"}]" * 20_000, b',"' + b"k" * 300_000 + b'":1},',
        b'"usage":{"input_tokens":5,"x":' + b"7" * 300_000 + b',"output_tokens":6}},',
        b'"type":"response.completed"}\n\n',
    ]  # fmt: skip
    tracemalloc.start()
    try:
        for piece in pieces:
            for at in range(0, len(piece), 4096):
                reader.feed(piece[at : at + 4096], 1.0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert trace.spent(100) == 11
    assert peak < 256 * 1024


def test_what_is_not_wanted_is_skipped_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities are megabytes of small objects, read on the event loop."""
    taken = 0
    take = JsonFields._take

    def counted(fields: JsonFields, mark: bytes) -> None:
        nonlocal taken
        taken += 1
        take(fields, mark)

    monkeypatch.setattr(JsonFields, "_take", counted)
    entry = {"token": "a]", "bytes": [97], "top_logprobs": [{"token": '"', "logprob": -1.5}] * 20}
    reply = {
        "choices": [{"logprobs": {"content": [entry] * 1000}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 9},
    }
    body = json.dumps(reply)
    trace = read(JSON, body, 64 * 1024)
    assert (trace.prompt_tokens, trace.completion_tokens, trace.finish) == (7, 9, "stop")
    assert len(body) > 500_000
    assert taken < 20_000  # the text has 200,000 marks; only blocks at its ends are read one by one


PATHS = ("a", "a.b", "a.b.c", "d.a")
SCALARS = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8)
KEYS = st.sampled_from(["a", "b", "c", "d", 'e"', "\\", "\u00e9"])
DOCUMENTS = st.dictionaries(
    KEYS,
    st.recursive(
        SCALARS,
        lambda inner: (
            st.dictionaries(KEYS, inner, max_size=4)
            | st.lists(st.dictionaries(KEYS, inner, max_size=3) | SCALARS, max_size=3)
        ),
        max_leaves=12,
    ),
    max_size=5,
)


@given(
    DOCUMENTS,
    st.integers(1, 200),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.sampled_from([4, 16, 16 * 1024]),
)
@example({"d": {"a": {"a": None}}}, 1, False, None, 4)
@example({"a": {"b": ""}}, 1, False, 1, 4)
@example({"d": {"c": [[], {"c": '"]}'}]}, "a": 1}, 200, False, None, 4)
def test_pieces_are_read_as_the_whole_is(
    document: Any, size: int, ascii_only: bool, indent: int | None, block: int
) -> None:
    """The scanner finds the same values as the standard library's parser."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_fields, "_SKIP", block)
        patch.setattr(json_fields, "_LEAST_SKIP", min(block, 512) // 4)
        _read_in_pieces(document, size, ascii_only, indent)


def _read_in_pieces(document: Any, size: int, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(document, ensure_ascii=ascii_only, indent=indent).encode()
    found: list[tuple[str, Any]] = []
    ends: list[int] = []
    fields = JsonFields(PATHS, lambda *pair: found.append(pair), lambda: ends.append(1))
    fields.read(text)
    whole, found[:] = sorted(found, key=repr), []
    for at in range(0, len(text), size):
        fields.feed(text[at : at + size])
    assert sorted(found, key=repr) == whole
    assert ends == [1, 1]
    assert fields.is_idle
