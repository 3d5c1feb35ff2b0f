"""Copies of files: reading, writing and hashing at the same time, and what errors do to them."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from modelpack.errors import StorageFullError
from modelpack.store import file_copy
from modelpack.store.file_copy import CHUNK, DirectWriter, Hashing, copy_and_hash

CHUNKS = 24  # more than there are buffers
SECONDS = 30.0


def filler(seen: Callable[[int], None] = lambda _: None) -> Callable[[memoryview], int]:
    """Return a function that fills `CHUNKS` buffers and calls `seen` with the number so far."""
    count = 0

    def fill(buffer: memoryview) -> int:
        nonlocal count
        seen(count)
        if count == CHUNKS:
            return 0
        buffer[:] = bytes([count]) * CHUNK
        count += 1
        return CHUNK

    return fill


CONTENT = b"".join(bytes([number]) * CHUNK for number in range(CHUNKS))


def copy(
    path: Path,
    fill: Callable[[memoryview], int],
    seen: Callable[[int], None] = lambda _: None,
) -> str:
    """Copy to `path`; return the SHA-256."""
    hasher = hashlib.sha256()
    file = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        size = copy_and_hash(fill, file, path, Hashing(hasher, len(CONTENT)), seen)
    finally:
        os.close(file)
    assert size == len(CONTENT)
    return hasher.hexdigest()


def own_threads() -> list[str]:
    return [
        t.name for t in threading.enumerate() if t.name in ("modelpack-write", "modelpack-hash")
    ]


@pytest.mark.parametrize("processors", [1, 2, 8])
def test_the_copy_and_the_digest_are_of_all_bytes(
    processors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_copy, "_processors", lambda: processors)
    assert copy(tmp_path / "file", filler()) == hashlib.sha256(CONTENT).hexdigest()
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_reading_goes_on_while_a_write_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_copy, "_processors", lambda: 2)
    is_third = threading.Event()
    waited: list[bool] = []
    write = DirectWriter.write

    def slow(self: DirectWriter, view: memoryview) -> None:
        if not waited:
            waited.append(is_third.wait(SECONDS))
        write(self, view)

    monkeypatch.setattr(DirectWriter, "write", slow)
    copy(tmp_path / "file", filler(lambda count: is_third.set() if count == 2 else None))
    assert waited == [True]


@pytest.mark.parametrize("processors", [1, 2])
@pytest.mark.parametrize("failing", [0, CHUNKS // 2, CHUNKS - 1])
def test_a_failed_write_ends_the_copy(
    failing: int, processors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_copy, "_processors", lambda: processors)
    written: list[bytes] = []

    def full(self: DirectWriter, view: memoryview) -> None:
        if len(written) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(bytes(view[:1]))

    monkeypatch.setattr(DirectWriter, "write", full)
    with pytest.raises(StorageFullError, match="file"):
        copy(tmp_path / "file", filler())
    assert len(written) == failing  # nothing is written after the failure
    assert not own_threads()


def test_a_copy_that_is_stopped_leaves_no_thread(tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        copy(tmp_path / "file", filler(), stop)
    assert not own_threads()
