"""What LoRA adapters add to the products of fused layers: one kernel for each product, or two.

Each row has its own adapter (Punica, https://arxiv.org/abs/2310.18547). Several layers with the
same input are computed together. The kernel also computes what follows, SwiGLU or a residual sum
and its norm: with few rows, the launches of kernels take most of the time. Many rows are multiplied
on tensor cores, by first matrices and by second ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import mlx.core as mx

from modelpack_engine.kernels import launch
from modelpack_engine.kernels.plan import vector_width
from modelpack_engine.layers.matmul import Parts

#: Ranks are padded to a multiple of this.
RANK_STEP = 8
#: The most layers of one product, and the largest rank: the kernel keeps a value of each in memory.
MOST_LAYERS, MOST_RANK = 4, 512
#: The most outputs that a threadgroup computes, and its most simdgroups, without and with the norm.
_CHUNK, _MOST_SIMDGROUPS, _NORM_SIMDGROUPS = 2048, 8, 16
#: With fewer rows, a threadgroup computes a whole row, with its norm. Many rows are prompts, of
#: which a block computes 16 on tensor cores. A block has so many threads for first matrices and for
#: second ones; it multiplies inputs by the former 32 at a time, and computes outputs, gates or
#: others, by the latter, 64 or 32 of them in a warp.
_MANY_ROWS, _BLOCK_ROWS, _DEPTH, _WIDTH = 256, 16, 32, 64
_SHRINKING, _EXPANDING, _OUTPUTS_OF_GATES, _OUTPUTS = 512, 256, 512, 256


@dataclass(frozen=True, slots=True)
class RowAdapters:
    """The input of linear layers in a step, and the matrices that adapters add to them.

    `x` is [rows, ...]. `down` [slots, layers * rank, inputs] and `up` [slots, rank, outputs of all
    layers] are the matrices of all adapters, and `slots` int32 [rows] those of the rows, 0 for
    none; the first `singles` rows are single tokens of sequences. `sizes` are the numbers of
    outputs of each layer.
    """

    x: mx.array
    down: mx.array
    up: mx.array
    slots: mx.array
    sizes: tuple[int, ...]
    singles: int = 0

    def __post_init__(self) -> None:
        assert self.slots.shape == (self.x.shape[0],), "each row has a slot"
        assert self.up.shape[1] <= MOST_RANK, "the kernel has memory for the rank"

    def takes_norm(self, dtype: mx.Dtype) -> bool:
        """Return whether `add_norm` computes these rows' sum with a residual of this type.

        For a single row, another kernel computes more.
        """
        few = 1 < self.x.shape[0] < _MANY_ROWS
        return few and len(self.sizes) == 1 and self.x.dtype == dtype

    def arrays(self) -> list[mx.array]:
        """Return the rows [rows, inputs], and the other arrays."""
        return [self.x.reshape(self.x.shape[0], -1), self.down, self.up, self.slots]


def add(
    parts: Parts,
    adapters: RowAdapters,
    *,
    gated: bool = False,
    chunk: int = _CHUNK,
    wide: bool | None = None,
) -> mx.array:
    """Return the sum of `parts` [rows, outputs] and of what the adapters of the rows add to it.

    With `gated`, two layers have the same number of outputs, and silu(the first's) * the second's
    is returned. The result has x's type. `wide` runs on tensor cores: the default for many rows,
    where the GPU has them. Otherwise, a threadgroup computes up to `chunk` outputs.
    """
    x, sizes = adapters.x, adapters.sizes
    if wide or (wide is None and x.shape[0] >= _MANY_ROWS and _fits_wide(adapters)):
        return _add_wide(parts, adapters, gated=gated)
    rows, inputs = x.shape[0], adapters.down.shape[2]
    outputs = adapters.up.shape[2]
    chunks = _num_chunks(sizes, chunk, gated=gated)
    chunk = min(chunk, max(sizes))  # threads keep the outputs of a chunk
    itemsize = max(x.dtype.size, adapters.up.dtype.size)
    load = vector_width(itemsize, inputs)
    vector = min(vector_width(max(itemsize, parts.array.dtype.size), size) for size in sizes)
    most = max(inputs // load, chunk // vector)
    simdgroups = min(_MOST_SIMDGROUPS, max(1, most // 32))
    (out,) = launch.run(
        "adapters",
        [parts.array, *adapters.arrays()],
        [("T", x.dtype), ("A", adapters.up.dtype), ("J", parts.array.dtype)],
        [
            ("IN", inputs), ("RANKS", (2 if gated else 1) * adapters.up.shape[1]),
            *_constants(adapters, parts, chunk, gated=gated),
            ("FROM", load), ("TO", vector), ("NSG", simdgroups),
        ],
        threads=rows * chunks * simdgroups * 32,
        group=simdgroups * 32,
        shapes=[(rows, outputs // 2 if gated else outputs)],
        dtypes=[x.dtype],
    )  # fmt: skip
    return out


def _num_chunks(sizes: tuple[int, ...], chunk: int, *, gated: bool) -> int:
    """Return into how many chunks of outputs the kernels divide a row: those of one layer each."""
    return sum(-(-size // chunk) for size in (sizes[:1] if gated else sizes))


def _constants(
    adapters: RowAdapters, parts: Parts, chunk: int, *, gated: bool
) -> list[tuple[str, int | bool]]:
    """Return the constants of a kernel that adds to `parts`, `chunk` outputs at a time."""
    rank, outputs = adapters.up.shape[1:]
    ends = [*accumulate(adapters.sizes), *[outputs] * MOST_LAYERS]
    return [
        ("OUT", outputs), ("N", adapters.down.shape[1]), ("RANK", rank), ("PARTS", parts.count),
        ("END0", ends[0]), ("END1", ends[1]), ("END2", ends[2]), ("GATED", gated), ("CHUNK", chunk),
    ]  # fmt: skip


def _add_wide(parts: Parts, adapters: RowAdapters, *, gated: bool) -> mx.array:
    """Compute what `add` does on tensor cores: rows times first matrices, and that by second ones.

    Rows of single tokens have adapters of their own; the others are computed 16 at a time.
    """
    x, down, up, slots = adapters.arrays()
    (rows, inputs), products, outputs = x.shape, down.shape[1], up.shape[2]
    singles = min(adapters.singles, rows - 1)
    blocks = -(-(rows - singles) // _BLOCK_ROWS)
    of_singles = slots[: singles + 1]  # only its size is read
    (inner,) = launch.run(
        "shrink_wide",
        [x, down, slots, of_singles],
        [("T", x.dtype)],
        [("IN", inputs), ("N", products)],
        threads=(singles + blocks) * _SHRINKING,
        group=_SHRINKING,
        shapes=[(rows, products)],
        dtypes=[x.dtype],
    )
    chunk = _OUTPUTS_OF_GATES if gated else _OUTPUTS
    blocks += -(-singles * chunk // (8 * _EXPANDING))  # a thread computes 8 outputs of a token
    (out,) = launch.run(
        "expand_wide",
        [parts.array, inner, up, slots, of_singles],
        [("T", x.dtype), ("J", parts.array.dtype)],
        _constants(adapters, parts, chunk, gated=gated),
        threads=blocks * _num_chunks(adapters.sizes, chunk, gated=gated) * _EXPANDING,
        group=_EXPANDING,
        shapes=[(rows, outputs // 2 if gated else outputs)],
        dtypes=[x.dtype],
    )
    return out


def _fits_wide(adapters: RowAdapters) -> bool:
    """Return whether the kernel on tensor cores computes with these matrices on this GPU."""
    dtype = adapters.x.dtype
    return (
        launch.backend() == "cuda"
        and dtype in (mx.float16, mx.bfloat16)
        and adapters.up.dtype == dtype
        and adapters.down.shape[2] % _DEPTH == 0
        and all(size % _WIDTH == 0 for size in adapters.sizes)
        and wide_verdict(dtype) is None
    )


def add_norm(
    a: mx.array, parts: Parts, adapters: RowAdapters, weight: mx.array, epsilon: float
) -> tuple[mx.array, mx.array]:
    """Return a + the sum of `parts` and of what adapters add, and its RMS norm times `weight`.

    The adapters are those of one layer. `a` and both results are [rows, ..., dim] in a's type.
    """
    dim, rows = a.shape[-1], adapters.x.shape[0]
    inputs, up = adapters.down.shape[2], adapters.up
    itemsize = max(a.dtype.size, up.dtype.size)
    vector = vector_width(max(itemsize, parts.array.dtype.size), dim)
    threads = 32 * min(_NORM_SIMDGROUPS, max(1, -(-dim // (vector * 32))))
    total, out = launch.run(
        "adapters_norm",
        [a, parts.array, weight, *adapters.arrays()],
        [
            ("T", a.dtype), ("A", up.dtype), ("B", parts.array.dtype), ("W", weight.dtype),
        ],
        [
            ("IN", inputs), ("N", up.shape[1]), ("RANKS", up.shape[1]),
            ("FROM", vector_width(itemsize, inputs)), ("D", dim), ("VEC", vector),
            ("NSG", threads // 32), ("PARTS", parts.count), ("EPSILON", launch.bits_of(epsilon)),
        ],
        threads=rows * threads,
        group=threads,
        shapes=[a.shape] * 2,
        dtypes=[a.dtype, a.dtype],
    )  # fmt: skip
    return total, out


#: A thread computes several vectors of the first layer, and of gates.
_OF_ROWS, _INPUTS, _RANK, _SIZES = (2, 0, 1, 2, 1), 2176, 3 * RANK_STEP, (2112, 128, 192)
_GATES = 576


def _case(
    dtype: mx.Dtype, sizes: tuple[int, ...], singles: int = 0
) -> tuple[Parts, RowAdapters, mx.array]:
    """Return random parts, adapters of the first layers, and their sum by MLX's functions."""
    keys = launch.random_keys(31, 4)
    x = mx.random.normal((5, _INPUTS), key=keys[0]).astype(dtype)
    down = mx.random.normal((3, 3 * _RANK, _INPUTS), key=keys[1]) / _INPUTS**0.5
    up = mx.random.normal((3, _RANK, sum(_SIZES)), key=keys[2]) / _RANK**0.5
    parts = mx.random.normal((2, 5, sum(_SIZES)), key=keys[3])[..., : sum(sizes)]
    down, up = down[:, : len(sizes) * _RANK].astype(dtype), up[..., : sum(sizes)].astype(dtype)
    total = parts.sum(axis=0)
    for row, slot in enumerate(_OF_ROWS):
        inner = x[row].astype(mx.float32) @ down[slot].astype(mx.float32).T
        by, start = up[slot].astype(mx.float32), 0
        for layer, size in enumerate(sizes if slot else ()):
            own = inner[layer * _RANK : (layer + 1) * _RANK] @ by[:, start : start + size]
            total[row, start : start + size] += own
            start += size
    slots = mx.array(_OF_ROWS, mx.int32)
    return Parts(parts, 2), RowAdapters(x, down, up, slots, sizes, singles), total


Pairs = dict[str, tuple[mx.array, mx.array]]


def _products(dtype: mx.Dtype, *, wide: bool) -> Pairs:
    """Return what `add` returns, with what it should be."""
    parts, three, expected = _case(dtype, _SIZES)
    chunks = (_CHUNK,) if wide else (_CHUNK, 64)
    found = [add(parts, three, chunk=chunk, wide=wide) for chunk in chunks]
    base = add(parts, replace(three, slots=mx.zeros_like(three.slots)), wide=wide)
    without = parts.array.sum(axis=0)
    parts, two, both = _case(dtype, (_GATES, _GATES), singles=3)
    gate, value = mx.split(both, 2, axis=1)
    gates = gate * mx.sigmoid(gate) * value
    scale = 0.25  # products of two outputs are larger, and so are the errors of their types
    return {
        "products with adapters": (mx.stack(found), expected),
        "the base": (base, without),
        "gates with adapters": (scale * add(parts, two, gated=True, wide=wide), scale * gates),
    }


def _compare(dtype: mx.Dtype) -> str | None:
    """Compare the kernels with MLX's functions: rows with and without an adapter."""
    parts, one, total = _case(dtype, _SIZES[:1])
    residual = mx.random.normal((5, _SIZES[0]), key=mx.random.key(7)).astype(dtype)
    made, normed = add_norm(residual, parts, one, mx.ones((_SIZES[0],), dtype), 1e-5)
    wanted = residual.astype(mx.float32) + total
    return launch.difference(
        _products(dtype, wide=False)
        | {
            "a sum with adapters": (made, wanted),
            "its norm": (normed, mx.fast.rms_norm(wanted, None, 1e-5)),
        },
        1e-3 if dtype == mx.float32 else 5e-2,
    )


#: None if the kernels compute the same as MLX's functions for a type, otherwise the problem; and
#: for the kernel on tensor cores.
verdict = launch.Verdict(_compare)
wide_verdict = launch.Verdict(lambda dtype: launch.difference(_products(dtype, wide=True), 5e-2))
