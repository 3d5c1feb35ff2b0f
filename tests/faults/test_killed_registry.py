"""The embedded registry, killed while clients push and pull: what it accepted, it has."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

import modelpack
from modelpack.progress import Stop, silent
from modelpack.storage import Watch
from tests.faults.instants import kills, seeded
from tests.faults.served import Load, serving

pytestmark = pytest.mark.long


def test_a_killed_registry(tmp_path: Path) -> None:
    _kill(tmp_path, 2)


def test_a_killed_registry_many_times(tmp_path: Path) -> None:
    _kill(tmp_path, kills())


def _kill(work: Path, times: int) -> None:
    load, root = Load(work), work / "root"
    with seeded() as chance:
        with serving(root) as server:
            assert load.run(server.host) == []
            calls = server.stop()
        _check(root, load)
        failed = 0
        for number in range(times):
            shutil.rmtree(root)
            load.forget()
            last = chance.randint(1, calls) if number % 2 == 0 else 0
            after = chance.uniform(0, 0.5)
            try:
                failed += _kill_once(root, load, last, after)
            except BaseException as error:
                error.add_note(f"killed at call {last} of {calls}, or after {after:.3f} s")
                raise
        assert failed >= times // 3, f"of {times} kills {failed} hit somebody"


def _kill_once(root: Path, load: Load, last: int, after: float) -> bool:
    """Kill the server at call `last`, or (0) after some seconds; whether a client noticed."""
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
