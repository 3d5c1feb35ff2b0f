"""The operations on paged KV: decode attention, prefill attention, and KV writes.

Each kernel is compared with MLX's functions on this machine before its first use, by a probe, which
returns None or a description of the error. Without a correct kernel, MLX's functions run.
References are computed on the CPU: some GPUs multiply float32 with 10 bits of mantissa.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx

from modelpack_engine.kernels import grouped, launch, prefill, reference
from modelpack_engine.kernels.launch import tried
from modelpack_engine.kernels.plan import (
    AttentionShape,
    accumulators,
    after,
    plan_decode,
    refusal,
    simdgroups,
    token_of,
    written,
)
from modelpack_engine.kernels.quantised import Quantisation
from modelpack_engine.kernels.reference import TOLERANCE
from modelpack_engine.kernels.sources import CONSTANT_BELOW, Backend

logger = logging.getLogger(__name__)

_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_QUANTISED = (mx.uint32,)

#: The shape that `available` probes if no kernel has been probed before.
_ANY_SHAPE = AttentionShape(num_heads=8, num_kv_heads=2, key_dim=64, value_dim=64)
_BLOCKS = 41
_WIDTH = 40
_SLOTS = 4096

#: Results of probes by kernel, device and types: None, or why the kernel is not used.
_verdicts: dict[tuple[object, ...], str | None] = {}
_enabled = True


@dataclass(frozen=True, slots=True)
class KernelSupport:
    """The backend, whether each kernel has passed all of its probes, and the failures."""

    backend: Backend
    decode: bool
    write: bool
    failures: tuple[str, ...] = ()


def enable(enabled: bool) -> None:
    """Switch kernels on or off; without them, MLX's functions run."""
    global _enabled
    _enabled = enabled


