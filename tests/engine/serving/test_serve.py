"""`modelpack serve` as a process: a store, a model, a stream, and SIGTERM."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

import modelpack
from modelpack.operations.package import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_engine.platform import device
from modelpack_server.cli.serve import has_own_process
from tests.cli.running import modelpack as run
from tests.engine.serving.test_api import wait_until_ready
from tests.engine.serving.tiny import write_tiny


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    store = LayoutStore(tmp_path / "store")
    files = write_tiny(tmp_path / "files")
    modelpack.package("team/tiny", PackageRequest(safetensors_dir=files), store=store)
    process = subprocess.Popen(
        [sys.executable, "-m", "modelpack", "serve", "team/tiny", "--port", "0", "--device", "cpu",
         "--store", str(store.root), "--served-model-name", "gpt", "--kv-cache-bytes", "2000000",
         "--runtime-flags", "--temp 0 --n-predict 250", "--preset", "chat", "--max-body", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.long
def test_a_stream_ends_before_the_server_does(
    serving: tuple[subprocess.Popen[str], str],
) -> None:
    process, url = serving
    wait_until_ready(url)
    names = [model["id"] for model in requests.get(f"{url}/v1/models", timeout=10).json()["data"]]
    assert names == ["gpt", "team/tiny"]
    refused = requests.post(f"{url}/v1/completions", json={"prompt": "x" * 2**20}, timeout=10)
    assert refused.status_code == 413
    body = {"model": "gpt", "messages": [{"role": "user", "content": "hello"}], "stream": True,
            "ignore_eos": True}  # fmt: skip
    with requests.post(
        f"{url}/v1/chat/completions", json=body, stream=True, timeout=60,
        headers={"X-Request-ID": "drained"},
    ) as response:  # fmt: skip
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line.decode() for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    traces = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert len({trace["id"] for trace in traces}) == len(traces)
    [trace] = [trace for trace in traces if trace["id"] == "drained"]
    assert (trace["model"], trace["finish"]) == ("team/tiny", "length")
    assert trace["completion_tokens"] > 100
    assert {"queue_s", "ttft_s", "tpot_s"} <= set(trace)


@pytest.fixture
def store(tmp_path: Path) -> LayoutStore:
    """A store with `team/tiny` and `team/martian`, which has an unknown architecture."""
    store = LayoutStore(tmp_path / "store")
    files = write_tiny(tmp_path / "files")
    modelpack.package("team/tiny", PackageRequest(safetensors_dir=files), store=store)
    config = json.loads((files / "config.json").read_text())
    (files / "config.json").write_text(json.dumps(config | {"model_type": "martian"}))
    modelpack.package("team/martian", PackageRequest(safetensors_dir=files), store=store)
    return store


def command(store: LayoutStore, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "modelpack", "serve", *arguments, "--port", "0",
            "--device", "cpu", "--store", str(store.root),
            "--kv-cache-bytes", "2000000"]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["team/martian"], "martian: the architecture 'martian' is not supported"),
        (["team/tiny", "--max-model-len", "9999"], "tiny: --max-model-len is 9999, but this"),
    ],
)
def test_a_model_that_cannot_load_ends_the_server(
    store: LayoutStore, arguments: list[str], reason: str
) -> None:
    done = subprocess.run(
        command(store, *arguments), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "cannot load" in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"error: cannot load the model team/{reason}")
    assert "ready in" not in done.stderr


@pytest.mark.long
def test_a_server_that_keeps_going_says_so_once_and_ends_with_0(store: LayoutStore) -> None:
    process = subprocess.Popen(
        command(store, "team/martian", "--keep-going"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    body = {"model": "team/martian", "prompt": "x"}
    answer = requests.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 500
    assert requests.get(f"{url}/health", timeout=10).status_code == 503
    assert requests.get(f"{url}/v1/models", timeout=10).status_code == 200
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    said = [line for line in errors.splitlines() if "'martian' is not supported" in line]
    assert said
    assert all('"message":"cannot load the model team/martian' in line for line in said)


@pytest.mark.long
def test_a_server_says_when_it_is_ready(store: LayoutStore) -> None:
    process = subprocess.Popen(
        command(store, "tiny", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    found = json.loads(process.stdout.readline())
    assert requests.get(f"{found['url']}/version", timeout=10).status_code == 200
    assert (found["models"], found["pid"]) == (["tiny"], process.pid)
    lines = iter(process.stderr.readline, "")
    assert next(line for line in lines if "serving tiny" in line)
    assert next(line for line in lines if re.fullmatch(r"ready in \d+\.\d s\n", line))
    banner = [next(lines).split(maxsplit=1) for _ in range(5)]
    url = found["url"]
    assert [name for name, _ in banner] == ["chat", "API", "API", "device", "team/tiny"]
    assert banner[0][1].split() == ["page", f"{url}/"]
    assert (banner[1][1].strip(), banner[2][1].split()[1]) == (f"{url}/v1", f"{url}/docs")
    sizes = r"weights [\d.]+ [kM]B, KV cache [\d.]+ [kMG]B, context \d+"
    assert re.fullmatch(sizes, banner[4][1].strip())
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "loud"], "loud"),
        (["--runtime-flags", "--bogus 1"], "--bogus"),
        (["--runtime-flags", "--temp 'warm"], "quotation"),
        (["--max-body", "0"], "max-body"),
        (["--keep-alive", "soon"], "soon"),
        (["--memory", "much"], "much"),
        (["--served-model-name", "x"], "served-model-name"),
        (["--host", "0.0.0.0"], "--keys"),
    ],
)
def test_what_serve_refuses(tmp_path: Path, arguments: list[str], says: str) -> None:
    """The error comes before the lookup of the model, which does not exist."""
    if arguments[0] != "--served-model-name":
        arguments = ["missing.example/team/model", *arguments]
    result = run("serve", "--store", str(tmp_path / "store"), "--port", "0", *arguments)
    assert result.code == 2
    assert says in result.err


@pytest.mark.parametrize("cuda", [False, True])
def test_engines_have_own_processes_on_nvidia_gpus(
    monkeypatch: pytest.MonkeyPatch, cuda: bool
) -> None:
    monkeypatch.setattr(device, "choose_device", lambda _: "gpu")
    monkeypatch.setattr(device.mx.cuda, "is_available", lambda: cuda)
    ranks: Any = object()
    assert has_own_process(None, EngineConfig(), None) is cuda
    assert has_own_process(not cuda, EngineConfig(), None) is not cuda
    assert not has_own_process(None, EngineConfig(), ranks)


def test_engines_on_a_cpu_run_in_the_server() -> None:
    assert not has_own_process(None, EngineConfig(device="cpu"), None)
