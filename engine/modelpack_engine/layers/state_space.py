"""Selective state spaces (Mamba-2, https://arxiv.org/abs/2405.21060), for a token or a prompt.

A prompt is computed in chunks by matmuls: attention within a chunk, plus the contribution of the
state before it. A single token is computed by a CUDA kernel.
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models.ssm import segsum

from modelpack_engine.kernels import launch

_SIMDGROUPS, _CHANNELS = 4, 4


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
    if x.shape[1] == 1 and state is not None:
        inputs = x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], d, state
        y, state = (step if takes(x, b, c, state) else by_operations)(*inputs)
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
    """Return the results of `step`, by MLX's operations."""
    batch, heads, dim = x.shape
    groups, size = b.shape[1:]
    split = (batch, groups, heads // groups)
    inputs = (dt[..., None] * x).reshape(*split, dim, 1)
    decay = mx.exp(dt * a).reshape(*split, 1, 1)
    new_state = decay * state.reshape(*split, dim, size) + inputs * b[:, :, None, None, :]
    y = (new_state * c[:, :, None, None, :]).sum(axis=-1).reshape(x.shape)
    y = y + x * d[:, None]
    return y.astype(x.dtype), new_state.reshape(state.shape)


def takes(x: mx.array, b: mx.array, c: mx.array, state: mx.array) -> bool:
    """Return whether the kernel supports this device, these shapes and types, and is correct."""
    size = b.shape[-1]
    return (
        launch.backend() == "cuda"
        and x.dtype == b.dtype == c.dtype
        and state.dtype == mx.float32
        and size % 32 == 0
        and size <= 256
        and verdict(x.dtype) is None
    )


def step(
    x: mx.array, dt: mx.array, a: mx.array, b: mx.array, c: mx.array, d: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the outputs of one token, [rows, heads, dim], and the state after it, by a kernel.

    `x` is [rows, heads, dim], `dt` float32 [rows, heads], `a` float32 [heads], `b` and `c` are
    [rows, groups, size], `d` is [heads], the state float32 [rows, heads, dim, size].
    """
    rows, heads, dim = x.shape
    groups, size = b.shape[1:]
    channels = _CHANNELS if dim % _CHANNELS == 0 else 1
    y, new_state = launch.run(
        "state_space",
        [x, dt, a, b, c, d, state],
        [("T", x.dtype), ("E", d.dtype)],
        [
            ("H", heads), ("P", dim), ("G", groups), ("N", size), ("R", channels),
            ("NSG", _SIMDGROUPS),
        ],
        threads=rows * heads * (dim // channels) * 32,
        group=_SIMDGROUPS * 32,
        shapes=[x.shape, state.shape],
        dtypes=[x.dtype, mx.float32],
    )  # fmt: skip
    return y, new_state


def _compare(dtype: mx.Dtype) -> str | None:
    keys = launch.random_keys(4, 6)
    rows, heads, dim, groups, size = 3, 4, 8, 2, 64
    x = mx.random.normal((rows, heads, dim), key=keys[0]).astype(dtype)
    b, c = (mx.random.normal((rows, groups, size), key=i).astype(dtype) for i in keys[1:3])
    dt = mx.random.uniform(0.1, 1, (rows, heads), key=keys[3])
    d = mx.random.normal((heads,), key=keys[4]).astype(dtype)
    state = mx.random.normal((rows, heads, dim, size), key=keys[5])
    a = -mx.arange(1, heads + 1, dtype=mx.float32) / heads
    found = step(x, dt, a, b, c, d, state)
    expected = by_operations(*(v.astype(mx.float32) for v in (x, dt, a, b, c, d, state)))
    scaled = {}
    for name, ours, theirs in zip(("output", "state"), found, expected, strict=True):
        most = mx.max(mx.abs(theirs))
        scaled[name] = ours.astype(mx.float32) / most, theirs / most
    return launch.difference(scaled, 1e-4 if dtype == mx.float32 else 1e-2)


#: None if the kernel computes the same as MLX's operations for a type, otherwise the problem.
verdict = launch.verdict(_compare)
