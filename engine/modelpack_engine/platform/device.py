"""The device and its memory: GPU or CPU, the allocator, and staging buffers of steps."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections import Counter, deque
from dataclasses import dataclass
from functools import cache
from typing import Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.config import EngineConfig
from modelpack_engine.errors import EngineError


def choose_device(config: EngineConfig) -> Literal["cpu", "gpu"]:
    """Return "gpu" or "cpu" and make it MLX's default device.

    Raises `EngineError` if `config` asks for a GPU and MLX finds none.
    """
    has_gpu = mx.metal.is_available() or mx.cuda.is_available()
    if config.device == "gpu" and not has_gpu:
        raise EngineError("there is no GPU that MLX can use", hint="use the CPU: device cpu")
    use_gpu = has_gpu and config.device != "cpu"
    mx.set_default_device(mx.gpu if use_gpu else mx.cpu)
    return "gpu" if use_gpu else "cpu"


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


def total_memory() -> int:
    """Return the bytes of the GPU's memory that may be used."""
    info = mx.device_info()
    total = int(info["memory_size"] if "memory_size" in info else info["total_memory"])
    return min(total, int(info.get("max_recommended_working_set_size", total)))


def used_memory() -> int:
    """Return the bytes that are used: by MLX, and where the GPU tells, by other processes, too."""
    info = mx.device_info()
    used = mx.get_active_memory()
    if "free_memory" in info and "total_memory" in info:
        used = max(used, int(info["total_memory"]) - int(info["free_memory"]))
    return used


logger = logging.getLogger(__name__)

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
#: Numbers that the smallest staged array holds, and how many arrays of a size there are at most.
_FEWEST_NUMBERS, _MOST_ARRAYS = 256, 32


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


class Staging:
    """Arrays of int32 in which the host hands steps over, used again once these have ended.

    Every step has a turn. That all of a turn's work has ended is known when a token of a later turn
    has been read, as turns run one after the other. Without CUDA, arrays are like any others.
    """

    def __init__(self) -> None:
        self._turn = 0
        self._free: dict[int, list[_Slot]] = {}
        self._taken: deque[tuple[int, _Slot]] = deque()
        self._count: Counter[int] = Counter()

    def next_turn(self) -> int:
        """Begin another step; return its turn."""
        self._turn += 1
        return self._turn

    def read(self, turn: int) -> None:
        """Take note that the host has read a token of `turn`: those before it have ended."""
        while self._taken and self._taken[0][0] < turn:
            _, slot = self._taken.popleft()
            self._free[slot.array.size].append(slot)

    def put(self, numbers: NDArray[np.int32]) -> mx.array:
        """Return int32 numbers for the step whose turn it is, perhaps with others after them."""
        prefetcher = _prefetcher()
        if prefetcher is None:
            return mx.array(numbers)
        size = max(_FEWEST_NUMBERS, 1 << (len(numbers) - 1).bit_length())
        free = self._free.setdefault(size, [])
        if free:
            slot, is_kept = free.pop(), True
        else:  # those over the limit are not kept: nobody reads what is sampled, or not for long
            slot, is_kept = _Slot.of(size), self._count[size] < _MOST_ARRAYS
            self._count[size] += is_kept
        if is_kept:
            self._taken.append((self._turn, slot))
        slot.memory[: len(numbers)] = numbers
        prefetcher.send(slot.address, numbers.nbytes)
        return slot.array


@dataclass(frozen=True, slots=True)
class _Slot:
    """An array, and its memory as the host sees it."""

    array: mx.array
    memory: NDArray[np.int32]
    address: int

    @classmethod
    def of(cls, size: int) -> _Slot:
        array = mx.array(np.zeros(size, np.int32))
        address = np.asarray(array).__array_interface__["data"][0]
        memory = np.ctypeslib.as_array((ctypes.c_int32 * size).from_address(address))
        return cls(array, memory, address)
