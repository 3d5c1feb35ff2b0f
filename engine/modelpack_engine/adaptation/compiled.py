"""Steps whose forward pass is compiled by MLX, once for each shape. For GPUs.

Building the graph of a step anew takes the host as long as the device takes to run it. Compiled, a
graph is replayed. All rows, those of prompts too, are rows of their own then: each sees its
sequence's blocks up to its own position, by the decode kernel. That reads keys again for every row
of a prompt, so it is for contexts that are not long.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.adaptation.adapted import Adapted
from modelpack_engine.attention.kernels.order import token_of, written
from modelpack_engine.attention.step import StepInputs
from modelpack_engine.batch import StepBatch
from modelpack_engine.block_manager import TRASH_BLOCK
from modelpack_engine.buckets import Buckets

#: Tokens of the longest context of a prompt whose rows are taken one by one.
LONGEST_PROMPT = 1024

Pools = list[tuple[mx.array, mx.array]]


class CompiledSteps:
    """Runs an adapted model's steps, as far as these are of the kind that it takes."""

    def __init__(
        self, model: nn.Module, adapted: Adapted, step: StepInputs, buckets: Buckets
    ) -> None:
        self._model, self._adapted, self._step, self._buckets = model, adapted, step, buckets
        self._of_all = mx.compile(lambda *inputs: self._trace(*inputs, sample_rows=None))
        self._of_some = mx.compile(lambda rows, *inputs: self._trace(*inputs, sample_rows=rows))

    @staticmethod
    def can_run(adapted: Adapted) -> bool:
        """Return whether nothing of a model runs sequence by sequence."""
        return not adapted.states and not adapted.in_pieces

    def takes(self, batch: StepBatch) -> bool:
        """Return whether a step's prompts are short enough."""
        return all(chunk.kv_length <= LONGEST_PROMPT for chunk in batch.chunks)

    def forward(self, batch: StepBatch, token_ids: mx.array, sample_rows: list[int]) -> mx.array:
        """Return logits [sampled rows, vocabulary], not yet computed; pools are replaced."""
        rows = self._buckets.pad_rows(batch.num_rows)
        padding = [0] * (rows - batch.num_rows)
        if padding:
            token_ids = mx.concatenate([token_ids, mx.zeros((len(padding),), mx.int32)])
        paged = self._adapted.paged
        pools: Pools = [(kv.pools.keys, kv.pools.values) for kv in paged]
        tokens = [_token(keys) for keys, _ in pools]
        inputs = (
            token_ids,
            mx.array(batch.positions + padding, mx.int32),
            mx.array(batch.slots + padding, mx.int32),
            self._tables(batch, rows),
            pools,
            tokens,
        )
        try:
            if batch.chunks:
                count = self._buckets.pad_rows(len(sample_rows)) or 1
                some = mx.array(sample_rows + [0] * (count - len(sample_rows)), mx.int32)
                logits, pools, tokens = self._of_some(some, *inputs)
            else:
                logits, pools, tokens = self._of_all(*inputs)
        finally:
            # Tracing leaves arrays in the caches that stand for any; `pools` are real ones.
            for kv, (keys, values), token in zip(paged, pools, tokens, strict=True):
                kv.pools.keys, kv.pools.values = written(keys, token), written(values, token)
        return logits[: len(sample_rows), -1]

    def _tables(self, batch: StepBatch, rows: int) -> mx.array:
        """Return the rows' block tables, int32 [rows, width]."""
        tables = list(batch.decode_tables)
        if not batch.chunks and len(tables) == rows:
            return mx.array(tables, mx.int32)
        of_row = list(range(len(tables)))
        nobody = len(tables) + len(batch.chunks)
        for chunk in batch.chunks:
            of_row += [len(tables)] * chunk.length
            of_row += [nobody] * (chunk.padded_length - chunk.length)
            tables.append(list(chunk.block_table))
        of_row += [nobody] * (rows - len(of_row))
        tables.append([])
        width = max(map(len, tables))
        tables = [table + [TRASH_BLOCK] * (width - len(table)) for table in tables]
        return mx.array(tables, mx.int32)[mx.array(of_row, mx.int32)]

    def _trace(
        self,
        token_ids: mx.array,
        positions: mx.array,
        slots: mx.array,
        tables: mx.array,
        pools: Pools,
        tokens: list[mx.array],
        *,
        sample_rows: mx.array | None,
    ) -> tuple[mx.array, Pools, list[mx.array]]:
        """Build the graph from arrays that stand for any of their shapes."""
        adapted, step = self._adapted, self._step
        for kv, (keys, values), token in zip(adapted.paged, pools, tokens, strict=True):
            kv.pools.keys, kv.pools.values = written(keys, token), written(values, token)
        step.begin_rows(positions, slots, tables, sample_rows)
        try:
            logits: Any = self._model(token_ids[:, None], cache=adapted.caches)
            adapted.close()
        except BaseException:
            adapted.abandon()
            raise
        finally:
            step.end()
        if not step.rows_taken and sample_rows is not None:
            logits = logits[sample_rows]
        new = [(kv.pools.keys, kv.pools.values) for kv in adapted.paged]
        return logits, new, [_token(keys) for keys, _ in new]


def _token(pool: mx.array) -> mx.array:
    """Return the token of the pool's last write; any other where MLX itself wrote."""
    token = token_of(pool)
    return mx.zeros((1,), mx.int32) if token is None else token
