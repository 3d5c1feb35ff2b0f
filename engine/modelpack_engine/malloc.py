"""Tell glibc's allocator what MLX needs of it on a CPU.

By default freed megabytes go back to the kernel, which zeroes pages anew for the next step's
arrays: a tenth of a step of decoding.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: Bytes: arrays up to here come from the heap (glibc allows no more), of which so much is kept.
LARGEST_ON_HEAP, KEPT = 32 << 20, 256 << 20


def keep_freed_memory() -> bool:
    """Keep freed memory for the next step; return whether the allocator is one that can."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST_ON_HEAP) and mallopt(_M_TRIM_THRESHOLD, KEPT))
