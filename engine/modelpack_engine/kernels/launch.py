"""Kernel launches: compiled kernels, their template arguments and grids, as calls of MLX."""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Any, ParamSpec

import mlx.core as mx

from modelpack_engine.kernels import cuda, recording
from modelpack_engine.kernels.plan import (
    MERGE_SIMDGROUPS,
    QUANTISED_PART,
    AttentionShape,
    DecodePlan,
    plan_write,
)
from modelpack_engine.kernels.quantised import Quantisation
from modelpack_engine.kernels.sources import (
    CONSTANT_BELOW,
    Backend,
    Body,
    KernelSource,
    can_include,
    kernel_source,
)

logger = logging.getLogger(__name__)

LOG2E = math.log2(math.e)
Kernel = Callable[..., list[mx.array]]
P = ParamSpec("P")


def backend() -> Backend:
    """Return the backend of the default device, on which kernels run."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return "none"
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else "none"


@cache
def _includes_files() -> bool:
    """Return whether CUDA's compiler can include files by path, tested by compiling a kernel."""
    if not can_include():
        return False
    made = _made(kernel_source("swiglu", "cuda", by_path=True), "cuda")
    try:
        mx.eval(
            made(
                inputs=[mx.zeros((1, 16), mx.float32)],
                template=[("T", mx.float32), ("N", 8), ("VEC", 4), ("SMALL", 0)],
                grid=(256, 1, 1),
                threadgroup=(256, 1, 1),
                output_shapes=[(1, 8)],
                output_dtypes=[mx.float32],
            )
        )
    except RuntimeError as error:
        logger.info("CUDA's compiler does not include files: %s", error)
        return False
    return True


def kernel(
    body: Body,
    on: Backend,
    shared_bytes: int = 0,
    *,
    split: bool = False,
    absent: tuple[str, ...] = (),
) -> Kernel:
    """Return the kernel of a body without the arrays `absent` (CUDA).

    `shared_bytes` is its dynamic shared memory (CUDA). Within `recording.recorded`, its calls are
    recorded.
    """
    found, source = made_kernel(body, on, shared_bytes, split=split, absent=absent)
    if (recorder := recording.active()) is None:
        return found
    return partial(recorder.run, found, body, source, shared_bytes)


@cache
def made_kernel(
    body: Body, on: Backend, shared_bytes: int, *, split: bool, absent: tuple[str, ...]
) -> tuple[Kernel, KernelSource]:
    """Return the kernel of a body, and its source."""
    by_path = on == "cuda" and _includes_files()
    source = kernel_source(body, on, split=split, by_path=by_path, absent=absent)
    return _made(source, on, shared_bytes), source


def run_on_cuda(
    body: Body,
    inputs: Mapping[str, mx.array | None],
    shared_bytes: int = 0,
    *,
    without: tuple[str, ...] = (),
    **more: Any,
) -> list[mx.array]:
    """Run the kernel of a body, whose inputs that are None, and the outputs `without`, are absent.

    `more` are the arguments of `Kernel`.
    """
    absent = tuple(name for name, array in inputs.items() if array is None) + without
    given = [array for array in inputs.values() if array is not None]
    return kernel(body, "cuda", shared_bytes, absent=absent)(inputs=given, **more)


def _made(found: KernelSource, on: Backend, shared_bytes: int = 0) -> Kernel:
    make: Any = mx.fast.metal_kernel if on == "metal" else mx.fast.cuda_kernel
    more = {"shared_memory": shared_bytes} if shared_bytes else {}
    made: Kernel = make(
        name=found.name,
        input_names=list(found.inputs),
        output_names=list(found.outputs),
        source=found.source,
        header=found.header,
        **more,
    )
    return cuda.prepared(made, found) if on == "cuda" else made


@cache
def zero() -> mx.array:
    """Return int32 [1] of 0: a token without an order, also used for absent inputs."""
    return mx.array([0], mx.int32)


@lru_cache(maxsize=256)
def factors(scale: float, softcap: float | None) -> mx.array:
    """Return the attention kernels' `params`, float32 [3], which convert scores to base 2."""
    if softcap is None:
        return mx.array([scale * LOG2E, LOG2E, 0.0], mx.float32)
    return mx.array([scale / softcap, 1.0 / softcap, softcap * LOG2E], mx.float32)


def bits_of(value: float) -> int:
    """Return the bits of a float32, to pass a number as a template argument.

    On CUDA, MLX keeps arrays of 8 bytes or less in host memory, and reading one takes 15 µs.
    """
    found: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return found


def template(
    types: Sequence[tuple[str, mx.Dtype]],
    constants: Sequence[tuple[str, int | bool]],
    inputs: Sequence[mx.array],
    on: Backend,
) -> list[tuple[str, Any]]:
    """Return template arguments that differ between calls whose generated source differs.

    MLX caches compiled kernels by name and template arguments. On Metal, the address space of an
    input depends on its size: without the argument SMALL, a kernel with changing input sizes would
    be compiled again for each change.
    """
    small = 0
    if on == "metal":
        small = sum(1 << i for i, a in enumerate(inputs) if a.size < CONSTANT_BELOW)
    return [*types, *constants, ("SMALL", small)]


