"""Selective state spaces (Mamba-2, https://arxiv.org/abs/2405.21060), for a token or a prompt.

Kernels compute them on GPUs: one token by token, and on CUDA one on tensor cores, for steps that
have prompts. Elsewhere, a prompt is computed in chunks by matmuls: attention
within a chunk, plus the contribution of the state before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.ssm import segsum

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
#: The kernel on tensor cores: its threads, its rows of a chunk, and the most rows of a segment that
#: it computes row by row.
_WIDE_THREADS, _CHUNK, _FEW = 128, 64, 16


def attend(
    x: mx.array,
    a_log: mx.array,
    b: mx.array,
    c: mx.array,
    d: mx.array,
    dt: mx.array,
    state: mx.array | None,
    chunk: int,
) -> tuple[mx.array, mx.array]:
    """Return outputs [batch, tokens, heads, dim] and the state after the last token.

    `x` is [batch, tokens, heads, dim], `b` and `c` are [batch, tokens, groups, size], `a_log` and
    `d` are [heads], `dt` is float32 [batch, tokens, heads], and the state is [batch, heads, dim,
    size] or None for zeros. A prompt is computed in chunks of `chunk` tokens.
    """
    a = -mx.exp(a_log).astype(mx.float32)
    if takes(x, b, c):
        batch, tokens, *of_row = x.shape
        rows, dt, b, c = (array.flatten(0, 1) for array in (x, dt, b, c))
        y, state = of_batch(
            batch, tokens, state, (*of_row, b.shape[-1]),
            lambda states, segments: by_segments(rows, dt, b, c, a, d, states, segments),
        )  # fmt: skip
        return y.reshape(x.shape), state
    if x.shape[1] == 1 and state is not None:
        y, state = by_operations(x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], d, state)
        return y[:, None], state
    outputs = []
    for start in range(0, x.shape[1], chunk):
        some = slice(start, start + chunk)
        y, state = _chunk(x[:, some], dt[:, some], a, b[:, some], c[:, some], state)
        outputs.append(y.astype(x.dtype))
    assert state is not None, "there is a token"
    y = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)
    return y + x * d[:, None], state


def _chunk(
    x: mx.array, dt: mx.array, a: mx.array, b: mx.array, c: mx.array, state: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Return the outputs of a chunk without the term of `d`, and the state after the chunk."""
    batch, tokens, heads, dim = x.shape
    groups, size = b.shape[2:]
    repeats = heads // groups
    steps = (dt * a).swapaxes(1, 2)  # [batch, heads, tokens]
    inputs = (dt[..., None] * x).swapaxes(1, 2)  # [batch, heads, tokens, dim]
    b, c = b.swapaxes(1, 2), c.swapaxes(1, 2)
    decay = mx.exp(segsum(steps))  # from token j to token i
    weights = mx.tril(mx.repeat(c @ b.swapaxes(2, 3), repeats, axis=1) * decay)
    y = weights @ inputs
    left = (inputs * decay[:, :, -1, :, None]).swapaxes(2, 3)
    new_state = left @ mx.repeat(b, repeats, axis=1)
    if state is not None:
        since = mx.exp(mx.cumsum(steps, axis=-1))
        new_state = new_state + since[:, :, -1, None, None] * state
        # One matmul for each group: [tokens, size] times all of its channels.
        channels = state.reshape(batch, groups, repeats * dim, size).swapaxes(2, 3)
        before = (c.astype(state.dtype) @ channels).reshape(batch, groups, tokens, repeats, dim)
        before = before.swapaxes(2, 3).reshape(batch, heads, tokens, dim)
        y = y + since[..., None] * before
    return y.swapaxes(1, 2), new_state


