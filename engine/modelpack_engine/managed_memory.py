"""Managed memory: where MLX on CUDA keeps arrays that the host makes, sent to the GPU ahead of use.

Host and GPU take its pages from one another. A kernel that touches one which the host has written
waits until it has moved, and the step waits with it: an eighth of a single stream's time. Asked for
as soon as it is written, it moves while the step is still being built.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache

import mlx.core as mx
import numpy as np

logger = logging.getLogger(__name__)

#: Arrays up to this many bytes are in memory of another kind, which the GPU reads over the bus.
_SMALL_BYTES = 8
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


class Prefetcher:
    """Asks CUDA's driver for pages to be moved, on a stream of its own; stops at its first refusal.

    CUDA Driver API, "Unified Addressing": `cuMemPrefetchAsync`. The device is that of the thread's
    context, which MLX has set; without one, nothing is asked for.
    """

    def __init__(self, driver: ctypes.CDLL) -> None:
        self._stream: ctypes.c_void_p | None = None
        self._device = ctypes.c_int()
        self._works = True
        self._get_device = driver.cuCtxGetDevice
        self._create = driver.cuStreamCreate
        self._prefetch = driver.cuMemPrefetchAsync
        self._prefetch.argtypes = [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]

    def send(self, address: int, num_bytes: int) -> None:
        """Have `num_bytes` at `address` moved to the GPU."""
        if not self._works:
            return
        if self._stream is None:
            if self._get_device(ctypes.byref(self._device)):
                return  # this thread has not used the GPU yet
            stream = ctypes.c_void_p()
            if code := self._create(ctypes.byref(stream), _NON_BLOCKING):
                self._refused("a stream", code)
                return
            self._stream = stream
        if code := self._prefetch(address, num_bytes, self._device, self._stream):
            self._refused("a prefetch", code)

    def _refused(self, what: str, code: int) -> None:
        logger.info(
            "CUDA refuses %s (error %d): steps will wait for what the host hands", what, code
        )
        self._works = False


@cache
def _prefetcher() -> Prefetcher | None:
    """Return what moves pages; None where memory does not move: without CUDA."""
    if not mx.cuda.is_available() or mx.default_device().type != mx.DeviceType.gpu:
        return None
    try:
        return Prefetcher(ctypes.CDLL("libcuda.so.1"))
    except (OSError, AttributeError) as error:
        logger.info("CUDA's driver cannot be asked to move memory: %s", error)
        return None


def sent(array: mx.array) -> mx.array:
    """Return an array that the host has just made, which is on its way to the GPU."""
    prefetcher = _prefetcher()
    if prefetcher is not None and array.nbytes > _SMALL_BYTES:
        prefetcher.send(np.asarray(array).__array_interface__["data"][0], array.nbytes)
    return array
