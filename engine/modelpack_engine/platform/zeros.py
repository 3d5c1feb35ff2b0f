"""Arrays of zeros whose memory the system gives when they are written, for the CPU's KV cache.

MLX writes zeros to a whole array. Here, it reads the array from a file, `_ZerosFile`, which does
not write to pages that the system has not given yet, since these read as zeros (proc(5),
/proc/PID/pagemap). The system gives them later, so they are not free: `promised_bytes` counts them.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import struct
import threading
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

_NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32"}
_PAGEMAP = Path("/proc/self/pagemap")
_PRESENT, _PRESENT_OR_SWAPPED = np.uint64(63), np.uint64(62)

#: Pages [first, last) of arrays, by the objects that hold these.
_promised = weakref.WeakKeyDictionary[object, list[tuple[int, int]]]()
_lock = threading.Lock()


def untouched_zeros(shape: tuple[int, ...], dtype: mx.Dtype, owner: object) -> mx.array:
    """Return zeros for `owner`, in memory that the system gives when it is written.

    They are MLX's own zeros, not evaluated, where the system does not say which memory it has
    given, and in builds for CUDA, whose memory it does not know.
    """
    if 0 in shape or not _PAGEMAP.exists() or mx.cuda.is_available():
        return mx.zeros(shape, dtype)
    file: Any = _ZerosFile(shape, dtype)
    try:
        found: Any = mx.load(file, format="safetensors")  # evaluates it
    except RuntimeError:  # no memory, which whoever evaluates zeros says
        return mx.zeros(shape, dtype)
    with _lock:
        _promised.setdefault(owner, []).extend(file.untouched)
    zeros: mx.array = found["zeros"]
    return zeros


def promised_bytes() -> int:
    """Return the bytes of arrays whose memory the system has not given yet."""
    with _lock:
        ranges = [each for of_owner in _promised.values() for each in of_owner]
    pages = 0
    for first, last in ranges:
        entries = _entries(first, last)
        if entries is not None:
            pages += int(np.count_nonzero(entries >> _PRESENT_OR_SWAPPED == 0))
    return pages * mmap.PAGESIZE


class _ZerosFile(io.RawIOBase):
    """A safetensors file with the array "zeros"; `untouched` are the pages that it left alone."""

    def __init__(self, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        size = math.prod(shape) * dtype.size
        fields = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (0, size)}
        header = json.dumps({"zeros": fields}).encode()
        self._header = struct.pack("<Q", len(header)) + header
        self._size, self._at = len(self._header) + size, 0
        self.untouched: list[tuple[int, int]] = []

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Write the next bytes of the file to `buffer`, but not to pages that read as zeros."""
        into = np.frombuffer(buffer, np.uint8)
        start, self._at = self._at, self._at + len(into)
        if start < len(self._header):
            header = self._header[start : self._at]
            into[: len(header)] = np.frombuffer(header, np.uint8)
            into = into[len(header) :]
        if len(into):
            self._clear(into)
        return self._at - start

    def _clear(self, into: NDArray[np.uint8]) -> None:
        into[0] = 0  # so that its page is there
        address, page = into.ctypes.data, mmap.PAGESIZE
        first, last = address // page + 1, (address + len(into)) // page
        if last > first and _is_untouched(first, last):
            into[: first * page - address] = 0
            into[last * page - address :] = 0
            self.untouched.append((first, last))
        else:
            into[:] = 0


def _is_untouched(first: int, last: int) -> bool:
    """Return whether pages [first, last) are neither in memory nor swapped; the one before is."""
    entries = _entries(first - 1, last)
    if entries is None or not entries[0] >> _PRESENT:
        return False
    return not np.any(entries[1:] >> _PRESENT_OR_SWAPPED)


def _entries(first: int, last: int) -> NDArray[np.uint64] | None:
    try:
        entries = np.fromfile(_PAGEMAP, np.uint64, last - first, offset=8 * first)
    except OSError:
        return None
    return entries if len(entries) == last - first else None
