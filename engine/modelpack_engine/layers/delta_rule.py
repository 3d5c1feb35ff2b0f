"""The gated delta rule of recurrent layers, by a CUDA kernel (https://arxiv.org/abs/2412.06464)."""

from __future__ import annotations

import mlx.core as mx

from modelpack_engine.kernels import launch

_SIMDGROUPS = 4
#: State rows per simdgroup, if that leaves at least `_ENOUGH` simdgroups to keep a GPU busy.
_ROWS, _ENOUGH = 4, 1024


def takes(q: mx.array, k: mx.array, v: mx.array) -> bool:
    """Return whether the kernel supports this device and these shapes, and is correct."""
    return (
        launch.backend() == "cuda"
        and q.dtype == k.dtype == v.dtype
        and k.shape[-1] % 32 == 0
        and k.shape[-1] <= 256
        and v.shape[2] % k.shape[2] == 0
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
    batch, tokens, key_heads, key_dim = k.shape
    heads, dim = v.shape[2:]
    if state is None:
        state = mx.zeros((batch, heads, dim, key_dim), mx.float32)
    rows = _ROWS if dim % _ROWS == 0 and batch * heads * dim // _ROWS >= _ENOUGH else 1
    inputs = [q, k, v, g.astype(mx.float32), beta.astype(mx.float32), state.astype(mx.float32)]
    y, new_state = launch.run(
        "delta_rule",
        inputs,
        [("T", q.dtype)],
        [
            ("HK", key_heads), ("HV", heads), ("DK", key_dim), ("DV", dim), ("R", rows),
            ("EVERY", g.ndim == 4), ("NSG", _SIMDGROUPS),
        ],
        threads=batch * heads * (dim // rows) * 32,
        group=_SIMDGROUPS * 32,
        shapes=[(batch, tokens, heads, dim), (batch, heads, dim, key_dim)],
        dtypes=[q.dtype, mx.float32],
    )  # fmt: skip
    return y, new_state


def _compare(dtype: mx.Dtype) -> str | None:
    keys = launch.random_keys(6, 6)
    batch, tokens, key_heads, heads, key_dim, dim = 2, 3, 2, 4, 64, 8
    q, k = (mx.random.normal((batch, tokens, key_heads, key_dim), key=i) / 8 for i in keys[:2])
    v = mx.random.normal((batch, tokens, heads, dim), key=keys[2])
    beta = mx.random.uniform(0, 1, (batch, tokens, heads), key=keys[3])
    state = mx.random.normal((batch, heads, dim, key_dim), key=keys[4])
    q, k, v = (a.astype(dtype) for a in (q, k, v))
    for shape in ((batch, tokens, heads), (batch, tokens, heads, key_dim)):
        g = mx.random.uniform(0.5, 1, shape, key=keys[5])
        (y, after), (y_wanted, wanted) = (
            f(q, k, v, g, beta, state) for f in (update, by_definition)
        )
        found = {"output": (y, y_wanted), "state": (after, wanted)}
        if problem := launch.difference(found, 1e-4 if dtype == mx.float32 else 3e-2):
            return problem
    return None


#: None if the kernel computes the rule correctly for a type, otherwise the problem.
verdict = launch.verdict(_compare)


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
