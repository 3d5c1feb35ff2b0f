"""PagedKV: one layer's paged keys and values, standing in for mlx-lm's KVCache.

Every scheduled token is one batch row of length 1, prefill and decode alike, so `offset` is a
vector that rotary embeddings take per row. `update_and_fetch` writes the new rows into the pool and
returns handles; `attend` answers when these reach the attention function.

The pool has one version per layer and step: it is written once, then read. A second write, or a
reference kept by anybody else, would make MLX copy the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from modelpack_engine.attention import gather, kernels
from modelpack_engine.attention.handles import (
    KVHandle,
    LostHandleError,
    RowMask,
    make_handle,
    make_row_mask,
)
from modelpack_engine.attention.step import StepInputs


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


#: Chunks up to this many tokens go the way of decode rows, where there is a kernel for these.
_SHORT_CHUNK = 8


@dataclass(frozen=True, slots=True)
class _How:
    """What a layer asks of its attention."""

    scale: float
    window: int | None
    sinks: mx.array | None
    softcap: float | None
    key_dtype: mx.Dtype | None


class PagedKV:
    """Keys and values of one layer, in blocks; see the module's docstring."""

    def __init__(
        self, layout: KVLayout, step: StepInputs, *, num_blocks: int, name: str = "layer"
    ) -> None:
        """Make the pools: [slots, heads, dim] each, zeros so that unwritten slots are finite."""
        self.layout = layout
        self.step = step
        self.name = name
        slots = num_blocks * step.block_size
        self.keys_pool = mx.zeros((slots, layout.key_heads, layout.key_dim), layout.dtype)
        self.values_pool = mx.zeros((slots, layout.value_heads, layout.value_dim), layout.dtype)
        self._open = False
        self._handles: tuple[KVHandle, KVHandle] | None = None
        self.row_masks = False

    @property
    def offset(self) -> mx.array:
        """Positions of the rows, int32 [rows]."""
        return self.step.positions

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> RowMask | None:
        """Return None, as attention is causal per row, or what says what was asked for."""
        if window_size is None and not self.row_masks:
            return None
        return make_row_mask(window_size, self.layout.window, return_array)

    def write(self, keys: mx.array, values: mx.array) -> None:
        """Write rows [rows, heads, 1, dim] at the step's slots."""
        slots, layout = self.step.slots, self.layout
        keys = keys.reshape(keys.shape[0], layout.key_heads, layout.key_dim)
        values = values.reshape(values.shape[0], layout.value_heads, layout.value_dim)
        if self.step.exact or not layout.value_dim:
            self.keys_pool[slots] = keys
            if layout.value_dim:
                self.values_pool[slots] = values
            return
        keys_pool, values_pool = kernels.write_kv(
            keys, values, self.keys_pool, self.values_pool, slots
        )
        assert values_pool is not None
        self.keys_pool, self.values_pool = keys_pool, values_pool

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[KVHandle, KVHandle]:
        """Write the step's rows and return them as handles."""
        if self._open:
            raise LostHandleError("it never attended to the keys it was given", cache=self)
        self._open = True
        self.write(keys, values)
        handles = make_handle(keys, self, "keys"), make_handle(values, self, "values")
        self._handles = handles
        return handles

    def keys_and_values(self) -> tuple[KVHandle, KVHandle]:
        """Return the step's handles again, for layers that share another layer's keys."""
        if self._handles is None:
            raise LostHandleError("it is read before it is written", cache=self)
        return self._handles

    def fetch(self, row: int, chunk: int | None) -> tuple[mx.array, mx.array]:
        """Return keys and values [1, heads, keys, dim] that a decode row or a chunk may see.

        In order, the piece's own rows last; those before the window of the last query are left out.
        """
        step, window = self.step, self.layout.window
        if chunk is None:
            span, table = step.decode_span(row, window)
        else:
            span, table = step.chunk_span(chunk, window)
        blocks = mx.array([table[span.first_block : span.first_block + span.num_blocks]], mx.int32)
        keys = self._gather(self.keys_pool, blocks, span.start, span.stop, None)
        return keys, self._gather(self.values_pool, blocks, span.start, span.stop, None)

    def close(self) -> None:
        """End the step; raise if its keys never reached the attention function."""
        lost, self._open, self._handles = self._open, False, None
        if lost:
            raise LostHandleError("it attended without the paged cache", cache=self)

    def abandon(self) -> None:
        """End the step whatever state it is in."""
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
        how = _How(scale, window or self.layout.window, sinks, softcap, key_dtype)
        outputs: list[mx.array] = []
        if step.num_decode:
            rows, pe = (_first(a, step.num_decode) for a in (queries, query_pe))
            assert rows is not None
            if step.exact:
                outputs += self._decode_in_groups(rows, pe, how)
            else:
                outputs.append(self._decode(rows, pe, *step.decode_rows(), how))
        end = step.num_decode
        for index, chunk in enumerate(step.chunks):
            end = chunk.row + chunk.padded_length
            rows, pe = (None if a is None else a[chunk.row : end] for a in (queries, query_pe))
            assert rows is not None
            if not step.exact and chunk.length <= _SHORT_CHUNK:
                outputs.append(self._decode(rows, pe, *step.chunk_rows(index), how))
            else:
                outputs.append(self._prefill(rows, pe, index, how))
        if end < step.num_rows:
            shape = (step.num_rows - end, *outputs[0].shape[1:])
            outputs.append(mx.zeros(shape, outputs[0].dtype))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def _decode(
        self, rows: mx.array, pe: mx.array | None, tables: mx.array, lengths: mx.array, how: _How
    ) -> mx.array:
        """Attend by a kernel, if there is one, to the blocks where they are."""
        output = kernels.decode_attention(
            rows[:, :, 0],
            self.keys_pool,
            self.values_pool,
            tables,
            lengths,
            scale=how.scale,
            num_kv_heads=self.layout.key_heads,
            window=how.window,
            softcap=how.softcap,
            sinks=how.sinks,
            q_more=None if pe is None else pe[:, :, 0],
            value_dim=None if pe is None else self.layout.key_dim,
            block_size=self.step.block_size,
        )
        return output[:, :, None]

    def _decode_in_groups(self, rows: mx.array, pe: mx.array | None, how: _How) -> list[mx.array]:
        """Attend to gathered keys, rows of similar length together."""
        groups, order = self.step.decode_groups(how.window)
        outputs = []
        for group in groups:
            some, some_pe = (
                a if a is None or group.rows is None else a[group.rows] for a in (rows, pe)
            )
            assert some is not None
            keys = (group.tables, group.start, group.stop)
            outputs.append(self._attend(some, some_pe, keys, group.mask, how))
        return outputs if order is None else [mx.concatenate(outputs)[order]]

    def _prefill(self, rows: mx.array, pe: mx.array | None, index: int, how: _How) -> mx.array:
        """Attend from the rows of a chunk, as queries of one sequence."""
        found = self.step.chunk_keys(index, how.window)
        keys = (found.blocks, found.start, found.stop)
        queries = rows.transpose(2, 1, 0, 3)
        pe = None if pe is None else pe.transpose(2, 1, 0, 3)
        return self._attend(queries, pe, keys, found.mask, how).transpose(2, 1, 0, 3)

    def _attend(
        self,
        queries: mx.array,
        pe: mx.array | None,
        keys: tuple[mx.array, int, int],
        mask: mx.array | str | None,
        how: _How,
    ) -> mx.array:
        return gather.attend(
            queries,
            self._gather(self.keys_pool, *keys, how.key_dtype),
            self._gather(self.values_pool, *keys, how.key_dtype),
            mask,
            scale=how.scale,
            sinks=how.sinks,
            softcap=how.softcap,
            query_pe=pe,
            fold_heads=self.step.exact,
        )

    def _gather(
        self, pool: mx.array, blocks: mx.array, start: int, stop: int, dtype: mx.Dtype | None
    ) -> mx.array:
        """Return keys or values [n, heads, stop - start, dim] of block tables [n, blocks]."""
        _, heads, dim = pool.shape
        if dim == 0:
            return mx.zeros((blocks.shape[0], heads, stop - start, 0), pool.dtype)
        by_block = pool.reshape(-1, self.step.block_size * heads * dim)
        found = by_block[kernels.after(blocks, pool)].reshape(blocks.shape[0], -1, heads, dim)
        if start or stop < found.shape[1]:
            found = found[:, start:stop]
        if dtype is not None and dtype != found.dtype:
            found = found.astype(dtype)
        # Matrix products on transposed keys are several times slower on a CPU than the copy.
        return mx.contiguous(found.swapaxes(1, 2))


def _first(array: mx.array | None, rows: int) -> mx.array | None:
    return array if array is None or array.shape[0] == rows else array[:rows]
