"""A hostile tokenizer fails only its model, with an error that names it; panics end no thread."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
import tokenizers

import modelpack
from modelpack.builder.request import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack_engine.async_engine import AsyncEngine, EngineState
from modelpack_engine.config import EngineConfig
from modelpack_engine.embedding.async_embedder import AsyncEmbedder
from modelpack_engine.errors import EngineError, ModelLoadError, as_error, no_panics
from modelpack_engine.models import ModelFiles, json_tokenizer
from modelpack_engine.models import json_tokenizer as tokenizer_check
from modelpack_engine.models.tokenizer import Tokenizer, TokenText
from modelpack_engine.worker.process import WorkerProcess
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.loaders.hostile_tokenizers import HOSTILE, changed
from tests.engine.serving.tiny import write_tiny


class Panic(BaseException):
    """Like pyo3's exception for a panic, not a subclass of Exception."""


def files(text: str) -> ModelFiles:
    return ModelFiles((), "safetensors", archived={"tokenizer.json": text.encode()})


@pytest.mark.sample(4)
@pytest.mark.parametrize(("text", "why"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tokenizer_does_not_load(text: str, why: str) -> None:
    with pytest.raises(ModelLoadError, match=r"^tokenizer\.json") as caught:
        json_tokenizer.tokenizer_of(files(text), {})
    assert why in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_good_tokenizer_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_check, "_checks", {})
    started: list[int] = []
    original = WorkerProcess.__init__

    def counting(self: WorkerProcess, memory: int, **more: Any) -> None:
        started.append(memory)
        original(self, memory, **more)

    monkeypatch.setattr(WorkerProcess, "__init__", counting)
    for _ in range(2):
        tokenizer = json_tokenizer.tokenizer_of(files(changed()), {})
        assert tokenizer.encode("abab") == [3, 3]
    assert len(started) == 1


@pytest.mark.parametrize("seconds", [0.0, 60.0], ids=["hangs", "aborts"])
def test_a_tokenizer_that_hangs_or_aborts(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_check, "_checks", {})
    monkeypatch.setattr(tokenizer_check, "MAX_SECONDS", seconds)
    call = WorkerProcess.call

    def disturbed(self: WorkerProcess, message: bytes, limit: float) -> bytes:
        if limit:
            os.kill(self.pid, signal.SIGABRT)
        else:
            os.kill(self.pid, signal.SIGSTOP)
            monkeypatch.setattr("modelpack_engine.worker.process._START_SECONDS", 0.0)
        return call(self, message, limit)

    monkeypatch.setattr(WorkerProcess, "call", disturbed)
    with pytest.raises(ModelLoadError, match="crashed" if seconds else "longer than 0 s"):
        json_tokenizer.tokenizer_of(files(changed()), {})


def test_panics_at_run_time_are_errors() -> None:
    backend = tokenizers.Tokenizer.from_str(changed())
    bad = {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}
    broken = tokenizers.Tokenizer.from_str(changed(decoder=bad))
    with pytest.raises(BaseException, match="out of bounds") as caught:
        broken.decode([1])
    assert not isinstance(caught.value, Exception)
    tokenizer = Tokenizer(broken, text=TokenText.OTHER, eos_token_ids=[0])
    with pytest.raises(EngineError, match="the tokenizer failed: index out of bounds"):
        tokenizer.decode([1])
    with pytest.raises(EngineError, match="the tokenizer failed"):
        tokenizer.token_bytes(1)
    assert Tokenizer(backend, text=TokenText.BYTE_LEVEL, eos_token_ids=[0]).decode([1]) == "a"


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError]
)
def test_what_ends_a_program_or_a_task_is_no_panic(error: type[BaseException]) -> None:
    @no_panics("it")
    def raising() -> None:
        raise error

    with pytest.raises(error):
        raising()
    value = ValueError("x")
    assert as_error(value, "it") is value
    assert str(as_error(Panic(), "it")) == "it failed: Panic"


def raise_panic() -> Any:
    raise Panic("the roof is on fire")


@pytest.mark.parametrize("kind", [AsyncEngine, AsyncEmbedder])
def test_a_panic_while_loading_is_what_loading_reports(kind: Any) -> None:
    engine = kind(raise_panic)
    try:
        with pytest.raises(EngineError, match="the roof is on fire"):
            engine.wait_until_ready(60)
        assert engine.state is EngineState.FAILED
        assert isinstance(engine.error, EngineError)
    finally:
        engine.close()


@pytest.mark.long
def test_a_server_with_a_hostile_model_serves_the_others(tmp_path: Path) -> None:
    store = LayoutStore(tmp_path / "store")
    directory = write_tiny(tmp_path / "files", temperature=0.0)
    modelpack.package("good", PackageRequest(safetensors_dir=directory), store=store)
    (directory / "tokenizer.json").write_text(HOSTILE["panic of a charsmap"][0])
    modelpack.package("hostile", PackageRequest(safetensors_dir=directory), store=store)
    config = EngineConfig(device="cpu", max_num_seqs=4, kv_cache_bytes=2**21)
    with ModelServer(
        lambda: ModelPool(StoreCatalogue(store, config), grace=5.0), address="127.0.0.1:0"
    ) as server:
        for name, status in (("hostile", 500), ("good", 200), ("hostile", 500)):
            answer = requests.post(
                f"{server.url}/v1/completions",
                json={"model": name, "prompt": "a", "max_tokens": 1},
                timeout=120,
            )
            assert answer.status_code == status, answer.text
            if status != 200:
                assert answer.json()["error"]["message"].startswith("tokenizer.json: ")


def test_the_worker_loads_no_array_library() -> None:
    code = "import modelpack_engine.worker.program, sys; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout.split()
    assert not {"mlx", "numpy", "jinja2"} & set(loaded)
