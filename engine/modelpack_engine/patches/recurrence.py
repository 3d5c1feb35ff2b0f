"""Recurrence: what recurrent layers of mlx-lm compute, where mlx-lm has no kernel for it.

Its state spaces and delta rules are Metal kernels, and on other devices long chains of operations:
one a token for the delta rule, and products of single vectors, thousands a layer, for state spaces.
`install` puts other ways to the same results in their place, for what runs `in_use`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
from mlx_lm.models import gated_delta, ssm

from modelpack_engine.layers import convolution, delta_rule, state_space

native_ssm_attn = ssm.ssm_attn
native_gated_delta_ops = gated_delta.gated_delta_ops
native_conv1d = mx.conv1d
_in_use: ContextVar[bool] = ContextVar("recurrence in use", default=False)


@contextmanager
def in_use() -> Iterator[None]:
    """Let what is called inside use what is installed; elsewhere mlx-lm computes as ever."""
    token = _in_use.set(True)
    try:
        yield
    finally:
        _in_use.reset(token)


def install() -> None:
    """Let mlx-lm's layers compute state spaces and delta rules by ours, once for the process.

    Where mlx-lm has kernels of its own, on Metal, it does not call what is replaced.
    """
    ssm.ssm_attn = _state_space
    gated_delta.gated_delta_ops = _delta_rule
    mx.conv1d = _convolution


def _state_space(
    x: Any, A_log: Any, B: Any, C: Any, D: Any, dt: Any, dt_bias: Any, state: Any = None,
    time_step_limit: Any = (0.001, 100.0), mask: Any = None, lengths: Any = None, step: int = 256,
) -> Any:  # fmt: skip
    if not _in_use.get() or mask is not None or lengths is not None:
        return native_ssm_attn(
            x, A_log, B, C, D, dt, dt_bias, state, time_step_limit, mask, lengths, step
        )
    dt = ssm.compute_dt(dt, dt_bias, time_step_limit)
    return state_space.attend(x, A_log, B, C, D, dt, state, step)


def _delta_rule(
    q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any = None, mask: Any = None
) -> Any:
    if not _in_use.get() or mask is not None or not delta_rule.takes(q, k, v):
        return native_gated_delta_ops(q, k, v, g, beta, state, mask)
    return delta_rule.update(q, k, v, g, beta, state)


def _convolution(x: mx.array, weight: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    if not _in_use.get() or not convolution.takes(x, weight, *args, **kwargs):
        return native_conv1d(x, weight, *args, **kwargs)
    return convolution.convolve(x, weight)
