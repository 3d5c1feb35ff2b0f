"""The gated delta rule of recurrent layers (https://arxiv.org/abs/2412.06464), by kernels.

They go token by token, and on CUDA through long prompts in tiles, on tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.attention.metadata import Segments, States
from modelpack_engine.kernels import launch
from modelpack_engine.layers.segments import (
    compared,
    example,
    example_states,
    fits,
    lanes_of,
    of_batch,
    segment_by_segment,
    with_proposal,
)

_SIMDGROUPS = 4
#: On tensor cores: the tokens of a tile, the elements of values that a block computes, and the
#: fewest rows of a segment.
_TILE, _WIDTH, _LONG = 16, 64, 32


def takes(q: mx.array, k: mx.array, v: mx.array) -> bool:
    """Return whether the kernel computes these instead of mlx-lm, and is correct."""
    return (
        launch.backend() == "cuda"
        and q.dtype == k.dtype == v.dtype
        and v.shape[2] % k.shape[2] == 0
        and fits(k.shape[3])
        and verdict(q.dtype) is None
    )


def update(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Return the outputs [batch, tokens, HV, DV], and the state after the last token.

    Queries and keys are [batch, tokens, HK, DK], values [batch, tokens, HV, DV], and `beta` is
    [batch, tokens, HV]. `g`, the factor by which the state decays before a token, has the shape of
    `beta` or is [batch, tokens, HV, DK]. The state is float32 [batch, HV, DV, DK]; None for zeros.
    """
    q, k, rows, g, beta = (array.flatten(0, 1) for array in (q, k, v, g, beta))
    batch, tokens, *of_value = v.shape
    y, after = of_batch(
        batch, tokens, state, (*of_value, k.shape[-1]),
        lambda states, segments: by_segments(q, k, rows, g, beta, states, segments),
    )  # fmt: skip
    return y.reshape(v.shape), after


def by_segments(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    states: States,
    segments: Segments,
) -> mx.array:
    """Return the outputs [rows, HV, DV] of a step; write the states after its segments.

    The arrays are as for `update`, with rows in place of batch and tokens; `states` has the rows
    and slots that `segments.runs` names.
    """
    (rows, heads, dim), (key_heads, key_dim) = v.shape, k.shape[1:]
    q, k, v = (array.astype(v.dtype).reshape(rows, -1) for array in (q, k, v))
    shape = key_heads, heads, key_dim, dim
    return _run(q, k, v, g, beta, states, segments, shape, (0, 0, 0), None)


@dataclass(frozen=True, slots=True, eq=False)
class Scalars:
    """Where the numbers of each token and head are in a joint projection, and what they become.

    Columns from `beta` and `g` on have them, `per` heads in each 2 `per` columns. The kernel
    computes exp(rates softplus(g + biases)) and sigmoid(beta); `rates` and `biases` are float32
    [heads].
    """

    g: int
    beta: int
    per: int
    rates: mx.array
    biases: mx.array


def of_joint(
    joint: mx.array,
    projected: mx.array,
    scalars: Scalars,
    states: States,
    segments: Segments,
    key_heads: int,
    epsilon: float,
    *,
    wide: bool | None = None,
) -> mx.array:
    """Return the outputs of `by_segments` for `joint` [rows, 2 HK DK + HV DV].

    These are queries, keys and values. Keys and queries are divided by their lengths, queries also
    by the square root of DK. `epsilon` is added to the squares of the lengths. `projected` [rows,
    any] has what `scalars` describe. `wide` says whether to compute long segments on tensor cores;
    None: if the kernel supports them and there are prompts.
    """
    heads, dim, key_dim = states.rows.shape[1:]
    keys = key_heads * key_dim
    return _run(
        joint, joint, joint, projected, projected, states, segments,
        (key_heads, heads, key_dim, dim), (0, keys, 2 * keys), epsilon, scalars, wide=wide,
    )  # fmt: skip