def decode_attention(
    q: mx.array,
    k_pool: mx.array,
    v_pool: mx.array | None,
    block_tables: mx.array,
    context_lens: mx.array,
    *,
    scale: float,
    num_kv_heads: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    q_more: mx.array | None = None,
    value_dim: int | None = None,
    block_size: int = 16,
    split: int | None = None,
    quantised: Quantisation | None = None,
) -> mx.array:
    """Return attention [B, H, Dv] in q's dtype, for q [B, H, D] with one row per sequence.

    Row b sees the last `window` (None: all) of its first `context_lens[b]` tokens, in the blocks
    `block_tables[b]` (int32 [B, width]). `sinks` [H] are added to the softmax's denominator only;
    `softcap` c limits scores to c * tanh(score / c). `split` fixes the number of parts that
    contexts are split into.

    For latent attention, `value_dim` is set, and the values are the first `value_dim` elements of
    k_pool's rows. Then v_pool is None, or [slots, Hkv, Dx] with further elements of the keys, and
    `q_more` [B, H, Dx] has the matching elements of the queries, already scaled by the model.

    Pools that are `quantised` are uint32 [slots, 1, words], without latent attention.
    """
    pools = (k_pool, k_pool if v_pool is None else v_pool)
    dims = [pool.shape[-1] for pool in pools]
    if quantised is not None:
        assert value_dim is None, "latents are not quantised"
        dims = [quantised.width(words) // num_kv_heads for words in dims]
    shape = AttentionShape(
        num_heads=q.shape[1],
        num_kv_heads=num_kv_heads,
        key_dim=dims[0],
        value_dim=value_dim or dims[1],
        extra_dim=0 if q_more is None else q_more.shape[-1],
        latent=value_dim is not None,
        block_size=block_size,
        window=window,
        softcap=softcap is not None,
        sinks=sinks is not None,
        bits=0 if quantised is None else quantised.bits,
        group=0 if quantised is None else quantised.group,
    )
    assert q.shape[-1] == shape.key_dim, (q.shape, k_pool.shape)
    assert shape.latent or v_pool is not None, "a pool of values is required"
    assert (q_more is None) == (not shape.latent or v_pool is None), "queries and keys differ"
    token = token_of(k_pool)
    if v_pool is None:
        v_pool = k_pool
    if not may_decode(shape, q.dtype, k_pool.dtype):
        return reference.decode_attention(
            q, k_pool, v_pool, after(block_tables, k_pool, v_pool), context_lens,
            scale=scale, num_kv_heads=num_kv_heads, window=window, softcap=softcap, sinks=sinks,
            q_more=q_more, value_dim=value_dim, block_size=block_size, quantised=quantised,
        )  # fmt: skip
    if (
        split is None
        and grouped.takes(shape, q.shape[0])
        and may_group(shape, q.dtype, k_pool.dtype)
    ):
        return grouped.attend(
            q, k_pool, v_pool, block_tables.astype(mx.int32), context_lens.astype(mx.int32), shape,
            scale=scale, softcap=softcap, sinks=sinks, written=token,
        )  # fmt: skip
    plan = plan_decode(
        shape, k_pool.dtype.size, q.shape[0], block_tables.shape[1] * block_size, split,
        simdgroups=simdgroups(launch.backend()),
        max_accumulators=accumulators(launch.backend()),
    )  # fmt: skip
    return launch.decode(
        plan, shape, launch.backend(), q, k_pool, v_pool,
        block_tables.astype(mx.int32), context_lens.astype(mx.int32),
        scale=scale, softcap=softcap, sinks=sinks, q_more=q_more, written=token,
    )  # fmt: skip


def prefill_attention(
    q: mx.array,
    k_pool: mx.array,
    v_pool: mx.array,
    tiles: prefill.Tiles,
    *,
    scale: float,
    num_kv_heads: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    block_size: int = 16,
) -> mx.array | None:
    """Return attention [rows, H, D] for the rows of `tiles`; None if there is no kernel."""
    shape = AttentionShape(
        num_heads=q.shape[1],
        num_kv_heads=num_kv_heads,
        key_dim=k_pool.shape[-1],
        value_dim=v_pool.shape[-1],
        block_size=block_size,
        window=window,
        softcap=softcap is not None,
        sinks=sinks is not None,
    )
    if not may_prefill(shape, q.dtype, k_pool.dtype):
        return None
    return prefill.attend(
        q, k_pool, v_pool, tiles, shape, scale=scale, softcap=softcap, sinks=sinks
    )


def write_kv(
    k: mx.array,
    v: mx.array | None,
    k_pool: mx.array,
    v_pool: mx.array | None,
    slots: mx.array,
    previous_token: mx.array | None = None,
    *,
    quantised: Quantisation | None = None,
) -> tuple[mx.array, mx.array | None]:
    """Write rows k [T, Hkv, D] and v [T, Hkv, Dv] to `slots` (int32 [T]); return the pools.

    Use the returned pools from then on, and drop the ones passed in. With the kernel, they share
    the same memory: nothing is copied, even if there are other references. Rows with negative slots
    are dropped. `previous_token` orders this write after another one; by default, the pools' last
    write. Pools that are `quantised` are uint32 [slots, 1, words], and both are required.
    """
    assert (v is None) == (v_pool is None), "v and v_pool must be given together"
    # Metal puts inputs with few elements in `constant` memory, where the kernel reads no vectors.
    tiny = min(k.size, k.size if v is None else v.size) < CONSTANT_BELOW
    if tiny or not may_write(k.dtype, k_pool.dtype, quantised):
        slots = after(slots, k_pool, v_pool)
        k_pool = reference.write_rows(k, k_pool, slots, quantised)
        if v is None or v_pool is None:
            return k_pool, None
        return k_pool, reference.write_rows(v, v_pool, slots, quantised)
    rows = k.shape[0]
    token = launch.write(
        launch.backend(),
        k.reshape(rows, -1),
        None if v is None else v.reshape(rows, -1).astype(k.dtype),
        k_pool,
        v_pool,
        slots.astype(mx.int32),
        token_of(k_pool) if previous_token is None else previous_token,
        quantised,
    )
    if v_pool is None:
        return written(mx.depends(k_pool, token), token), None
    pools = mx.depends([k_pool, v_pool], token)
    return written(pools[0], token), written(pools[1], token)


def available() -> KernelSupport:
    """Return which kernels passed all probes so far on the default device."""
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


def probe(
    shapes: Iterable[AttentionShape],
    dtype: mx.Dtype = mx.bfloat16,
    pool_dtype: mx.Dtype | None = None,
) -> KernelSupport:
    """Probe the kernels for a model's attention shapes and types, and log failures.

    Call this while a model loads; otherwise, kernels are probed at their first use.
    """
    pool = pool_dtype or dtype
    for shape in shapes:
        may_decode(shape, dtype, pool)
    may_write(dtype, pool)
    return available()


def may_decode(shape: AttentionShape, dtype: mx.Dtype, pool: mx.Dtype) -> bool:
    """Return whether the decode kernel is correct for `shape`, probing it on the first call."""
    on = launch.backend()
    if on == "none" or not _enabled:
        return False
    key = ("decode", on, shape, dtype, pool)
    if key not in _verdicts:
        if dtype not in _DTYPES or pool not in (_QUANTISED if shape.bits else _DTYPES):
            reason: str | None = f"no kernel for {dtype} over {pool}"
        else:
            reason = refusal(shape, pool.size) or tried(probe_decode, shape, on, dtype, pool)
        _conclude(key, reason, f"decode on {on} for {shape} in {dtype}", "gathered blocks")
    return _verdicts[key] is None


def may_group(shape: AttentionShape, dtype: mx.Dtype, pool: mx.Dtype) -> bool:
    """Return whether the kernel for grouped heads is correct for `shape`, probing it as needed."""
    key = ("grouped", launch.backend(), shape, dtype, pool)
    if key not in _verdicts:
        refused = grouped.refusal(shape, dtype, pool)
        if refused is not None:
            _verdicts[key] = refused
        else:
            reason = tried(grouped.probe, shape, dtype)
            _conclude(key, reason, f"grouped decode for {shape} in {dtype}", "the other kernel")
    return _verdicts[key] is None


def may_prefill(shape: AttentionShape, dtype: mx.Dtype, pool: mx.Dtype) -> bool:
    """Return whether the prefill kernel is correct for `shape`, probing it on the first call."""
    on = launch.backend()
    if on == "none" or not _enabled:
        return False
    key = ("prefill", on, shape, dtype, pool)
    if key not in _verdicts:
        refused = prefill.refusal(shape, dtype, pool)
        if refused is not None:
            _verdicts[key] = refused
        else:
            reason = tried(prefill.probe, shape, dtype)
            _conclude(key, reason, f"prefill on {on} for {shape} in {dtype}", "gathered blocks")
    return _verdicts[key] is None


def may_write(dtype: mx.Dtype, pool: mx.Dtype, quantised: Quantisation | None = None) -> bool:
    """Return whether the write kernel is correct for these types, probing it on the first call."""
    on = launch.backend()
    if on == "none" or not _enabled:
        return False
    key = ("write", on, dtype, pool, quantised)
    if key not in _verdicts:
        if dtype not in _DTYPES or pool not in (_DTYPES if quantised is None else _QUANTISED):
            reason: str | None = f"no kernel for {dtype} into {pool}"
        elif quantised is None:
            reason = tried(probe_write, on, dtype, pool)
        else:
            reason = tried(probe_quantise, on, dtype, quantised)
        into = pool if quantised is None else quantised
        _conclude(key, reason, f"write on {on} of {dtype} into {into}", "MLX's scatter")
    return _verdicts[key] is None


def _conclude(key: tuple[object, ...], reason: str | None, kernel: str, instead: str) -> None:
    if reason is not None:
        logger.warning("The kernel to %s is not used: %s. Using %s.", kernel, reason, instead)
    _verdicts[key] = reason


def probe_decode(shape: AttentionShape, on: Backend, dtype: mx.Dtype, pool: mx.Dtype) -> str | None:
    """Compare decode attention of random rows with 1 to 600 tokens, with and without splits."""
    keys = launch.random_keys(7, 8)
    size = shape.block_size
    lines = _BLOCKS * size, shape.num_kv_heads
    longest = (_WIDTH - 2) * size
    context_lens = mx.array([1, size + 1, longest // 2 - 1, longest], mx.int32)
    rows = context_lens.size
    heads = rows, shape.num_heads
    kind = mx.float32 if shape.bits else pool
    k_pool = mx.random.normal((*lines, shape.key_dim), key=keys[0]).astype(kind)
    more = shape.extra_dim if shape.latent else shape.value_dim
    v_pool = mx.random.normal((*lines, more), key=keys[1]).astype(kind) if more else k_pool
    quantised = Quantisation(shape.bits, shape.group) if shape.bits else None
    if quantised is not None:
        k_pool, v_pool = (
            quantised.encode(mx.random.normal((lines[0], 1, lines[1] * dim), key=keys[6 + i]))
            for i, dim in enumerate((shape.key_dim, shape.value_dim))
        )
    q = mx.random.normal((*heads, shape.key_dim), key=keys[2]).astype(dtype)
    q_more = None
    if shape.extra_dim:
        q_more = mx.random.normal((*heads, shape.extra_dim), key=keys[3]).astype(dtype)
    sinks = mx.random.normal((shape.num_heads,), key=keys[4]) if shape.sinks else None
    tables = mx.random.randint(1, _BLOCKS, (rows, _WIDTH), mx.int32, key=keys[5])
    scale = (shape.key_dim + shape.extra_dim) ** -0.5
    softcap = 2.0 if shape.softcap else None
    mx.eval(q, k_pool, v_pool, tables)
    with mx.stream(mx.cpu):
        expected = reference.decode_attention(
            q.astype(mx.float32), k_pool, v_pool, tables, context_lens,
            scale=scale, num_kv_heads=shape.num_kv_heads, window=shape.window, softcap=softcap,
            sinks=sinks, q_more=q_more, value_dim=shape.value_dim if shape.latent else None,
            block_size=size, quantised=quantised,
        )  # fmt: skip
        mx.eval(expected)
    for parts in (1, 4):
        plan = plan_decode(
            shape, k_pool.dtype.size, rows, _WIDTH * size, parts,
            simdgroups=simdgroups(on), max_accumulators=accumulators(on),
        )  # fmt: skip
        out = launch.decode(
            plan, shape, on, q, k_pool, v_pool, tables, context_lens,
            scale=scale, softcap=softcap, sinks=sinks, q_more=q_more,
        )  # fmt: skip
        error = float(mx.max(mx.abs(out.astype(mx.float32) - expected)).item())  # type: ignore[arg-type]
        if not error <= TOLERANCE[dtype]:  # also if the error is NaN
            return f"its output is off by {error:.3g} in {parts} parts, allowed {TOLERANCE[dtype]}"
    return None


def probe_write(on: Backend, dtype: mx.Dtype, pool: mx.Dtype) -> str | None:
    """Compare a write into pools with other references: right values, no copy, readers wait."""
    rows, width = 32, 512
    key = mx.random.key(11)
    k_pool = mx.random.normal((_SLOTS, 1, width), key=key).astype(pool)
    v_pool = mx.zeros((_SLOTS, 1, width), pool)
    # Small integers are exact in every type.
    k = mx.random.randint(-100, 100, (rows, width), key=key).astype(dtype)
    v = k - 1
    slots = _some_slots(rows)
    kept = mx.arange(rows) != 3
    mx.eval(k, v, k_pool, v_pool, slots, kept)

    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    token = launch.write(on, k, v, k_pool, v_pool, slots, None)
    mx.eval(mx.depends([k_pool, v_pool], token))
    copied = mx.get_peak_memory() - before
    if copied >= k_pool.nbytes // 2:
        return f"it copied {copied} bytes of a pool of {k_pool.nbytes}"
    for name, rows_in, kv_pool in (("keys", k, k_pool), ("values", v, v_pool)):
        found = kv_pool[:, 0][mx.maximum(slots, 0)].astype(dtype)
        if not mx.all((found == rows_in) | ~kept[:, None]).item():
            return f"the {name} read back are not those written"

    # As in a model, each round writes rows that depend on what the previous round has read.
    written = k_pool
    values = k
    indices = mx.arange(1, rows + 1, dtype=mx.int32)
    order: mx.array | None = token
    for _ in range(8):
        order = launch.write(on, values, None, written, None, indices, order)
        written = mx.depends(written, order)
        values = written[:, 0][indices + order].astype(dtype) + 1
    if not mx.array_equal(values, k + 8).item():
        return "a reader did not wait for the previous write"
    return None


def _some_slots(rows: int) -> mx.array:
    """Return different slots, int32 [rows], out of order; the one of row 3 is -1: padding."""
    order = [(row * 37 + 11) % _SLOTS for row in range(rows)]
    return mx.array([-1 if row == 3 else slot for row, slot in enumerate(order)], mx.int32)


def probe_quantise(on: Backend, dtype: mx.Dtype, quantised: Quantisation) -> str | None:
    """Compare a quantised write: right values, no copy, and no other slots written."""
    rows, widths = 32, (512, 256)
    keys = launch.random_keys(13, 4)
    k, v = (
        mx.random.normal((rows, width), key=key).astype(dtype) * 3
        for width, key in zip(widths, keys, strict=False)
    )
    k[5, 70] = mx.nan
    pools = [mx.full((_SLOTS, 1, quantised.words(width)), 7, mx.uint32) for width in widths]
    slots = _some_slots(rows)
    mx.eval(k, v, pools, slots)

    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    token = launch.write(on, k, v, pools[0], pools[1], slots, None, quantised)
    mx.eval(mx.depends(pools, token))
    copied = mx.get_peak_memory() - before
    if copied >= pools[0].nbytes // 2:
        return f"it copied {copied} bytes of a pool of {pools[0].nbytes}"
    kept = [row for row in range(rows) if row != 3]
    for name, rows_in, kv_pool in (("keys", k, pools[0]), ("values", v, pools[1])):
        with mx.stream(mx.cpu):
            wanted = quantised.encode(rows_in[mx.array(kept)])
            places = slots[mx.array(kept)]
            found = quantised.decode(kv_pool[places, 0], mx.float32)
            read = quantised.decode(wanted, mx.float32)
            # A code may differ by one for an element halfway between two codes.
            far = mx.abs(found - read) > 24.0 / ((1 << quantised.bits) - 1) * 1.05
            if mx.any(far | (mx.isnan(found) != mx.isnan(read))).item():
                return f"the {name} read back are not those written"
            if not mx.all(mx.sum(kv_pool != 7) <= wanted.size).item():
                return f"it wrote {name} to slots that are not its own"
    return None
