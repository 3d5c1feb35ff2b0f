"""The device: GPU or CPU, its memory, the host's allocator, and staging buffers of steps."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.config import EngineConfig
from modelpack_engine.errors import EngineError
from modelpack_engine.platform.zeros import promised_bytes

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

#: The largest array on the heap (glibc allows no more), and the freed bytes that the heap keeps.
LARGEST_ON_HEAP, KEPT = 32 << 20, 256 << 20
MEMINFO = Path("/proc/meminfo")
#: The root of control groups, and which one the process is in.
CGROUP, GROUP_OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
#: What of a group's memory the system takes back for others (cgroup-v2.rst, memory.stat).
_RECLAIMABLE = ("active_file", "inactive_file", "slab_reclaimable")
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING

#: The size of the smallest staged array, and the most arrays of one size.
_FEWEST_NUMBERS, _MOST_ARRAYS = 256, 32


def choose_device(config: EngineConfig) -> Literal["cpu", "gpu"]:
    """Return "gpu" or "cpu" and make it MLX's default device.

    Raises `EngineError` if `config` asks for a GPU and MLX finds none.
    """
    has_gpu = mx.metal.is_available() or mx.cuda.is_available()
    if config.device == "gpu" and not has_gpu:
        raise EngineError("MLX found no GPU", hint="use the CPU: device cpu")
    use_gpu = has_gpu and config.device != "cpu"
    mx.set_default_device(mx.gpu if use_gpu else mx.cpu)
    return "gpu" if use_gpu else "cpu"


def uses_cuda(config: EngineConfig) -> bool:
    """Return whether models run on an NVIDIA GPU; raise as `choose_device` does."""
    return choose_device(config) == "gpu" and mx.cuda.is_available()


def usable_processors() -> int:
    """Return how many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_cores() -> int:
    """Return how many cores this process may run on: how many threads compute fastest.

    A core often counts as two processors; the second adds little, as both share its dot products.
    """
    if not hasattr(os, "sched_getaffinity"):
        return usable_processors()
    cores = set()
    for number in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            return usable_processors()
    return len(cores)


def keep_freed_memory() -> bool:
    """Make the allocator keep freed memory for the next step; return whether it can."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST_ON_HEAP) and mallopt(_M_TRIM_THRESHOLD, KEPT))


def total_memory() -> int:
    """Return the usable bytes of the GPU's memory."""
    info = mx.device_info()
    total = int(info["memory_size"] if "memory_size" in info else info["total_memory"])
    return min(total, int(info.get("max_recommended_working_set_size", total)))


def available_memory() -> int:
    """Return the bytes of the host's memory that this process can get without swapping.

    At most what limits of control groups leave (v2), a container's too, less what arrays of zeros
    still get. Half of the memory where the system does not report it, as macOS.
    """
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with suppress(OSError, KeyError, ValueError):
        found = 1024 * int(_fields(MEMINFO.read_text(), ":")["MemAvailable"].split()[0])
    found = min([found, *_rooms_of_groups()])
    return max(0, found - promised_bytes())


def _rooms_of_groups() -> Iterator[int]:
    """Return the bytes that each limit of the process's control groups leaves (v2)."""
    group = CGROUP
    with suppress(OSError, KeyError):
        # In a container, its own group is the root; ".." is a group outside of it.
        path = _fields(GROUP_OF_PROCESS.read_text(), "::")["0"].strip("/")
        group = CGROUP if ".." in path else CGROUP / path
    for directory in (group, *group.parents):
        for name in ("memory.max", "memory.high"):
            with suppress(OSError, KeyError, ValueError):  # "max" is no number
                limit = int((directory / name).read_text())
                used = int((directory / "memory.current").read_text())
                stat = _fields((directory / "memory.stat").read_text(), " ")
                yield limit - used + sum(int(stat[name]) for name in _RECLAIMABLE)
        if directory == CGROUP:
            return


