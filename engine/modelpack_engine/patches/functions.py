"""Functions of MLX and mlx-lm that the engine replaces in the whole process.

`install()` replaces the functions in `FUNCTIONS`, `uninstall()` restores the originals. Every
replacement calls the native function unless the arguments come from a step of the engine.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import (
    activations,
    bailing_hybrid,
    bailing_moe_linear,
    gated_delta,
    rwkv7,
    ssm,
)

from modelpack_engine.attention.cache_handle import KVHandle, LostHandleError, RotaryScores, RowMask
from modelpack_engine.attention.gather import native_attention
from modelpack_engine.attention.metadata import Positions
from modelpack_engine.kernels import launch
from modelpack_engine.layers import convolution, delta_rule, linear_attention, state_space
from modelpack_engine.layers.segments import LayerStates

native_rope: Callable[..., mx.array] = mx.fast.rope
native_conv1d = mx.conv1d
native_ssm_attn = ssm.ssm_attn
native_gated_delta_ops = gated_delta.gated_delta_ops
native_gated_delta_kernel = gated_delta.gated_delta_kernel
native_gla = bailing_hybrid.recurrent_gla
native_gla_of_moe = bailing_moe_linear.recurrent_gla
native_wkv: Callable[..., Any] = rwkv7.Rwkv7TimeMixing._wkv7
native_token_shift: Callable[..., Any] = rwkv7.TokenShift.__call__
native_swiglu: Callable[[mx.array, mx.array], mx.array] = activations.swiglu


@dataclass(frozen=True, slots=True)
class FunctionPatch:
    """A replaced attribute of a module or class: why, and when the patch can be removed."""

    owner: ModuleType | type
    name: str
    replacement: Callable[..., Any]
    reason: str
    until: str

    def __str__(self) -> str:
        owner = self.owner
        module = f"{owner.__module__}." if isinstance(owner, type) else ""
        return f"{module}{owner.__name__}.{self.name}"


_replaced: list[tuple[FunctionPatch, Any]] = []


def install(patches: Iterable[FunctionPatch] | None = None) -> None:
    """Replace the functions of `patches` (default: `FUNCTIONS`) that are not replaced yet."""
    for patch in FUNCTIONS if patches is None else patches:
        current = getattr(patch.owner, patch.name)
        if current is not patch.replacement:
            _replaced.append((patch, current))
            setattr(patch.owner, patch.name, patch.replacement)


def uninstall() -> None:
    """Restore the functions that `install` replaced."""
    while _replaced:
        patch, original = _replaced.pop()
        setattr(patch.owner, patch.name, original)


# Attention


def _attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    **rest: Any,
) -> mx.array:
    """Attend to the paged cache if the keys are a handle, else call MLX's function.

    Raises `LostHandleError` if the layer uses the handles in a way that the cache cannot serve.
    """
    cache = next((a.cache for a in (k, v) if isinstance(a, KVHandle)), None)
    if cache is None:
        if isinstance(mask, RowMask):
            raise LostHandleError("a layer attends to something other than its cache")
        return native_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **rest)
    if not isinstance(k, KVHandle) or not isinstance(v, KVHandle) or v.cache is not k.cache:
        raise LostHandleError("it attends to something other than its keys and values", cache=cache)
    latent = isinstance(mask, RotaryScores)
    if k.transposed or v.transposed or k.part != "keys" or (v.part == "keys") != latent:
        raise LostHandleError("it exchanges or transposes keys and values", cache=cache)
    window = queries = None
    if isinstance(mask, RowMask):
        window = mask.window
    elif isinstance(mask, RotaryScores):
        queries = mask.queries
    elif isinstance(mask, mx.array):
        raise LostHandleError("it applies a mask of its own", cache=cache)
    return k.cache.attend(
        q, scale=scale, window=window, sinks=sinks, query_pe=queries, key_dtype=k.dtype
    )


# Rotary embeddings

#: With at least this many pairs of elements, MLX's CUDA kernel can rotate any number of rows. With
#: fewer, it cannot be launched for `_TOO_MANY` threads, each of which serves four heads of a row.
_ENOUGH_PAIRS, _HEADS_PER_THREAD, _TOO_MANY = 16, 4, 128
#: Matrices kept per step. Models have one or two kinds of rotation; a model that exceeds the limit
#: makes a new one at every call.
MAX_ROTATIONS = 8


def _rope(x: mx.array, dims: int, **how: Any) -> mx.array:
    """Rotate x [rows, heads, 1, dim] by one matmul if `offset` caches matrices for the step."""
    offset = how.get("offset")
    rotations = offset.rotations if isinstance(offset, Positions) else None
    if x.ndim == 4 and x.shape[2] == 1 and dims < 2 * _ENOUGH_PAIRS and _on_cuda():
        return _rope_in_parts(x, dims, how)
    if rotations is None or x.dtype != mx.float32 or x.ndim != 4 or x.shape[2] != 1:
        return native_rope(x, dims, **how)
    rows, heads, _, dim = x.shape
    rest = {name: value for name, value in how.items() if name != "offset"}
    # Arrays (a layer's frequencies) are compared by identity.
    identities = {n: id(v) if isinstance(v, mx.array) else v for n, v in rest.items()}
    key = (dim, dims, *identities.items())
    if key not in rotations:
        if len(rotations) == MAX_ROTATIONS:
            return native_rope(x, dims, **how)
        unit = mx.broadcast_to(mx.eye(dim)[None, :, None, :], (rows, dim, 1, dim))
        matrix = native_rope(unit, dims, offset=offset, **rest)[:, :, 0]
        rotations[key] = matrix, list(rest.values())
    return (x.reshape(rows, heads, dim) @ rotations[key][0])[:, :, None]


def _on_cuda() -> bool:
    return mx.cuda.is_available() and mx.default_device() != mx.Device(mx.cpu)


def _rope_in_parts(x: mx.array, dims: int, how: dict[str, Any]) -> mx.array:
    """Rotate x [rows, heads, 1, dim] in as few calls as CUDA can launch."""
    most = max((_TOO_MANY - 1) // -(-x.shape[1] // _HEADS_PER_THREAD), 1)
    if x.shape[0] <= most:
        return native_rope(x, dims, **how)
    parts = []
    for start in range(0, x.shape[0], most):
        part = slice(start, start + most)
        offset = how.get("offset", 0)
        if isinstance(offset, mx.array) and offset.ndim > 0:
            offset = offset[part]
        parts.append(native_rope(x[part], dims, **{**how, "offset": offset}))
    return mx.concatenate(parts)


# Recurrent layers

_fast_recurrence: ContextVar[bool] = ContextVar("fast recurrence", default=False)
_states: ContextVar[LayerStates | None] = ContextVar("states", default=None)


@contextmanager
def fast_recurrence(states: LayerStates | None = None) -> Iterator[None]:
    """Let recurrent layers called in this context use the engine's kernels.

    With `states`, a layer is called with all rows of a step, as `Recurrence` says.
    """
    tokens = _fast_recurrence.set(True), _states.set(states)
    try:
        yield
    finally:
        _fast_recurrence.reset(tokens[0])
        _states.reset(tokens[1])


def _state_space(
    x: Any, A_log: Any, B: Any, C: Any, D: Any, dt: Any, dt_bias: Any, state: Any = None,
    time_step_limit: Any = (0.001, 100.0), mask: Any = None, lengths: Any = None, step: int = 256,
) -> Any:  # fmt: skip
    if not _fast_recurrence.get():
        return native_ssm_attn(
            x, A_log, B, C, D, dt, dt_bias, state, time_step_limit, mask, lengths, step
        )
    dt = ssm.compute_dt(dt, dt_bias, time_step_limit)
    if (states := _states.get()) is not None:
        a = -mx.exp(A_log).astype(mx.float32)
        # These are views; an index would copy.
        rows = x.squeeze(0), dt.squeeze(0), B.squeeze(0), C.squeeze(0)
        shape = *x.shape[2:], B.shape[-1]
        y = states.replace(
            shape, lambda before, segments: state_space.by_segments(*rows, a, D, before, segments)
        )
        return y[None], None
    if mask is not None:  # no time passes at padding, which leaves the state as it is
        dt = mx.where(mask[..., None], dt, 0)
    return state_space.attend(x, A_log, B, C, D, dt, state, step)


def _delta_rule(
    q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any = None, mask: Any = None
) -> Any:
    if (states := _states.get()) is not None:
        rows = q.squeeze(0), k.squeeze(0), v.squeeze(0), g.squeeze(0), beta.squeeze(0)
        shape = *v.shape[2:], k.shape[-1]
        y = states.replace(
            shape, lambda before, segments: delta_rule.by_segments(*rows, before, segments)
        )
        return y[None], None
    if not _fast_recurrence.get() or not delta_rule.takes(q, k, v):
        return native_gated_delta_ops(q, k, v, g, beta, state, mask)
    if mask is not None:  # padding neither decays the state nor adds to it
        g = mx.where(mask[..., None] if g.ndim == 3 else mask[..., None, None], g, 1)
        beta = mx.where(mask[..., None], beta, 0)
    return delta_rule.update(q, k, v, g, beta, state)


def _delta_rule_on_metal(*inputs: Any) -> Any:
    compute = native_gated_delta_kernel if _states.get() is None else _delta_rule
    return compute(*inputs)


def _lightning(
    native: Callable[..., Any], q: mx.array, k: mx.array, v: mx.array, g: mx.array,
    *, scale: float, h: mx.array | None = None, **more: Any,
) -> Any:  # fmt: skip
    """Compute Lightning attention, of rows [rows, heads, 1, dim] in a step with states."""
    if (states := _states.get()) is None:
        return native(q=q, k=k, v=v, g=g, scale=scale, h=h, **more)
    q, k, v = (q * scale)[:, :, 0], k[:, :, 0], v[:, :, 0]
    shape = k.shape[1], k.shape[2], v.shape[2]
    y = states.replace(
        shape,
        lambda before, segments: linear_attention.by_segments(
            q, k, v, mx.exp(g), before, segments, turned=True
        ),
    )
    return y[:, :, None], None


def _wkv(
    self: Any, r: Any, w: Any, k: Any, v: Any, a: Any, b: Any, state: Any
) -> tuple[mx.array, mx.array | None]:
    """Compute RWKV-7's rule, of rows [rows, 1, heads, dim] in a step with states."""
    if (states := _states.get()) is None:
        found: tuple[mx.array, mx.array] = native_wkv(self, r, w, k, v, a, b, state)
        return found
    r, w, k, v, a, b = (array[:, 0] for array in (r, w, k, v, a, b))
    shape = v.shape[1], v.shape[2], k.shape[2]
    y = states.replace(
        shape,
        lambda before, segments: linear_attention.by_segments(r, k, v, w, before, segments, (a, b)),
    )
    return y[:, None], None


