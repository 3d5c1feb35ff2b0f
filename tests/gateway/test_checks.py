"""The requests that `protect` passes to an application, and its refusals."""

from __future__ import annotations

import http.client
import json
import logging
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from modelpack.errors import UsageError
from modelpack_server.gateway import KeyFile, Protection, add_key, protect, trace_of
from modelpack_server.gateway.app import GatewayServer, GatewaySettings
from tests.gateway.houses import BODY, MESSAGES, OLLAMA, House, told
from tests.gateway.servers import (
    CHAT,
    COMPLETION,
    Asked,
    Upstream,
    answering,
    new_client,
    protected,
    respond,
    serving,
)


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


@pytest.mark.sample(8)
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
        ("/v1/requests/req_1:2/cancel", {}),
        ("/v1/conversations", {}),
        ("/v1/conversations/conv_1", {"metadata": {}}),
        ("/v1/conversations/conv_1/items", {"items": []}),
    ],
)
def test_a_narrow_key_uses_its_models(house: House, path: str, body: Any) -> None:
    assert house.post("narrow", path, body).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/models", "/api/tags", "/api/version", "/engines/v1/models",
     "/v1/models/ai%2Fsmollm2", "/engines/v1/models/ai/smollm2:x", "/v1/responses/resp_1",
     "/v1/conversations/conv_1", "/v1/conversations/conv_1/items?limit=3"],
)  # fmt: skip
def test_a_narrow_key_looks_around(house: House, path: str) -> None:
    house.app.reply = answering({"data": []})
    headers = {"x-api-key": house.secrets["narrow"]}
    assert house.served.client.get(path, headers=headers).status_code == 200


@pytest.mark.sample(7)
@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (CHAT, {"model": "other"}, 403, "may not use the model 'other'"),
        (MESSAGES, {"model": "other"}, 403, "may not use the model 'other'"),
        (OLLAMA, {"model": "other"}, 403, "may not use the model 'other'"),
        (OLLAMA, {"model": "ai/smollm2", "name": "other"}, 403, "'other'"),
        (CHAT, {"model": "ai/smollm2", "Model": "other"}, 400, "model: expected exactly one name"),
        (
            CHAT,
            b'{"model": "ai/smollm2", "model": "other"}',
            400,
            "model: expected exactly one name",
        ),
        (CHAT, {"Model": "other"}, 400, "model: expected exactly one name"),
        (CHAT, {}, 400, "model: expected exactly one name"),
        (CHAT, {"model": 1}, 400, "model: expected exactly one name"),
        # vLLM ignores other spellings than `model`, and uses its base model if that is empty.
        (CHAT, {"name": "ai/smollm2"}, 400, "model: expected exactly one name"),
        (CHAT, {"model": "", "name": "ai/smollm2"}, 400, "model: expected exactly one name"),
        (CHAT, {"model": None, "name": "ai/smollm2"}, 400, "model: expected exactly one name"),
        (CHAT, {"model": ["other"], "name": "ai/smollm2"}, 400, "model: expected exactly one name"),
        (MESSAGES, {"name": "ai/smollm2"}, 400, "model: expected exactly one name"),
        (CHAT, {"Model": "ai/smollm2"}, 400, "model: expected exactly one name"),
        (OLLAMA, {"Name": "ai/smollm2"}, 400, "model: expected exactly one name"),
        ("/v1/responses/compact", {"model": "other"}, 403, "requires a key without 'models'"),
        ("/v1/responses/input_tokens", {"model": "other"}, 403, "not use the model 'other'"),
        ("/v1/requests/x", {"model": "other"}, 403, "requires a key without 'models'"),
        (CHAT, [], 400, "not a JSON object"),
        (CHAT, b"{", 400, "not a JSON object"),
        (CHAT, b"[" * 9000, 400, "nested deeper than 128"),
        (CHAT, b"", 400, "not a JSON object"),
        ("/models/create", {"from": "ai/smollm2"}, 403, "requires a key without 'models'"),
        ("/api/delete", {"model": "ai/smollm2"}, 403, "requires a key without 'models'"),
        ("/models/load", b"x", 403, "requires a key without 'models'"),
        ("/engines/unload", {"all": True}, 403, "requires a key without 'models'"),
        ("/models/ai/smollm2/v1/chat/completions", BODY, 403, "requires a key without 'models'"),
        ("/v1//chat/completions", {"model": "other"}, 403, "'other'"),
        ("/exp/vDD4.40/v1/chat/completions", {"model": "other"}, 403, "'other'"),
        ("/v1/%63hat%2Fcompletions", {"model": "other"}, 403, "'other'"),
        ("/exp/vDD4.40//engines/unload", {"all": True}, 403, "requires a key without 'models'"),
        (CHAT, {"model": "ai/smollm2@sha256:" + "a" * 64}, 403, "may not use"),
        (CHAT, {"model": "sha256:" + "a" * 64}, 403, "may not use"),
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
            # A socket, since httpx would log the URL itself.
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


