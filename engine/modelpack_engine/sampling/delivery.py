"""Delivery: the tokens of a step in the host's memory, without a copy by MLX (CUDA).

MLX copies an array from a GPU when the host reads it. The copy waits behind steps that are launched
already, so the host would get the tokens of a step when the next one ends, and launch the one after
it too late. Here, a kernel of the step itself writes its tokens to page-locked memory.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from functools import cache
from typing import cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.kernels import launch

#: The tokens of a place, and the places: at most two steps are in flight, one after the other.
_MOST_TOKENS, _PLACES = 4096, 4
_PORTABLE, _MAPPED = 1, 2  # CU_MEMHOSTALLOC_*
#: MLX keeps arrays of up to 8 bytes in the host's memory.
_IN_HOST_MEMORY = 8
_THREADS = 256


@dataclass(frozen=True, slots=True)
class Place:
    """Page-locked memory of the host, int32 [most tokens], and its address for kernels."""

    memory: NDArray[np.int32]
    address: mx.array

    @classmethod
    def at(cls, address: int) -> Place:
        """Return the place of `_MOST_TOKENS` tokens at an address."""
        memory = np.ctypeslib.as_array((ctypes.c_int32 * _MOST_TOKENS).from_address(address))
        return cls(memory, mx.array(address_halves(address)))


@dataclass(frozen=True, slots=True)
class Delivery:
    """Tokens that are on their way: evaluate `done` with the step."""

    done: mx.array
    memory: NDArray[np.int32]

    def read(self) -> list[int]:
        """Wait for the tokens."""
        mx.eval(self.done)  # waits for the step, and copies nothing
        return cast("list[int]", self.memory.tolist())


class Outbox:
    """Sends the tokens of steps to the host, in turn to a few places."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._next = 0

    def send(self, token_ids: mx.array) -> Delivery | None:
        """Send int32 [rows]; None if MLX reads them as fast, or CUDA has no such memory."""
        count = token_ids.size
        if not _IN_HOST_MEMORY < token_ids.nbytes <= _MOST_TOKENS * 4 or verdict() is not None:
            return None
        if not self._places:
            self._places = _take_places()
            weakref.finalize(self, _unused.append, self._places)
        self._next = (self._next + 1) % len(self._places)
        place = self._places[self._next]
        return Delivery(deliver(token_ids, place.address), place.memory[:count])


#: The places of samplers that are gone; page-locked memory is never freed.
_unused: list[list[Place]] = []


def _take_places() -> list[Place]:
    if _unused:
        return _unused.pop()
    size = _MOST_TOKENS * 4
    start = _allocate(size * _PLACES)
    return [Place.at(start + index * size) for index in range(_PLACES)]


def _allocate(num_bytes: int) -> int:
    """Return the address of page-locked memory (CUDA Driver API, `cuMemHostAlloc`)."""
    found = ctypes.c_void_p()
    allocate = _driver().cuMemHostAlloc
    allocate.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_uint]
    if code := allocate(ctypes.byref(found), num_bytes, _PORTABLE | _MAPPED):
        raise RuntimeError(f"CUDA refuses page-locked memory: error {code}")
    assert found.value is not None, "allocated"
    return found.value


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def address_halves(address: int) -> NDArray[np.int32]:
    """Return an address of the host as `deliver` reads it, int32 [4]."""
    return np.array([address & 0xFFFFFFFF, address >> 32, 0, 0], np.uint32).view(np.int32)


def deliver(numbers: mx.array, address: mx.array) -> mx.array:
    """Write int32 [n] to an address; return an array that is computed afterwards."""
    (done,) = launch.run(
        "deliver", [numbers, address], [], [],
        threads=numbers.size, group=_THREADS, shapes=[(1,)], dtypes=[mx.int32],
    )  # fmt: skip
    return done


def _compare() -> str | None:
    if launch.backend() != "cuda":
        return "the host and the GPU share their memory"
    try:
        place, *_ = places = _take_places()
    except OSError as error:
        return f"CUDA's driver is not found: {error}"
    wanted = np.arange(7, 7 + 3 * _THREADS + 5, dtype=np.int32)
    mx.eval(deliver(mx.array(wanted) + 1, place.address))
    right = np.array_equal(place.memory[: len(wanted)], wanted + 1)
    _unused.append(places)
    return None if right else "the host reads other tokens than were written"


#: None if tokens arrive, otherwise the problem.
verdict = launch.Verdict(_compare)
