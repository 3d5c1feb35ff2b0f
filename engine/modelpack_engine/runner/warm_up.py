"""Warm-up: the shapes of the steps to compile, and the memory of a step for KV cache sizing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from modelpack_engine.core.batch import Chunk, StepBatch
from modelpack_engine.core.buckets import Buckets, round_up, sizes_up_to

#: What norms, sums, rotations and activations add to the outputs of the linear layers, as a factor,
#: less what the GPU is done with before two steps are handed over. Measured: 1.55 for
#: Llama-3.2-1B's shape (benchmarks/results/engine-h200.md).
_BESIDE = 1.6
#: Experts that a token goes to, at most: what a layer is made of does not tell.
_MOST_EXPERTS = 8


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes that a step's arrays take: for each row, and however many there are."""

    per_row: int = 0
    per_step: int = 0


def step_memory(model: nn.Module, vocab_size: int) -> StepMemory:
    """Return about how much memory steps of `model` take; the head runs on few rows.

    MLX gives memory back when the GPU has done what it was handed, and by then the host has handed
    it most of a step: so all layers count. Quantised weights are written out for many rows.
    """
    outputs = written_out = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.QuantizedLinear):
            size = module["weight"].shape[0]
            if size == vocab_size and "layers" not in name:
                continue
            outputs += size
            if isinstance(module, nn.QuantizedLinear):
                written_out += size * module["scales"].shape[1] * module.group_size
        elif isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            experts, size = module["weight"].shape[:2]
            outputs += size * min(experts, _MOST_EXPERTS)
    itemsize = _itemsize(model)
    return StepMemory(int(outputs * _BESIDE) * itemsize, written_out * itemsize)


def _itemsize(model: nn.Module) -> int:
    """Return the bytes of an element of what layers put out: as many as the norms' weights have."""
    sizes = [
        module["weight"].dtype.size
        for _, module in model.named_modules()
        if isinstance(module, nn.RMSNorm | nn.LayerNorm) and "weight" in module
    ]
    return max(sizes, default=mx.bfloat16.size)


#: A sequence that no request has.
PADDING_SEQ_ID = -1

#: What mixed steps are warmed up with: decode rows, tokens of chunks, tokens of contexts.
_MIXED_ROWS, _MIXED_CHUNKS, _USUAL_CONTEXT = (8, 32, 64, 128), (128, 256, 512), 1024


@dataclass(frozen=True, slots=True)
class StepShape:
    """Decode rows, columns of their block tables, and tokens of a prompt's chunk, any of them 0."""

    decode_rows: int
    table_width: int
    chunk_length: int = 0


def step_shapes(
    buckets: Buckets, *, max_num_seqs: int, max_chunk: int, max_model_len: int, block_size: int
) -> list[StepShape]:
    """Return the shapes that steps up to these limits have: decode alone, and a chunk alone.

    Mixed steps are made of the same parts, whose numbers multiply: some of these are enough.
    """
    widths = sizes_up_to(-(-max_model_len // block_size), buckets.table_width)
    shapes = [
        StepShape(rows, width)
        for rows in sizes_up_to(max_num_seqs, buckets.rows)
        for width in widths
    ]
    shapes += [
        StepShape(0, width, length)
        for length in sizes_up_to(max_chunk, buckets.chunk)
        for width in widths
        if width * block_size >= length
    ]
    usual = round_up(-(-min(max_model_len, _USUAL_CONTEXT) // block_size), buckets.table_width)
    shapes += [
        StepShape(rows, usual, length)
        for rows in _MIXED_ROWS
        if rows <= round_up(max_num_seqs, buckets.rows)
        for length in _MIXED_CHUNKS
        if length <= round_up(max_chunk, buckets.chunk)
    ]
    return shapes


def padding_batch(shape: StepShape, block_size: int) -> StepBatch:
    """Return a batch of `shape` that writes to the null block only."""
    rows = shape.decode_rows + shape.chunk_length
    chunks: Iterable[Chunk] = ()
    if shape.chunk_length:
        table = (0,) * max(shape.table_width, -(-shape.chunk_length // block_size))
        chunks = (
            Chunk(
                row=shape.decode_rows,
                length=shape.chunk_length,
                padded_length=shape.chunk_length,
                kv_length=shape.chunk_length,
                block_table=table,
                seq_id=PADDING_SEQ_ID,
            ),
        )
    sampled = [*range(shape.decode_rows), *([rows - 1] if chunks else [])]
    return StepBatch(
        token_ids=[0] * rows,
        positions=[0] * rows,
        slots=[0] * rows,
        from_previous=(),
        num_decode=shape.decode_rows,
        decode_tables=[[0] * shape.table_width] * shape.decode_rows,
        decode_lengths=[1] * shape.decode_rows,
        decode_seq_ids=(),
        chunks=tuple(chunks),
        sample_rows=tuple(sampled),
        sample_seqs=(),
    )
