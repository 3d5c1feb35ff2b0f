"""A registry that caches another one, killed while it fetches: it goes on where it was."""

from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.errors import ModelpackError
from modelpack.progress import Stop, silent
from modelpack.storage import Watch
from tests.faults.instants import kills, seeded
from tests.faults.served import IMPATIENT, serving
from tests.registry.faulty import FaultyRegistry
from tests.weights import write_safetensors

MIB = 1024 * 1024
NAME = "team/model:v1"


def test_a_killed_cache(tmp_path: Path) -> None:
    _kill(tmp_path, 2)


@pytest.mark.long
def test_a_killed_cache_many_times(tmp_path: Path) -> None:
    _kill(tmp_path, kills())


def _kill(work: Path, times: int) -> None:
    write_safetensors(work / "files" / "model.safetensors", random.Random(1).randbytes(6 * MIB))
    request = modelpack.PackageRequest(safetensors_dir=work / "files")
    with FaultyRegistry() as upstream, seeded() as chance:
        origin = modelpack.Store(work / "origin")
        made = modelpack.package(f"{upstream.host}/{NAME}", request, push=True, store=origin)
        place = _Cache(work, upstream, made.digest)
        place.fill()
        calls = place.calls
        cut = 0
        for number in range(times):
            last = chance.randint(1, calls) if number % 2 == 0 else 0
            after = chance.uniform(0, 0.3)
            try:
                cut += place.kill_once(last, after)
            except BaseException as error:
                error.add_note(f"killed at call {last} of {calls}, or after {after:.3f} s")
                raise
        assert cut >= times // 3, f"of {times} kills {cut} hit somebody"


class _Cache:
    def __init__(self, work: Path, upstream: FaultyRegistry, digest: Digest) -> None:
        self.calls = 0
        self._root, self._client = work / "root", work / "client"
        self._upstream, self._digest = upstream, digest

    def fill(self) -> None:
        """Serve, and pull through it, which has to work."""
        with serving(self._root, 0, "--upstream", self._upstream.host) as server:
            self._pull(server.host)
            self.calls = server.stop()
        self._check()

    def kill_once(self, last: int, after: float) -> bool:
        """Kill the server at call `last`, or (0) after some seconds; whether that cut a pull."""
        shutil.rmtree(self._root)
        cut = True
        with serving(self._root, last, "--upstream", self._upstream.host) as server:
            if server.host:
                killer = threading.Timer(after, server.process.kill)
                if not last:
                    killer.start()
                try:
                    self._pull(server.host)
                    cut = False
                except ModelpackError:
                    pass
                killer.cancel()
            server.kill()
        if (self._root / "index.json").exists():
            self._check()
        before = self._kept()
        self._upstream.requests.clear()
        self.fill()
        fetched = sum(request.sent_size for request in self._upstream.seen("GET", "/blobs/"))
        assert fetched <= self._kept() - before, "what was here was fetched again"
        return cut

    def _pull(self, host: str) -> None:
        shutil.rmtree(self._client, ignore_errors=True)
        store = modelpack.Store(self._client)
        assert (
            modelpack.pull(f"{host}/{NAME}", store=store, remote=IMPATIENT).digest == self._digest
        )

    def _kept(self) -> int:
        """The bytes of the blobs that are here, and of what is on its way."""
        paths = (*self._root.glob("blobs/*/*"), *self._root.glob("ingest/*.part"))
        return sum(path.stat().st_size for path in paths)

    def _check(self) -> None:
        report = modelpack.Store(self._root).fsck(watch=Watch(silent, Stop()))
        assert report.ok, report.problems
