"""Decode attention on CUDA's tensor cores, where several query heads share keys and values.

On CUDA's other cores, the scores of four heads take as long to compute as their keys to read. The
kernel is for steps with many rows, whose contexts need not be split.
"""

from __future__ import annotations

import mlx.core as mx

from modelpack_engine.kernels import launch, reference
from modelpack_engine.kernels.plan import TARGET_THREADGROUPS, AttentionShape
from modelpack_engine.kernels.reference import TOLERANCE

#: Heads that share keys: with fewer, the other kernel is as fast; there are 16 rows in a matmul.
FEWEST_HEADS, MOST_HEADS = 4, 16
#: Warps of a block, and the tiles that each of them has in flight.
_WARPS, _STAGES = 4, 3


def refusal(shape: AttentionShape, dtype: mx.Dtype, pool: mx.Dtype) -> str | None:
    """Return why the kernel does not support this attention, or None."""
    if launch.backend() != "cuda":
        return "no tensor cores of CUDA"
    if dtype != pool or dtype not in (mx.float16, mx.bfloat16):
        return f"no kernel for {dtype} over {pool}"
    if shape.latent or shape.bits or shape.key_dim != shape.value_dim:
        return "keys and values differ in size, or are quantised"
    if shape.key_dim not in (64, 96, 128):
        return f"no kernel for heads of {shape.key_dim} elements"
    heads = shape.num_heads // shape.num_kv_heads
    if not FEWEST_HEADS <= heads <= MOST_HEADS:
        return f"{heads} heads share keys, expected {FEWEST_HEADS} to {MOST_HEADS}"
    return None


def takes(shape: AttentionShape, rows: int) -> bool:
    """Return whether there are enough rows to keep a large GPU busy without splitting contexts."""
    return rows * shape.num_kv_heads >= TARGET_THREADGROUPS


def attend(
    q: mx.array,
    k_pool: mx.array,
    v_pool: mx.array,
    block_tables: mx.array,
    context_lens: mx.array,
    shape: AttentionShape,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    written: mx.array | None = None,
    warps: int = _WARPS,
    stages: int = _STAGES,
) -> mx.array:
    """Return attention [rows, H, D] for q [rows, H, D], as `operations.decode_attention`."""
    heads, dim = shape.num_heads // shape.num_kv_heads, shape.key_dim
    memory = max(warps * stages * 2 * 16 * (dim + 8) * 2, 4 * warps * heads * (dim + 10))
    factors = launch.factors(scale, softcap)
    inputs = [
        q, k_pool, v_pool, block_tables, context_lens, factors if sinks is None else sinks, factors,
        launch.zero() if written is None else written,
    ]  # fmt: skip
    (out,) = launch.kernel("grouped", "cuda", memory)(
        inputs=inputs,
        template=[
            ("T", q.dtype), ("S", inputs[5].dtype), ("D", dim), ("HK", shape.num_kv_heads),
            ("G", heads), ("WARPS", warps), ("STAGES", stages), ("BLOCK", shape.block_size),
            ("WINDOW", shape.window or 0), ("SOFTCAP", shape.softcap), ("SINKS", shape.sinks),
        ],
        grid=(shape.num_kv_heads * warps * 32, q.shape[0], 1),
        threadgroup=(warps * 32, 1, 1),
        output_shapes=[tuple(q.shape)],
        output_dtypes=[q.dtype],
    )  # fmt: skip
    return out


def probe(shape: AttentionShape, dtype: mx.Dtype) -> str | None:
    """Compare rows of several lengths with the reference; return the error, or None."""
    keys = mx.random.split(mx.random.key(13), 4)
    size, blocks, width = shape.block_size, 41, 40
    lines = blocks * size, shape.num_kv_heads, shape.key_dim
    k_pool, v_pool = (mx.random.normal(lines, key=key).astype(dtype) for key in keys[:2])
    lengths = mx.array([1, size + 1, width * size // 2 - 1, 15, (width - 2) * size, 16], mx.int32)
    q = mx.random.normal((lengths.size, shape.num_heads, shape.key_dim), key=keys[2]).astype(dtype)
    tables = mx.random.randint(1, blocks, (lengths.size, width), mx.int32, key=keys[3])
    sinks = mx.arange(shape.num_heads, dtype=mx.float32) / 4 if shape.sinks else None
    scale, softcap = shape.key_dim**-0.5, 2.0 if shape.softcap else None
    mx.eval(q, k_pool, v_pool, tables, lengths)
    with mx.stream(mx.cpu):
        expected = reference.decode_attention(
            q.astype(mx.float32), k_pool, v_pool, tables, lengths,
            scale=scale, num_kv_heads=shape.num_kv_heads, window=shape.window, softcap=softcap,
            sinks=sinks, block_size=size,
        )  # fmt: skip
        mx.eval(expected)
    out = attend(
        q, k_pool, v_pool, tables, lengths, shape, scale=scale, softcap=softcap, sinks=sinks
    )
    error = float(mx.max(mx.abs(out.astype(mx.float32) - expected)))
    if not error <= TOLERANCE[dtype]:
        return f"its output is off by {error:.3g}, allowed {TOLERANCE[dtype]}"
    return None
