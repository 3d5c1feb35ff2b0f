"""Disks that run full, take no changes, or have no locks: a clear error, and nothing broken."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from pathlib import Path

import pytest

import modelpack
from modelpack.errors import ModelpackError
from modelpack.registry_server import RegistryServer
from tests.cli.running import modelpack as command_line
from tests.cli.running import succeed
from tests.faults.killed import COMMANDS, NEW, OLD, SIZE, Place
from tests.models import tiny_gguf
from tests.registry.faulty import FaultyRegistry


def fill(disk: Path, leave: int) -> Path:
    """Use up the disk but for `leave` bytes."""
    found = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(bytes(max(0, found.f_bavail * found.f_frsize - leave)))
    return filler


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "leave"),
    [
        ("package", 0), ("pull", 0), ("import", 0), ("package", 64 * 1024), ("pull", SIZE // 2),
        ("import", SIZE // 2), ("package", SIZE + 4096), ("pull", SIZE + 4096),
    ],
)  # fmt: skip
def test_a_disk_that_is_too_small(name: str, leave: int, disk: Path, tmp_path: Path) -> None:
    """One that ends before the first byte, in the middle, and after the largest blob."""
    command = COMMANDS[name]()
    with FaultyRegistry() as registry:
        place = Place(tmp_path, registry, here=disk / "store")
        command.prepare(place)
        index = (place.here / "index.json").read_bytes()
        filler = fill(disk, leave)
        failed = place.run(*command.arguments(place))
        assert failed.code == 1, failed.out
        assert "Traceback" not in failed.out
        assert "hint: free some space" in failed.out
        if leave in (64 * 1024, SIZE // 2):
            assert "need" in failed.out
            assert "have" in failed.out
        assert (place.here / "index.json").read_bytes() == index
        filler.unlink()
        command.check_killed(place)
        again = place.run(*command.arguments(place))
        assert again.code == 0, again.out
        command.check_done(place)


def test_a_registry_whose_disk_is_full_says_so(disk: Path, tmp_path: Path) -> None:
    with FaultyRegistry() as registry, RegistryServer(disk / "s", address="127.0.0.1:0") as server:
        place = Place(tmp_path, registry)
        place.prepare()
        there = f"{server.host}/{OLD}"
        place.store.tag(OLD, modelpack.Reference.parse(there))
        filler = fill(disk, 256 * 1024)
        with pytest.raises(ModelpackError, match="no room for the upload"):
            modelpack.push(there, store=place.store)
        assert server.store.models() == ()
        filler.unlink()
        assert modelpack.push(there, store=place.store).digest == server.store.resolve(OLD).digest


@pytest.fixture
def read_only(disk: Path, tmp_path: Path) -> Path:
    """A store with a model, on a file system that takes no changes."""
    store = disk / "store"
    succeed("--store", store, "package", "--gguf", tiny_gguf(tmp_path), OLD)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    return store


@pytest.mark.parametrize(
    "words",
    ["list", f"inspect {OLD}", f"resolve {OLD}", "fsck", "fsck --fast", f"bundle {OLD} BUNDLE"],
)
def test_a_read_only_store_can_be_read(read_only: Path, words: str, tmp_path: Path) -> None:
    arguments = words.replace("BUNDLE", str(tmp_path / "bundle")).split()
    succeed("--store", read_only, *arguments)


def test_a_read_only_store_can_be_served(read_only: Path, tmp_path: Path) -> None:
    store = modelpack.Store(read_only)
    with RegistryServer(store, address="127.0.0.1:0", read_only=True) as server:
        back = modelpack.Store(tmp_path / "back")
        pulled = modelpack.pull(f"{server.host}/{OLD}", store=back)
    assert pulled.digest == store.resolve(OLD).digest


@pytest.mark.parametrize(
    "words", [f"package --gguf GGUF {NEW}", f"tag {OLD} {NEW}", f"rm {OLD}", "gc", "pull REMOTE"]
)
def test_a_read_only_store_is_not_written_to(read_only: Path, words: str, tmp_path: Path) -> None:
    with FaultyRegistry() as registry:
        there = f"{registry.host}/{NEW}"
        request = modelpack.PackageRequest(gguf=tmp_path / "tiny.gguf")
        origin = modelpack.Store(tmp_path / "origin")
        modelpack.package(there, request, push=True, store=origin)
        words = words.replace("GGUF", str(tmp_path / "tiny.gguf")).replace("REMOTE", there)
        failed = command_line("--store", read_only, *words.split())
    assert failed.code == 1, failed.out
    assert "Read-only file system" in failed.err
    hint = "hint: check the owner of the store and whether its file system is writable"
    assert hint in failed.err


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("words", [f"package --gguf GGUF {NEW}", f"tag {OLD} {NEW}", "gc"])
def test_a_store_without_locks(
    words: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file system of this machine lacks them: the system call fails as it does on others."""
    gguf, store = tiny_gguf(tmp_path), tmp_path / "store"
    succeed("--store", store, "package", "--gguf", gguf, OLD)

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    failed = command_line("--store", store, *words.replace("GGUF", str(gguf)).split())
    assert failed.code == 1
    assert f"cannot lock {store}" in failed.err
    assert "does not support locks" in failed.err
    assert "hint: " in failed.err
    for reading in ("list", "resolve"):
        succeed("--store", store, reading, *([OLD] if reading == "resolve" else []))
