"""Sixty-four clients stream from a tiny model, and many disconnect: no resources leak.

`MODELPACK_LOAD_SECONDS` is for how long they come, 10 unless it says otherwise.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp

from modelpack_engine.engine import Engine
from modelpack_server.api.app import ModelServer
from modelpack_server.gateway.protection import Protection, protect
from modelpack_server.pool.pool import ModelPool
from tests.engine.serving.load.served import Served
from tests.engine.serving.load.streams import malformed
from tests.engine.serving.tiny import TinyCatalogue, chat_engine

CLIENTS = 64
SECONDS = float(os.environ.get("MODELPACK_LOAD_SECONDS", "10"))
PROC = Path("/proc/self")
MIB = 2**20
_EXECUTORS = ("asyncio_", "modelpack-json_", "modelpack-prompts_", "modelpack-rendering_")


def cramped() -> Engine:
    """An engine with too few blocks for its requests, so that it preempts some."""
    per_token = 2 * 2 * 2 * 16 * 4
    return chat_engine(max_num_seqs=16, max_waiting=44, kv_cache_bytes=40 * 16 * per_token,
                       max_num_batched_tokens=64)  # fmt: skip


@dataclass
class Loaded:
    """A server with measures of the resources that must not leak."""

    port: int
    catalogue: TinyCatalogue
    pools: list[ModelPool]

    def run(self, seconds: float, seed: int) -> dict[str, Any]:
        """Run clients for a while; return the results of their streams."""
        arguments = [str(self.port), str(CLIENTS), str(seconds), str(seed)]
        done = subprocess.run(
            [sys.executable, "-m", "tests.engine.serving.load.clients", *arguments],
            stdout=subprocess.PIPE,
            check=True,
            timeout=seconds + 60,
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def settle(self) -> None:
        """Wait until no request uses the model, by polling with requests."""
        deadline = time.monotonic() + 20
        served = Served(self.port, {})
        while any(entry.users or entry.waiting for entry in self.pools[0].entries()):
            connection = served.connect()
            connection.request("GET", "/pool")
            connection.getresponse().read()
            connection.close()
            assert time.monotonic() < deadline, "a lease was never given back"

    def kept(self) -> dict[str, int]:
        """Return the current amount of each resource that requests use."""
        [engine] = self.catalogue.engines
        stats = engine.stats()
        reaper = self.pools[0]._reaper
        assert reaper is not None
        threads = [thread.name for thread in threading.enumerate()]
        return {
            "leases": sum(entry.users + entry.waiting for entry in self.pools[0].entries()),
            "blocks": stats.blocks_used,
            "running": stats.num_running + stats.num_waiting,
            "streams": len(engine._streams) + len(engine._running_choices),
            "metered": len(engine.meter._last_token),
            "tasks": len([t for t in asyncio.all_tasks(reaper.get_loop()) if not t.done()]),
            "files": len(os.listdir(PROC / "fd")),
            # Threads of executors are bounded, and stay alive.
            "threads": len([name for name in threads if not name.startswith(_EXECUTORS)]),
        }


@pytest.fixture
def loaded() -> Iterator[Loaded]:
    catalogue = TinyCatalogue(cramped)
    pools: list[ModelPool] = []

    def pool() -> ModelPool:
        pools.append(ModelPool(catalogue, grace=0.0))
        return pools[-1]

    def wrap(app: ASGIApp) -> ASGIApp:
        return protect(app, Protection(report=lambda trace: None))

    with ModelServer(pool, address="127.0.0.1:0", wrap=wrap) as server:
        yield Loaded(int(server.url.rpartition(":")[2]), catalogue, pools)


@pytest.mark.long
@pytest.mark.skipif(not PROC.exists(), reason="needs Linux's accounts of a process")
def test_nothing_is_left_of_clients(loaded: Loaded) -> None:
    loaded.run(2, seed=1)
    loaded.settle()
    before = loaded.kept()
    limit = max(0.1, 4.0 / SECONDS) * MIB
    # Objects of earlier tests make full collections rare and the heap uneven. The growth from that
    # ends, while a leak goes on.
    gc.freeze()
    try:
        for seed in (2, 3, 4):
            with measured_memory() as samples:
                found = loaded.run(SECONDS, seed)
            if slope(samples.values) < limit:
                break
    finally:
        gc.unfreeze()
    loaded.settle()
    assert found["faults"] == []
    assert found["whole"] > 20
    assert found["left"] > 20
    after = settled(loaded.kept, before)
    assert after == before
    assert (after["leases"], after["blocks"], after["running"], after["streams"]) == (0, 0, 0, 0)
    [engine] = loaded.catalogue.engines
    assert engine.stats().num_preemptions > 0
    print(found, engine.stats(), f"{slope(samples.values) / 1024:.1f} KiB/s")
    assert slope(samples.values) < limit


def settled(look: Callable[[], dict[str, int]], wanted: dict[str, int]) -> dict[str, int]:
    """Return the value of `look` when it is the wanted one, or after a timeout."""
    deadline = time.monotonic() + 10
    while (seen := look()) != wanted and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    return seen


@dataclass
class Samples:
    """Record (seconds, resident bytes) every tenth of a second."""

    values: list[tuple[float, float]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def take(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self.over.wait(0.1):
            pages = int((PROC / "statm").read_text().split()[1])
            self.values.append((time.monotonic(), float(pages * page)))


@contextmanager
def measured_memory() -> Iterator[Samples]:
    samples = Samples()
    thread = threading.Thread(target=samples.take)
    thread.start()
    try:
        yield samples
    finally:
        samples.over.set()
        thread.join()


def slope(values: list[tuple[float, float]]) -> float:
    """Return the growth in bytes per second in the last two thirds of the time (least squares)."""
    late = values[len(values) // 3 :]
    assert len(late) > 10
    middle = sum(at for at, _ in late) / len(late)
    spread = sum((at - middle) ** 2 for at, _ in late)
    return sum((at - middle) * size for at, size in late) / spread


@pytest.mark.parametrize(
    ("family", "content"),
    [
        ("openai", b'data: {"id":1,"created":1,"model":1,"choices":[]}\n\n'),
        ("openai", b"data: [DONE]\n\n"),
        ("anthropic", b'event: message_start\ndata: {"type":"message_stop"}\n\n'),
        ("anthropic", b'event: message_stop\ndata: {"type":"message_stop"}\n\n'),
        ("ollama", b'{"message":{"role":"assistant","content":""},"done":false}\n'),
        ("ollama", b'{"message":{"role":"assistant","content":""},"done":true}'),
    ],
)
def test_streams_that_are_cut_are_seen(family: str, content: bytes) -> None:
    assert malformed(family, content)
