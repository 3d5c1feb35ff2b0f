"""Which kernels may run here: what backend there is, and what the probes have found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx

from modelpack_engine.attention.kernels import launch, prefill, probes
from modelpack_engine.attention.kernels.plan import AttentionShape, refusal
from modelpack_engine.attention.kernels.sources import Backend
from modelpack_engine.attention.quantised import Quantisation

logger = logging.getLogger(__name__)

_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_QUANTISED = (mx.uint32,)
#: What `available` probes if nothing has been probed before.
_ANY_SHAPE = AttentionShape(num_heads=8, num_kv_heads=2, key_dim=64, value_dim=64)


@dataclass(frozen=True, slots=True)
class KernelSupport:
    """The backend, whether each kernel passed all of its probes, and what failed."""

    backend: Backend
    decode: bool
    write: bool
    failures: tuple[str, ...] = ()


#: What was found, by kernel, device and types: None, or why the kernel is not used.
_verdicts: dict[tuple[object, ...], str | None] = {}
_enabled = True


def enable(enabled: bool) -> None:
    """Let kernels run, or use MLX's own functions only, from now on."""
    global _enabled
    _enabled = enabled


def may_decode(shape: AttentionShape, dtype: mx.Dtype, pool: mx.Dtype) -> bool:
    """Return whether the decode kernel is right for `shape`; the first call for one probes it."""
    on = launch.backend()
    if on == "none" or not _enabled:
        return False
    key = ("decode", on, shape, dtype, pool)
    if key not in _verdicts:
        if dtype not in _DTYPES or pool not in (_QUANTISED if shape.bits else _DTYPES):
            reason: str | None = f"no kernel for {dtype} over {pool}"
        else:
            reason = refusal(shape, pool.size) or _run(
                lambda: probes.probe_decode(shape, on, dtype, pool)
            )
        _conclude(key, reason, f"decode on {on} for {shape} in {dtype}", "gathered blocks")
    return _verdicts[key] is None


def may_prefill(shape: AttentionShape, dtype: mx.Dtype, pool: mx.Dtype) -> bool:
    """Return whether the prefill kernel is right for `shape`; the first call for one probes it."""
    on = launch.backend()
    if on == "none" or not _enabled:
        return False
    key = ("prefill", on, shape, dtype, pool)
    if key not in _verdicts:
        refused = prefill.refusal(shape, dtype, pool)
        if refused is not None:
            _verdicts[key] = refused
        else:
            reason = _run(lambda: prefill.probe(shape, dtype))
            _conclude(key, reason, f"prefill on {on} for {shape} in {dtype}", "gathered blocks")
    return _verdicts[key] is None


def may_write(dtype: mx.Dtype, pool: mx.Dtype, quantised: Quantisation | None = None) -> bool:
    """Return whether the write kernel is right for these types; the first call probes it."""
    on = launch.backend()
    if on == "none" or not _enabled:
        return False
    key = ("write", on, dtype, pool, quantised)
    if key not in _verdicts:
        if dtype not in _DTYPES or pool not in (_DTYPES if quantised is None else _QUANTISED):
            reason: str | None = f"no kernel for {dtype} into {pool}"
        elif quantised is None:
            reason = _run(lambda: probes.probe_write(on, dtype, pool))
        else:
            reason = _run(lambda: probes.probe_quantise(on, dtype, quantised))
        into = pool if quantised is None else quantised
        _conclude(key, reason, f"write on {on} of {dtype} into {into}", "MLX's scatter")
    return _verdicts[key] is None


def probe(
    shapes: Iterable[AttentionShape],
    dtype: mx.Dtype = mx.bfloat16,
    pool_dtype: mx.Dtype | None = None,
) -> KernelSupport:
    """Probe both kernels for a model's attention shapes and types; say by a warning what fails.

    To be called while a model loads: a kernel that was not probed is so at its first use.
    """
    pool = pool_dtype or dtype
    for shape in shapes:
        may_decode(shape, dtype, pool)
    may_write(dtype, pool)
    return available()


def available() -> KernelSupport:
    """Return what kernels there are on the default device, by all probes so far."""
    on = launch.backend()
    if on == "none" or not _enabled:
        return KernelSupport("none", decode=False, write=False)
    if not all(any(key[:2] == (name, on) for key in _verdicts) for name in ("decode", "write")):
        probe([_ANY_SHAPE])
    found = {
        name: [verdict for key, verdict in _verdicts.items() if key[:2] == (name, on)]
        for name in ("decode", "write")
    }
    failures = tuple(verdict for name in found for verdict in found[name] if verdict is not None)
    good = {name: bool(found[name]) and not any(found[name]) for name in found}
    return KernelSupport(on, good["decode"], good["write"], failures)


def _run(check: Callable[[], str | None]) -> str | None:
    """Return what `check` finds; a kernel that cannot be compiled or launched is one that fails."""
    try:
        return check()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"it does not run: {error}"


def _conclude(key: tuple[object, ...], reason: str | None, kernel: str, instead: str) -> None:
    if reason is not None:
        logger.warning("The kernel to %s is not used: %s. Using %s.", kernel, reason, instead)
    _verdicts[key] = reason
