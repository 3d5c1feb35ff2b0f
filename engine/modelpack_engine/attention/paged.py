"""PagedKV: one layer's paged keys and values, in the place of mlx-lm's KVCache.

Every scheduled token is one batch row of length 1, in prefill and decode, so `offset` is a vector
with a position per row. `update_and_fetch` writes the new rows into the pool and returns handles;
`attend` computes attention when the handles reach the attention function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from modelpack_engine import kernels
from modelpack_engine.attention import gather
from modelpack_engine.attention.cache_handle import (
    KVHandle,
    LostHandleError,
    RowMask,
    make_handle,
    make_row_mask,
)
from modelpack_engine.attention.kv_pools import (
    HeadMajorPools,
    KeyRange,
    KVLayout,
    Pools,
    TokenMajorPools,
    visible,
)
from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.kernels.recording import join

#: Chunks of up to this many tokens attend like decode rows if there is a kernel for them.
_SHORT_CHUNK = 8


@dataclass(frozen=True, slots=True)
class _How:
    """The options of a layer's attention call."""

    scale: float
    window: int | None
    sinks: mx.array | None
    softcap: float | None
    key_dtype: mx.Dtype | None


class PagedKV:
    """Keys and values of one layer, in blocks; see the module's docstring."""

    def __init__(
        self,
        layout: KVLayout,
        step: StepInputs,
        *,
        num_blocks: int,
        name: str = "layer",
        frees_blocks: bool = False,
    ) -> None:
        self.step = step
        self.name = name
        self.frees_blocks = frees_blocks  # blocks before the layout's window are freed
        self.replace_pools(layout, num_blocks)
        self._open = False
        self._handles: tuple[KVHandle, KVHandle] | None = None
        self.row_masks = False

    def replace_pools(self, layout: KVLayout, num_blocks: int) -> None:
        """Allocate zeroed pools for `layout`; the contents of the old ones are lost."""
        self.layout = layout
        kind = HeadMajorPools if self.step.exact else TokenMajorPools
        self.pools: Pools = kind(layout, num_blocks, self.step.block_size)

    @property
    def offset(self) -> mx.array:
        """Positions of the rows, int32 [rows]."""
        return self.step.positions

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> RowMask | None:
        """Return None, as attention is causal per row, or a mask with the requested window."""
        if window_size is None and not self.row_masks:
            return None
        return make_row_mask(window_size, self.layout.window, return_array)

    def write(self, keys: mx.array, values: mx.array) -> None:
        """Write rows [rows, heads, 1, dim] at the step's slots."""
        layout = self.layout
        self.pools.write(
            keys.reshape(keys.shape[0], layout.key_heads, layout.key_dim),
            values.reshape(values.shape[0], layout.value_heads, layout.value_dim),
            self.step.slots,
            self.step.slot_runs,
        )

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[KVHandle, KVHandle]:
        """Write the step's rows and return them as handles."""
        if self._open:
            raise LostHandleError("the layer did not attend to its last keys", cache=self)
        self._open = True
        self.write(keys, values)
        self._handles = make_handle(keys, self, "keys"), make_handle(values, self, "values")
        return self._handles

    def keys_and_values(self) -> tuple[KVHandle, KVHandle]:
        """Return the step's handles again, for layers that share the keys of another layer."""
        if self._handles is None:
            raise LostHandleError("the cache is read before it is written", cache=self)
        return self._handles

    def fetch(self, row: int, chunk: int | None) -> tuple[mx.array, mx.array]:
        """Return the keys and values [1, heads, keys, dim] that a decode row or a chunk may see.

        In order, its own rows last; keys before the window of its first query are left out.
        """
        return self.pools.read(self.step.keys_of(row, chunk, self.layout.window))

    def close(self) -> None:
        """End the step; raise `LostHandleError` if its keys never reached attention."""
        lost, self._open, self._handles = self._open, False, None
        if lost:
            raise LostHandleError("the layer attended without the paged cache", cache=self)

    def abandon(self) -> None:
        """End a step that failed."""
        self._open, self._handles = False, None

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        window: int | None = None,
        sinks: mx.array | None = None,
        softcap: float | None = None,
        query_pe: mx.array | None = None,
        key_dtype: mx.Dtype | None = None,
    ) -> mx.array:
        """Return [rows, heads, 1, value dim] of `queries` [rows, heads, 1, dim].

        `window` counts the tokens a row sees, itself included; `sinks` [heads] join the softmax's
        denominator only.
        """
        self._open = False
        step = self.step
        how = _How(scale, self.seen(window), sinks, softcap, key_dtype)
        outputs: list[mx.array] = []
        if step.num_decode:
            rows, pe = (_first(a, step.num_decode) for a in (queries, query_pe))
            assert rows is not None
            if step.exact:
                outputs += self._decode_in_groups(rows, pe, how)
            else:
                outputs.append(self._decode(rows, pe, *step.decode_rows(), how))
        end = step.num_decode
        if step.tiles is not None:
            rows, pe = (None if a is None else a[end:, :, 0] for a in (queries, query_pe))
            assert rows is not None
            outputs.append(self._attend_tiles(rows, pe, step.tiles, how)[:, :, None])
            end = step.num_rows
        for index, chunk in enumerate(step.chunks):
            end = chunk.row + chunk.padded_length
            rows, pe = (None if a is None else a[chunk.row : end] for a in (queries, query_pe))
            assert rows is not None
            if not step.exact and chunk.length <= _SHORT_CHUNK and not chunk.spans:
                outputs.append(self._decode(rows, pe, *step.chunk_rows(index), how))
            else:
                outputs.append(self._prefill(rows, pe, index, how))
        if end < step.num_rows:
            shape = (step.num_rows - end, *outputs[0].shape[1:])
            outputs.append(mx.zeros(shape, outputs[0].dtype))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def seen(self, window: int | None) -> int | None:
        """Return the window of a row if the model requests `window`.

        The request may exceed the cache's window: in mlx-lm, prompt tokens may see more than that.
        """
        if window is not None and not self.frees_blocks:
            return window
        return min((w for w in (window, self.layout.window) if w is not None), default=None)

    def attend_rows(
        self, queries: mx.array, *, scale: float, window: int | None = None
    ) -> mx.array:
        """Return [rows, heads, dim] of queries [rows, heads, dim]: `attend` in fewer operations."""
        step = self.step
        if step.exact or step.chunks:
            return self.attend(queries[:, :, None], scale=scale, window=window)[:, :, 0]
        how = _How(scale, self.seen(window), None, None, None)
        if step.tiles is None:
            return self._decode_rows(queries, None, *step.decode_rows(), how)
        of_tiles = self._attend_tiles(queries[step.num_decode :], None, step.tiles, how)
        if not step.num_decode:
            return of_tiles
        rows = queries[: step.num_decode]
        return join(self._decode_rows(rows, None, *step.decode_rows(), how), of_tiles)

    def _decode(
        self, rows: mx.array, pe: mx.array | None, tables: mx.array, lengths: mx.array, how: _How
    ) -> mx.array:
        """Attend from rows [rows, heads, 1, dim]; see `_decode_rows`."""
        pe = None if pe is None else pe[:, :, 0]
        return self._decode_rows(rows[:, :, 0], pe, tables, lengths, how)[:, :, None]

    def _decode_rows(
        self, rows: mx.array, pe: mx.array | None, tables: mx.array, lengths: mx.array, how: _How
    ) -> mx.array:
        """Attend to the blocks in place, by a kernel if there is one: [rows, heads, dim]."""
        return kernels.decode_attention(
            rows,
            self.pools.keys,
            self.pools.values,
            tables,
            lengths,
            scale=how.scale,
            num_kv_heads=self.layout.key_heads,
            window=how.window,
            softcap=how.softcap,
            sinks=how.sinks,
            q_more=pe,
            value_dim=None if pe is None else self.layout.key_dim,
            block_size=self.step.block_size,
            quantised=self.layout.quantised,
        )

    def _attend_tiles(
        self, rows: mx.array, pe: mx.array | None, tiles: kernels.Tiles, how: _How
    ) -> mx.array:
        """Attend by tiles of rows if there is a kernel, or row by row: [rows, heads, dim]."""
        if pe is None and self.layout.quantised is None:
            output = kernels.prefill_attention(
                rows,
                self.pools.keys,
                self.pools.values,
                tiles,
                scale=how.scale,
                num_kv_heads=self.layout.key_heads,
                window=how.window,
                softcap=how.softcap,
                sinks=how.sinks,
                block_size=self.step.block_size,
            )
            if output is not None:
                return output
        self.step.tiles_refused = True
        return self._decode_rows(rows, pe, *self.step.tile_rows(), how)

    def _decode_in_groups(self, rows: mx.array, pe: mx.array | None, how: _How) -> list[mx.array]:
        """Attend to gathered keys, in groups of rows of similar length."""
        groups, order = self.step.decode_groups(how.window)
        outputs = [
            self._attend(rows[g.rows], None if pe is None else pe[g.rows], g.keys, g.mask, how)
            for g in groups
        ]
        return outputs if order is None else [mx.concatenate(outputs)[order]]

    def _prefill(self, rows: mx.array, pe: mx.array | None, index: int, how: _How) -> mx.array:
        """Attend from the rows of a chunk, as queries of one sequence."""
        found = self.step.chunk_keys(index, how.window)
        queries = rows.transpose(2, 1, 0, 3)
        pe = None if pe is None else pe.transpose(2, 1, 0, 3)
        made = self._attend(queries, pe, found.keys, found.mask, how, is_causal=found.is_causal)
        return made.transpose(2, 1, 0, 3)

    def _attend(
        self,
        queries: mx.array,
        pe: mx.array | None,
        found: KeyRange,
        mask: mx.array | str | None,
        how: _How,
        *,
        is_causal: bool = True,
    ) -> mx.array:
        keys, values = self.pools.read(found)
        if how.key_dtype is not None and how.key_dtype != keys.dtype:
            keys, values = keys.astype(how.key_dtype), values.astype(how.key_dtype)
        return gather.attend(
            queries,
            keys,
            values,
            mask,
            scale=how.scale,
            sinks=how.sinks,
            softcap=how.softcap,
            query_pe=pe,
            on_cpu=self.step.exact and is_causal,
            second=self.step.second_stream,
        )


