"""BlockContents: what blocks hold in all layers, as bytes that can leave the device.

A row of bytes is a block: layer by layer its keys, then its values, each as its pool has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from modelpack_engine.attention.paged import PagedKV


class BlockContents:
    """Reads and writes blocks of all the pools of a model, many at a time."""

    def __init__(self, paged: Sequence[PagedKV]) -> None:
        self._paged = paged
        # MLX knows shapes and types without computing anything.
        some = [kv.pools.blocks(mx.zeros((1,), mx.int32)) for kv in paged]
        self._parts = [[(part.shape[1:], part.dtype) for part in parts] for parts in some]
        sizes = [math.prod(shape) * dtype.size for of in self._parts for shape, dtype in of]
        #: Bytes of one block.
        self.length = sum(sizes)

    def describe(self) -> list[str]:
        """Say what the bytes mean, as far as an equal text means equal bytes."""
        return [
            f"{type(kv.pools).__name__} {kv.layout}: {[(shape, str(dtype)) for shape, dtype in of]}"
            for kv, of in zip(self._paged, self._parts, strict=True)
        ]

    def read(self, blocks: Sequence[int]) -> mx.array:
        """Return uint8 [blocks, length], not yet computed. It holds the pools until it is."""
        indices = mx.array(list(blocks), mx.int32)
        rows = [
            mx.contiguous(part).reshape(len(blocks), -1).view(mx.uint8)
            for kv in self._paged
            for part in kv.pools.blocks(indices)
        ]
        return mx.concatenate(rows, axis=1)

    def write(self, blocks: Sequence[int], contents: Sequence[bytes]) -> None:
        """Have each of `blocks` hold what was read of one, once the pools are next computed."""
        indices = mx.array(list(blocks), mx.int32)
        joined: Any = memoryview(b"".join(contents)).cast("B", (len(blocks), self.length))
        rows = mx.array(joined)
        start = 0
        for kv, parts in zip(self._paged, self._parts, strict=True):
            arrays = []
            for shape, dtype in parts:
                stop = start + math.prod(shape) * dtype.size
                part = mx.contiguous(rows[:, start:stop]).view(dtype)
                arrays.append(part.reshape(len(blocks), *shape))
                start = stop
            kv.pools.set_blocks(indices, arrays)