def by_operations(
    x: mx.array, dt: mx.array, a: mx.array, b: mx.array, c: mx.array, d: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the outputs of one token, [rows, heads, dim], and the state after it.

    `x` is [rows, heads, dim], `dt` float32 [rows, heads], `a` float32 [heads], `b` and `c` are
    [rows, groups, size], `d` is [heads], the state float32 [rows, heads, dim, size].
    """
    batch, heads, dim = x.shape
    groups, size = b.shape[1:]
    split = (batch, groups, heads // groups)
    inputs = (dt[..., None] * x).reshape(*split, dim, 1)
    decay = mx.exp(dt * a).reshape(*split, 1, 1)
    new_state = decay * state.reshape(*split, dim, size) + inputs * b[:, :, None, None, :]
    y = (new_state * c[:, :, None, None, :]).sum(axis=-1).reshape(x.shape)
    y = y + x * d[:, None]
    return y.astype(x.dtype), new_state.reshape(state.shape)


def takes(x: mx.array, b: mx.array, c: mx.array) -> bool:
    """Return whether the kernel computes these instead of MLX, and is correct."""
    return (
        launch.backend() == "cuda"
        and x.dtype == b.dtype == c.dtype
        and x.shape[2] % b.shape[2] == 0
        and fits(b.shape[3])
        and verdict(x.dtype) is None
    )


def by_segments(
    x: mx.array,
    dt: mx.array,
    b: mx.array,
    c: mx.array,
    a: mx.array,
    d: mx.array,
    states: States,
    segments: Segments,
    *,
    wide: bool | None = None,
) -> mx.array:
    """Return the outputs [rows, heads, dim] of a step; write the states after its segments.

    `x` is [rows, heads, dim], `dt` float32 [rows, heads], `b` and `c` are [rows, groups, size], `a`
    is float32 [heads], `d` [heads], the states are float32 [states, heads, dim, size]. `wide` runs
    on tensor cores: the default for steps that have prompts, where the GPU has them.
    """
    rows, groups = x.shape[0], b.shape[1]
    x, b, c = (array.astype(x.dtype).reshape(rows, -1) for array in (x, b, c))
    return _run(x, b, c, dt, a, d, states, segments, groups, (0, 0, 0), wide=wide)


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """Where the step of each token and head is in a projection, and what it becomes.

    The kernel computes softplus(step + biases) of the columns from `first` on, within the limits.
    `biases` is float32 [heads].
    """

    first: int
    biases: mx.array
    lowest: float
    highest: float


def of_joint(
    joint: mx.array,
    projected: mx.array,
    steps: Steps,
    a: mx.array,
    d: mx.array,
    states: States,
    segments: Segments,
    groups: int,
    *,
    wide: bool | None = None,
) -> mx.array:
    """Return the outputs of `by_segments` for `joint` [rows, heads * dim + 2 groups * size].

    Its columns are those of `x`, `b` and `c`. `projected` [rows, any] has what `steps` describe.
    """
    heads, dim, size = states.rows.shape[1:]
    columns = 0, heads * dim, heads * dim + groups * size
    return _run(
        joint, joint, joint, projected, a, d, states, segments, groups, columns, steps, wide=wide
    )


def _run(
    x: mx.array,
    b: mx.array,
    c: mx.array,
    dt: mx.array,
    a: mx.array,
    d: mx.array,
    states: States,
    segments: Segments,
    groups: int,
    columns: tuple[int, int, int],
    steps: Steps | None = None,
    *,
    wide: bool | None = None,
) -> mx.array:
    """Run a kernel on rows [rows, any], where `x`, `b` and `c` begin at `columns`."""
    heads, dim, size = states.rows.shape[1:]
    rows, count = x.shape[0], segments.runs.shape[0]
    inputs = {
        "x": x, "dt": dt, "a": a, "b": b, "c": c, "d": d,
        "biases": a if steps is None else steps.biases, "state": states.rows, "pool": states.slots,
        "segments": segments.runs, "owners": segments.owners,
    }  # fmt: skip
    types = [("T", x.dtype), ("E", d.dtype), ("S", dt.dtype)]
    constants: list[tuple[str, int | bool]] = [
        ("H", heads), ("P", dim), ("G", groups), ("N", size),
        ("INPUTS", x.shape[1]), ("GROUPS", b.shape[1]),
        *zip(("X_AT", "B_AT", "C_AT"), columns, strict=True),
        ("RAW", steps is not None), ("STEPS", dt.shape[1]),
        ("DT_AT", steps.first if steps else 0),
        ("LOW", launch.bits_of(steps.lowest if steps else 0.0)),
        ("HIGH", launch.bits_of(steps.highest if steps else 0.0)),
    ]  # fmt: skip
    # A segment of more than a few rows makes a step's rows outnumber its segments.
    if wide or (wide is None and rows - count >= _FEW and _fits_wide(x.dtype, dim, size)):
        width = 32 if dim % 32 == 0 else 16
        line = size + 8
        (y,) = launch.run_on_cuda(
            "state_space_wide",
            inputs,
            x.dtype.size * (width * line + 2 * _CHUNK * (2 * line + width + 8)),
            template=[*types, *constants, ("WIDTH", width), ("FEW", _FEW)],
            grid=((count + 1) * heads * (dim // width) * _WIDE_THREADS, 1, 1),
            threadgroup=(_WIDE_THREADS, 1, 1),
            output_shapes=[(rows, heads, dim)],
            output_dtypes=[x.dtype],
        )
        return y
    each, units = lanes_of(size, dim)
    (y,) = launch.run(
        "state_space",
        [*inputs.values()],
        types,
        [*constants, ("R", each), ("NSG", _SIMDGROUPS)],
        threads=(count + 1) * heads * units * 32,
        group=_SIMDGROUPS * 32,
        shapes=[(rows, heads, dim)],
        dtypes=[x.dtype],
    )
    return y


def _fits_wide(dtype: mx.Dtype, dim: int, size: int) -> bool:
    """Return whether the kernel on tensor cores computes such states on this GPU."""
    return (
        launch.backend() == "cuda"
        and dtype == mx.bfloat16  # products and states may exceed the range of float16
        and dim % 16 == 0
        and size % 64 == 0
        and size <= 256
        and wide_verdict(dtype, dim, size) is None
    )


def one_by_one(
    x: mx.array,
    dt: mx.array,
    b: mx.array,
    c: mx.array,
    a: mx.array,
    d: mx.array,
    states: States,
    segments: Segments,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return outputs, states and snapshots of `by_segments`, segment by segment, in float32."""

    def rule(
        x: mx.array, dt: mx.array, b: mx.array, c: mx.array, state: mx.array
    ) -> tuple[mx.array, mx.array]:
        outputs = []
        for t in range(x.shape[1]):
            y, state = by_operations(
                x[:, t], dt[:, t], a, b[:, t], c[:, t], d.astype(mx.float32), state
            )
            outputs.append(y)
        return mx.stack(outputs, axis=1), state

    return segment_by_segment(segments, states, rule, x, dt, b, c)


def _compare(dtype: mx.Dtype) -> str | None:
    return _differences(dtype, 8, 64, example(), wide=False)


def _compare_wide(dtype: mx.Dtype, dim: int, size: int) -> str | None:
    """Compare segments of one and several chunks, with marks within and at the ends of chunks."""
    prompts = (0, 17, -1, -1), (-1, 70, 40, 4), (-3, 64, 64, 5), (1, 135, 100, 6), (-3, 30, 7, 7)
    segments = with_proposal(example(*prompts), 18)
    return _differences(dtype, dim, size, segments, wide=True)


def _differences(
    dtype: mx.Dtype, dim: int, size: int, segments: Segments, *, wide: bool
) -> str | None:
    keys = launch.random_keys(4, 6)
    rows, heads, groups = segments.owners.shape[0], 4, 2
    x = mx.random.normal((rows, heads, dim), key=keys[0]).astype(dtype)
    b, c = (mx.random.normal((rows, groups, size), key=i).astype(dtype) for i in keys[1:3])
    dt = mx.random.uniform(0.1, 1, (rows, heads), key=keys[3])
    d = mx.random.normal((heads,), key=keys[4]).astype(dtype)
    given = mx.random.normal((10 if wide else 6, heads, dim, size), key=keys[5])
    a = -mx.arange(1, heads + 1, dtype=mx.float32) / heads

    states = example_states(given, segments)
    wanted = one_by_one(x, dt, b, c, a, d, states, segments)
    mx.eval(wanted)
    found = by_segments(x, dt, b, c, a, d, states, segments, wide=wide)
    tolerance = 1e-4 if dtype == mx.float32 else 1e-2
    if problem := launch.difference(compared(found, states, wanted), tolerance):
        return problem
    joint = mx.concatenate([array.reshape(rows, -1) for array in (x, b, c)], axis=1)
    raw = mx.random.normal((rows, 2 + heads), key=keys[3]).astype(dtype)
    steps = Steps(2, mx.arange(heads, dtype=mx.float32) / 4 - 1, 0.3, 1.2)
    dt = mx.clip(nn.softplus(raw[:, 2:].astype(mx.float32) + steps.biases), 0.3, 1.2)
    states = example_states(given, segments)
    wanted = one_by_one(x, dt, b, c, a, d, states, segments)
    mx.eval(wanted)
    found = of_joint(joint, raw, steps, a, d, states, segments, groups, wide=wide)
    problem = launch.difference(compared(found, states, wanted), tolerance)
    return problem and f"of joint rows: {problem}"


#: None if the kernel computes the same as MLX's operations for a type, otherwise the problem; and
#: for the kernel on tensor cores, for a type and the sizes of a head and its state.
verdict = launch.Verdict(_compare)
wide_verdict = launch.Verdict(_compare_wide)
