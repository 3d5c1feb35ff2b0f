"""Eight processes at one store at once: no error, no name lost, nothing broken."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

import modelpack
from modelpack.progress import Stop, silent
from modelpack.storage import Watch
from tests.faults.crowd import LEAST, ROLES, commands, started
from tests.faults.served import serving
from tests.registry.faulty import FaultyRegistry
from tests.weights import write_safetensors


@pytest.mark.long
def test_eight_processes_for_five_seconds(tmp_path: Path) -> None:
    _crowd(tmp_path, 5)


@pytest.mark.long
def test_eight_processes_for_a_minute(tmp_path: Path) -> None:
    _crowd(tmp_path, 60)


def _crowd(work: Path, seconds: float) -> None:
    store = modelpack.Store(work / "store")
    pinned = modelpack.package("team/pinned:v1", _files(work / "pinned", b"p"), store=store)
    with FaultyRegistry() as registry, serving(store.root) as server:
        remote = f"{registry.host}/team/model:v1"
        for number, name in enumerate(("model", "remover")):
            there = f"{registry.host}/team/{name}:v1"
            request = _files(work / name, bytes([number]))
            origin = modelpack.Store(work / "origin")
            modelpack.package(there, request, push=True, store=origin)
        deadline = time.monotonic() + seconds
        crowd = {role: started(deadline, role, store.root, work, remote) for role in ROLES}
        visitor = _Visitor(server.host, work, deadline)
        visitor.start()
        for process in crowd.values():
            process.join(seconds + 120)
        visitor.join()
        codes = {role: process.exitcode for role, process in crowd.items()}
        told = {role: (work / f"{role}.out").read_text() for role, code in codes.items() if code}
        assert not told, told
        assert visitor.error is None, visitor.error
        assert server.stop() > 0
    for role in ROLES:
        assert len(commands(work, role)) >= LEAST
    report = modelpack.Store(store.root).fsck(watch=Watch(silent, Stop()))
    assert report.ok, report.problems
    assert _names(store) == _expected(work, remote) | visitor.pushed
    for name in visitor.pushed:
        assert store.resolve(name).digest == pinned.digest


class _Visitor(threading.Thread):
    """Pulls from the server the model that stays, and pushes it back under more names."""

    def __init__(self, host: str, work: Path, deadline: float) -> None:
        super().__init__()
        self.pushed: set[str] = set()
        self.error: BaseException | None = None
        self._host, self._work, self._deadline = host, work, deadline

    def run(self) -> None:
        number, own = 0, modelpack.Store(self._work / "visitor")
        there = f"{self._host}/team/pinned"
        try:
            while time.monotonic() < self._deadline:
                number += 1
                modelpack.pull(f"{there}:v1", store=own)
                own.tag(f"{there}:v1", modelpack.Reference.parse(f"{there}:visit-{number}"))
                modelpack.push(f"{there}:visit-{number}", store=own)
                self.pushed.add(f"docker.io/team/pinned:visit-{number}")
        except BaseException as error:
            self.error = error


def _files(folder: Path, content: bytes) -> modelpack.PackageRequest:
    write_safetensors(folder / "model.safetensors", content * 300_000)
    return modelpack.PackageRequest(safetensors_dir=folder)


def _names(store: modelpack.Store) -> set[str]:
    return {str(name) for model in modelpack.Store(store.root).models() for name in model.names}


def _expected(work: Path, remote: str) -> set[str]:
    """Return the names that what was run has left."""
    left = {"docker.io/team/pinned:v1", remote}
    for role in ROLES:
        for code, (verb, *words) in commands(work, role):
            assert code == 0
            if verb in ("tag", "package"):
                left.add(f"docker.io/{words[-1]}")
            elif verb == "rm":
                left.discard(f"docker.io/{words[-1]}")
            elif verb == "pull" and words[-1] != remote:
                left.add(words[-1])
            if verb == "rm":
                left.discard(words[-1])
    return left