class KVReader:
    """Lets rows that are in no step attend to one layer's keys and values, and write none.

    Its handles stand for keys and values in the call of a layer that has queries only.
    """

    def __init__(self, kv: PagedKV) -> None:
        self.kv = kv
        self._tables: list[tuple[list[int], int]] = []
        self._rows: tuple[mx.array, mx.array] | None = None

    def begin(self, tables: list[list[int]], lengths: list[int]) -> None:
        """Let row i attend to the first `lengths[i]` tokens of its block table, on a CPU."""
        self._tables, self._rows = list(zip(tables, lengths, strict=True)), None

    def begin_rows(self, tables: mx.array, lengths: mx.array) -> None:
        """Do the same with tables int32 [rows, width] and lengths int32 [rows], on a GPU."""
        self._rows = tables, lengths

    def handles(self, num_rows: int, dtype: mx.Dtype) -> tuple[KVHandle, KVHandle]:
        """Return handles of the keys and values, for queries of `dtype`."""
        layout = self.kv.layout
        keys = mx.zeros((num_rows, layout.key_heads, 1, layout.key_dim), dtype)
        values = mx.zeros((num_rows, layout.value_heads, 1, layout.value_dim), dtype)
        return make_handle(keys, self, "keys"), make_handle(values, self, "values")

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        window: int | None = None,
        sinks: mx.array | None = None,
        softcap: float | None = None,
        query_pe: mx.array | None = None,
        key_dtype: mx.Dtype | None = None,
    ) -> mx.array:
        """Return [rows, heads, 1, value dim] of `queries` [rows, heads, 1, dim]."""
        kv = self.kv
        window = kv.seen(window or kv.layout.window)
        how = _How(scale, window, sinks, softcap, key_dtype)
        if self._rows is not None:
            return kv._decode(queries, query_pe, *self._rows, how)
        outputs = []
        for row, (table, length) in enumerate(self._tables):
            span = visible(length, window, kv.step.block_size)
            blocks = table[span.first_block : span.first_block + span.num_blocks]
            found = KeyRange([blocks], span.start, span.stop)
            outputs.append(kv._attend(queries[row : row + 1], None, found, None, how))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


