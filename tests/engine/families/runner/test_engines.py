"""/engines: loaded models, their settings and their disk usage."""

from __future__ import annotations

import asyncio
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import modelpack
from modelpack_server.api.model_runner.engines import ConfigureRequest, config_shown
from modelpack_server.pool.settings import ModelSettings
from tests.engine.families.runner.conftest import Runner
from tests.engine.scripted import THINKING


def ps(runner: Runner) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = runner.http.get("/engines/ps").json()
    return found


def wait_until_loaded(runner: Runner) -> dict[str, Any]:
    """Wait until the only model is loaded, like clients of `_configure`; return its entry."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if (found := ps(runner)) and "loading" not in found[0]:
            [model] = found
            return model
    raise AssertionError("the model was never loaded")


def test_status(shared: Runner) -> None:
    assert shared.http.get("/engines/status").json() == {
        "modelpack": f"Running: modelpack {modelpack.__version__}"
    }
    assert shared.http.get("/version").json() == {"version": modelpack.__version__}
    assert shared.http.get("/logs?follow=false&no-engines=true").status_code == 200


def test_what_is_loaded(runner: Runner) -> None:
    assert ps(runner) == []
    runner.chat()
    [model] = ps(runner)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", model.pop("last_used"))
    assert model == {
        "backend_name": "modelpack", "model_name": "ai/tiny:latest", "mode": "completion",
        "keep_alive": "5m0s",
    }  # fmt: skip
    runner.chat(keep_alive=-1)
    assert ps(runner)[0]["keep_alive"] == "-1"


def test_disk_usage(runner: Runner, gguf: Path) -> None:
    used = runner.http.get("/engines/df").json()
    assert used["models_disk_usage"] > gguf.stat().st_size
    assert used["default_backend_disk_usage"] == 0
    runner.http.delete("/models/purge")
    assert runner.http.get("/engines/df").json()["models_disk_usage"] < used["models_disk_usage"]


@pytest.mark.parametrize(
    ("body", "count"),
    [
        ({"all": True, "backend": "", "models": []}, 1),
        ({"all": False, "backend": "", "models": ["tiny"]}, 1),
        ({"models": ["ai/tiny:latest", "tiny", "nothing"]}, 1),
        ({"models": ["tiny"], "backend": "llama.cpp"}, 1),
        ({"models": ["nothing", ".."]}, 0),
        ({"models": None}, 0),
        ({}, 0),
    ],
)
def test_unloading(idle: Runner, body: dict[str, Any], count: int) -> None:
    idle.chat()
    response = idle.http.post("/engines/unload", json=body)
    assert response.json() == {"unloaded_runners": count}
    assert len(ps(idle)) == 1 - count


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("unload", "{", 400),
        ("unload", '{"all": "yes"}', 400),
        ("unload", '{"all": true, "backend": "abacus"}', 404),
        ("install-backend", "{}", 400),
        ("install-backend", '{"backend": "abacus"}', 404),
        ("uninstall-backend", "", 400),
        ("uninstall-backend", '{"backend": "abacus"}', 404),
        ("_configure", "{", 400),
        ("_configure", "{}", 400),
        ("_configure", '{"model": "none"}', 404),
        ("abacus/_configure", '{"model": "tiny"}', 404),
        ("_configure", '{"model": "tiny", "mode": "image-generation"}', 400),
        ("_configure", '{"model": "tiny", "mode": "singing"}', 400),
        ("_configure", '{"model": "tiny", "runtime-flags": ["--bogus"]}', 400),
        ("_configure", '{"model": "tiny", "raw-runtime-flags": "\\""}', 400),
        ("_configure", '{"model": "tiny", "raw-runtime-flags": "--jinja yes"}', 400),
        ("_configure", '{"model": "tiny", "keep_alive": "soon"}', 400),
        ("_configure", '{"model": "tiny", "context-size": "wide"}', 400),
        ("_configure", '{"model": "tiny", "vllm": {"gpu-memory-utilization": 2}}', 400),
        ("_configure", '{"model": "tiny", "vllm": {"hf-overrides": {"a": 1}}}', 400),
        ("_configure", '{"model": "tiny", "speculative": {"num_tokens": -1}}', 400),
        ("_configure", '{"model": "tiny", "speculative": {"min_acceptance_rate": 2}}', 400),
    ],
)
def test_what_is_refused_is_a_line_of_text(
    shared: Runner, path: str, body: str, status: int
) -> None:
    response = shared.http.post(f"/engines/{path}", content=body)
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("text/plain")
    assert response.text.endswith("\n")
    assert ps(shared) == []


def test_installing_what_is_there(runner: Runner) -> None:
    runner.chat()
    for body in ({"backend": "vllm"}, {"backend": "llama.cpp", "version": "latest"}):
        assert runner.http.post("/engines/install-backend", json=body).content == b""
    assert len(ps(runner)) == 1
    assert runner.http.post("/engines/uninstall-backend", json={"backend": "mlx"}).is_success
    assert ps(runner) == []


@pytest.mark.parametrize(
    ("body", "settings", "shown"),
    [
        ({}, ModelSettings(), {}),
        ({"context-size": 4096}, ModelSettings(context_size=4096), {"context-size": 4096}),
        ({"context-size": -1}, ModelSettings(), {}),
        (
            {"runtime-flags": ["--temp", "0.5"], "raw-runtime-flags": "--temp 1"},
            ModelSettings(runtime_flags=("--temp", "0.5")),
            {"runtime-flags": ["--temp", "0.5"]},
        ),
        (
            {"raw-runtime-flags": "--temp '0.5' --top-k=3"},
            ModelSettings(runtime_flags=("--temp", "0.5", "--top-k=3")),
            {"runtime-flags": ["--temp", "0.5", "--top-k=3"]},
        ),
        (
            {"runtime-flags": ["--verbose", "-t", "8", "--top-k", "3", "-ngl=99", "--log-prefix"]},
            ModelSettings(runtime_flags=("--top-k", "3")),
            {"runtime-flags": ["--top-k", "3"]},
        ),
        ({"raw-runtime-flags": "-fa --flash-attn on -fa"}, ModelSettings(), {}),
        ({"keep_alive": "1h30m"}, ModelSettings(keep_alive=5400), {"keep_alive": "1h30m0s"}),
        ({"keep_alive": "-1"}, ModelSettings(keep_alive=float("inf")), {"keep_alive": "-1"}),
        ({"keep_alive": "0"}, ModelSettings(keep_alive=0), {"keep_alive": "0s"}),
        ({"mode": "embedding"}, ModelSettings(mode="embedding"), {}),
        ({"runtime-flags": ["--embeddings"]}, ModelSettings(mode="embedding"), {}),
        ({"raw-runtime-flags": "--reranking"}, ModelSettings(mode="reranking"), {}),
        (
            {"vllm": {"gpu-memory-utilization": 0.5}, "sglang": {}},
            ModelSettings(engine={"gpu_memory_utilization": 0.5}),
            {"vllm": {"gpu-memory-utilization": 0.5}},
        ),
        (
            {"speculative": {"draft_model": "x", "num_tokens": 3, "min_acceptance_rate": 0.5}},
            ModelSettings(
                engine={
                    "draft_model": "x",
                    "num_speculative_tokens": 3,
                    "speculative_min_acceptance": 0.5,
                }
            ),
            {"speculative": {"draft_model": "x", "num_tokens": 3, "min_acceptance_rate": 0.5}},
        ),
        ({"speculative": {"draft_model": "", "num_tokens": 0}}, ModelSettings(), {}),
        ({"speculative": None, "llamacpp": None, "vllm": None}, ModelSettings(), {}),
        (
            {"llamacpp": {"reasoning-budget": -1}},
            ModelSettings(reasoning_budget=-1),
            {"llamacpp": {"reasoning-budget": -1}},
        ),
    ],
)
def test_a_configuration_there_and_back(
    body: dict[str, Any], settings: ModelSettings, shown: dict[str, Any]
) -> None:
    made = ConfigureRequest.model_validate({"model": "m"} | body).settings()
    assert made == settings
    assert config_shown(made) == shown


@pytest.mark.parametrize(
    ("budget", "given", "reasons"),
    [
        (0, {}, False),
        (0, {"enable_thinking": True}, True),
        (0, {"reasoning_effort": "high"}, True),
        (-1, {}, True),
        (-1, {"reasoning_effort": "none"}, False),
        (None, {}, True),
    ],
)
def test_reasoning_is_set_up(
    idle: Runner, budget: int | None, given: dict[str, Any], reasons: bool
) -> None:
    idle.catalogue.template = THINKING
    body = {"model": "tiny", "llamacpp": {"reasoning-budget": budget}}
    assert idle.http.post("/engines/_configure", json=body).status_code == 202
    assert idle.chat(**given).status_code == 200
    assert ("<think>" in idle.catalogue.engines[-1].prompt) is reasons
    counted = idle.http.post(
        "/anthropic/v1/messages/count_tokens",
        json={"model": "tiny", "messages": [{"role": "user", "content": "hi"}]},
    )
    assert counted.status_code == 200


def test_configure_loads_and_is_refused_while_a_stream_runs(runner: Runner) -> None:
    response = runner.http.post(
        "/engines/_configure", json={"model": "tiny", "context-size": 4096, "keep_alive": "10m"}
    )
    assert (response.status_code, response.content) == (202, b"")
    assert wait_until_loaded(runner)["keep_alive"] == "10m0s"
    entry = {
        "Backend": "modelpack", "Model": "ai/tiny:latest",
        "ModelID": str(runner.store.get("tiny").digest), "Mode": "completion",
        "Config": {"context-size": 4096, "keep_alive": "10m0s"},
    }  # fmt: skip
    for path in ("", "?model=tiny", "?model=ai/tiny"):
        assert runner.http.get(f"/engines/_configure{path}").json() == [entry]
    assert runner.http.get("/engines/_configure?model=none").json() == []

    [engine] = runner.catalogue.engines
    assert engine.max_model_len == 4096
    engine.wait = asyncio.Event()
    body = {
        "model": "tiny", "stream": True, "messages": [{"role": "user", "content": "hi"}]
    }  # fmt: skip
    asked = runner.http.portal
    assert asked is not None
    streaming = asked.start_task_soon(_stream, runner, body)
    deadline = time.monotonic() + 20
    while not engine.submitted:
        assert time.monotonic() < deadline
    busy = runner.http.post("/engines/_configure", json={"model": "tiny", "context-size": 8192})
    assert busy.status_code == 409
    assert busy.text.startswith("runner already active")
    [model] = ps(runner)
    assert (model["in_use"], model["last_used"]) == (True, "0001-01-01T00:00:00Z")
    same = {"model": "tiny", "context-size": 4096, "keep_alive": "10m"}
    assert runner.http.post("/engines/_configure", json=same).status_code == 202
    assert runner.http.post("/engines/unload", json={"all": True}).json() == {"unloaded_runners": 0}
    asked.call(engine.wait.set)
    assert '"Hello"' in (text := streaming.result(20))
    assert text.endswith("data: [DONE]\n\n")

    wider = {"model": "tiny", "context-size": 8192}
    assert runner.http.post("/engines/llama.cpp/_configure", json=wider).status_code == 202
    wait_until_loaded(runner)
    assert runner.catalogue.engines[-1].max_model_len == 8192


async def _stream(runner: Runner, body: dict[str, Any]) -> str:
    """Return the stream of a chat, on the server's event loop."""
    import httpx

    transport = httpx.ASGITransport(runner.http.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        response = await client.post("/engines/v1/chat/completions", json=body)
        return response.text


def test_setting_up_what_is_being_loaded_waits(runner: Runner) -> None:
    runner.catalogue.gate.clear()
    for body in ({"context-size": 4096}, {"context-size": 4096}):
        response = runner.http.post("/engines/_configure", json={"model": "tiny"} | body)
        assert response.status_code == 202
    deadline = time.monotonic() + 20
    while not (found := ps(runner)):
        assert time.monotonic() < deadline
    assert found[0]["loading"] is True
    with ThreadPoolExecutor() as threads:
        wider = {"model": "tiny", "context-size": 8192}
        second = threads.submit(runner.http.post, "/engines/_configure", json=wider)
        runner.catalogue.gate.set()
        assert second.result(20).status_code == 202
    runner.chat()
    assert runner.catalogue.engines[-1].max_model_len == 8192


def test_loading_ahead_that_fails_is_only_logged(
    runner: Runner, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.catalogue, "needs", lambda model, settings, limit: 1 / 0)
    response = runner.http.post("/engines/_configure", json={"model": "tiny"})
    assert response.status_code == 202
    assert runner.chat().status_code == 500
    assert ps(runner) == []
