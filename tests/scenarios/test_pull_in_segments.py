"""A pull over several connections, as a process that is killed or interrupted in the middle."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from tests.registry import faults
from tests.registry.faulty import FaultyRegistry
from tests.scenarios.processes import Ended, finish, run, staged_bytes, start, wait_until
from tests.weights import write_safetensors

MIB = 1024 * 1024
SIZE = 64 * MIB
CONNECTIONS = 4


@dataclass
class Slow:
    """A model in a registry that is slow, until it sends nothing more after `until` bytes.

    A slow connection is one that pauses; `stalled` is set once all of them have nothing more to
    give.
    """

    registry: FaultyRegistry
    reference: str
    weights: Descriptor
    until: int = 10 * SIZE
    sent: int = 0
    waiting: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    stalled: threading.Event = field(default_factory=threading.Event)

    def drip(self, exchange: faults.Exchange) -> None:
        reply = exchange.reply()
        exchange.send_head(reply.status, reply.headers | {"Content-Length": str(len(reply.body))})
        for position in range(0, len(reply.body), MIB):
            with self.lock:
                enough = self.sent >= self.until
                self.sent += 0 if enough else min(MIB, len(reply.body) - position)
                self.waiting += enough
                if self.waiting == CONNECTIONS:
                    self.stalled.set()
            if enough:
                exchange.keep_silent()
                return
            exchange.write(reply.body[position : position + MIB])
            if self.registry.closing.wait(0.015):  # 70 MB/s at most
                return


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Slow]:
    files = tmp_path / "model"
    write_safetensors(files / "model.safetensors", os.urandom(SIZE))
    with FaultyRegistry() as registry:
        reference = f"{registry.host}/team/model:v1"
        request = modelpack.PackageRequest(safetensors_dir=files)
        store = modelpack.Store(tmp_path / "origin")
        made = modelpack.package(reference, request, push=True, store=store)
        [weights] = [layer for layer in made.manifest.layers if layer.size > MIB]
        registry.requests.clear()
        slow = Slow(registry, reference, weights)
        registry.faults.add("GET", f"/blobs/{weights.digest}", slow.drip, times=None)
        yield slow


def pull(slow: Slow, store: Path) -> Ended:
    return run("--store", store, "pull", slow.reference, "--connections", str(CONNECTIONS))


def check_whole(slow: Slow, store: Path) -> None:
    stored = store / "blobs" / "sha256" / slow.weights.digest.encoded
    assert Digest.of(stored.read_bytes()) == slow.weights.digest
    left = {path.name for path in (store / "ingest").iterdir() if path.is_file()}
    assert left <= {"places.json"}


def test_a_slow_registry_is_asked_for_several_parts_at_a_time(slow: Slow, tmp_path: Path) -> None:
    ended = pull(slow, tmp_path / "store")
    assert ended.code == 0, ended.err
    check_whole(slow, tmp_path / "store")
    ranges = [request.headers.get("range") for request in slow.registry.seen("GET", "/blobs/")]
    assert len(set(filter(None, ranges))) > CONNECTIONS
    assert slow.sent < slow.weights.size * 1.1


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.scenario(1, 35)
def test_a_pull_that_was_ended_goes_on_where_it_was(
    slow: Slow, tmp_path: Path, number: signal.Signals
) -> None:
    """Ended at 60 %, it fetches less than 45 % once more; an interrupt takes two seconds."""
    store = tmp_path / "store"
    slow.until = slow.weights.size * 6 // 10
    process = start("--store", store, "pull", slow.reference)
    assert slow.stalled.wait(60), "all connections have given what they had"
    wait_until(lambda: staged_bytes(store) > slow.weights.size // 2, "most of it is written")
    process.send_signal(number)
    sent_at = time.monotonic()
    ended = finish(process)
    if number == signal.SIGINT:
        assert time.monotonic() - sent_at < 2
        assert ended.code == 130
        assert "Traceback" not in ended.err
    else:
        assert ended.code == -signal.SIGKILL
    assert run("--store", store, "list", "-q").out == ""
    assert not (store / "blobs" / "sha256" / slow.weights.digest.encoded).exists()
    [part] = store.glob("ingest/*.part")
    assert part.stat().st_blocks * 512 > slow.weights.size // 2

    before, slow.until = slow.sent, 10 * SIZE
    again = pull(slow, store)
    assert again.code == 0, again.err
    check_whole(slow, store)
    assert slow.sent - before < slow.weights.size * 0.50


def test_a_limit_holds_a_pull_back_and_keeps_it_to_one_connection(
    slow: Slow, tmp_path: Path
) -> None:
    started = time.monotonic()
    ended = run(
        "--store", tmp_path / "store", "pull", slow.reference, "--limit-rate", f"{SIZE / 1.5:.0f}"
    )
    assert ended.code == 0, ended.err
    assert time.monotonic() - started > 1
    assert slow.registry.count("GET", f"/blobs/{slow.weights.digest}") == 1