def _fields(text: str, separator: str) -> dict[str, str]:
    pairs = (line.partition(separator) for line in text.splitlines())
    return {name: value for name, _, value in pairs}


def used_memory() -> int:
    """Return the used bytes: MLX's, and those of other processes if the GPU reports them."""
    info = mx.device_info()
    used = mx.get_active_memory()
    if "free_memory" in info and "total_memory" in info:
        used = max(used, int(info["total_memory"]) - int(info["free_memory"]))
    return used


def peak_memory() -> int:
    """Return the most bytes that MLX has held since its peak was reset.

    MLX counts a peak at allocations only, and CUDA graphs allocate nothing.
    """
    return max(mx.get_peak_memory(), mx.get_active_memory())


class Prefetcher:
    """Moves pages to the GPU by CUDA's driver, on its own stream, until the driver refuses once.

    Uses `cuMemPrefetchAsync` (CUDA Driver API, "Unified Addressing"). The device is that of the
    thread's context, which MLX has set; without a context, nothing is moved.
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
        """Move `num_bytes` at `address` to the GPU."""
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
        logger.info("CUDA refuses %s (error %d): steps will wait for their inputs", what, code)
        self._works = False


def _prefetcher() -> Prefetcher | None:
    """Return the prefetcher; None without CUDA, where memory is not moved."""
    if not mx.cuda.is_available() or mx.default_device().type != mx.DeviceType.gpu:
        return None
    return _loaded_prefetcher()


@cache
def _loaded_prefetcher() -> Prefetcher | None:
    try:
        return Prefetcher(ctypes.CDLL("libcuda.so.1"))
    except (OSError, AttributeError) as error:
        logger.info("CUDA's driver cannot move memory: %s", error)
        return None


class Staging:
    """Reusable int32 buffers for the inputs that the host passes to steps.

    Steps are numbered and run in order: when a token of a later step has been read, the buffers of
    earlier steps can be reused. Without CUDA, inputs are ordinary arrays.
    """

    def __init__(self) -> None:
        self._step = 0
        self._free: dict[int, list[_Slot]] = {}
        self._taken: deque[tuple[int, _Slot]] = deque()
        self._count: Counter[int] = Counter()

    def next_step(self) -> int:
        """Begin the next step; return its number."""
        self._step += 1
        return self._step

    def read(self, step: int) -> None:
        """Free the buffers of the steps before `step`, of which the host has read a token."""
        while self._taken and self._taken[0][0] < step:
            _, slot = self._taken.popleft()
            self._free[slot.array.size].append(slot)

    def put(self, numbers: NDArray[np.int32]) -> mx.array:
        """Return `numbers` on the device for the current step; the array may be longer."""
        prefetcher = _prefetcher()
        if prefetcher is None:
            return mx.array(numbers)
        size = max(_FEWEST_NUMBERS, 1 << (len(numbers) - 1).bit_length())
        free = self._free.setdefault(size, [])
        if free:
            slot, is_kept = free.pop(), True
        else:  # A buffer over the limit is not reused: no token may be read for a long time.
            slot, is_kept = _Slot.of(size), self._count[size] < _MOST_ARRAYS
            self._count[size] += is_kept
        if is_kept:
            self._taken.append((self._step, slot))
        slot.memory[: len(numbers)] = numbers
        prefetcher.send(slot.address, numbers.nbytes)
        return slot.array


@dataclass(frozen=True, slots=True)
class _Slot:
    """A buffer: an array on the device, and the same memory on the host."""

    array: mx.array
    memory: NDArray[np.int32]
    address: int

    @classmethod
    def of(cls, size: int) -> _Slot:
        array = mx.array(np.zeros(size, np.int32))
        address = np.asarray(array).__array_interface__["data"][0]
        memory = np.ctypeslib.as_array((ctypes.c_int32 * size).from_address(address))
        return cls(array, memory, address)
