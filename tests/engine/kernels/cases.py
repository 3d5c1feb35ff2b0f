"""Cases of decode attention for the emulator, with their expected results in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from modelpack_engine.kernels.launch import LOG2E
from modelpack_engine.kernels.plan import AttentionShape, DecodePlan, plan_decode
from modelpack_engine.kernels.quantised import Quantisation
from tests.engine.kernels.signatures import Instance, decode_instance, merge_instance

Array = npt.NDArray[Any]
SOFTCAP = 2.0
ITEMSIZE = {"float": 4, "float16_t": 2, "bfloat16_t": 2, "uint32_t": 4}


@dataclass(frozen=True)
class Case:
    """One decode attention: its shape, contexts, C types of queries and pools, and its split."""

    name: str
    shape: AttentionShape
    context_lens: tuple[int, ...] = (1, 17, 40)
    pool: str = "float"
    q: str = "float"
    parts: int = 1
    simdgroups: int = 2
    max_steps: int = 2

    @property
    def width(self) -> int:
        """The columns of the block table, including one that is never used."""
        return max(-(-n // self.shape.block_size) for n in self.context_lens) + 1

    @property
    def plan(self) -> DecodePlan:
        """The plan for this case on a GPU."""
        return plan_decode(
            self.shape,
            ITEMSIZE[self.pool],
            len(self.context_lens),
            self.width * self.shape.block_size,
            self.parts,
            self.simdgroups,
            self.max_steps,
        )

    @property
    def instances(self) -> tuple[Instance, ...]:
        """The kernels of this case."""
        decode = decode_instance(self.plan, q=self.q, pool=self.pool)
        return (decode, merge_instance(self.shape, q=self.q)) if self.parts > 1 else (decode,)


S = AttentionShape
CASES = [
    Case("plain", S(4, 2, 64, 64), simdgroups=4),
    Case("bf16", S(4, 2, 64, 64), (1, 30, 100), pool="bfloat16_t", max_steps=4),
    Case("f16-out-f16", S(2, 2, 64, 64), pool="float16_t", q="float16_t"),
    Case("window-sinks-gqa4-80", S(4, 1, 80, 80, window=9, sinks=True)),
    Case("window-over-blocks-bf16", S(3, 1, 128, 128, window=33), (5, 33, 90), pool="bfloat16_t"),
    Case("softcap-dk96-dv64-bs8", S(2, 2, 96, 64, block_size=8, softcap=True)),
    Case("softcap-window-sinks", S(2, 1, 72, 72, softcap=True, window=20, sinks=True)),
    Case("256-bf16", S(2, 1, 256, 256), pool="bfloat16_t"),
    Case("dv-above-dk-bs32", S(2, 1, 64, 128, block_size=32), (3, 70), pool="bfloat16_t"),
    Case("ragged-head-groups", S(9, 1, 64, 64, sinks=True), (19,), pool="bfloat16_t"),
    Case("odd-dims", S(2, 2, 20, 12), (1, 33), pool="bfloat16_t"),
    Case("empty-row", S(2, 1, 64, 64), (0, 5), pool="bfloat16_t"),
    Case("empty-row-sinks", S(2, 1, 64, 64, sinks=True), (0, 5), pool="bfloat16_t"),
    Case("split", S(4, 2, 64, 64), (1, 17, 100), pool="bfloat16_t", parts=4),
    Case("split-sinks", S(2, 1, 128, 128, sinks=True), (1, 70), pool="float16_t", parts=2),
    Case("split-window", S(2, 1, 64, 64, window=40), (90, 12, 130), pool="bfloat16_t", parts=2),
    Case("split-empty-row", S(1, 1, 64, 64), (0, 64), pool="bfloat16_t", parts=2),
    Case("split-bf16-out", S(2, 1, 96, 96), (50,), pool="bfloat16_t", q="bfloat16_t", parts=2),
    Case("latent-one-pool", S(4, 1, 72, 64, latent=True)),
    Case("latent-two-pools", S(4, 1, 64, 64, 8, latent=True), pool="bfloat16_t"),
    Case("q8", S(4, 2, 64, 64, bits=8, group=64), pool="uint32_t"),
    Case("q4-bf16", S(4, 2, 64, 64, bits=4, group=64), pool="uint32_t", q="bfloat16_t"),
    Case("q8-odd-rows", S(9, 3, 64, 64, sinks=True, bits=8, group=64), pool="uint32_t"),
    Case("q4-128-window", S(4, 1, 128, 128, window=20, bits=4, group=64), pool="uint32_t"),
    Case("q8-96-64-split", S(2, 2, 96, 64, bits=8, group=32), (1, 70), pool="uint32_t", parts=2),
    Case("latent-576", S(6, 1, 512, 512, 64, latent=True), (1, 20), pool="bfloat16_t", parts=2),
]  # fmt: skip


def typed(array: Array, c_type: str) -> Array:
    """Return float32 values as the bits of a C type (bfloat16 as uint16)."""
    if c_type == "float":
        return array.astype(np.float32)
    if c_type == "float16_t":
        return array.astype(np.float16)
    wide = array.astype(np.float32).view(np.uint32)
    bits = ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), bits)


def plain(array: Array, c_type: str) -> Array:
    """Return the float64 values of an array that `typed` has made."""
    if c_type == "uint32_t":
        raise TypeError("words have no values of their own")
    if c_type == "bfloat16_t":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def packed(pool: Array, shape: AttentionShape) -> Array:
    """Return a pool [slots, heads, dim] quantised to [slots, words]; NaN makes its group NaN."""
    kind = Quantisation(shape.bits, shape.group)
    rows = pool.reshape(len(pool), -1, shape.group)
    # MLX's functions make the words; groups of nothing but NaN are 1 << 30 or so.
    words = kind.encode(mx.array(np.nan_to_num(rows).reshape(len(pool), -1)))
    found = np.array(words)
    scales = found[:, -rows.shape[1] :]
    scales[np.isnan(rows).any(-1)] = 0x7FC0
    return found


def unpacked(words: Array, shape: AttentionShape, heads: int) -> Array:
    """Return the values of quantised words, float64 [slots, heads, dim], without MLX."""
    width = words.shape[1] * 32 * shape.group // (shape.bits * shape.group + 32)
    codes, scales = np.split(words, [width * shape.bits // 32], axis=1)
    per_word = 32 // shape.bits
    shifts = np.arange(per_word, dtype=np.uint32) * shape.bits
    values = (codes[:, :, None] >> shifts) & (2**shape.bits - 1)
    values = values.reshape(len(words), -1, shape.group).astype(np.float64)
    step = (scales << 16).view(np.float32)[..., None].astype(np.float64)
    bias = (scales & 0xFFFF0000).view(np.float32)[..., None].astype(np.float64)
    found: Array = (values * step + bias).reshape(len(words), heads, -1)
    return found


@dataclass
class Inputs:
    """The input arrays of a case, and its `params`."""

    arrays: dict[str, Array]
    scale: float


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Return random inputs: unseen slots are NaN, and unused table entries are out of range."""
    rng = np.random.default_rng(seed)
    shape, size = case.shape, case.shape.block_size
    rows, blocks = len(case.context_lens), sum(-(-n // size) for n in case.context_lens) + 1
    more = shape.extra_dim if shape.latent else shape.value_dim
    slots = blocks * size
    k_pool = np.full((slots, shape.num_kv_heads, shape.key_dim), np.nan, np.float32)
    v_pool = np.full((slots, shape.num_kv_heads, max(1, more)), np.nan, np.float32)
    tables = np.full((rows, case.width), 1 << 30, np.int32)
    free = iter(rng.permutation(np.arange(1, blocks)))
    for row, length in enumerate(case.context_lens):
        first = 0 if shape.window is None else max(0, length - shape.window)
        for block in range(-(-length // size)):
            tables[row, block] = next(free)
        for token in range(first, length):
            slot = tables[row, token // size] * size + token % size
            k_pool[slot] = rng.standard_normal(k_pool.shape[1:])
            v_pool[slot] = rng.standard_normal(v_pool.shape[1:])
    scale = (shape.key_dim + shape.extra_dim) ** -0.5
    cap = SOFTCAP if shape.softcap else 0.0
    factors = [scale / cap, 1.0, cap * LOG2E] if cap else [scale * LOG2E, LOG2E, 0.0]
    heads = rows, shape.num_heads
    parts = (case.parts,) if case.parts > 1 else ()
    arrays = {
        "q": typed(rng.standard_normal((*heads, shape.key_dim)), case.q),
        "q_more": typed(rng.standard_normal((*heads, max(1, shape.extra_dim))) * scale, case.q),
        "k_pool": packed(k_pool, shape) if shape.bits else typed(k_pool, case.pool),
        "v_pool": packed(v_pool, shape) if shape.bits else typed(v_pool, case.pool),
        "block_tables": tables,
        "context_lens": np.array(case.context_lens, np.int32),
        "sinks": rng.standard_normal(shape.num_heads).astype(np.float32),
        "params": np.array(factors, np.float32),
        "written": np.zeros(1, np.int32),
        "out": np.full((*heads, *parts, shape.value_dim), np.nan, np.float32),
        "stats": np.full((*heads, *parts, 2), np.nan, np.float32),
    }
    if case.parts == 1:
        arrays["out"] = typed(arrays["out"], case.q)
    return Inputs(arrays, scale)


def expected(case: Case, inputs: Inputs) -> Array:
    """Return the naive result in float64, head by head."""
    shape, size = case.shape, case.shape.block_size
    arrays = inputs.arrays
    q, q_more = (plain(arrays[name], case.q) for name in ("q", "q_more"))
    pools = arrays["k_pool"], arrays["v_pool"]
    if shape.bits:
        k_pool, v_pool = (unpacked(words, shape, shape.num_kv_heads) for words in pools)
    else:
        k_pool, v_pool = (plain(pool, case.pool) for pool in pools)
    out = np.zeros((len(case.context_lens), shape.num_heads, shape.value_dim))
    for row, length in enumerate(case.context_lens):
        first = 0 if shape.window is None else max(0, length - shape.window)
        tokens = np.arange(first, length)
        slots = arrays["block_tables"][row, tokens // size] * size + tokens % size
        for head in range(shape.num_heads):
            kv_head = head * shape.num_kv_heads // shape.num_heads
            keys = k_pool[slots, kv_head]
            scores = keys @ q[row, head] * inputs.scale
            values = keys[:, : shape.value_dim] if shape.latent else v_pool[slots, kv_head]
            if shape.extra_dim:
                scores += v_pool[slots, kv_head] @ q_more[row, head]
            if shape.softcap:
                scores = np.tanh(scores / SOFTCAP) * SOFTCAP
            sink = float(arrays["sinks"][head]) if shape.sinks else -np.inf
            top = max([*scores, sink])
            if length:
                weights = np.exp(scores - top)
                total = weights.sum() + np.exp(sink - top)
                out[row, head] = weights @ values / total
    return out
