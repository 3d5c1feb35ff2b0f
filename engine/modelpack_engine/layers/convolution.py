"""Short depthwise convolutions of recurrent layers, as sums of products.

On CUDA, MLX uses cuDNN, which takes tens of milliseconds to plan each new prompt length. A kernel
computes those of several sequences in one step.
"""

from __future__ import annotations

from functools import lru_cache, partial

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.attention.metadata import Segments, States
from modelpack_engine.kernels import launch
from modelpack_engine.layers.segments import (
    compared,
    example,
    example_states,
    segment_by_segment,
)

LONGEST = 8
#: The channels of a thread, if they are enough, and the threads of a group.
VECTOR, _THREADS = 4, 128


def takes(
    x: mx.array,
    weight: mx.array,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    **_: object,
) -> bool:
    """Return whether `mx.conv1d` with these arguments is a short depthwise convolution."""
    return (
        (stride, padding, dilation) == (1, 0, 1)
        and groups == x.shape[-1] == weight.shape[0]
        and weight.shape[2] == 1
        and weight.shape[1] <= LONGEST
    )


def convolve(x: mx.array, weight: mx.array) -> mx.array:
    """Return x [batch, length, channels] convolved with weight [channels, size, 1].

    The result has length - size + 1 positions, in x's type. Sums are computed in float32.
    """
    size = weight.shape[1]
    length = x.shape[1] - size + 1
    parts = [x[:, i : i + length] for i in range(size)]
    return _sum(*parts, *(weight[:, i, 0] for i in range(size)))


@partial(mx.compile, shapeless=True)
def _sum(*terms: mx.array) -> mx.array:
    """Return the sum of the products of the first half of `terms` with the second half."""
    half = len(terms) // 2
    total = mx.array(0.0)
    for x, weight in zip(terms[:half], terms[half:], strict=True):
        total = total + x.astype(mx.float32) * weight.astype(mx.float32)
    return total.astype(terms[0].dtype)


def by_segments(
    x: mx.array,
    weight: mx.array,
    states: States,
    segments: Segments,
    *,
    columns: mx.array | None = None,
    bias: mx.array | None = None,
    activate: bool = False,
) -> mx.array:
    """Return the convolved rows of a step, [rows, channels]; write the states after its segments.

    The last rows of `x` [any, width] are the step's, and the weight is [channels, size, 1].
    `columns`, int32, has the column of every fourth channel in `x`, if they are not in order.
    `bias` [channels] is added; with `activate`, the result is the SiLU of the sum. A state, [size -
    1, channels] in x's type, has the rows before a segment.
    """
    assert states.rows.dtype == states.slots.dtype == x.dtype, "states are rows of before"
    channels, size = weight.shape[:2]
    rows, count = segments.owners.shape[0], segments.runs.shape[0]
    vector = VECTOR if columns is not None or channels % VECTOR == 0 else 1
    (y,) = launch.run(
        "convolve",
        [
            x, _in_order(channels, vector) if columns is None else columns, weight,
            weight if bias is None else bias.astype(weight.dtype), states.rows, states.slots,
            segments.runs, segments.owners,
        ],
        [("T", x.dtype), ("E", weight.dtype)],
        [
            ("C", channels), ("K", size), ("V", vector), ("WIDTH", x.shape[1]),
            ("SKIP", x.shape[0] - rows), ("BIAS", bias is not None), ("ACTIVATE", activate),
        ],
        threads=(rows + count * (size - 1)) * (channels // vector),
        group=_THREADS,
        shapes=[(rows, channels)],
        dtypes=[x.dtype],
    )  # fmt: skip
    return y


@lru_cache(maxsize=64)
def _in_order(channels: int, vector: int) -> mx.array:
    made = mx.arange(0, channels, vector, dtype=mx.int32)
    mx.eval(made)
    return made


def one_by_one(
    x: mx.array,
    weight: mx.array,
    states: States,
    segments: Segments,
    *,
    columns: mx.array | None = None,
    bias: mx.array | None = None,
    activate: bool = False,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return outputs, states and snapshots of `by_segments`, segment by segment, in float32."""
    kept = weight.shape[1] - 1
    x = x[x.shape[0] - segments.owners.shape[0] :]
    if columns is not None:
        x = x[:, (columns[:, None] + mx.arange(VECTOR)).reshape(-1)]

    def rule(x: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
        joined = mx.concatenate([state.astype(mx.float32), x], axis=1)
        parts = [joined[:, i : i + x.shape[1]] * weight[:, i, 0] for i in range(kept + 1)]
        sums = mx.stack(parts).sum(axis=0) + (0 if bias is None else bias)
        return nn.silu(sums) if activate else sums, joined[:, joined.shape[1] - kept :]

    return segment_by_segment(segments, states, rule, x)


def _compare(dtype: mx.Dtype) -> str | None:
    keys = launch.random_keys(7, 3)
    rows, channels, size = 9, 12, 4
    x = mx.random.normal((size - 1 + rows, channels), key=keys[0]).astype(dtype)
    weight = mx.random.normal((channels, size, 1), key=keys[1]).astype(dtype)
    given = mx.random.normal((6, size - 1, channels), key=keys[2]).astype(dtype)

    bias, columns = weight[:, 0, 0], mx.array([8, 0, 4], mx.int32)
    for more in ({}, {"columns": columns, "bias": bias, "activate": True}):
        states = example_states(given)
        wanted = one_by_one(x, weight, states, example(), **more)  # type: ignore[arg-type]
        mx.eval(wanted)
        found = by_segments(x, weight, states, example(), **more)  # type: ignore[arg-type]
        tolerance = 1e-5 if dtype == mx.float32 else 1e-2
        if problem := launch.difference(compared(found, states, wanted), tolerance):
            return problem
    return None


#: None if the kernel computes the same as MLX's operations for a type, otherwise the problem.
verdict = launch.Verdict(_compare)
