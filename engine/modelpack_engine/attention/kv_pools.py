"""KV pools: the memory of one layer's keys and values, and the ranges of it that calls read.

`HeadMajorPools` are for CPUs, `TokenMajorPools` for GPUs; `paged.PagedKV` chooses. `KVLayout`
describes the keys and values of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx

from modelpack_engine import kernels
from modelpack_engine.kernels.quantised import Quantisation
from modelpack_engine.platform.zeros import untouched_zeros


class KeyRange:
    """The keys [start, stop) of each of `tables`, which are block tables of the same width.

    `first` is the first block if there is a single table of consecutive blocks, otherwise None. The
    layers of a step share the indices on the device.
    """

    def __init__(self, tables: Sequence[Sequence[int]], start: int, stop: int) -> None:
        self.tables, self.start, self.stop = tables, start, stop
        self.first = tables[0][0] if len(tables) == 1 and consecutive(tables[0]) else None
        self._blocks: mx.array | None = None
        self._by_head: dict[tuple[int, int], mx.array] = {}

    def blocks(self) -> mx.array:
        """Return the tables, int32 [sequences, blocks]."""
        if self._blocks is None:
            self._blocks = mx.array([list(table) for table in self.tables], mx.int32)
        return self._blocks

    def blocks_by_head(self, heads: int, num_blocks: int) -> mx.array:
        """Return the tables of each head, int32 [sequences, heads, blocks].

        They index pools that hold the `num_blocks` blocks of each head one head after another.
        """
        key = (heads, num_blocks)
        if key not in self._by_head:
            first = mx.arange(heads, dtype=mx.int32)[None, :, None] * num_blocks
            self._by_head[key] = self.blocks()[:, None, :] + first
        return self._by_head[key]


def consecutive(blocks: Sequence[int]) -> bool:
    """Return whether the block ids are consecutive."""
    return all(block == blocks[0] + index for index, block in enumerate(blocks))


@dataclass(frozen=True, slots=True)
class Span:
    """Keys [start, stop), counted from the first token of block `first_block` of a block table."""

    first_block: int
    num_blocks: int
    start: int
    stop: int


class Run(NamedTuple):
    """`length` rows, from `row`, whose slots are consecutive from `slot`."""

    row: int
    slot: int
    length: int


def visible(length: int, window: int | None, block_size: int, *, queries: int = 1) -> Span:
    """Return the keys that the last `queries` of `length` tokens see, in whole blocks.

    With a window of W tokens (the token itself included) each query sees W keys, so that
    W + queries - 1 keys are needed; blocks before them are left out. `start` counts the keys of the
    first block that no query sees.
    """
    oldest = 0 if window is None else max(0, length - queries + 1 - window)
    first_block = oldest // block_size
    last_block = -(-length // block_size)
    base = first_block * block_size
    return Span(first_block, last_block - first_block, oldest - base, length - base)


def length_groups(lengths: Sequence[int], spread: int = 2) -> list[list[int]]:
    """Return row indices in groups whose longest row is at most `spread` times the shortest.

    Rows of a group are padded to its longest row, so a single group would slow down short rows.
    Rows keep their order if one group holds all of them.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups: list[list[int]] = []
    shortest = 0
    for row in order:
        if groups and lengths[row] <= spread * shortest:
            groups[-1].append(row)
        else:
            groups.append([row])
            shortest = max(1, lengths[row])
    if len(groups) == 1:
        return [list(range(len(lengths)))]
    return groups


