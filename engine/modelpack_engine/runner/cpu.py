"""CpuRunner: run steps by the library for CPUs (`modelpack_engine.cpu`), without MLX.

A block of the KV cache holds keys and values of all layers, one layer after the other in a pool of
its own: [blocks][keys, values][heads][tokens * elements]. The library says how tokens lie in it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.core.batch import StepBatch, StepShape
from modelpack_engine.core.buckets import EXACT
from modelpack_engine.cpu.library import CacheType, Span, Step
from modelpack_engine.cpu.program import Program
from modelpack_engine.cpu.weights import PackedWeights
from modelpack_engine.errors import EngineError
from modelpack_engine.platform.device import Staging
from modelpack_engine.runner.model_layout import ModelLayout

#: The tokens whose keys the library keeps side by side.
_TILE = 16
_TYPES = {
    mx.float32: CacheType.F32,
    mx.float16: CacheType.F16,
    mx.bfloat16: CacheType.BF16,
}


class CpuRunner:
    """A `ModelRunner` of packed weights; a step is computed before `forward` returns."""

    tier = "paged"
    fused: Mapping[str, int] = {}
    supports_prefix_cache = can_go_back = writes_in_place = True
    snapshots = None
    computes_at_once = True
    buckets = EXACT
    adapter_rows = None

    def __init__(
        self,
        model: nn.Module,
        weights: PackedWeights,
        layout: ModelLayout,
        *,
        num_blocks: int,
        block_size: int,
        max_rows: int,
    ) -> None:
        """Raises `OutOfMemoryError` if the buffers of steps do not fit.

        Raises `EngineError` for blocks that the library cannot read.
        """
        if block_size % _TILE:
            raise EngineError(
                f"blocks of {block_size} tokens: the library for CPUs has multiples of {_TILE}",
                hint=f"set block_size to {_TILE}, or backend to mlx",
            )
        self.model, self.layout, self.staging = model, layout, Staging()
        self.notes: tuple[str, ...] = ()
        dtype = layout.kv_layouts()[0].dtype
        self._program = Program(model, weights, _TYPES[dtype], max_rows=max_rows)
        self._block_size, self._vocab_size = block_size, layout.vocab_size
        program = self._program
        part = block_size * program.dim * dtype.size
        self._contents = CpuBlocks(
            program.num_layers, num_blocks, (2, program.kv_heads, part), f"{dtype} {block_size}"
        )
        pools = [pool.ctypes.data for pool in self._contents.pools]
        self._pools = (ctypes.c_void_p * len(pools))(*pools)

    def forward(
        self, batch: StepBatch, token_ids: mx.array, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Compute a step; return its logits, float32 [sampled rows, vocabulary]."""
        assert input_embeddings is None, "models with a vision tower run with MLX"
        rows = batch.num_rows
        columns = [np.array(token_ids), batch.positions, batch.slots, batch.sample_rows]
        tokens, positions, slots, sampled = (np.ascontiguousarray(c, np.int32) for c in columns)
        tables: list[int] = []
        spans: list[tuple[int, int, int]] = []
        for row, table in enumerate(batch.decode_tables):
            spans.append((row, 1, len(tables)))
            tables += table
        for chunk in batch.chunks:
            spans.append((chunk.row, chunk.length, len(tables)))
            tables += chunk.block_table
        blocks = np.array(tables, np.int32)
        first = blocks.ctypes.data
        logits = mx.zeros((len(sampled), self._vocab_size))
        mx.eval(logits)
        view = np.array(logits, copy=False)  # raises an error if it had to copy
        self._program.run(
            Step(
                rows, len(spans), len(sampled), self._block_size,
                tokens.ctypes.data, positions.ctypes.data, slots.ctypes.data, sampled.ctypes.data,
                (Span * len(spans))(*(Span(row, n, first + 4 * at) for row, n, at in spans)),
                self._pools, view.ctypes.data,
            )
        )  # fmt: skip
        return logits

    def pools(self) -> list[mx.array]:
        """Return nothing: MLX computes none of them."""
        return []

    def release(self, seq_ids: Iterable[int]) -> None:
        """Do nothing: sequences have no state but their blocks."""

    def verified(self, seq_id: int, num_tokens: int) -> None:
        """Do nothing: there is no recurrent state to keep."""

    def scrub(self, blocks: Iterable[int], group: int = 0) -> None:
        for pool in self._contents.pools:
            pool[list(blocks)] = 0

    def scrub_slots(self, slots: list[int], group: int = 0) -> None:
        """Zero the blocks' tokens: the keys of a token are every `_TILE`-th element of its head."""
        dim = self._program.dim
        for pool in self._contents.pools:
            size = pool.shape[-1] // (self._block_size * dim)
            for slot in slots:
                block, offset = divmod(slot, self._block_size)
                keys = pool[block, 0].reshape(-1, self._block_size // _TILE, dim, _TILE, size)
                keys[:, offset // _TILE, :, offset % _TILE] = 0
                values = pool[block, 1].reshape(-1, self._block_size, dim, size)
                values[:, offset] = 0

    def block_contents(self) -> list[CpuBlocks]:
        return [self._contents]

    def state_contents(self) -> None:
        """Return nothing: no layer has recurrent state."""

    def warm_up(self, shapes: Iterable[StepShape]) -> None:
        """Do nothing: nothing is compiled."""

    def undo(self) -> None:
        """Do nothing: the model's classes are unchanged."""


class CpuBlocks:
    """The pools of all layers, uint8 [blocks, 2, heads, bytes]; `BlockContents` of this runner."""

    def __init__(self, num_layers: int, num_blocks: int, shape: tuple[int, ...], text: str) -> None:
        self.pools: list[NDArray[np.uint8]] = [
            np.zeros((num_blocks, *shape), np.uint8) for _ in range(num_layers)
        ]
        self._size = int(np.prod(shape))
        #: Bytes of one block.
        self.length = num_layers * self._size
        self._text = text

    def describe(self) -> list[str]:
        """Describe the layout of a block; equal descriptions mean compatible bytes."""
        return [f"cpu {self._text} {pool.shape[1:]}" for pool in self.pools]

    def read(self, blocks: Sequence[int]) -> mx.array:
        """Return uint8 [blocks, length]."""
        rows = [pool[list(blocks)].reshape(len(blocks), -1) for pool in self.pools]
        return mx.array(np.concatenate(rows, axis=1))

    def write(self, blocks: Sequence[int], contents: Sequence[bytes]) -> None:
        """Write contents that `read` returned to `blocks`."""
        rows: Any = np.frombuffer(b"".join(contents), np.uint8).reshape(len(blocks), -1)
        for index, pool in enumerate(self.pools):
            part = rows[:, index * self._size : (index + 1) * self._size]
            pool[list(blocks)] = part.reshape(len(blocks), *pool.shape[1:])