def _first(array: mx.array | None, rows: int) -> mx.array | None:
    return array if array is None or array.shape[0] == rows else array[:rows]


class BlockContents:
    """Reads and writes blocks of all the pools of a model, many at a time."""

    def __init__(self, paged: Sequence[PagedKV]) -> None:
        self._paged = paged
        # MLX infers shapes and types without computing anything.
        some = [kv.pools.blocks(mx.zeros((1,), mx.int32)) for kv in paged]
        self._parts = [[(part.shape[1:], part.dtype) for part in parts] for parts in some]
        sizes = [math.prod(shape) * dtype.size for of in self._parts for shape, dtype in of]
        #: Bytes of one block.
        self.length = sum(sizes)

    def describe(self) -> list[str]:
        """Describe the layout of a block; equal descriptions mean compatible bytes."""
        return [
            f"{type(kv.pools).__name__} {kv.layout}: {[(shape, str(dtype)) for shape, dtype in of]}"
            for kv, of in zip(self._paged, self._parts, strict=True)
        ]

    def read(self, blocks: Sequence[int]) -> mx.array:
        """Return uint8 [blocks, length], lazily: it references the pools until evaluated."""
        indices = mx.array(list(blocks), mx.int32)
        rows = [
            mx.contiguous(part).reshape(len(blocks), -1).view(mx.uint8)
            for kv in self._paged
            for part in kv.pools.blocks(indices)
        ]
        return mx.concatenate(rows, axis=1)

    def write(self, blocks: Sequence[int], contents: Sequence[bytes]) -> None:
        """Write contents that `read` returned to `blocks`, when the pools are next evaluated."""
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
