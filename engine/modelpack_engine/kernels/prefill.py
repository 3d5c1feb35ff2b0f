"""Prefill attention on CUDA's tensor cores, for tiles of 16 token rows of one sequence.

On other devices, keys are gathered from their blocks, and MLX's attention function is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from modelpack_engine.kernels import launch, reference
from modelpack_engine.kernels.plan import AttentionShape, num_parts, token_of
from modelpack_engine.kernels.reference import TOLERANCE

#: Rows of a tile: consecutive tokens of one sequence.
TILE_ROWS = 16
_MOST_WARPS = 8
_KEY_ELEMENTS = 4096
#: The multiprocessors of a large GPU: contexts are split if there are no more threadgroups than
#: these. Merging takes longer than for decode rows, so parts have more tokens.
_PROCESSORS, _FEWEST_TOKENS, _MOST_PARTS = 132, 1024, 8


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of 16 rows: block tables `tables` int32 [tiles, width], and `spans` int32 [tiles, 2].

    A span has the position of the tile's first row, and the number of its rows without padding.
    """

    tables: mx.array
    spans: mx.array

    def as_rows(self) -> tuple[mx.array, mx.array]:
        """Return the block tables and lengths of the rows, as if each of them decoded."""
        first, count = self.spans[:, :1], self.spans[:, 1:]
        places = mx.arange(TILE_ROWS, dtype=mx.int32)
        lengths = mx.where(places < count, first + places, 0) + 1
        return mx.repeat(self.tables, TILE_ROWS, axis=0), lengths.reshape(-1)


def refusal(shape: AttentionShape, dtype: mx.Dtype, pool: mx.Dtype) -> str | None:
    """Return why the kernel does not support this attention, or None."""
    if launch.backend() != "cuda":
        return "no tensor cores of CUDA"
    if dtype != pool or dtype not in (mx.float16, mx.bfloat16):
        return f"no kernel for {dtype} over {pool}"
    if shape.latent or shape.key_dim != shape.value_dim:
        return "keys and values differ in size"
    if shape.key_dim not in (32, 64, 96, 128, 192, 256):
        return f"no kernel for heads of {shape.key_dim} elements"
    return None


@lru_cache(maxsize=256)
def _constants(shape: AttentionShape) -> tuple[tuple[str, int | bool], ...]:
    group = shape.num_heads // shape.num_kv_heads
    keys = 64
    while keys * shape.key_dim > _KEY_ELEMENTS:
        keys //= 2
    return (
        ("D", shape.key_dim), ("HK", shape.num_kv_heads), ("G", group),
        ("WARPS", min(group, _MOST_WARPS)), ("TILE", max(16, keys)), ("BLOCK", shape.block_size),
        ("WINDOW", shape.window or 0), ("SOFTCAP", shape.softcap), ("SINKS", shape.sinks),
    )  # fmt: skip


def attend(
    q: mx.array,
    k_pool: mx.array,
    v_pool: mx.array,
    tiles: Tiles,
    shape: AttentionShape,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    parts: int | None = None,
) -> mx.array:
    """Return attention [rows, H, D] for q [rows, H, D], the rows of `tiles` in order.

    Each row sees its sequence's tokens up to its own, limited to the last `shape.window` tokens.
    `parts` fixes the number of parts that contexts are split into.
    """
    constants = _constants(shape)
    how = dict(constants)
    groups = -(-int(how["G"]) // int(how["WARPS"]))
    threads = 32 * int(how["WARPS"])
    token = token_of(k_pool)
    factors = launch.factors(scale, softcap)
    inputs = [
        q, k_pool, v_pool, tiles.tables, tiles.spans, factors if sinks is None else sinks, factors,
        launch.zero() if token is None else token,
    ]  # fmt: skip
    num_tiles, width = tiles.tables.shape
    blocks = shape.num_kv_heads * groups
    if parts is None:
        parts = num_parts(
            blocks * num_tiles, width * shape.block_size, shape.window,
            enough=_PROCESSORS + 1, fewest=_FEWEST_TOKENS, most=_MOST_PARTS,
        )  # fmt: skip
    split = parts > 1
    lines: list[tuple[int, ...]] = [tuple(q.shape)]
    if split:
        lines = [(*q.shape[:2], parts, shape.key_dim), (*q.shape[:2], parts, 2)]
    found = launch.kernel("prefill", "cuda", split=split)(
        inputs=inputs,
        template=[("T", q.dtype), ("S", inputs[5].dtype), *constants, ("SPLIT", split)],
        grid=(blocks * threads, num_tiles, parts),
        threadgroup=(threads, 1, 1),
        output_shapes=lines,
        output_dtypes=[mx.float32, mx.float32] if split else [q.dtype],
    )
    return launch.merge(found, shape, "cuda", q.dtype, inputs[5], 1) if split else found[0]


def probe(shape: AttentionShape, dtype: mx.Dtype) -> str | None:
    """Compare attention of tiles of three sequences with the reference; return the error, or None.

    One of the tiles starts in the middle of its sequence. The reference treats each row as a decode
    row.
    """
    keys = launch.random_keys(5, 4)
    size, blocks, width = shape.block_size, 23, 12
    lines = blocks * size, shape.num_kv_heads, shape.key_dim
    k_pool, v_pool = (mx.random.normal(lines, key=key).astype(dtype) for key in keys[:2])
    spans = [(0, 16), (16, 5), (0, 0), (size * 7 + 3, 16)]
    rows = TILE_ROWS * len(spans)
    q = mx.random.normal((rows, shape.num_heads, shape.key_dim), key=keys[2]).astype(dtype)
    table = mx.random.randint(1, blocks, (len(spans), width), mx.int32, key=keys[3])
    sinks = mx.arange(shape.num_heads, dtype=mx.float32) / 4 if shape.sinks else None
    scale, softcap = shape.key_dim**-0.5, 2.0 if shape.softcap else None
    lengths = [
        first + i + 1 if i < count else 1 for first, count in spans for i in range(TILE_ROWS)
    ]
    mx.eval(q, k_pool, v_pool, table)
    with mx.stream(mx.cpu):
        expected = reference.decode_attention(
            q.astype(mx.float32), k_pool, v_pool, mx.repeat(table, TILE_ROWS, axis=0),
            mx.array(lengths, mx.int32), scale=scale, num_kv_heads=shape.num_kv_heads,
            window=shape.window, softcap=softcap, sinks=sinks, block_size=size,
        )  # fmt: skip
        mx.eval(expected)
    real = mx.array([i < count for _, count in spans for i in range(TILE_ROWS)])[:, None, None]
    for parts in (1, 4):
        out = attend(
            q, k_pool, v_pool, Tiles(table, mx.array(spans, mx.int32)), shape,
            scale=scale, softcap=softcap, sinks=sinks, parts=parts,
        ).astype(mx.float32)  # fmt: skip
        error = float(mx.max(mx.abs(mx.where(real, out - expected, out))))
        if not error <= TOLERANCE[dtype]:
            return f"its output in {parts} parts is off by {error:.3g}, allowed {TOLERANCE[dtype]}"
    return None