def _token_shift(self: Any, x: mx.array, state: mx.array | None) -> mx.array:
    """Return the rows before; in a step with states, of rows [rows, 1, width]."""
    if (states := _states.get()) is None:
        shifted: mx.array = native_token_shift(self, x, state)
        return shifted
    width = x.shape[2]
    return states.replace(
        (1, width),
        lambda before, segments: convolution.by_segments(
            x[:, 0], _previous(width, x.dtype), before, segments
        ),
    )[:, None]


@lru_cache(maxsize=16)
def _previous(width: int, dtype: mx.Dtype) -> mx.array:
    """Return the weight of the convolution whose result is the row before."""
    made = mx.broadcast_to(mx.array([[1], [0]], dtype), (width, 2, 1))
    mx.eval(made := mx.contiguous(made))
    return made


def _convolution(x: mx.array, weight: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    if not _fast_recurrence.get() or not convolution.takes(x, weight, *args, **kwargs):
        return native_conv1d(x, weight, *args, **kwargs)
    if (states := _states.get()) is not None:
        shape = weight.shape[1] - 1, weight.shape[0]
        y = states.replace(
            shape,
            lambda before, segments: convolution.by_segments(
                x.squeeze(0), weight, before, segments
            ),
        )
        return y[None]
    if launch.backend() != "cuda":
        return native_conv1d(x, weight, *args, **kwargs)
    return convolution.convolve(x, weight)


#: The patches that every model runner installs.
FUNCTIONS = (
    FunctionPatch(
        mx.fast,
        "scaled_dot_product_attention",
        _attention,
        "mlx-lm's models pass it the handles of the cache, so that paged attention gets its queries"
        " here",
        "MLX has paged attention, or mlx-lm's models let the cache attend",
    ),
    FunctionPatch(
        mx.fast,
        "rope",
        _rope,
        "on CPUs it is slow for one token a row; on CUDA MLX 0.32 cannot launch it for many rows"
        " of few elements",
        "MLX rotates rows of one token as fast as a matmul, and launches any size",
    ),
    FunctionPatch(
        mx,
        "conv1d",
        _convolution,
        "MLX computes depthwise convolutions of short prompts slowly on CUDA",
        "MLX has a kernel for causal depthwise convolutions",
    ),
    FunctionPatch(
        ssm,
        "ssm_attn",
        _state_space,
        "without Metal, mlx-lm computes state spaces by thousands of products of single vectors",
        "mlx-lm has state-space kernels for CUDA and CPUs",
    ),
    FunctionPatch(
        gated_delta,
        "gated_delta_ops",
        _delta_rule,
        "without Metal, mlx-lm computes delta rules by a chain of operations per token",
        "mlx-lm has delta-rule kernels for CUDA",
    ),
    FunctionPatch(
        gated_delta,
        "gated_delta_kernel",
        _delta_rule_on_metal,
        "a step computes rows of several sequences",
        "mlx-lm's kernel takes sequences of different lengths",
    ),
    *(
        FunctionPatch(
            owner,
            name,
            replacement,
            "a step computes rows of several sequences",
            "mlx-lm computes sequences of different lengths",
        )
        for owner, name, replacement in (
            (bailing_hybrid, "recurrent_gla", partial(_lightning, native_gla)),
            (bailing_moe_linear, "recurrent_gla", partial(_lightning, native_gla_of_moe)),
            (rwkv7.Rwkv7TimeMixing, "_wkv7", _wkv),
            (rwkv7.TokenShift, "__call__", _token_shift),
        )
    ),
)


# SwiGLU on CPUs


@partial(mx.compile, shapeless=True)
def _by_powers_of_two(gate: mx.array, x: mx.array) -> mx.array:
    return gate * x / (1 + mx.power(2.0, gate * (-1 / math.log(2))))


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Return silu(gate) * x; on CPUs in half to two thirds of mlx-lm's time.

    MLX's sigmoid spends most of its time in `exp`; powers of two are cheaper.
    """
    if gate.dtype == x.dtype == mx.float32 and mx.default_device() == mx.Device(mx.cpu):
        return _by_powers_of_two(gate, x)
    return native_swiglu(gate, x)


def swiglu_patches(model: nn.Module) -> list[FunctionPatch]:
    """Return a patch for each module of mlx-lm that defines layers of `model` and uses SwiGLU."""
    names = sorted({type(module).__module__ for module in model.modules()})
    return [
        FunctionPatch(
            sys.modules[name],
            "swiglu",
            swiglu,
            "MLX's sigmoid is slow on CPUs",
            "MLX vectorises exp on CPUs",
        )
        for name in names
        if getattr(sys.modules[name], "swiglu", None) in (native_swiglu, swiglu)
    ]


# Collectives of ranks

_last_collective: mx.array | None = None


def begin_collectives() -> None:
    """Begin a new chain of collectives, for a step; steps are launched one after the other."""
    global _last_collective
    _last_collective = None


def _ordered(collective: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def call(x: mx.array, **arguments: Any) -> mx.array:
        global _last_collective
        if _last_collective is not None:
            x = mx.depends([x], [_last_collective])[0]
        _last_collective = collective(x, **arguments)
        return _last_collective

    return call


#: The patches that a rank installs; only one of its threads computes.
COLLECTIVES = tuple(
    FunctionPatch(
        mx.distributed,
        name,
        _ordered(getattr(mx.distributed, name)),
        "MLX runs independent collectives in any order, and ranks would add up parts of different"
        " sequences",
        "MLX runs the collectives of a group in the order in which they were called",
    )
    for name in ("all_sum", "all_gather")
)
