"""kill -9 at random instants: nothing is broken, nothing is lost, and little is done twice."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.errors import ModelpackError
from modelpack.progress import Stop, silent
from modelpack.storage import Watch
from tests.faults.instants import kills, seeded
from tests.faults.killed import COMMANDS, Command, Place, died, prepared, unchanged
from tests.faults.served import IMPATIENT, Load, serving
from tests.registry.faulty import FaultyRegistry
from tests.weights import write_safetensors

pytestmark = pytest.mark.long

MIB = 1024 * 1024
NAME = "team/model:v1"


def kill_often(
    chance: random.Random, calls: int, seconds: float, kill: Callable[[int, float], bool]
) -> None:
    """Call `kill(call, after)` many times, with the number of a system call or (0) a time.

    It returns whether the kill came in time, as at least a third of them must.
    """
    times = kills()
    hits = 0
    for number in range(times):
        call = chance.randint(1, calls) if number % 2 == 0 else 0
        after = chance.uniform(0, seconds)
        try:
            hits += kill(call, after)
        except BaseException as error:
            error.add_note(f"killed at call {call} of {calls}, or (0) after {after:.3f} s")
            raise
    assert hits >= times // 3, f"of {times} kills {hits} came in time"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command(name: str, tmp_path: Path) -> None:
    command = COMMANDS[name]()
    with seeded() as chance, prepared(command, tmp_path / "place") as place:
        with unchanged(place):
            whole = place.run(*command.arguments(place))
            assert whole.code == 0, whole.out
        kill_often(
            chance, whole.calls, whole.seconds,
            lambda call, after: _kill_command(command, place, call, after),
        )  # fmt: skip


def _kill_command(command: Command, place: Place, call: int, after: float) -> bool:
    with unchanged(place):
        arguments = command.arguments(place)
        first = place.run(*arguments, last=call, seconds=None if call else after)
        command.check_killed(place)
        if command.is_needed(place):
            again = place.run(*arguments)
            assert again.code == 0, again.out
        command.check_done(place)
    return died(first)


def test_a_killed_registry(tmp_path: Path) -> None:
    """What the embedded registry accepted from clients, it has."""
    load, root = Load(tmp_path), tmp_path / "root"
    with seeded() as chance:
        with serving(root) as server:
            assert load.run(server.host) == []
            calls = server.stop()
        _check(root, load)
        kill_often(chance, calls, 0.5, lambda call, after: _kill_registry(root, load, call, after))


def _kill_registry(root: Path, load: Load, last: int, after: float) -> bool:
    """Kill the server at a call, or (0) after some seconds; return whether a client noticed."""
    shutil.rmtree(root)
    load.forget()
    failed = True
    with serving(root, last) as server:
        if server.host:
            killer = threading.Timer(after, server.process.kill)
            if not last:
                killer.start()
            failed = bool(load.run(server.host))
            killer.cancel()
        server.kill()
    if (root / "index.json").exists():
        _check(root, load)
    blobs = root / "blobs" / "sha256"
    there = sum(path.stat().st_size for path in blobs.iterdir()) if blobs.is_dir() else 0
    with serving(root) as server:
        assert load.run(server.host) == []
        server.stop()
    assert load.sent <= load.size - there + _manifests(root), "what was there was sent again"
    assert len(load.done) == load.models
    _check(root, load)
    return failed


def _manifests(root: Path) -> int:
    """The bytes of the small blobs: manifests and configs, which are no part of what is sent."""
    sizes = (path.stat().st_size for path in (root / "blobs" / "sha256").iterdir())
    return sum(size for size in sizes if size < 64 * 1024)


def _check(root: Path, load: Load) -> None:
    """Assert that the store is clean, and that everything that was accepted is there."""
    store = modelpack.Store(root, create=False)
    report = store.fsck(watch=Watch(silent, Stop()))
    assert report.ok, report.problems
    for name, digest in load.done.items():
        assert store.resolve(name).digest == digest
        modelpack.resolve(name, store=store)


def test_a_killed_cache(tmp_path: Path) -> None:
    """A registry that caches another one goes on where it was."""
    write_safetensors(tmp_path / "files" / "model.safetensors", random.Random(1).randbytes(6 * MIB))
    request = modelpack.PackageRequest(safetensors_dir=tmp_path / "files")
    with FaultyRegistry() as upstream, seeded() as chance:
        origin = modelpack.Store(tmp_path / "origin")
        made = modelpack.package(f"{upstream.host}/{NAME}", request, push=True, store=origin)
        cache = _Cache(tmp_path, upstream, made.digest)
        cache.fill()
        kill_often(chance, cache.calls, 0.3, cache.kill_once)


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
        """Kill the server at a call, or (0) after some seconds; return whether it cut a pull."""
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
