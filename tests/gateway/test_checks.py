"""What `protect` lets through to an application, and how it refuses."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from modelpack.errors import UsageError
from modelpack.gateway import KeyFile, Protection, add_key, protect, trace_of
from modelpack.gateway.app import GatewaySettings
from modelpack.gateway.limits import Limits
from modelpack.gateway.serving import GatewayServer
from tests.gateway.servers import (
    CHAT,
    COMPLETION,
    PATIENCE,
    Asked,
    Served,
    Upstream,
    answering,
    new_client,
    piece,
    protected,
    serving,
    start_stream,
    wait_for,
)

BODY = {"model": "ai/smollm2:latest", "messages": [{"role": "user", "content": "top-secret"}]}
MESSAGES, OLLAMA = "/anthropic/v1/messages", "/api/chat"


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class House:
    """A protected application with keys."""

    served: Served
    app: Upstream
    file: Path
    clock: Clock
    secrets: dict[str, str]

    def post(self, key: str, path: str = CHAT, body: Any = BODY, **headers: str) -> httpx.Response:
        """Ask in the name of a key."""
        headers = {"authorization": f"Bearer {self.secrets[key]}"} | headers
        return self.served.client.post(path, json=body, headers=headers)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    file = tmp_path / "keys.toml"
    secrets = {
        "free": add_key(file, "free"),
        "narrow": add_key(file, "narrow", models=("ai/smollm2*",)),
        "slow": add_key(file, "slow", limits=Limits(requests_per_minute=2)),
        "terse": add_key(file, "terse", limits=Limits(tokens_per_minute=600)),
        "single": add_key(file, "single", limits=Limits(concurrency=1)),
    }
    with file.open("a") as more:
        more.write("[keys.shared]\nsha256 = '" + "0" * 64 + "'\n")
    app, clock = Upstream(), Clock()
    with protected(app, keys=KeyFile(file), max_body=10_000, clock=clock) as served:
        yield House(served, app, file, clock, secrets)


def told(response: httpx.Response) -> tuple[str | None, str]:
    """The type and the message of an error, whatever its family."""
    body = response.json()
    if isinstance(body["error"], str):
        return None, body["error"]
    if body.get("type") == "error":
        assert body["request_id"] == response.headers["request-id"]
        return body["error"]["type"], body["error"]["message"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]["type"], body["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer {}"},
        {"authorization": "bearer   {}"},
        {"x-api-key": "{}"},
        {"api-key": "{}"},
        {"authorization": "Bearer wrong", "x-api-key": "{}"},
    ],
)
def test_a_key_is_taken_wherever_it_is(house: House, headers: dict[str, str]) -> None:
    filled = {name: value.format(house.secrets["free"]) for name, value in headers.items()}
    reply = house.served.client.post(CHAT, json=BODY, headers=filled)
    assert (reply.status_code, reply.json()) == (200, COMPLETION)
    [trace] = house.served.traces.wait()
    assert (trace.key, trace.model, trace.status) == ("free", BODY["model"], 200)
    assert (trace.prompt_tokens, trace.completion_tokens) == (7, 3)


@pytest.mark.parametrize(
    ("path", "kind"),
    [(CHAT, "authentication_error"), (MESSAGES, "authentication_error"), (OLLAMA, None),
     ("/models", "authentication_error"), ("/metrics", "authentication_error"),
     ("/docs", "authentication_error")],
)  # fmt: skip
@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer mp_wrong"}, {"authorization": "Basic eDp5"},
     {"x-api-key": ""}, {"authorization": "Bearer"}],
)  # fmt: skip
def test_without_a_key(house: House, path: str, kind: str | None, headers: dict[str, str]) -> None:
    reply = house.served.client.post(path, json=BODY, headers=headers)
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert told(reply)[0] == kind
    assert "key" in told(reply)[1]
    assert "mp_wrong" not in reply.text
    assert house.app.asked == []


@pytest.mark.parametrize("path", ["/", "/health", "/version", "/ping"])
def test_what_needs_no_key(house: House, path: str) -> None:
    assert house.served.client.get(path).status_code == 200
    assert house.served.client.head(path).status_code == 200
    assert house.served.client.post(path, json={}).status_code == 401


def test_options_never_reach_the_application(house: House) -> None:
    assert house.served.client.options(CHAT).status_code == 204
    assert house.app.asked == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, BODY),
        ("/engines/vllm/v1/chat/completions", BODY),
        (MESSAGES, BODY),
        (OLLAMA, {"name": "ai/smollm2"}),
        ("/api/show", {"model": "ai/smollm2"}),
        ("/v1/responses/resp_1/cancel", {}),
    ],
)
def test_a_narrow_key_uses_its_models(house: House, path: str, body: Any) -> None:
    assert house.post("narrow", path, body).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/models", "/api/tags", "/api/version", "/engines/v1/models", "/metrics",
     "/v1/models/ai%2Fsmollm2", "/engines/v1/models/ai/smollm2:x", "/v1/responses/resp_1"],
)  # fmt: skip
def test_a_narrow_key_looks_around(house: House, path: str) -> None:
    headers = {"x-api-key": house.secrets["narrow"]}
    assert house.served.client.get(path, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (CHAT, {"model": "other"}, 403, "may not use the model 'other'"),
        (MESSAGES, {"model": "other"}, 403, "may not use the model 'other'"),
        (OLLAMA, {"model": "other"}, 403, "may not use the model 'other'"),
        (OLLAMA, {"model": "ai/smollm2", "name": "other"}, 403, "'other'"),
        (CHAT, {"model": "ai/smollm2", "Model": "other"}, 400, "model: one name"),
        (CHAT, b'{"model": "ai/smollm2", "model": "other"}', 400, "model: one name"),
        (CHAT, {"Model": "other"}, 403, "'other'"),
        (CHAT, {}, 400, "model: one name"),
        (CHAT, {"model": 1}, 400, "model: one name"),
        (CHAT, [], 400, "no JSON object"),
        (CHAT, b"{", 400, "no JSON object"),
        (CHAT, b"[" * 9000, 400, "no JSON object"),
        (CHAT, b"", 400, "no JSON object"),
        ("/models/create", {"from": "ai/smollm2"}, 403, "needs a key without 'models'"),
        ("/api/delete", {"model": "ai/smollm2"}, 403, "needs a key without 'models'"),
        ("/models/load", b"x", 403, "needs a key without 'models'"),
        ("/engines/unload", {"all": True}, 403, "needs a key without 'models'"),
        ("/models/ai/smollm2/v1/chat/completions", BODY, 403, "needs a key without 'models'"),
        ("/v1//chat/completions", {"model": "other"}, 403, "needs a key without 'models'"),
    ],
)
def test_a_narrow_key_is_held_to_its_models(
    house: House, path: str, body: Any, status: int, message: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"x-api-key": house.secrets["narrow"]}
    reply = house.served.client.post(path, content=content, headers=headers)
    assert reply.status_code == status
    assert message in told(reply)[1]
    assert house.app.asked == []


@pytest.mark.parametrize(
    "path", ["/logs", "/engines/requests", "/v1/models/other", "/models/ai/smollm2/export"]
)
def test_a_narrow_key_does_not_read_everything(house: House, path: str) -> None:
    headers = {"x-api-key": house.secrets["narrow"]}
    assert house.served.client.get(path, headers=headers).status_code == 403
    headers = {"x-api-key": house.secrets["free"]}
    assert house.served.client.get(path, headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models/../../logs", "/v1/%2e%2e/logs", "/v1/./models",
                                  "/v1/models/..%5c..%5clogs"])  # fmt: skip
def test_paths_that_climb_are_refused(house: House, path: str) -> None:
    host, port = house.served.url.removeprefix("http://").split(":")
    secret = house.secrets["narrow"]
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}\r\nx-api-key: {secret}\r\n\r\n".encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    assert house.app.asked == []


@pytest.mark.parametrize(
    ("path", "kind"),
    [(CHAT, "rate_limit_error"), (MESSAGES, "rate_limit_error"), (OLLAMA, None)],
)
def test_too_many_requests(house: House, path: str, kind: str | None) -> None:
    assert [house.post("slow").status_code for _ in range(2)] == [200, 200]
    reply = house.post("slow", path)
    assert (reply.status_code, told(reply)[0]) == (429, kind)
    assert "'slow' may make 2 requests a minute" in told(reply)[1]
    assert (reply.headers["retry-after"], reply.headers["retry-after-ms"]) == ("30", "30000")
    assert house.post("free").status_code == 200
    house.clock.now += 30
    assert house.post("slow").status_code == 200
    assert house.served.traces.wait(5)[2].refused == "requests_per_minute_exceeded"


def test_tokens_are_charged_by_what_the_reply_tells(house: House) -> None:
    body = BODY | {"max_tokens": 500}
    usage = {"usage": {"prompt_tokens": 400, "completion_tokens": 200}}
    house.app.reply = answering(usage)
    assert house.post("terse", body=body).status_code == 200
    reply = house.post("terse", body=body)
    assert reply.status_code == 429
    assert "600 tokens a minute" in told(reply)[1]
    house.clock.now += 60
    house.app.reply = answering({"error": "no"}, 400)  # costs nothing
    assert [house.post("terse", body=body).status_code for _ in range(3)] == [400, 400, 400]


def test_tokens_of_a_stream_without_counts_are_counted(house: House) -> None:
    async def reply(_: Asked, __: Receive, send: Send) -> None:
        await start_stream(send)
        for _unused in range(580):
            await send(piece(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'))
        await send(piece(b"data: [DONE]\n\n", more=False))

    house.app.reply = reply
    assert house.post("terse", body=BODY | {"max_tokens": 1, "stream": True}).status_code == 200
    assert house.post("terse", body=BODY | {"max_tokens": 100}).status_code == 429
    assert house.served.traces.wait(2)[0].counted_tokens == 580


def test_one_at_a_time(house: House) -> None:
    arrived, held = threading.Event(), threading.Event()

    async def reply(asked: Asked, receive: Receive, send: Send) -> None:
        arrived.set()
        await wait_for(held)
        await answering(COMPLETION)(asked, receive, send)

    house.app.reply = reply
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(house.post("single").status_code))
    thread.start()
    assert arrived.wait(PATIENCE)
    with new_client(house.served.url) as other:
        refused = other.post(CHAT, json=BODY, headers={"x-api-key": house.secrets["single"]})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    held.set()
    thread.join()
    assert statuses == [200]
    house.served.traces.wait(2)
    assert house.post("single").status_code == 200


def test_a_place_is_free_again_when_the_application_fails(house: House) -> None:
    async def reply(_: Asked, __: Receive, ___: Send) -> None:
        raise RuntimeError

    house.app.reply = reply
    assert house.post("single").status_code == 500
    house.app.reply = answering(COMPLETION)
    house.served.traces.wait(1)
    assert house.post("single").status_code == 200
    assert [trace.status for trace in house.served.traces.wait(2)] == [500, 200]


def test_callers_within_a_key(house: House) -> None:
    with house.file.open("a") as more:
        more.write("[keys.free.per_caller]\nrequests_per_minute = 1\n")
    asks = [("a", 200), ("b", 200), ("a", 429), (None, 200), ("b", 429)]
    for caller, status in asks:
        headers = {"x-modelpack-caller": caller} if caller else {}
        assert house.post("free", **headers).status_code == status


def test_keys_are_read_again(house: House) -> None:
    house.secrets["new"] = add_key(house.file, "new")
    assert house.post("new").status_code == 200
    house.file.write_text("")
    assert house.post("new").status_code == 401


@pytest.mark.parametrize(
    ("path", "kind"),
    [(CHAT, "invalid_request_error"), (MESSAGES, "request_too_large"), (OLLAMA, None)],
)
@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_over_the_cap(house: House, path: str, kind: str | None, chunked: bool) -> None:
    headers = {"x-api-key": house.secrets["free"]}
    content: Any = (b"x" * 5000 for _ in range(4)) if chunked else b"x" * 20_000
    reply = house.served.client.post(path, content=content, headers=headers)
    assert (reply.status_code, told(reply)[0]) == (413, kind)
    assert "10000 bytes" in told(reply)[1]
    assert house.app.asked == []
    assert house.post("free").status_code == 200


def test_a_body_at_the_cap(house: House) -> None:
    headers = {"x-api-key": house.secrets["free"]}
    content = b"{" + b" " * 9998 + b"}"
    assert house.served.client.post(CHAT, content=content, headers=headers).status_code == 200
    assert house.app.asked[0].body == content


def test_a_body_too_large_is_refused_before_it_is_asked_for(house: House) -> None:
    host, port = house.served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 99999999\r\n"
            f"x-api-key: {house.secrets['free']}\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_body_nobody_may_send_is_not_read(house: House) -> None:
    host, port = house.served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9999\r\n\r\n".encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_a_client_that_leaves_in_its_body(house: House) -> None:
    host, port = house.served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9999\r\n"
            f"x-api-key: {house.secrets['single']}\r\n\r\nhalf".encode()
        )
    [trace] = house.served.traces.wait()
    assert (trace.status, trace.finish) == (499, "abort")
    assert house.post("single").status_code == 200


def test_the_log_has_what_matters_and_no_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "keys.toml"
    secret = add_key(file, "alice")
    file.chmod(0o644)
    settings = Protection(keys=KeyFile(file))
    with (
        serving(protect(Upstream(), Protection())) as upstream,
        GatewayServer(GatewaySettings((upstream,), settings)) as server,
    ):
        for sent in ({"x-api-key": secret}, {"authorization": "Bearer mp_not-one"}):
            # Not httpx, which would log the URL itself.
            connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
            headers = sent | {
                "x-modelpack-caller": "editor", "x-modelpack-stack": "compose/dev",
                "x-modelpack-user": "u\x01", "x-request-id": "r-1",
            }  # fmt: skip
            connection.request("POST", f"{CHAT}?key={secret}", json.dumps(BODY), headers)
            connection.getresponse().read()
            connection.close()
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "modelpack.requests"]
    lines = [line for line in lines if "key" in line or "refused" in line]  # not the upstream's
    assert lines[0].pop("upstream") == upstream
    assert {name: lines[0][name] for name in lines[0] if not name.endswith("_s")} == {
        "id": "r-1", "method": "POST", "path": CHAT, "family": "openai", "status": 200,
        "key": "alice", "caller": "editor", "stack": "compose/dev", "model": BODY["model"],
        "attempts": 1, "prompt_tokens": 7, "completion_tokens": 3, "finish": "stop",
    }  # fmt: skip
    assert (lines[1]["status"], lines[1]["refused"]) == (401, "invalid_api_key")
    for hidden in (secret, secret[3:], "mp_not-one", "top-secret"):
        assert hidden not in caplog.text


@pytest.mark.parametrize(
    ("given", "kept"),
    [("a-b_c.d:e", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False)],
)
def test_request_ids(house: House, given: str, kept: bool) -> None:
    reply = house.post("free", **{"x-request-id": given})
    returned = reply.headers["x-request-id"]
    assert (returned == given) is kept
    assert house.app.asked[0].header("x-request-id") == returned
    assert house.served.traces.wait()[0].id == returned


def test_an_application_adds_to_its_trace() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        trace = trace_of(scope)
        assert trace is not None
        trace.queue_s, trace.completion_tokens, trace.finish = 1.5, 42, "length"
        await answering({})(Asked("", b"", [], b""), receive, send)

    with protected(app) as served:
        served.client.get("/v1/models")
        [trace] = served.traces.wait()
    record = trace.to_json()
    assert (record["queue_s"], record["completion_tokens"], record["finish"]) == (1.5, 42, "length")


def test_without_keys_credentials_mean_nothing() -> None:
    with protected(Upstream()) as served:
        reply = served.client.post(CHAT, json=BODY, headers={"authorization": "Bearer dummy"})
        assert reply.status_code == 200
        assert served.client.get("/metrics").status_code == 200


def test_metrics_without_keys_are_for_this_machine() -> None:
    async def from_afar(scope: Scope, receive: Receive, send: Send) -> None:
        await inner({**scope, "client": ("192.0.2.1", 1)}, receive, send)

    inner = protect(Upstream(), Protection(host="0.0.0.0", allow_anonymous=True))
    with serving(from_afar) as url, new_client(url) as client:
        assert client.get("/metrics").status_code == 403
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "models.lan", "::"])
def test_beyond_loopback_a_key_is_asked_for(host: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a loopback address") as caught:
        Protection(host=host)
    assert "--allow-anonymous" in str(caught.value.hint)
    add_key(tmp_path / "k", "a")
    assert Protection(host=host, keys=KeyFile(tmp_path / "k")).keys is not None
    assert Protection(host=host, allow_anonymous=True).keys is None
