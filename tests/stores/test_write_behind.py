"""The ranges that WriteBehind reports to the kernel, and when it stops."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from modelpack.store import file_copy
from modelpack.store.file_copy import WriteBehind

MIB = 1024 * 1024
WINDOW = file_copy._WRITE_BEHIND_BYTES


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The reported ranges: start and end of each."""
    ranges: list[tuple[int, int]] = []

    def advise(file: int, begin: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        ranges.append((begin, begin + length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return ranges


def test_every_window_is_told_once_to_start_writing(told: list[tuple[int, int]]) -> None:
    behind = WriteBehind(0, 5)
    for position in range(5, 4 * WINDOW, MIB):
        behind.written(position)
    assert told == [(5 + n * WINDOW, 5 + (n + 1) * WINDOW) for n in range(3)]


def test_a_slow_disk_is_left_alone(
    told: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(file_copy, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    behind = WriteBehind(0, 0)
    for position in range(WINDOW, 5 * WINDOW, WINDOW):
        behind.written(position)
    assert len(told) == 1


def test_a_file_that_takes_no_advice_is_no_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        WriteBehind(writing, 0).written(WINDOW)
    finally:
        os.close(reading)
        os.close(writing)
