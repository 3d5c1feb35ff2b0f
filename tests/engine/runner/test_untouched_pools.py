"""Pools on CPUs are zeros whose memory the system gives when tokens are written."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.attention.kv_pools import HeadMajorPools, KVLayout
from modelpack_engine.platform import device, zeros
from modelpack_engine.platform.zeros import promised_bytes, untouched_zeros

PAGE = mmap.PAGESIZE
only_linux = pytest.mark.skipif(
    not Path("/proc/self/pagemap").exists(), reason="needs Linux's proc"
)


class Owner:
    """Holds arrays."""


def touched(array: mx.array) -> int:
    """Return how many pages of the array's memory the system has given."""
    address = np.array(array.view(mx.uint8), copy=False).ctypes.data
    first, last = -(-address // PAGE), (address + array.nbytes) // PAGE
    entries = np.fromfile("/proc/self/pagemap", np.uint64, last - first, offset=8 * first)
    return int(np.count_nonzero(entries >> np.uint64(62)))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.uint32])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (2, 4096, 3), (3, 0, 5)])
def test_they_are_zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    found = untouched_zeros(shape, dtype, Owner())
    assert (found.shape, found.dtype) == (shape, dtype)
    assert mx.array_equal(found, mx.zeros(shape, dtype))


@only_linux
def test_memory_is_given_for_the_rows_that_are_written() -> None:
    """In a process of its own: here, the allocator may have memory that other tests have used."""
    name = "check_memory_is_given_for_rows"
    code = f"import modelpack_engine; from {__name__} import {name}; {name}()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


def check_memory_is_given_for_rows() -> None:
    pools = HeadMajorPools(KVLayout(2, 64, 2, 64, mx.float32), 2048, 16)  # 16 MiB each
    mx.eval(pools.keys, pools.values)
    assert touched(pools.keys) == touched(pools.values) == 0
    rows = mx.ones((16, 2, 64))
    pools.write(rows, rows, mx.arange(16) + 16000, None)
    mx.eval(pools.keys, pools.values)
    assert 0 < touched(pools.keys) <= 8
    assert pools.keys.sum() == 16 * 2 * 64


class Reader:
    """Reads the array's part of a file into memory of the test."""

    def __init__(self, size: int) -> None:
        made: Any = zeros._ZerosFile((size,), mx.float32)
        self.file, self.header = made, made.seek(0, 2) - 4 * size

    def into(self, buffer: Any) -> bytes:
        self.file.seek(self.header)
        assert self.file.readinto(buffer) == len(buffer)
        return bytes(buffer)


