"""Paths, aliases, limits and the server's own routes."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from modelpack_engine.errors import ModelLoadError
from modelpack_server.api.app import create_app
from modelpack_server.gateway import Protection, protect
from modelpack_server.pool.catalogue import LoadedEngine
from modelpack_server.pool.pool import ModelPool
from tests.engine.scripted import ScriptedEngine
from tests.engine.serving.conftest import Scripted, ScriptedCatalogue

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/engines/v1/chat/completions",
        "/engines/llama.cpp/v1/chat/completions",
        "/engines/vllm/v1/chat/completions",
        "/engines/mlx/v1/chat/completions",
        "/engines/modelpack/v1/chat/completions",
        "/chat/completions",
        "//v1//chat/completions",
        "/v1/chat/completions?api-version=1",
    ],
)
def test_chat_by_every_path(api: Scripted, path: str) -> None:
    assert api.http.post(path, json=CHAT).status_code == 200


@pytest.mark.parametrize("prefix", ["/v1", "/engines/v1", "/engines/vllm/v1"])
def test_completions_and_models_by_every_path(api: Scripted, prefix: str) -> None:
    body = {"model": "m", "prompt": "a"}
    assert api.http.post(f"{prefix}/completions", json=body).status_code == 200
    [listed] = api.http.get(f"{prefix}/models").json()["data"]
    assert (listed["id"], listed["object"], listed["owned_by"]) == ("m", "model", "modelpack")
    for name in ("m", "ai/m:v1", "ai%2Fm:v1"):
        found = api.http.get(f"{prefix}/models/{name}")
        assert found.status_code == 200, name
        assert found.json()["id"] == name.replace("%2F", "/")
    assert api.http.get(f"{prefix}/models/x").json()["error"]["code"] == "model_not_found"


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("POST", "/engines/nothing/v1/chat/completions", 404, "backend not found: 'nothing'"),
        ("GET", "/nothing", 404, "no such route: GET /nothing"),
        ("POST", "/v1/v1/chat/completions", 404, "no such route: POST /v1/v1/chat/completions"),
        ("GET", "/v1/nothing/", 404, "no such route: GET /v1/nothing/"),
        (
            "GET", "/v1/chat/completions", 405,
            "method not allowed: GET /v1/chat/completions. use POST",
        ),
        ("POST", "/v1/models", 405, "method not allowed: POST /v1/models. use GET"),
    ],
)  # fmt: skip
def test_paths_that_are_none(api: Scripted, method: str, path: str, status: int, says: str) -> None:
    response = api.http.request(method, path, json=CHAT)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"] == says
    assert (error["code"] == "unknown_url") == says.startswith("no such route")


def test_routes_are_built_with_the_application(api: Scripted) -> None:
    """FastAPI would build those of an included router again, at the first request."""
    pool = ModelPool(ScriptedCatalogue(api.engine), memory=10)
    assert all(isinstance(route, Route) for route in create_app(pool).routes)


def test_an_unknown_backend_is_named(api: Scripted) -> None:
    response = api.http.post("/engines/nothing/v1/chat/completions", json=CHAT)
    assert "backend not found" in response.json()["error"]["message"]


def test_preloading_answers_with_nothing(api: Scripted) -> None:
    headers = {"X-Preload-Only": "true"}
    body = {"model": "m", "messages": []}
    response = api.http.post("/engines/v1/chat/completions", json=body, headers=headers)
    assert (response.status_code, response.content) == (200, b"")
    assert api.catalogue.loads == 1
    assert api.engine.submitted == []
    for bad in ({"model": "x"}, {"messages": []}):
        refused = api.http.post("/v1/chat/completions", json=bad, headers=headers)
        assert refused.status_code in (400, 404)
    broken = api.http.post("/v1/chat/completions", content=b"{", headers=headers)
    assert broken.status_code == 400


@pytest.mark.parametrize("streamed", [False, True])
def test_too_large_a_body(api: Scripted, streamed: bool) -> None:
    def pieces() -> Any:
        yield b'{"model": "'
        for _ in range(30):
            yield b"x" * 1000

    content: Any = pieces() if streamed else b"x" * 20_001
    limited = protect(api.http.app, Protection(max_body=20_000))
    client = TestClient(limited, base_url="http://localhost")
    response = client.post("/v1/chat/completions", content=content)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("content", "type"),
    [
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b"null", "application/json"),
        (b"", "application/json"),
        (b"\xff", "application/json"),
        (b"[" * 5000, "application/json"),
        (b"model=m", "application/x-www-form-urlencoded"),
    ],
)
def test_bodies_that_are_none(api: Scripted, content: bytes, type: str) -> None:
    headers = {"Content-Type": type}
    response = api.http.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert "message" in response.json()["error"]


def test_what_the_server_says_of_itself(api: Scripted) -> None:
    assert "Modelpack is running" in api.http.get("/").text
    assert api.http.head("/").status_code == 200
    for path in ("/health", "/ping", "/v1/health"):
        assert api.http.get(path).json() == {"status": "ok"}
    assert set(api.http.get("/version").json()) == {"version"}
    paths = api.http.get("/openapi.json").json()["paths"]
    assert "/v1/chat/completions" in paths
    assert "/engines/v1/chat/completions" not in paths
    responses = paths["/v1/chat/completions"]["post"]["responses"]
    assert "422" not in responses
    assert "400" in responses


def test_metrics_before_and_after(api: Scripted) -> None:
    before = api.http.get("/metrics").text
    for name in ("num_requests_running", "kv_cache_usage_perc", "time_to_first_token_seconds",
                 "time_per_output_token_seconds", "request_success_total",
                 "iteration_tokens_total", "request_params_n"):  # fmt: skip
        assert f"# TYPE vllm:{name} " in before
    api.http.post("/v1/chat/completions", json=CHAT)
    after = api.http.get("/metrics").text
    assert 'vllm:num_requests_running{engine="0",model_name="m"}' in after
    assert 'vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="m"}' in after
    families = [line.split()[2] for line in after.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))


def test_the_log_holds_what_was_logged(api: Scripted) -> None:
    import logging

    logging.getLogger("modelpack_engine.test").error("something %s", "happened")
    assert "something happened" in api.http.get("/logs").text


def test_the_pool_is_told_and_managed(api: Scripted) -> None:
    assert api.http.get("/pool").json() == {"models": [], "memory": 100}
    api.http.post("/v1/chat/completions", json=CHAT | {"keep_alive": "10m"})
    [model] = api.http.get("/pool").json()["models"]
    assert (model["name"], model["state"], model["keep_alive"]) == ("m", "ready", "10m0s")
    assert model["expires_at"] > model["last_used"]
    assert api.http.post("/pool/unload", json={}).status_code == 400
    unloaded = api.http.post("/pool/unload", json={"models": ["ai/m:v1"]}).json()
    assert unloaded == {"unloaded": ["m"]}
    assert api.http.get("/pool").json()["models"] == []
    body = {"model": "m", "runtime_flags": ["--temp", "0.1"], "preset": "chat", "keep_alive": -1}
    answer = api.http.post("/pool/configure", json=body).json()
    assert answer["keep_alive"] == "-1"
    api.engine.state = type(api.engine.state).READY
    api.http.post("/v1/chat/completions", json=CHAT)
    assert (api.engine.params.temperature, api.engine.params.top_p) == (0.1, 0.9)
    wrong = api.http.post("/pool/configure", json={"model": "m", "runtime_flags": ["--x"]})
    assert wrong.status_code == 400
    assert "--ctx-size" in wrong.json()["error"]["message"]


def test_a_model_that_does_not_fit(api: Scripted) -> None:
    api.catalogue.needs = lambda model, settings, limit: 1000  # type: ignore[method-assign]
    response = api.http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "out_of_memory"
    assert response.headers["x-should-retry"] == "false"


def test_too_many_wait_for_a_model() -> None:
    app = create_app(ModelPool(ScriptedCatalogue(ScriptedEngine()), max_waiting=0))
    with TestClient(app, raise_server_exceptions=False) as http:
        reply = http.post("/v1/completions", json={"model": "m", "prompt": "a"})
    assert reply.status_code == 503
    assert reply.json()["error"]["type"] == "service_unavailable"
    assert reply.headers["retry-after"] == "1"


def test_a_model_that_does_not_load(api: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> LoadedEngine:
        raise ModelLoadError("its tensors are missing")

    monkeypatch.setattr(api.catalogue, "load", fail)
    reply = api.http.post("/v1/completions", json={"model": "m", "prompt": "a"})
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "model_load_failed"
    assert "tensors" in reply.json()["error"]["message"]
    assert reply.headers["x-should-retry"] == "false"
