"""The values that the gateway reads from requests and replies."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from starlette.datastructures import Headers

from modelpack_server.gateway import bodies
from modelpack_server.gateway.bodies import look_into
from modelpack_server.gateway.checks import Route, is_plain, route_of
from modelpack_server.gateway.families import Family, family_of
from modelpack_server.gateway.metrics import GatewayMetrics
from modelpack_server.gateway.traces import Trace
from modelpack_server.gateway.usage import ReplyReader
from tests.gateway.houses import BODY
from tests.gateway.servers import CHAT, Upstream, protected


def new_trace(family: Family = Family.OPENAI) -> Trace:
    return Trace("id", "POST", "/", family, started=10.0)


@pytest.mark.parametrize(
    ("path", "family"),
    [
        ("/v1/chat/completions", Family.OPENAI),
        ("/models/create", Family.OPENAI),
        ("/apis", Family.OPENAI),
        ("/v1/messages", Family.ANTHROPIC),
        ("/v1/messages/count_tokens", Family.ANTHROPIC),
        ("/engines/v1/messages", Family.ANTHROPIC),
        ("/engines/mlx/v1/messages", Family.ANTHROPIC),
        ("/anthropic/v1/models", Family.ANTHROPIC),
        ("/anthropics", Family.OPENAI),
        ("/api/chat", Family.OLLAMA),
    ],
)
def test_families(path: str, family: Family) -> None:
    assert family_of(path, Headers({})) is family


def test_a_header_of_anthropics_clients_tells_the_family() -> None:
    headers = Headers({"anthropic-version": "2023-06-01"})
    assert family_of("/v1/models", headers) is Family.ANTHROPIC
    assert family_of("/api/tags", headers) is Family.OLLAMA


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("GET", "/", Route.OPEN),
        ("POST", "/", Route.MANAGEMENT),
        ("POST", "/chat/completions", Route.INFERENCE),
        ("POST", "/engines/vllm/v1/rerank", Route.INFERENCE),
        ("POST", "/engines/v1/responses", Route.INFERENCE),
        ("POST", "/v1/responses/input_tokens", Route.INFERENCE),
        ("POST", "/tokenize", Route.INFERENCE),
        ("POST", "/engines/vllm/v1/detokenize", Route.INFERENCE),
        ("POST", "/api/generate", Route.INFERENCE),
        ("POST", "/v1/audio/transcriptions", Route.SPEECH),
        ("POST", "/engines/mlx/v1/audio/translations", Route.SPEECH),
        ("GET", "/v1/audio/transcriptions", Route.MANAGEMENT),
        ("POST", "/v1/audio/speech", Route.MANAGEMENT),
        ("PUT", "/v1/chat/completions", Route.MANAGEMENT),
        ("POST", "/a/b/c/v1/chat/completions", Route.MANAGEMENT),
        ("GET", "/v1/models/a/b:c", Route.ONE_MODEL),
        ("GET", "/models/a", Route.MANAGEMENT),
        ("POST", "/models/load", Route.UPLOAD),
        ("POST", "/v1/files", Route.FILE),
        ("POST", "/engines/vllm/v1/files", Route.FILE),
        ("POST", "/v1/batches", Route.BATCH),
        ("POST", "/v1/batches/batch_1/cancel", Route.LISTING),
        ("POST", "/v1/batches/batch_1", Route.MANAGEMENT),
        ("GET", "/v1/files", Route.LISTING),
        ("GET", "/v1/files/file-1/content", Route.LISTING),
        ("GET", "/engines/v1/batches/batch_1", Route.LISTING),
        ("GET", "/v1/files/a/b/c", Route.MANAGEMENT),
        ("DELETE", "/v1/files/file-1", Route.LISTING),
        ("DELETE", "/v1/files", Route.MANAGEMENT),
        ("DELETE", "/v1/batches/batch_1", Route.MANAGEMENT),
        ("POST", "/api/blobs/sha256:0", Route.UPLOAD),
        ("DELETE", "/v1/responses/resp_1", Route.LISTING),
        ("POST", "/v1/conversations", Route.LISTING),
        ("GET", "/v1/conversations", Route.MANAGEMENT),
        ("GET", "/conversations/conv_1", Route.LISTING),
        ("POST", "/engines/v1/conversations/conv_1", Route.LISTING),
        ("DELETE", "/v1/conversations/conv_1", Route.LISTING),
        ("GET", "/v1/conversations/conv_1/items", Route.LISTING),
        ("POST", "/engines/mlx/v1/conversations/conv_1/items", Route.LISTING),
        ("GET", "/v1/conversations/conv_1/items/msg_1", Route.LISTING),
        ("DELETE", "/v1/conversations/conv_1/items/msg_1", Route.LISTING),
        ("POST", "/v1/conversations/conv_1/items/msg_1", Route.MANAGEMENT),
        ("POST", "/v1/conversations/conv_1/respond", Route.MANAGEMENT),
        ("PUT", "/v1/conversations/conv_1", Route.MANAGEMENT),
        ("DELETE", "/v1/models/x", Route.MANAGEMENT),
        ("POST", "/api/pull", Route.MANAGEMENT),
    ],
)
def test_routes(method: str, path: str, route: Route) -> None:
    assert route_of(method, path) is route


@pytest.mark.parametrize(
    ("path", "plain"),
    [("/v1/a..b/.c", True), ("/", True), ("//a", True), ("/a/..", False), ("/./a", False),
     ("/a\\..\\b", False), ("a", False), ("http://x/", False), ("/a\x00", False)],
)  # fmt: skip
def test_plain_paths(path: str, plain: bool) -> None:
    assert is_plain(path) is plain


@pytest.mark.parametrize(
    ("body", "prompt", "answer"),
    [
        ({"messages": [{"content": "x" * 400}]}, 101, 256),
        ({"messages": [{"content": "x" * 400}], "max_tokens": 7}, 101, 7),
        ({"prompt": ["x" * 40, "y" * 40], "max_completion_tokens": 5, "n": 3}, 21, 30),
        ({"input": "x" * 40}, 11, 0),
        ({"prompt": "", "options": {"num_predict": 9}}, 1, 9),
        ({"prompt": "", "options": {"num_predict": -1}}, 1, 256),
        (
            {
                "messages": [
                    {"content": [{"image_url": {"url": "data:image/png;base64," + "A" * 9000}}]}
                ]
            },
            36,
            256,
        ),
        (
            {"messages": [{"content": "x", "images": ["iVBORw0KGgo+/" + "A" * 9000 + "=="]}]},
            36,
            256,
        ),
        # As many tokens as a model sees of a video; its longest is 45 MiB.
        ({"messages": [{"content": "data:video/mp4;base64," + "A" * 6_000_000}]}, 21401, 256),
        ({"messages": [{"content": "data:Video/mp4;base64," + "A" * 9000}]}, 36, 256),
        ({"messages": [{"content": "data:image/png;base64," + "A" * 6_000_000}]}, 23438, 256),
        # Text with any separators between its words.
        ({"messages": [{"content": "word\n" * 2000}], "n": -1}, 2501, 256),
        ({"prompt": "data:" + "word." * 2000}, 2502, 256),
        ({"prompt": "A" * 4096 + " word" * 2000}, 3525, 256),
        ({"prompt": "\u8a5e" * 8000}, 2001, 256),
        ({"messages": [{"content": "word " * 2000}], "n": -1}, 2501, 256),
        ({"prompt": [1] * 1000, "max_tokens": 7}, 1001, 7),
        ({"prompt": [[1] * 1000, [2]]}, 1002, 512),
    ],
)
def test_estimates(body: Any, prompt: int, answer: int) -> None:
    _, asked = look_into(json.dumps(body).encode())
    assert (asked.prompt_tokens, asked.answer_tokens) == (prompt, answer)


def test_a_request_that_no_key_counts_has_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"model": "m", "prompt": "data:image/png;base64," + "A" * 9000, "max_tokens": 7}
    _, counted = look_into(json.dumps(body).encode())

    def read(text: str) -> bool:
        raise AssertionError("the media were read")

    monkeypatch.setattr(bodies, "_is_media", read)
    _, asked = look_into(json.dumps(body).encode(), is_counted=False)
    assert asked == replace(counted, prompt_tokens=0)
    with protected(Upstream()) as served:
        assert served.client.post(CHAT, json={**BODY, **body}).status_code == 200


OPENAI = (
    'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    'data: {"choices":[{"delta":{"content":"say \\"usage\\":{\\"prompt_tokens\\": 999}"}}]}\n\n'
    'data: {"choices":[{"delta":{"reasoning_content":"b"}}]}\n\n'
    'data: {"choices":[{"delta":{},"finish_reason":"length"}]}\n\n'
    'data: {"choices":[],"usage":{"prompt_tokens": 120,"completion_tokens":34,"total_tokens":154,'
    '"prompt_tokens_details":{"cached_tokens":96}}}\n\ndata: [DONE]\n\n'
)
ANTHROPIC = (
    'event: message_start\ndata: {"type":"message_start","message":{"content":[],'
    '"stop_reason":null,"usage":{"input_tokens":10,"cache_read_input_tokens":100,'
    '"cache_creation_input_tokens":10,"output_tokens":1}}}\n\n'
    'event: content_block_start\ndata: {"content_block":{"type":"text","text":""}}\n\n'
    'event: content_block_delta\ndata: {"delta":{"type":"text_delta","text":"a"}}\n\n'
    'event: content_block_delta\ndata: {"delta":{"type":"thinking_delta","thinking":"b"}}\n\n'
    'event: message_delta\ndata: {"delta":{"stop_reason":"max_tokens"},'
    '"usage":{"output_tokens":34}}\n\n'
)
OLLAMA = (
    '{"message":{"role":"assistant","content":"a"},"done":false}\n'
    '{"message":{"role":"assistant","content":"b"},"done":false}\n'
    '{"message":{"role":"assistant","content":""},"done":true,"done_reason":"length",'
    '"prompt_eval_count":120,"prompt_eval_duration":5,"eval_count":34,"eval_duration":7}\n'
)


@pytest.mark.parametrize("size", [1, 7, 64, 100_000])
@pytest.mark.parametrize(
    ("family", "media_type", "text", "finish", "cached"),
    [
        (Family.OPENAI, "text/event-stream", OPENAI, "length", 96),
        (Family.ANTHROPIC, "text/event-stream", ANTHROPIC, "max_tokens", 100),
        (Family.OLLAMA, "application/x-ndjson", OLLAMA, "length", None),
    ],
)
def test_streams_however_they_are_cut(
    family: Family, media_type: str, text: str, finish: str, cached: int | None, size: int
) -> None:
    trace = new_trace(family)
    reader = ReplyReader(trace, media_type)
    content = text.encode()
    for at in range(0, len(content), size):
        reader.feed(content[at : at + size], 10.0 + at)
    assert (trace.prompt_tokens, trace.completion_tokens) == (120, 34)
    assert (trace.cached_tokens, trace.finish) == (cached, finish)
    if size > 1000:
        assert (trace.counted_tokens, trace.ttft) == (2, 0.0)


def test_times_between_tokens() -> None:
    trace = new_trace()
    reader = ReplyReader(trace, "text/event-stream")
    for number, line in enumerate(OPENAI.split("\n\n")):
        reader.feed(line.encode() + b"\n\n", 11.0 + number)
    assert trace.ttft == 2.0  # not the time of the role, which comes first
    assert trace.tpot == pytest.approx(1 / 33)


def test_other_replies_are_not_read() -> None:
    trace = new_trace()
    ReplyReader(trace, "text/plain").feed(b'"prompt_tokens": 1, "finish_reason": "stop"', 1.0)
    assert (trace.prompt_tokens, trace.finish) == (None, None)


@pytest.mark.parametrize(
    ("status", "prompt", "completion", "counted", "spent"),
    [
        (200, 5, 7, 0, 12),
        (200, 5, None, 3, 8),
        (200, None, None, 3, 103),
        (200, None, None, 0, None),
        (404, None, None, 0, 100),
        (429, None, None, 0, 0),
        (503, None, None, 0, 0),
        (None, None, None, 0, None),
        (None, 5, 7, 0, 12),
        (499, 5, 7, 0, 12),
        (499, None, None, 0, None),
    ],
)
def test_what_is_charged(
    status: int | None, prompt: int | None, completion: int | None, counted: int, spent: int | None
) -> None:
    trace = new_trace()
    trace.status, trace.prompt_tokens = status, prompt
    trace.completion_tokens, trace.counted_tokens = completion, counted
    assert trace.spent(100) == spent


def test_metrics() -> None:
    metrics = GatewayMetrics()
    trace = new_trace()
    trace.status, trace.key, trace.prompt_tokens, trace.completion_tokens = 200, "alice", 5, 7
    trace.first_token_at, trace.ended = 10.05, 12.0
    metrics.observe(trace)
    metrics.observe(trace)
    refused = new_trace(Family.OLLAMA)
    refused.status, refused.refused = 401, "invalid_api_key"
    metrics.observe(refused)
    lines = metrics.render([('http://a"b', True, 3, 1)]).decode().splitlines()
    for line in (
        'modelpack_gateway_requests_total{family="openai",key="alice",status="200"} 2.0',
        'modelpack_gateway_requests_total{family="ollama",key="",status="401"} 1.0',
        'modelpack_gateway_refusals_total{reason="invalid_api_key"} 1.0',
        'modelpack_gateway_tokens_total{key="alice",kind="prompt"} 10.0',
        'modelpack_gateway_tokens_total{key="alice",kind="completion"} 14.0',
        'modelpack_gateway_upstream_running{upstream="http://a\\"b"} 3.0',
        'modelpack_gateway_time_to_first_token_seconds_bucket{le="0.04"} 0.0',
        'modelpack_gateway_time_to_first_token_seconds_bucket{le="0.06"} 2.0',
        'modelpack_gateway_time_to_first_token_seconds_bucket{le="+Inf"} 2.0',
        "modelpack_gateway_request_seconds_sum 4.0",
        "# TYPE modelpack_gateway_request_seconds histogram",
    ):
        assert line in lines
    assert len(lines) == len(set(lines))
    assert not any("_created" in line for line in lines)
    families = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert all(
        name.startswith("modelpack_gateway_") for name in families
    )  # no metrics of the process
    assert 'key="alice"' not in GatewayMetrics().render().decode()