@pytest.mark.parametrize("offset", [0, 1, 24, PAGE - 1])
def test_what_memory_held_before_is_overwritten(offset: int) -> None:
    size = 4 * PAGE
    memory = mmap.mmap(-1, 8 * PAGE)
    memory.write(b"\xff" * 8 * PAGE)
    part = memoryview(memory)[offset : offset + size]
    assert Reader(size // 4).into(part) == bytes(size)
    assert memory[:offset] == b"\xff" * offset
    assert memory[offset + size :] == b"\xff" * (8 * PAGE - offset - size)


@only_linux
@pytest.mark.parametrize("page", [0, 2, 5])
def test_a_page_that_was_touched_is_overwritten(page: int) -> None:
    """Pages of others at both ends hold a part of the array: the header of an allocation."""
    memory = mmap.mmap(-1, 8 * PAGE)
    memory[page * PAGE : (page + 1) * PAGE] = b"\xff" * PAGE
    assert Reader(5 * PAGE // 4).into(memoryview(memory)[24 : 24 + 5 * PAGE]) == bytes(5 * PAGE)


def test_all_is_written_where_nothing_says_which_pages_are_touched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(zeros, "_PAGEMAP", tmp_path / "none")
    memory = bytearray(b"\xff" * 8 * PAGE)
    assert Reader(2 * PAGE).into(memoryview(memory)) == bytes(8 * PAGE)
    (tmp_path / "none").write_bytes(bytes(8))  # it ends early
    memory = bytearray(b"\xff" * 8 * PAGE)
    assert Reader(2 * PAGE).into(memoryview(memory)) == bytes(8 * PAGE)


def test_arrays_in_memory_that_mlx_has_used_before() -> None:
    """The allocator may return memory that other arrays had."""
    for _ in range(20):
        used = [mx.full((64, 1024), float("nan")) for _ in range(16)]
        mx.eval(used)
        del used
        found = [untouched_zeros((64, 1024), mx.float32, Owner()) for _ in range(16)]
        mx.eval(found)
        assert not any(bool(mx.any(array != 0)) for array in found)


@only_linux
def test_what_is_promised_is_not_free() -> None:
    """A promise ends when the system gives the memory, or when the owner of the array is freed."""
    before, free = promised_bytes(), device.available_memory()
    pools = HeadMajorPools(KVLayout(2, 64, 2, 64, mx.float32), 131072, 16)  # 1 GiB each
    assert 0 <= (2 << 30) - (promised_bytes() - before) <= 8 * PAGE
    assert device.available_memory() < free - (1 << 30)
    memory = np.array(pools.keys.view(mx.uint8), copy=False).ctypes.data
    ctypes.memset(memory, 1, 64 * PAGE)
    assert promised_bytes() - before <= (2 << 30) - 60 * PAGE
    del pools
    assert promised_bytes() == before


@only_linux
def test_a_system_that_says_nothing_of_pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A sandbox may show zeros for all pages, also for one that was just written."""
    monkeypatch.setattr(zeros, "_PAGEMAP", tmp_path / "pagemap")
    monkeypatch.setattr(zeros, "_entries", lambda first, last: np.zeros(last - first, np.uint64))
    memory = bytearray(b"\xff" * 8 * PAGE)
    assert Reader(2 * PAGE).into(memoryview(memory)) == bytes(8 * PAGE)


@pytest.mark.parametrize("reason", ["no page map", "CUDA"])
def test_mlx_writes_the_zeros_elsewhere(
    reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if reason == "CUDA":
        monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    else:
        monkeypatch.setattr(zeros, "_PAGEMAP", tmp_path / "none")
    monkeypatch.setattr(zeros, "_ZerosFile", None)
    assert mx.array_equal(untouched_zeros((2, 3), mx.float32, Owner()), mx.zeros((2, 3)))


@pytest.mark.parametrize("own", ["", "system.slice/x.service", "../../outside"])
@pytest.mark.parametrize(
    ("limits", "current", "cached", "room"),
    [
        ({"max": "3000000"}, "1000000", "500000", 2500000),
        ({"max": "max", "high": "3000000"}, "1000000", "500000", 2500000),
        ({"max": "3000000", "high": "2000000"}, "1000000", "500000", 1500000),
        ({"max": "max", "high": "max"}, "1000000", "500000", None),
        ({"max": "1000000"}, "2000000", "0", 0),
        ({"max": "3000000"}, "many", "0", None),
        ({"max": ""}, "", "", None),
    ],
)
def test_limits_of_control_groups_bound_what_is_free(
    own: str, limits: dict[str, str], current: str, cached: str, room: int | None,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """Of the process's own group, and of the one around it; a container's is the root."""
    root, process = tmp_path / "root", tmp_path / "process"
    monkeypatch.setattr(device, "promised_bytes", lambda: 0)
    monkeypatch.setattr(device, "CGROUP", root)
    monkeypatch.setattr(device, "GROUP_OF_PROCESS", process)
    free = device.available_memory()
    process.write_text(f"2:cpu:/elsewhere\n0::/{own}\n")
    group = (root / own).parent if own.startswith("system") else root
    group.mkdir(parents=True, exist_ok=True)
    for name, limit in limits.items():
        (group / f"memory.{name}").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{current}\n")
    kinds = f"active_file {cached}\ninactive_file 0\nslab_reclaimable 0\n"
    (group / "memory.stat").write_text(f"anon 7\n{kinds}")
    found = device.available_memory()
    if room is None:
        assert found > free / 2
    else:
        assert found == room
