"""Transfers: inputs of towers to the GPU, and embeddings back, through page-locked memory (CUDA).

The driver moves the memory of MLX's arrays page by page when the other side first uses it: for the
pixels of a photo of 0.8 megapixels, that takes the host 8 ms and an H200 2, and for its embeddings,
the host 9 ms. Here, kernels read and write page-locked memory, in the order of the GPU's work.
"""

from __future__ import annotations

import ctypes
import logging
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.kernels import launch
from modelpack_engine.platform.driver import DriverError, find_driver
from modelpack_engine.sampling.delivery import address_halves, deliver

#: Smaller arrays are left to MLX, and larger ones, as page-locked memory is never swapped.
LEAST_BYTES, MOST_BYTES = 1 << 16, 1 << 26
#: The places in page-locked memory of each direction, which transfers use in turn.
NUM_PLACES = 2
_TYPES = {np.dtype(np.float32): mx.float32, np.dtype(np.uint8): mx.uint8}
_THREADS = 256
#: Bytes that a thread copies.
_WIDTH = 16

_log = logging.getLogger(__name__)


class Arrival:
    """Bytes on their way to the host: `content` on the device, or in `memory` once it is computed.

    If the host reads an array of MLX, the copy waits for all steps in flight.
    """

    def __init__(self, content: mx.array, memory: NDArray[np.uint8] | None = None) -> None:
        self._content: mx.array | None = content
        self._found = memory

    @property
    def is_read(self) -> bool:
        """Whether the host has a copy."""
        return self._content is None

    def read(self) -> NDArray[np.uint8]:
        """Wait for the bytes."""
        if self._content is not None:
            mx.eval(self._content)
            self._found = np.array(self._content if self._found is None else self._found)
            self._content = None
        assert self._found is not None
        return self._found


@dataclass(slots=True, eq=False)
class _Place:
    """Page-locked memory, and its last transfer: what is computed after it, and what is read."""

    memory: NDArray[np.uint8]
    address: int
    done: mx.array | None = None
    arrival: weakref.ref[Arrival] | None = None

    @classmethod
    def of(cls, num_bytes: int) -> _Place:
        address = find_driver().allocate_host(num_bytes)
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        return cls(np.ctypeslib.as_array(memory), address)

    @property
    def is_read(self) -> bool:
        """Whether no bytes wait here for the host."""
        arrival = None if self.arrival is None else self.arrival()
        return arrival is None or arrival.is_read

    def wait(self) -> None:
        """Wait until no kernel uses the memory."""
        done, self.done = self.done, None
        if done is not None:
            mx.eval(done)

    def free(self) -> None:
        """Free the memory, once no kernel uses it."""
        self.wait()
        try:
            find_driver().free_host(self.address)
        except DriverError as error:
            _log.warning("page-locked memory is not freed: %s", error)


class _Places:
    """Up to `NUM_PLACES` places, which transfers of one direction use in turn."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._next = 0

    def take(self, num_bytes: int) -> _Place | None:
        """Return a place with so much memory that no kernel uses; None while all are to be read.

        Raises `DriverError` if there is no memory.
        """
        number = self._next
        place = self._places[number] if number < len(self._places) else None
        if place is not None:
            if not place.is_read:
                return None
            place.wait()
        if place is None or len(place.memory) < num_bytes:
            made = _Place.of(1 << (num_bytes - 1).bit_length())
            if place is not None:
                place.free()
            self._places[number : number + 1] = [made]
            place = made
        self._next = (number + 1) % NUM_PLACES
        return place

    def free(self) -> None:
        """Free all memory."""
        for place in self._places:
            place.free()
        self._places.clear()


class Transfers:
    """Moves arrays to the device and back; by MLX where there is no such memory or no GPU."""

    def __init__(self) -> None:
        self._works = verdict() is None  # kernels are compiled now, not in a step
        self._sent, self._taken = _Places(), _Places()
        for places in (self._sent, self._taken):
            weakref.finalize(self, places.free).atexit = False

    def send(self, parts: Sequence[NDArray[Any]]) -> mx.array:
        """Return arrays after each other, on the device."""
        is_copied = parts[0].dtype in _TYPES
        size = sum(part.nbytes for part in parts)
        place = self._place(self._sent, size) if is_copied else None
        return joined(parts) if place is None else _send(parts, place)

    def take(self, made: mx.array) -> Arrival:
        """Start copying an array to the host; never wait for the device."""
        place = self._place(self._taken, made.nbytes) if made.nbytes % 4 == 0 else None
        if place is not None:
            return _take(made, place)
        content = made.flatten().view(mx.uint8) | 0  # the view alone would share the memory
        mx.async_eval(content)
        return Arrival(content)

    def _place(self, places: _Places, num_bytes: int) -> _Place | None:
        """Return a place for so many bytes; None if MLX has to copy them."""
        if not self._works or not LEAST_BYTES <= num_bytes <= MOST_BYTES:
            return None
        try:
            return places.take(num_bytes)
        except DriverError as error:
            _log.warning("arrays are copied by MLX: %s", error)
            self._works = False
            return None


def joined(parts: Sequence[NDArray[Any]]) -> mx.array:
    """Return arrays after each other, as MLX copies them."""
    return mx.array(np.concatenate(parts) if parts[1:] else parts[0])


def _send(parts: Sequence[NDArray[Any]], place: _Place) -> mx.array:
    first, at = parts[0], 0
    for part in parts:
        place.memory[at : at + part.nbytes] = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        at += part.nbytes
    numbers, place.done = _fetch(place.address, -(-at // _WIDTH))
    mx.async_eval(numbers, place.done)
    shape = (sum(map(len, parts)), *first.shape[1:])
    return numbers.view(_TYPES[first.dtype])[: math.prod(shape)].reshape(shape)


def _take(made: mx.array, place: _Place) -> Arrival:
    done = place.done = deliver(made.flatten().view(mx.int32), _source(place.address, 0))
    mx.async_eval(done)
    arrival = Arrival(done, place.memory[: made.nbytes])
    place.arrival = weakref.ref(arrival)
    return arrival


def _fetch(address: int, fours: int) -> tuple[mx.array, mx.array]:
    """Return int32 [4 * fours] at an address of the host, and what is computed afterwards."""
    numbers, done = launch.run(
        "fetch", [_source(address, fours)], [], [],
        threads=fours, group=_THREADS, shapes=[(4 * fours,), (1,)], dtypes=[mx.int32, mx.int32],
    )  # fmt: skip
    return numbers, done


@lru_cache(maxsize=64)
def _source(address: int, fours: int) -> mx.array:
    halves = address_halves(address)
    halves[2] = fours
    return mx.array(halves)


def _compare() -> str | None:
    if launch.backend() != "cuda":
        return "the host and the GPU share their memory"
    values = np.arange(5 * _THREADS + 3, dtype=np.float32)
    try:
        place = _Place.of(2 * values.nbytes)
    except DriverError as error:
        return str(error)
    try:
        sent = _send([values, values[:7]], place)
        if not mx.array_equal(sent, joined([values, values[:7]])):
            return "the GPU reads other numbers than the host sent"
        if not np.array_equal(_take(sent + 1, place).read().view(np.float32), np.array(sent + 1)):
            return "the host reads other numbers than the GPU sent"
        return None
    finally:
        place.free()


#: None if arrays arrive, otherwise the problem.
verdict = launch.Verdict(_compare)
