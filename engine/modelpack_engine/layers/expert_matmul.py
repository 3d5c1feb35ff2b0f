"""Matmuls of rows with the weights of their experts, by a CUDA kernel.

MLX uses tiles of 256 rows, however few an expert gets: 52 us for 8 rows for each of 32 experts of
512 x 1024. Reading the weights takes 8 us.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from modelpack_engine.kernels import launch
from modelpack_engine.layers import expert_kernels
from modelpack_engine.layers.expert_kernels import Dispatch
from modelpack_engine.layers.matmul import (
    OUTPUTS,
    THREADS,
    Weights,
    fits,
    random_weights,
    stage_bytes,
)

#: Rows of a tile that the kernel is compiled for, with their stages; and how many rows an expert
#: has at most, on average, for it to be the faster one.
_TILES, _MOST_ROWS = {32: 4, 64: 3}, 64


def takes(x: mx.array, weights: Weights, pairs: int, *, swiglu: bool) -> bool:
    """Return whether our kernel multiplies `pairs` rows by the weights [experts, out, in]."""
    experts = weights.weight.shape[0]
    return (
        pairs <= _MOST_ROWS * experts
        and fits(x, weights)
        and verdict(x.dtype, weights.bits or 16, tile_for(pairs, experts), swiglu=swiglu) is None
    )


def tile_for(pairs: int, experts: int) -> int:
    """Return how many rows of an expert a block multiplies, by how many there are of each."""
    return min(_TILES) if pairs <= 24 * experts else max(_TILES)


def multiply(
    x: mx.array,
    weights: Weights,
    sent: Dispatch,
    *,
    gather: bool = False,
    multiplied: Weights | None = None,
) -> mx.array:
    """Return rows x, in the order of experts, times the weights of theirs: [pairs, out].

    By `gather`, `x` are the rows before they were sent. With `multiplied`, `weights` are those of
    gates: silu(gate) * what the others give.
    """
    bits, up = weights.bits or 16, weights if multiplied is None else multiplied
    outputs, stages = weights.num_outputs, _TILES[sent.tile]
    inputs = [x]
    for some in (weights, up):
        inputs.append(some.weight)
        inputs += [x if a is None else a for a in (some.scales, some.biases, some.bias)]
    across = OUTPUTS if multiplied is None else OUTPUTS // 2
    (out,) = launch.kernel("experts", "cuda", stages * stage_bytes(bits, sent.tile))(
        inputs=[*inputs, sent.source, sent.spans],
        template=[
            ("T", x.dtype), ("O", x.dtype), ("BITS", bits), ("GROUP", weights.group_size or 64),
            ("BIAS", weights.bias is not None), ("MT", sent.tile), ("STAGES", stages),
            ("SWIGLU", multiplied is not None), ("GATHER", gather),
        ],
        grid=(-(-outputs // across) * THREADS, sent.spans.shape[0], 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(sent.source.shape[0], outputs)],
        output_dtypes=[x.dtype],
    )  # fmt: skip
    return out


@cache
def verdict(dtype: mx.Dtype, bits: int, tile: int, *, swiglu: bool) -> str | None:
    """Return None if our kernel multiplies by experts as MLX does, else what is off.

    Only what a model uses is compiled, as each takes seconds: tiles of a size, with SwiGLU or not.
    """
    return launch.verdict(_compare, dtype, bits, tile, swiglu)


def _compare(dtype: mx.Dtype, bits: int, tile: int, swiglu: bool) -> str | None:
    keys = mx.random.split(mx.random.key(10), 4)
    experts, outputs, inputs, rows, each = 5, 104, 256, 40, 2
    shape = (experts, outputs, inputs)
    made = [random_weights(dtype, bits, shape, 1 / 16, key, key) for key in keys[:2]]
    x = mx.random.normal((rows, inputs), key=keys[2]).astype(dtype)
    chosen = mx.random.randint(0, experts - 1, (rows, each), mx.int32, key=keys[3])
    sent = expert_kernels.dispatch(chosen.astype(mx.uint32), experts, tile)
    wide = x[sent.source]
    gate, up = (
        mx.einsum("pi,poi->po", wide.astype(mx.float32), dense[sent.experts]) + bias[sent.experts]
        for _, dense, bias in made
    )
    first, second = (weights for weights, _, _ in made)
    found = {
        "gates": (
            multiply(x, first, sent, gather=True, multiplied=second if swiglu else None),
            gate * mx.sigmoid(gate) * up if swiglu else gate,
        ),
        "products": (multiply(wide, second, sent), up),
    }
    for name, (ours, expected) in found.items():
        error = float(mx.max(mx.abs(ours.astype(mx.float32) - expected)))
        if not error <= 2e-1:
            return f"{name} of experts are off by {error:.3g}, allowed 0.2"
    return None