def slot_runs(slots: Sequence[int], most: int) -> list[Run] | None:
    """Return the runs of consecutive `slots`, or None if there are more than `most`."""
    runs: list[Run] = []
    for row, slot in enumerate(slots):
        if runs and slot == runs[-1].slot + runs[-1].length:
            runs[-1] = runs[-1]._replace(length=runs[-1].length + 1)
        elif len(runs) == most:
            return None
        else:
            runs.append(Run(row, slot, 1))
    return runs


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The keys and values of a token in one layer; `window` is how many it sees, None for all.

    Keys and values may differ in heads and size: latent attention keeps latents and rotary keys.
    If they are `quantised`, `dtype` is the type after dequantisation.
    """

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    dtype: mx.Dtype
    window: int | None = None
    quantised: Quantisation | None = None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in this layer."""
        widths = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        if self.quantised is not None:
            return 4 * sum(map(self.quantised.words, widths))
        return int(sum(widths) * self.dtype.size)

    @property
    def pool_dtype(self) -> mx.Dtype:
        """The type of the pools' elements."""
        return mx.uint32 if self.quantised is not None else self.dtype


class Pools(Protocol):
    """Keys and values of all slots; rows are [rows, heads, dim]."""

    keys: mx.array
    values: mx.array

    def write(
        self, keys: mx.array, values: mx.array, slots: mx.array, runs: Sequence[Run] | None
    ) -> None:
        """Write rows at `slots` (int32 [rows]); `runs` are the same slots if there are few runs."""

    def read(self, found: KeyRange) -> tuple[mx.array, mx.array]:
        """Return keys and values [sequences, heads, keys, dim]."""

    def zero(self, slots: mx.array) -> None:
        """Overwrite `slots` with zeros."""

    def blocks(self, indices: mx.array) -> list[mx.array]:
        """Return the contents of the blocks `indices` (int32 [n]) as arrays [n, …]."""

    def set_blocks(self, indices: mx.array, contents: list[mx.array]) -> None:
        """Write contents that `blocks` returned, of this pool or one with the same layout."""