def _run(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    states: States,
    segments: Segments,
    shape: tuple[int, int, int, int],
    columns: tuple[int, int, int],
    epsilon: float | None,
    scalars: Scalars | None = None,
    *,
    wide: bool | None = None,
) -> mx.array:
    """Run the kernel on rows [rows, any], where queries, keys and values begin at `columns`.

    `shape` has the numbers of heads of keys and values, and of elements of a key and a value.
    """
    key_heads, heads, key_dim, dim = shape
    rows, count = v.shape[0], segments.runs.shape[0]
    each, units = lanes_of(key_dim, dim)
    rates = biases = states.rows
    if scalars is None:
        g, beta = g.astype(mx.float32), beta.astype(mx.float32)
    else:
        rates, biases = scalars.rates, scalars.biases
    given = [
        q, k, v, g, beta, rates, biases, states.rows, states.slots, segments.runs, segments.owners,
    ]  # fmt: skip
    common = [
        ("HK", key_heads), ("HV", heads), ("DK", key_dim), ("KEYS", k.shape[1]),
        *zip(("Q_AT", "K_AT"), columns[:2], strict=True), ("EPSILON", launch.bits_of(epsilon or 0)),
        ("SCALARS", g.shape[1]), ("G_AT", scalars.g if scalars else 0),
        ("BETA_AT", scalars.beta if scalars else 0), ("PER", scalars.per if scalars else 1),
        ("LONG", _LONG),
    ]  # fmt: skip
    blocks = -(-(count + 1) * heads * units // _SIMDGROUPS)
    if scalars is None or epsilon is None:
        wide = False
    elif wide is None:
        wide = _is_wide(given, shape, columns)
    if wide:
        slots = -(-rows // _TILE) + count
        given += launch.run(
            "delta_tiles",
            [q, k, g, rates, biases, segments.runs, segments.owners],
            [("T", v.dtype), ("G", g.dtype)],
            common,
            threads=slots * heads * 32,
            group=32,
            shapes=[(slots, heads, 2, _TILE, _TILE), (slots, heads, 4, _TILE)],
            dtypes=[v.dtype, mx.float32],
        )
        blocks += count * heads * (dim // _WIDTH)
    (y,) = launch.run(
        "delta_wide" if wide else "delta_rule",
        given,
        [("T", v.dtype), ("G", g.dtype)],
        [
            *common, ("DV", dim), ("R", each), ("EVERY", g.ndim == 3), ("NSG", _SIMDGROUPS),
            ("VALUES", v.shape[1]), ("V_AT", columns[2]), ("NORM", epsilon is not None),
            ("RAW", scalars is not None), ("WIDE", wide),
        ],
        threads=blocks * _SIMDGROUPS * 32,
        group=_SIMDGROUPS * 32,
        shapes=[(rows, heads, dim)],
        dtypes=[v.dtype],
    )  # fmt: skip
    return y


def _is_wide(
    given: list[mx.array], shape: tuple[int, int, int, int], columns: tuple[int, int, int]
) -> bool:
    """Return whether long segments of a step are computed in tiles on tensor cores.

    They are if there are more rows than segments, padding included: only prompts cause that.
    """
    q, k, v, *_, runs, owners = given
    _, _, key_dim, dim = shape
    strides = (*columns, *(array.shape[1] for array in (q, k, v)))
    return (
        launch.backend() == "cuda"
        and v.dtype == mx.bfloat16  # states may exceed the range of float16
        and owners.shape[0] > runs.shape[0]
        and key_dim % 32 == 0
        and dim % _WIDTH == 0
        and all(number % 8 == 0 for number in strides)
        and wide_verdict(v.dtype, key_dim, dim) is None
    )


def one_by_one(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    states: States,
    segments: Segments,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return outputs, states and snapshots of `by_segments`, segment by segment, in float32."""
    return segment_by_segment(segments, states, by_definition, q, k, v, g, beta)


def _compare(dtype: mx.Dtype) -> str | None:
    keys = launch.random_keys(6, 6)
    rows, key_heads, heads, key_dim, dim = 9, 2, 4, 64, 8
    q, k = (mx.random.normal((rows, key_heads, key_dim), key=i) / 8 for i in keys[:2])
    v = mx.random.normal((rows, heads, dim), key=keys[2])
    beta = mx.random.uniform(0, 1, (rows, heads), key=keys[3])
    given = mx.random.normal((6, heads, dim, key_dim), key=keys[4])
    q, k, v = (a.astype(dtype) for a in (q, k, v))
    for shape in ((rows, heads), (rows, heads, key_dim)):
        g = mx.random.uniform(0.5, 1, shape, key=keys[5])
        states = example_states(given)
        wanted = one_by_one(q, k, v, g, beta, states, example())
        mx.eval(wanted)
        found = by_segments(q, k, v, g, beta, states, example())
        if problem := launch.difference(compared(found, states, wanted), _tolerance(dtype)):
            return problem
    return _compare_joint(q, k, v, given, example(), wide=False)


def _compare_wide(dtype: mx.Dtype, key_dim: int, dim: int) -> str | None:
    prompts = (1, 70, 64, 4), (-3, 40, -1, -1), (-1, 50, 37, 5), (-1, 48, 48, 6)
    segments = with_proposal(example(*prompts), 36)
    keys = launch.random_keys(9, 4)
    rows, key_heads, heads = segments.owners.shape[0], 2, 4
    q, k = (mx.random.normal((rows, key_heads, key_dim), key=i).astype(dtype) for i in keys[:2])
    v = mx.random.normal((rows, heads, dim), key=keys[2]).astype(dtype)
    given = mx.random.normal((9, heads, dim, key_dim), key=keys[3])
    return _compare_joint(q, k, v, given, segments, wide=True)


def _compare_joint(
    q: mx.array, k: mx.array, v: mx.array, given: mx.array, segments: Segments, *, wide: bool
) -> str | None:
    """Return a problem of `of_joint`, of queries, keys, values, and states before."""
    rows, heads = v.shape[:2]
    key_heads, key_dim = k.shape[1:]
    joint = mx.concatenate([array.reshape(rows, -1) for array in (q, k, v)], axis=1)
    key = launch.random_keys(10, 1)[0]
    raw = mx.random.normal((rows, 8 + 2 * heads), key=key).astype(v.dtype)
    scalars = Scalars(
        8 + heads // 2, 8, heads // 2, rates=-mx.arange(1, heads + 1, dtype=mx.float32) / heads,
        biases=mx.arange(heads, dtype=mx.float32) / 4,
    )  # fmt: skip
    pairs = raw[:, 8:].astype(mx.float32).reshape(rows, 2, 2, heads // 2)
    b, a = (pairs[:, :, i].reshape(rows, heads) for i in (0, 1))
    g, beta = mx.exp(scalars.rates * nn.softplus(a + scalars.biases)), mx.sigmoid(b)
    states = example_states(given, segments)
    q_unit, k_unit = (
        a * mx.rsqrt((a.astype(mx.float32) ** 2).sum(axis=-1, keepdims=True) + 1e-6) for a in (q, k)
    )
    wanted = one_by_one(q_unit * key_dim**-0.5, k_unit, v, g, beta, states, segments)
    mx.eval(wanted)
    found = of_joint(joint, raw, scalars, states, segments, key_heads, 1e-6, wide=wide)
    problem = launch.difference(compared(found, states, wanted), _tolerance(v.dtype))
    return problem and f"of joint rows: {problem}"


def _tolerance(dtype: mx.Dtype) -> float:
    return 1e-4 if dtype == mx.float32 else 3e-2


#: None if the kernel computes the rule correctly for a type, otherwise the problem.
verdict = launch.Verdict(_compare)
#: The same of long segments on tensor cores, for a type and the sizes of keys and values.
wide_verdict = launch.Verdict(_compare_wide)


def by_definition(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the results of `update`, computed in float32 by MLX's operations."""
    repeats = v.shape[2] // k.shape[2]
    q, k = (mx.repeat(a.astype(mx.float32), repeats, axis=2) for a in (q, k))
    outputs = []
    for t in range(v.shape[1]):
        decay = g[:, t, :, None, None] if g.ndim == 3 else g[:, t, :, None, :]
        state = state * decay
        key = k[:, t, :, None, :]
        change = (v[:, t].astype(mx.float32) - (state * key).sum(axis=-1)) * beta[:, t, :, None]
        state = state + key * change[..., None]
        outputs.append((state * q[:, t, :, None, :]).sum(axis=-1))
    return mx.stack(outputs, axis=1), state
