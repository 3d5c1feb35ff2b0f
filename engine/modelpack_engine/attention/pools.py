"""Pools: where one layer's keys and values lie, in slots of blocks.

On a GPU token by token, [slots, heads, dim], which is what the kernels take. On a CPU head by head,
[heads, slots, dim]: matrix products want the keys of one head side by side, and there a copy that
also transposes costs more than the attention itself.

A pool is written once in a step and then read. MLX writes in place only while nobody else holds the
array, so nothing keeps a reference to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from modelpack_engine.attention import kernels
from modelpack_engine.attention.keys import KeyRange
from modelpack_engine.attention.spans import Run


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What one layer caches per token; `window` is the number of tokens it sees, or None for all.

    Keys and values may differ in heads and size: latent attention keeps latents and rotary keys.
    """

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    dtype: mx.Dtype
    window: int | None = None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in this layer."""
        elements = self.key_heads * self.key_dim + self.value_heads * self.value_dim
        return int(elements * self.dtype.size)


class Pools(Protocol):
    """Keys and values of all slots; rows are [rows, heads, dim]."""

    keys: mx.array
    values: mx.array

    def write(
        self, keys: mx.array, values: mx.array, slots: mx.array, runs: Sequence[Run] | None
    ) -> None:
        """Write rows at `slots` (int32 [rows]), which are `runs` if these are few."""
        ...

    def read(self, found: KeyRange) -> tuple[mx.array, mx.array]:
        """Return keys and values [sequences, heads, keys, dim]."""
        ...

    def zero(self, slots: mx.array) -> None:
        """Overwrite `slots` with zeros."""
        ...


class HeadMajorPools:
    """Pools [heads, slots, dim], for a CPU. Zeros at first: what is never written is finite."""

    def __init__(self, layout: KVLayout, num_blocks: int, block_size: int) -> None:
        self._num_blocks, self._block_size = num_blocks, block_size
        slots = num_blocks * block_size
        self.keys = mx.zeros((layout.key_heads, slots, layout.key_dim), layout.dtype)
        self.values = mx.zeros((layout.value_heads, slots, layout.value_dim), layout.dtype)

    def write(
        self, keys: mx.array, values: mx.array, slots: mx.array, runs: Sequence[Run] | None
    ) -> None:
        """See `Pools`."""
        for pool, rows in ((self.keys, keys), (self.values, values)):
            if rows.shape[2] == 0:
                continue
            by_head = rows.swapaxes(0, 1)
            if runs is None:
                pool[:, slots] = by_head
            else:
                for row, slot, length in runs:
                    pool[:, slot : slot + length] = by_head[:, row : row + length]

    def read(self, found: KeyRange) -> tuple[mx.array, mx.array]:
        """See `Pools`; what lies in one piece is not copied."""
        return self._read(self.keys, found), self._read(self.values, found)

    def _read(self, pool: mx.array, found: KeyRange) -> mx.array:
        if found.first is not None:
            base = found.first * self._block_size
            return pool[None, :, base + found.start : base + found.stop]
        heads, _, dim = pool.shape
        if dim == 0:
            return mx.zeros((len(found.tables), heads, found.stop - found.start, 0), pool.dtype)
        by_block = pool.reshape(heads * self._num_blocks, self._block_size * dim)
        keys = by_block[found.blocks_by_head(heads, self._num_blocks)]
        keys = keys.reshape(len(found.tables), heads, -1, dim)
        return keys[:, :, found.start : found.stop]

    def zero(self, slots: mx.array) -> None:
        """See `Pools`."""
        for pool in (self.keys, self.values):
            pool[:, slots] = mx.zeros((), pool.dtype)


class TokenMajorPools:
    """Pools [slots, heads, dim], for a GPU; written by a kernel where there is one."""

    def __init__(self, layout: KVLayout, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        slots = num_blocks * block_size
        self.keys = mx.zeros((slots, layout.key_heads, layout.key_dim), layout.dtype)
        self.values = mx.zeros((slots, layout.value_heads, layout.value_dim), layout.dtype)

    def write(
        self, keys: mx.array, values: mx.array, slots: mx.array, runs: Sequence[Run] | None
    ) -> None:
        """See `Pools`."""
        if values.shape[2] == 0:
            self.keys, _ = kernels.write_kv(keys, None, self.keys, None, slots)
            return
        written, values_pool = kernels.write_kv(keys, values, self.keys, self.values, slots)
        assert values_pool is not None
        self.keys, self.values = written, values_pool

    def read(self, found: KeyRange) -> tuple[mx.array, mx.array]:
        """See `Pools`."""
        return self._read(self.keys, found), self._read(self.values, found)

    def _read(self, pool: mx.array, found: KeyRange) -> mx.array:
        _, heads, dim = pool.shape
        sequences = len(found.tables)
        if dim == 0:
            return mx.zeros((sequences, heads, found.stop - found.start, 0), pool.dtype)
        by_block = pool.reshape(-1, self._block_size * heads * dim)
        keys = by_block[kernels.after(found.blocks(), pool)].reshape(sequences, -1, heads, dim)
        return mx.contiguous(keys[:, found.start : found.stop].swapaxes(1, 2))

    def zero(self, slots: mx.array) -> None:
        """See `Pools`."""
        for pool in (self.keys, self.values):
            pool[kernels.after(slots, pool)] = mx.zeros((), pool.dtype)
