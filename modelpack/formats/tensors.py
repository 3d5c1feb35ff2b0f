"""What a header says of one tensor, the same for all formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

#: More tensors than this in one file are refused. The largest mixture-of-experts models, with
#: every expert apart, have about as many in all their shards together; a parsed file of this many
#: takes 40 MB.
MAX_TENSORS = 100_000

#: Dimensions of one tensor. ggml has 4, and files for image models have been seen with 5.
MAX_DIMENSIONS = 8

#: Elements, and bytes, of anything: the largest number that a signed 64-bit integer holds.
MAX_COUNT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `offset` and `size` are bytes in the file's data section.

    `shape` is in the file's own order: GGUF puts the fastest-moving dimension first, safetensors
    last. `dtype` is the format's name for the type, such as `Q4_1` or `BF16`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


class Shapes:
    """Gives equal shapes one object: most tensors of a model share a few."""

    _MAX = 4096

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def shared(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return `shape` or an equal tuple seen before."""
        if len(self._known) < self._MAX:
            return self._known.setdefault(shape, shape)
        return self._known.get(shape, shape)


def repeated_name(tensors: Sequence[TensorInfo]) -> int | None:
    """Return the index of a tensor whose name another one has too, or None.

    Sorting takes far less memory than a set of all names.
    """
    names = [tensor.name for tensor in tensors]
    order = sorted(range(len(names)), key=names.__getitem__)
    return next((b for a, b in pairwise(order) if names[a] == names[b]), None)


def in_data_order(tensors: Sequence[TensorInfo]) -> Sequence[int]:
    """Return the indices of `tensors`, sorted by where their data starts, empty ones first."""
    if all(_starts_before(a, b) for a, b in pairwise(tensors)):  # as writers leave them
        return range(len(tensors))
    order = sorted(range(len(tensors)), key=lambda at: tensors[at].size)
    order.sort(key=lambda at: tensors[at].offset)
    return order


def _starts_before(a: TensorInfo, b: TensorInfo) -> bool:
    return a.offset < b.offset or (a.offset == b.offset and a.size <= b.size)
