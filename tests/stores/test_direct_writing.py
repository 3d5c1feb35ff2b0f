"""Direct writes: the same bytes with and without support of the file system."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from modelpack.store import file_copy
from modelpack.store.file_copy import ALIGNMENT, DirectWriter

MIB = 1024 * 1024


def pages(content: bytes) -> memoryview:
    memory = mmap.mmap(-1, max(len(content), 1))
    memory[: len(content)] = content
    return memoryview(memory)[: len(content)]


def is_direct(file: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


@pytest.mark.parametrize("tail", [0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1])
def test_all_bytes_arrive(tail: int, tmp_path: Path) -> None:
    content = os.urandom(8 * MIB + tail)
    file = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)
    try:
        writer = DirectWriter(file, len(content))
        for start in range(0, len(content), MIB):
            writer.write(pages(content[start : start + MIB]))
    finally:
        os.close(file)
    assert (tmp_path / "file").read_bytes() == content


def test_memory_that_is_not_aligned_goes_through_the_cache(tmp_path: Path) -> None:
    content = os.urandom(2 * ALIGNMENT)
    file = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)
    try:
        writer = DirectWriter(file, 8 * MIB)
        writer.write(pages(b"x" + content)[1:])
        assert not is_direct(file)
    finally:
        os.close(file)
    assert (tmp_path / "file").read_bytes() == content


def test_small_files_are_left_in_the_cache(tmp_path: Path) -> None:
    file = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)
    try:
        DirectWriter(file, 4096).write(pages(b"a" * ALIGNMENT))
        assert not is_direct(file)
    finally:
        os.close(file)


def test_a_file_system_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(file_copy.DirectWriter, "_switch", lambda *_, on: False)
            writer = DirectWriter(file, 8 * MIB)
        writer.write(pages(b"b" * ALIGNMENT))
    finally:
        os.close(file)
    assert (tmp_path / "file").read_bytes() == b"b" * ALIGNMENT


def test_a_write_that_is_taken_in_part_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(4 * ALIGNMENT)
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, view: real(file, view[:ALIGNMENT]))
    file = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)
    try:
        DirectWriter(file, 8 * MIB).write(pages(content))
    finally:
        os.close(file)
    assert (tmp_path / "file").read_bytes() == content


def test_a_full_disk_is_still_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)
    try:
        writer = DirectWriter(file, 8 * MIB)
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            writer.write(pages(b"c" * ALIGNMENT))
    finally:
        os.close(file)