def run(
    body: Body,
    inputs: Sequence[mx.array],
    types: Sequence[tuple[str, mx.Dtype]],
    constants: Sequence[tuple[str, int | bool]],
    *,
    threads: int,
    group: int,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[mx.Dtype],
) -> list[mx.array]:
    """Run a kernel with at least `threads` threads, in whole threadgroups of `group` threads."""
    on = backend()
    return kernel(body, on)(
        inputs=list(inputs),
        template=template(types, constants, inputs, on),
        grid=(-(-threads // group) * group, 1, 1),
        threadgroup=(group, 1, 1),
        output_shapes=list(shapes),
        output_dtypes=list(dtypes),
    )


def random_keys(seed: int, count: int) -> list[mx.array]:
    """Return keys of random arrays; to index those of `mx.random.split`, MLX compiles a gather."""
    return [mx.random.key(100 * seed + number) for number in range(count)]


class Verdict:
    """Compares a kernel with MLX: None if it is right, otherwise the problem.

    Results are cached by backend: a process may run an engine on the CPU before one on the GPU.
    """

    def __init__(self, compare: Callable[..., str | None]) -> None:
        self._found = cache(lambda on, *args, **kwargs: tried(compare, *args, **kwargs))

    def __call__(self, *args: Any, **kwargs: Any) -> str | None:
        on = backend()
        return "there is no GPU" if on == "none" else self._found(on, *args, **kwargs)

    def cache_clear(self) -> None:
        """Forget what was found."""
        self._found.cache_clear()


def tried(compare: Callable[P, str | None], *args: P.args, **kwargs: P.kwargs) -> str | None:
    """Return what `compare` finds; a kernel that cannot be compiled or launched is a problem."""
    try:
        with recording.unrecorded():
            return compare(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"it does not run: {error}"


def difference(found: Mapping[str, tuple[mx.array, mx.array]], tolerance: float) -> str | None:
    """Return which array is off by more than `tolerance` from the second of its pair, or None."""
    for name, (ours, expected) in found.items():
        error = float(mx.max(mx.abs(ours.astype(mx.float32) - expected.astype(mx.float32))))
        if not error <= tolerance:  # also if the error is NaN
            return f"{name} is off by {error:.3g}, allowed {tolerance}"
    return None


def decode(
    plan: DecodePlan,
    shape: AttentionShape,
    on: Backend,
    q: mx.array,
    k_pool: mx.array,
    v_pool: mx.array,
    block_tables: mx.array,
    context_lens: mx.array,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    q_more: mx.array | None = None,
    written: mx.array | None = None,
) -> mx.array:
    """Run the decode kernel by `plan`, and the merge kernel if contexts are split: [B, H, Dv]."""
    rows = q.shape[0]
    split = plan.parts > 1
    if sinks is None:
        sinks = factors(1.0, None)
    if q_more is None:
        q_more = q
    inputs = [
        q, q_more, k_pool, v_pool, block_tables, context_lens, sinks, factors(scale, softcap),
        zero() if written is None else written,
    ]  # fmt: skip
    out_dtype = mx.float32 if split else q.dtype
    types = [("T", q.dtype), ("P", k_pool.dtype), ("S", sinks.dtype), ("O", out_dtype)]
    heads = (rows, shape.num_heads)
    shapes: list[tuple[int, ...]] = [(*heads, shape.value_dim)]
    dtypes = [out_dtype]
    if split:
        shapes = [(*heads, plan.parts, shape.value_dim), (*heads, plan.parts, 2)]
        dtypes = [mx.float32, mx.float32]
    found = kernel("decode", on, split=split)(
        inputs=inputs,
        template=template(types, plan.constants, inputs, on),
        grid=(shape.num_kv_heads * plan.groups * plan.threads, rows, plan.parts),
        threadgroup=(plan.threads, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )
    return merge(found, shape, on, q.dtype, sinks) if split else found[0]


def merge(
    parts: Sequence[mx.array],
    shape: AttentionShape,
    on: Backend,
    dtype: mx.Dtype,
    sinks: mx.array,
    simdgroups: int = MERGE_SIMDGROUPS,
) -> mx.array:
    """Merge the attention of parts [rows, H, parts, Dv] by their statistics into [rows, H, Dv].

    `simdgroups` work on each head of a row: few are enough with many rows and few parts.
    """
    constants = [
        ("HQ", shape.num_heads), ("DV", shape.value_dim), ("SINKS", shape.sinks),
        ("NSG", simdgroups),
    ]  # fmt: skip
    inputs, rows = [*parts, sinks], parts[0].shape[0]
    (out,) = kernel("merge", on)(
        inputs=inputs,
        template=template([("T", dtype), ("S", sinks.dtype)], constants, inputs, on),
        grid=(shape.num_heads * 32 * simdgroups, rows, 1),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[(rows, shape.num_heads, shape.value_dim)],
        output_dtypes=[dtype],
    )
    return out


def write(
    on: Backend,
    k: mx.array,
    v: mx.array | None,
    k_pool: mx.array,
    v_pool: mx.array | None,
    slots: mx.array,
    previous: mx.array | None,
    quantised: Quantisation | None = None,
) -> mx.array:
    """Write rows k [T, key width], v [T, value width] into the pools' memory; return the token."""
    (rows, key_width), value_width = k.shape, 0 if v is None else v.shape[1]
    itemsize = max(k.dtype.size, k_pool.dtype.size)
    constants: list[tuple[str, int | bool]] = [("KW", key_width), ("VW", value_width)]
    if quantised is None:
        vector, threads = plan_write(itemsize, key_width, value_width)
        constants.append(("VEC", vector))
    else:
        threads = (key_width + value_width) // QUANTISED_PART
        constants += [("BITS", quantised.bits), ("GROUP", quantised.group)]
    inputs = [
        k, k if v is None else v, k_pool, k_pool if v_pool is None else v_pool, slots,
        zero() if previous is None else previous,
    ]  # fmt: skip
    (token,) = kernel("write" if quantised is None else "quantise", on)(
        inputs=inputs,
        template=template([("R", k.dtype), ("P", k_pool.dtype)], constants, inputs, on),
        grid=(rows * threads, 1, 1),
        threadgroup=(min(256, rows * threads), 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.int32],
    )
    return token