METRICS = ["/metrics", "//metrics", "/%2fmetrics", "/%6detrics", "/metrics/", "/metrics/x",
           "/exp/vDD4.40/metrics", "/exp/vDD4.40//exp/vDD1.1/metrics", "/METRICS"]  # fmt: skip


@pytest.mark.parametrize("path", METRICS)
def test_metrics_name_all_models_so_they_need_a_key_for_all(house: House, path: str) -> None:
    client, url = house.served.client, house.served.url + path
    narrow, free = ({"x-api-key": house.secrets[name]} for name in ("narrow", "free"))
    assert client.get(url).status_code == 401
    reply = client.get(url, headers=narrow)
    assert (reply.status_code, told(reply)[0]) == (403, "permission_error")
    assert house.app.asked == []
    assert client.get(url, headers=free).status_code == 200


@pytest.mark.parametrize("path", METRICS)
def test_metrics_without_keys_are_for_this_machine_however_they_are_spelled(path: str) -> None:
    asked = []

    async def app(scope: Scope, _: Receive, send: Send) -> None:
        asked.append(scope["path"])
        await respond(send, 200, {})

    async def from_elsewhere(scope: Scope, receive: Receive, send: Send) -> None:
        scope = {**scope, "client": ("192.0.2.1", 50000)}
        await protect(app, Protection())(scope, receive, send)

    with serving(from_elsewhere) as url, new_client(url) as client:
        assert client.get(url + path).status_code == 403
        assert asked == []
        assert client.get("/v1/models").status_code == 200


def test_metrics_without_keys_are_for_this_machine() -> None:
    async def from_afar(scope: Scope, receive: Receive, send: Send) -> None:
        await inner({**scope, "client": ("192.0.2.1", 1)}, receive, send)

    inner = protect(Upstream(), Protection(host="0.0.0.0", allow_anonymous=True))
    with serving(from_afar) as url, new_client(url) as client:
        assert client.get("/metrics").status_code == 403
        assert client.get("/health").status_code == 200


def test_a_server_without_keys_may_be_monitored_from_other_machines(tmp_path: Path) -> None:
    async def from_afar(scope: Scope, receive: Receive, send: Send) -> None:
        await inner({**scope, "client": ("192.0.2.1", 1)}, receive, send)

    opened = Protection(host="0.0.0.0", allow_anonymous=True, remote_metrics=True)
    inner = protect(Upstream(), opened)
    with serving(from_afar) as url, new_client(url) as client:
        assert client.get("/metrics").status_code == 200
    add_key(tmp_path / "k", "a")
    inner = protect(Upstream(), replace(opened, keys=KeyFile(tmp_path / "k")))
    with serving(from_afar) as url, new_client(url) as client:
        assert client.get("/metrics").status_code == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "models.lan", "::"])
def test_beyond_loopback_a_key_is_asked_for(host: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a loopback address") as caught:
        Protection(host=host)
    assert "--allow-anonymous" in str(caught.value.hint)
    add_key(tmp_path / "k", "a")
    assert Protection(host=host, keys=KeyFile(tmp_path / "k")).keys is not None
    assert Protection(host=host, allow_anonymous=True).keys is None
