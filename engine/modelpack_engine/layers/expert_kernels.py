"""Kernels for mixtures of experts: routing, sorting rows by expert, matmuls, combining outputs.

The matmul kernels are for CUDA. MLX uses tiles of 256 rows, however few rows an expert gets: 52 us
for 8 rows for each of 32 experts of 512 x 1024, where reading the weights takes 8 us. With 128 rows
for each of 128 experts of 768 x 2048, it reaches 61 TFLOP/s on an H200.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from modelpack_engine.kernels import launch
from modelpack_engine.kernels.plan import vector_width
from modelpack_engine.layers.matmul import (
    OUTPUTS,
    THREADS,
    fits,
    stage_bytes,
)
from modelpack_engine.layers.packed import has_warpgroups
from modelpack_engine.layers.weights import NO_UP, Weights, random_weights

_SIMDGROUPS = 4


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router chooses `top_k` experts for a row by its logits.

    With `sigmoid`, it uses sigmoids and a bias, chooses among the `keep` best of `groups`, and
    multiplies the scores by `factor`. Otherwise it uses softmax. `normed` scores are divided by
    their sum.
    """

    top_k: int
    normed: bool
    sigmoid: bool = False
    groups: int = 1
    keep: int = 1
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Pairs of a row and an expert, sorted by expert.

    `source` int32 [pairs] has their rows, and `experts` uint32 [pairs] their experts. `place` int32
    [pairs] has the index of each pair, for the pairs in the order of rows. `spans` int32 [slots, 3]
    divide the pairs into runs of up to `tile` pairs of one expert: expert, first pair, count.
    """

    source: mx.array
    experts: mx.array
    place: mx.array
    spans: mx.array
    tile: int


def route(
    logits: mx.array,
    routing: Routing,
    bias: mx.array | None,
    dtype: mx.Dtype,
    rounded: mx.Dtype | None = None,
) -> tuple[mx.array, mx.array]:
    """Return the experts, uint32 [rows, top_k], and scores in `dtype`, of logits [rows, experts].

    Logits may be partial sums [parts, rows, experts], whose sum is `rounded` to the layer's type.
    They have the order of MLX's sorts: with sigmoids, the best expert is first, and the first of
    equal experts is chosen; with softmax, the best is last, and the last of equal ones is chosen.
    """
    rows, experts = logits.shape[-2:]
    found = launch.run(
        "route",
        [logits, logits if bias is None else bias],
        [
            ("L", logits.dtype), ("T", rounded or logits.dtype),
            ("B", logits.dtype if bias is None else bias.dtype), ("S", dtype),
        ],
        [
            ("PARTS", logits.shape[0] if logits.ndim == 3 else 1),
            ("EXPERTS", experts), ("K", routing.top_k), ("SIGMOID", routing.sigmoid),
            ("GROUPS", routing.groups), ("KEEP", routing.keep), ("NORMED", routing.normed),
            ("FACTOR", launch.bits_of(routing.factor)), ("NSG", _SIMDGROUPS),
        ],
        threads=rows * 32,
        group=_SIMDGROUPS * 32,
        shapes=[(rows, routing.top_k)] * 2,
        dtypes=[mx.uint32, dtype],
    )  # fmt: skip
    return found[0], found[1]


def dispatch(experts: mx.array, num_experts: int, tile: int) -> Dispatch:
    """Return the pairs of rows and their `experts` (uint32 [rows, each]), sorted by expert."""
    rows, each = experts.shape
    pairs = rows * each
    source, place, ordered, spans = launch.run(
        "dispatch",
        [experts.reshape(-1)],
        [],
        [("EXPERTS", num_experts), ("EACH", each), ("TILE", tile), ("NSG", _SIMDGROUPS)],
        threads=num_experts * 32,
        group=_SIMDGROUPS * 32,
        shapes=[(pairs,)] * 3 + [(pairs // tile + num_experts, 3)],
        dtypes=[mx.int32, mx.int32, mx.uint32, mx.int32],
    )
    return Dispatch(source, ordered, place, spans, tile)


def combine(given: mx.array, place: mx.array, scores: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return the sums of the experts' outputs times `scores` [rows, each]: [rows, dim] in `dtype`.

    The outputs `given` [pairs, dim] are sorted by expert; `place` is that of `Dispatch`.
    """
    (rows, each), dim = scores.shape, given.shape[-1]
    product = mx.result_type(given, scores)
    vector = vector_width(max(given.dtype.size, dtype.size), dim)
    (out,) = launch.run(
        "combine",
        [given, place, scores],
        [("T", given.dtype), ("S", scores.dtype), ("R", product), ("O", dtype)],
        [("D", dim), ("K", each), ("VEC", vector)],
        threads=rows * (dim // vector),
        group=256,
        shapes=[(rows, dim)],
        dtypes=[dtype],
    )
    return out


def _compare_routing(dtype: mx.Dtype) -> str | None:
    rows, experts, each, dim = 9, 40, 3, 64
    keys = launch.random_keys(21, 4)
    logits = mx.random.normal((rows, experts), key=keys[0])
    bias = mx.random.normal((experts,), key=keys[1]) / 8
    choices = {
        "softmax": (Routing(each, True), None),
        "sigmoids": (Routing(each, True, sigmoid=True, factor=2.5), bias),
        "groups": (Routing(each, False, sigmoid=True, groups=8, keep=2), bias),
    }
    for name, (routing, some_bias) in choices.items():
        chosen, scores = route(logits, routing, some_bias, mx.float32)
        experts_of, scores_of = _routed(logits, routing, some_bias)
        if chosen.tolist() != experts_of.tolist():
            return f"experts by {name} differ"
        if not mx.allclose(scores, scores_of, 1e-3, 1e-3).item():
            return f"scores by {name} differ"
    both = mx.stack([logits / 4, logits * 3 / 4])
    if route(both, routing, some_bias, mx.float32, logits.dtype)[0].tolist() != chosen.tolist():
        return "experts by partial sums differ"
    # Some experts have more than one span, and most have none.
    few = mx.random.randint(0, 4, (rows, each), mx.int32, key=keys[2])
    chosen = (few * (experts - 1) // 3).astype(mx.uint32)
    sent = dispatch(chosen, experts, 4)
    pairs = mx.arange(rows * each)
    found = [sent.experts, sent.experts[sent.place], sent.source[sent.place], mx.sort(sent.place)]
    wanted = [mx.sort(chosen.reshape(-1)), chosen.reshape(-1), pairs // each, pairs]
    if [a.tolist() for a in found] != [a.tolist() for a in wanted]:
        return "rows go to the wrong experts"
    firsts, counts = (np.array(sent.spans)[:, column] for column in (1, 2))
    runs = [first + i for first, count in zip(firsts, counts, strict=True) for i in range(count)]
    if sorted(runs) != list(range(rows * each)):
        return "spans do not cover all pairs"
    given = mx.random.normal((rows * each, dim), key=keys[3]).astype(dtype)
    scores = mx.random.uniform(0, 1, (rows, each), key=keys[0])
    back = given[sent.place].reshape(rows, each, dim) * scores[..., None]
    total = combine(given, sent.place, scores, mx.float32)
    right = mx.allclose(total, back.sum(axis=1), 1e-3, 1e-3).item()
    return None if right else "sums of experts are off"


#: None if routing computes the same as MLX's functions for a type, otherwise the problem.
verdict = launch.Verdict(_compare_routing)


def _routed(logits: mx.array, routing: Routing, bias: mx.array | None) -> tuple[mx.array, mx.array]:
    """Return the results of `route` by MLX's functions, for logits float32 [rows, experts]."""
    if bias is None:
        scores = mx.softmax(logits, axis=-1)
        chosen = mx.argsort(scores, axis=-1)[:, -routing.top_k :]
    else:
        scores = mx.sigmoid(logits)
        value = (scores + bias).reshape(logits.shape[0], routing.groups, -1)
        best = mx.sort(value, axis=-1)[..., -2:].sum(axis=-1)
        rank = mx.argsort(mx.argsort(best, axis=-1), axis=-1)
        kept = rank >= routing.groups - routing.keep
        value = mx.where(kept[..., None], value, 0.0).reshape(logits.shape)
        chosen = mx.argsort(-value, axis=-1)[:, : routing.top_k]
    scores = mx.take_along_axis(scores, chosen, axis=-1)
    if routing.normed:
        scores = scores / scores.sum(axis=-1, keepdims=True)
    return chosen, scores * routing.factor


#: The tile sizes that the matmul kernels are compiled for, with their pipeline stages. The last is
#: that of the kernel by warpgroups.
_TILES = {32: 4, 64: 3, 128: 4}
SMALLEST_TILE, _WIDE = min(_TILES), max(_TILES)
#: The most rows per expert, on average, for tiles of 32, and for ours without warpgroups, after
#: which MLX is faster: see benchmarks/results/experts-h200.md.
_MOST_NARROW, _MOST_ROWS = 32, 64


def tile_for(x: mx.array, weights: Weights, pairs: int, *, swiglu: bool) -> int | None:
    """Return the tile by which a kernel multiplies `pairs` rows by weights [experts, out, in].

    None: no kernel of ours does, or MLX is faster.
    """
    if not fits(x, weights):
        return None
    experts, outputs = weights.weight.shape[0], weights.num_outputs
    many = pairs > _MOST_NARROW * experts
    if many and weights.bits is None and outputs % 8 == 0 and has_warpgroups():
        return _WIDE if wide_verdict(x.dtype, swiglu=swiglu) is None else None
    if pairs > _MOST_ROWS * experts:
        return None
    tile = 64 if many else 32
    problem = matmul_verdict(x.dtype, weights.bits or 16, tile, swiglu=swiglu)
    return tile if problem is None else None


def multiply(
    x: mx.array,
    weights: Weights,
    sent: Dispatch,
    *,
    gather: bool = False,
    multiplied: Weights | None = None,
) -> mx.array:
    """Return the rows x, sorted by expert, times the weights of their experts: [pairs, out].

    With `gather`, x has the rows in their original order. With `multiplied`, the weights of the up
    projection, `weights` are those of the gate, and the result is silu(gate) * up.
    """
    if sent.tile == _WIDE:
        return _multiply_wide(x, weights, sent, multiplied, gather=gather)
    ups = NO_UP if multiplied is None else multiplied.inputs("_up")
    bits = weights.bits or 16
    outputs, stages = weights.num_outputs, _TILES[sent.tile]
    across = OUTPUTS if multiplied is None else OUTPUTS // 2
    (out,) = launch.run_on_cuda(
        "experts",
        {"x": x, **weights.inputs(), **ups, "source": sent.source, "spans": sent.spans},
        stages * stage_bytes(bits, sent.tile),
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


def _multiply_wide(
    x: mx.array, weights: Weights, sent: Dispatch, up: Weights | None, *, gather: bool
) -> mx.array:
    outputs, threads, stages = weights.num_outputs, 256, _TILES[_WIDE]
    across, stage = 256 if up is None else 128, (256 + _WIDE) * 128
    biases = weights.bias, None if up is None else up.bias
    (out,) = launch.run_on_cuda(
        "experts_wide",
        {
            "x": x, "weight": weights.weight, "bias": biases[0],
            "weight_up": None if up is None else up.weight, "bias_up": biases[1],
            "source": sent.source, "spans": sent.spans,
        },
        stages * stage,
        template=[
            ("T", x.dtype), ("BIAS", weights.bias is not None), ("MT", _WIDE), ("STAGES", stages),
            ("SWIGLU", up is not None), ("GATHER", gather),
        ],
        grid=(-(-outputs // across) * threads, sent.spans.shape[0], 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(sent.source.shape[0], outputs)],
        output_dtypes=[x.dtype],
    )  # fmt: skip
    return out


def _compare_matmul(dtype: mx.Dtype, bits: int, tile: int, swiglu: bool) -> str | None:
    keys = launch.random_keys(10, 4)
    experts, outputs, inputs, rows, each = 5, 104, 256, 5 * tile // 4, 2
    shape = (experts, outputs, inputs)
    made = [random_weights(dtype, bits, shape, 1 / 16, key, key) for key in keys[:2]]
    x = mx.random.normal((rows, inputs), key=keys[2]).astype(dtype)
    chosen = mx.random.randint(0, experts - 1, (rows, each), mx.int32, key=keys[3])
    sent = dispatch(chosen.astype(mx.uint32), experts, tile)
    wide = x[sent.source]
    gate, up = (
        mx.einsum("pi,poi->po", wide.astype(mx.float32), dense[sent.experts]) + bias[sent.experts]
        for _, dense, bias in made
    )
    first, second = (weights for weights, _, _ in made)
    found = {
        "the gate of experts": (
            multiply(x, first, sent, gather=True, multiplied=second if swiglu else None),
            gate * mx.sigmoid(gate) * up if swiglu else gate,
        ),
        "the product of experts": (multiply(wide, second, sent), up),
    }
    return launch.difference(found, 2e-1)


#: None if our kernel multiplies as MLX does for a type, bits of a weight, tile size, and with or
#: without SwiGLU; otherwise the problem. Each variant takes seconds to compile, so only those that
#: a model uses are tested.
matmul_verdict = launch.Verdict(_compare_matmul)


def _compare_wide(dtype: mx.Dtype, swiglu: bool) -> str | None:
    return _compare_matmul(dtype, 16, _WIDE, swiglu)


#: The same for the kernel by warpgroups.
wide_verdict = launch.Verdict(_compare_wide)
