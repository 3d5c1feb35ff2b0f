"""AsyncEmbedder: one thread for MLX, batches of several requests, and how requests end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelpack_engine.async_engine import EngineState
from modelpack_engine.embedding import AsyncEmbedder, CrossEncoder, Embedder, load_embedder
from modelpack_engine.embedding.request import Prepared
from modelpack_engine.errors import ContextLengthError, EngineError, ModelLoadError, RequestError
from modelpack_engine.models import ModelFiles
from tests.engine.embedding.models import write_model

pytestmark = pytest.mark.long

Make = Callable[[], Embedder | CrossEncoder]


def tiny(root: Path, name: str = "bert") -> Make:
    files = ModelFiles.from_directory(write_model(root, name))
    return lambda: load_embedder(files, device="cpu")


class Gate:
    """Blocks the model's thread before its first batch, and counts batches."""

    def __init__(self, make: Make) -> None:
        self.make = make
        self.entered = threading.Event()
        self.open = threading.Event()
        self.batches: list[int] = []
        self.threads: set[int] = set()
        self.fails = 0

    def __call__(self) -> Embedder | CrossEncoder:
        model = self.make()
        run = model.run

        def gated(batch: Sequence[Prepared]) -> Any:
            self.entered.set()
            assert self.open.wait(60)
            self.batches.append(len(batch))
            self.threads.add(threading.get_ident())
            if len(self.batches) <= self.fails:
                raise ValueError("the device is gone")
            return run(batch)

        model.run = gated  # type: ignore[method-assign, assignment]
        return model


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tiny(tmp_path))
    yield gate
    gate.open.set()


@asynccontextmanager
async def running(make: Make) -> AsyncIterator[AsyncEmbedder]:
    model = AsyncEmbedder(make)
    await asyncio.to_thread(model.wait_until_ready, 60)
    try:
        yield model
    finally:
        await asyncio.to_thread(model.close)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 120))


TEXTS = [f"w{at} w{at + 1} w{at + 2}" for at in range(4, 24)]


def test_requests_that_wait_run_together(gate: Gate) -> None:
    async def work() -> None:
        async with running(gate) as model:
            first = asyncio.create_task(model.embed(["w50"]))
            await asyncio.to_thread(gate.entered.wait)
            tasks = [asyncio.create_task(model.embed([text])) for text in TEXTS]
            while model._calls.qsize() < len(TEXTS):
                await asyncio.sleep(0)
            gate.open.set()
            await first
            got = [(await task).vectors[0] for task in tasks]
            assert gate.batches == [1, len(TEXTS)]
            assert len(gate.threads) == 1
            assert threading.get_ident() not in gate.threads
        alone = gate.make()
        assert isinstance(alone, Embedder)
        assert np.abs(np.array(got) - np.array(alone.embed(TEXTS).vectors)).max() < 1e-5

    run(work)


def test_a_request_that_nobody_waits_for_is_dropped(gate: Gate) -> None:
    async def work() -> None:
        async with running(gate) as model:
            first = asyncio.create_task(model.embed(["w50"]))
            await asyncio.to_thread(gate.entered.wait)
            gone = asyncio.create_task(model.embed(TEXTS))
            while not model._calls.qsize():
                await asyncio.sleep(0)
            gone.cancel()
            await asyncio.wait([gone])
            gate.open.set()
            await first
            assert (await model.embed(["w60"])).token_counts == (3,)
            assert gate.batches == [1, 1]

    run(work)


def test_a_batch_that_fails_fails_its_requests_only(gate: Gate) -> None:
    async def work() -> None:
        gate.fails = 1
        gate.open.set()
        async with running(gate) as model:
            with pytest.raises(EngineError, match="the device is gone"):
                await model.embed(["w50"])
            assert (await model.embed(["w60"])).token_counts == (3,)
            assert model.state is EngineState.READY

    run(work)


def test_requests_fail_when_it_stops(gate: Gate) -> None:
    async def work() -> None:
        async with running(gate) as model:
            first = asyncio.create_task(model.embed(["w50"]))
            await asyncio.to_thread(gate.entered.wait)
            waiting = asyncio.create_task(model.embed(["w51"]))
            while not model._calls.qsize():
                await asyncio.sleep(0)
            model._calls.put(None)
            gate.open.set()
            await first
            with pytest.raises(EngineError, match="stopped"):
                await waiting
        with pytest.raises(EngineError, match="stopped"):
            await model.embed(["w50"])

    run(work)


def test_what_it_cannot_do_is_said(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tiny(tmp_path)) as model:
            assert not model.ranks_pairs
            assert model.max_model_len == 160
            assert model.vocab_size == 96
            assert model.memory_bytes > 0
            for request in (
                model.score([("a", "b")]),
                model.submit(None),  # type: ignore[arg-type]
                model.embed([""]),
            ):
                with pytest.raises(RequestError):
                    await request
            with pytest.raises(ContextLengthError):
                await model.embed([[5] * 161])
            assert (await model.embed([])).vectors == ()

    run(work)


def test_cross_encoder(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tiny(tmp_path, "rank-bert")) as model:
            assert model.ranks_pairs
            pairs = [("w5 w6", f"w{at} w9 w8 " * (1 + at % 3)) for at in range(4, 14)]
            scores = await model.score(pairs)
            alone = [(await model.score([pair])).values[0] for pair in pairs]
            assert np.abs(np.array(scores.values) - np.array(alone)).max() < 1e-5
            assert len({round(value, 3) for value in alone}) > 5
            assert scores.token_counts[:3] == (11, 14, 8)
            with pytest.raises(RequestError, match="no vectors"):
                await model.embed(["w5"])
            with pytest.raises(ContextLengthError, match="document 1 has 165 tokens"):
                await model.score([("w5", "w6"), ("w5 w6", "w7 " * 160)])
            cut = await model.score([("w5 w6", "w7 " * 160)], truncate=True)
            assert cut.token_counts == (160,)

    run(work)


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    write_model(tmp_path, "bert", config={"model_type": "t5"})
    model = AsyncEmbedder(lambda: load_embedder(ModelFiles.from_directory(tmp_path), device="cpu"))
    with pytest.raises(EngineError, match="t5"):
        model.wait_until_ready(60)
    assert isinstance(model.error, ModelLoadError)
    assert model.state is EngineState.FAILED
    model.close()


def test_a_stopped_model_frees_its_weights(tmp_path: Path) -> None:
    model = AsyncEmbedder(tiny(tmp_path))
    model.wait_until_ready(60)
    weights = weakref.ref(model.model)
    model.close()
    assert weights() is None


@pytest.mark.parametrize("module", ["modelpack_server.api.app", "modelpack_engine.models"])
def test_a_blas_is_chosen_before_mlx_is_loaded(module: str) -> None:
    code = f"""
import sys
import {module}
from modelpack_engine.platform import blas
assert "mlx.core" in sys.modules
print(blas.prepare().note)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert "imported before" not in done.stdout + done.stderr