class HeadMajorPools:
    """Pools [heads, slots, dim] for CPUs. Zeros at first, so that unwritten slots are finite.

    They take memory as blocks are written.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, block_size: int) -> None:
        self._num_blocks, self._block_size = num_blocks, block_size
        self._layout = layout
        slots = num_blocks * block_size
        dims = layout.key_dim, layout.value_dim
        if layout.quantised is not None:
            dims = layout.quantised.words(dims[0]), layout.quantised.words(dims[1])
        self.keys = untouched_zeros((layout.key_heads, slots, dims[0]), layout.pool_dtype, self)
        self.values = untouched_zeros((layout.value_heads, slots, dims[1]), layout.pool_dtype, self)

    def write(
        self, keys: mx.array, values: mx.array, slots: mx.array, runs: Sequence[Run] | None
    ) -> None:
        if (quantised := self._layout.quantised) is not None:
            if keys.shape == values.shape:  # in one call
                both = quantised.encode(mx.stack([keys, values]))
                keys, values = both[0], both[1]
            else:
                keys, values = quantised.encode(keys), quantised.encode(values)
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
        """Consecutive blocks are not copied, unless they are quantised."""
        keys, values = self._read(self.keys, found), self._read(self.values, found)
        if self._layout.quantised is None:
            return keys, values
        decode, dtype = self._layout.quantised.decode, self._layout.dtype
        return decode(keys, dtype), decode(values, dtype)

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
        for pool in (self.keys, self.values):
            pool[:, slots] = mx.zeros((), pool.dtype)

    def blocks(self, indices: mx.array) -> list[mx.array]:
        pools = [pool for pool in (self.keys, self.values) if pool.size]
        return [self._by_block(pool)[:, indices].swapaxes(0, 1) for pool in pools]

    def set_blocks(self, indices: mx.array, contents: list[mx.array]) -> None:
        for name, rows in zip(("keys", "values"), contents, strict=False):
            shape = getattr(self, name).shape
            pool = self._by_block(getattr(self, name))
            setattr(self, name, None)  # MLX writes in place if this is the only reference
            pool[:, indices] = rows.swapaxes(0, 1)
            setattr(self, name, pool.reshape(shape))

    def _by_block(self, pool: mx.array) -> mx.array:
        heads, _, dim = pool.shape
        return pool.reshape(heads, self._num_blocks, self._block_size * dim)


class TokenMajorPools:
    """Pools [slots, heads, dim] for GPUs; a kernel writes them if there is one."""

    def __init__(self, layout: KVLayout, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._layout = layout
        slots = num_blocks * block_size
        keys, values = (layout.key_heads, layout.key_dim), (layout.value_heads, layout.value_dim)
        if (quantised := layout.quantised) is not None:
            keys, values = ((1, quantised.words(heads * dim)) for heads, dim in (keys, values))
        self.keys = mx.zeros((slots, *keys), layout.pool_dtype)
        self.values = mx.zeros((slots, *values), layout.pool_dtype)

    def write(
        self, keys: mx.array, values: mx.array, slots: mx.array, runs: Sequence[Run] | None
    ) -> None:
        if values.shape[2] == 0:
            self.keys, _ = kernels.write_kv(keys, None, self.keys, None, slots)
            return
        written, values_pool = kernels.write_kv(
            keys, values, self.keys, self.values, slots, quantised=self._layout.quantised
        )
        assert values_pool is not None
        self.keys, self.values = written, values_pool

    def last_write(self) -> mx.array:
        """Return an input that orders a kernel after the last write: its token, or 0."""
        token = kernels.token_of(self.keys)
        return mx.zeros((1,), mx.int32) if token is None else token

    def set_written(self, token: mx.array) -> None:
        """Record that the kernel which returned `token` writes rows in place."""
        kernels.written(self.keys, token)
        kernels.written(self.values, token)

    def read(self, found: KeyRange) -> tuple[mx.array, mx.array]:
        keys, values = self._read(self.keys, found), self._read(self.values, found)
        if (layout := self._layout).quantised is None:
            return keys, values
        return self._decode(keys, layout.key_heads), self._decode(values, layout.value_heads)

    def _decode(self, words: mx.array, heads: int) -> mx.array:
        """Return [sequences, heads, keys, dim] of words [sequences, 1, keys, words]."""
        assert self._layout.quantised is not None
        rows = self._layout.quantised.decode(words[:, 0], self._layout.dtype)
        return rows.reshape(*rows.shape[:2], heads, -1).swapaxes(1, 2)

    def _read(self, pool: mx.array, found: KeyRange) -> mx.array:
        _, heads, dim = pool.shape
        sequences = len(found.tables)
        if dim == 0:
            return mx.zeros((sequences, heads, found.stop - found.start, 0), pool.dtype)
        by_block = pool.reshape(-1, self._block_size * heads * dim)
        keys = by_block[kernels.after(found.blocks(), pool)].reshape(sequences, -1, heads, dim)
        return mx.contiguous(keys[:, found.start : found.stop].swapaxes(1, 2))

    def zero(self, slots: mx.array) -> None:
        for pool in (self.keys, self.values):
            pool[kernels.after(slots, pool)] = mx.zeros((), pool.dtype)

    def blocks(self, indices: mx.array) -> list[mx.array]:
        return [
            pool.reshape(-1, self._block_size, *pool.shape[1:])[kernels.after(indices, pool)]
            for pool in (self.keys, self.values)
            if pool.size
        ]

    def set_blocks(self, indices: mx.array, contents: list[mx.array]) -> None:
        offsets = mx.arange(self._block_size, dtype=mx.int32)
        slots = (indices[:, None] * self._block_size + offsets).reshape(-1)
        rows = [part.reshape(-1, *part.shape[2:]) for part in contents]
        if self._layout.quantised is not None:  # No kernel writes quantised words.
            self.keys[kernels.after(slots, self.keys)] = rows[0]
            self.values[kernels.after(slots, self.values)] = rows[1]
        else:
            self.write(rows[0], rows[1] if len(rows) > 1 else rows[0][:, :, :0], slots, None)
