"""Rotation, the write to the cache and attention, against numpy in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack_engine.cpu.library import CacheType, Code, Operation, Rope
from tests.engine.cpu.programs import (
    EPS,
    Array,
    Sequence_,
    Steps,
    compute,
    from_bfloat16,
    operation,
    to_bfloat16,
)

#: The largest relative error of an element in each type of cache.
ROUNDING = {CacheType.F32: EPS, CacheType.F16: 2.0**-11, CacheType.BF16: 2.0**-8}


@dataclass(frozen=True)
class Case:
    """Attention of one layer: its shape, and (tokens in the cache, new rows) of each sequence."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    cache: CacheType = CacheType.F32
    block_size: int = 16
    sequences: tuple[tuple[int, int], ...] = ((0, 5), (20, 1), (37, 3))
    rope_dims: int = 0
    traditional: bool = False
    rope_scale: float = 1.0
    norms: bool = False
    seed: int = 0

    @property
    def scale(self) -> float:
        return float(np.float32(self.dim**-0.5))

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.dim

    @property
    def positions(self) -> list[int]:
        return [context + i for context, rows in self.sequences for i in range(rows)]

    @property
    def visible(self) -> list[int]:
        """For each sequence, the first token that a row of this step sees."""
        return [max(0, c + 1 - self.window) if self.window else 0 for c, _ in self.sequences]


class Cache:
    """A pool whose blocks lie out of order; block 0 and what was never written are NaN."""

    def __init__(self, case: Case, rng: np.random.Generator) -> None:
        self.case, size = case, case.block_size
        needed = [-(-(context + rows) // size) for context, rows in case.sequences]
        order = iter(rng.permutation(np.arange(1, 1 + sum(needed))))
        self.tables = [np.array([next(order) for _ in range(n)], np.int32) for n in needed]
        shape = (1 + sum(needed), 2, case.kv_heads, size * case.dim)
        if case.cache is CacheType.F32:
            self.pool = np.full(shape, np.nan, np.float32)
        elif case.cache is CacheType.F16:
            self.pool = np.full(shape, np.nan, np.float16)
        else:
            self.pool = np.full(shape, 0x7FC0, np.uint16)
        blocks = (len(self.pool), case.kv_heads, size)
        # [blocks][heads][size / 16][dim][16] and [blocks][heads][size][dim]
        self._keys = self.pool[:, 0].reshape(blocks[0], case.kv_heads, size // 16, case.dim, 16)
        self._values = self.pool[:, 1].reshape(*blocks, case.dim)
        for table, (context, _), first in zip(
            self.tables, case.sequences, case.visible, strict=True
        ):
            for token in range(first // size * size, context):
                keys, values = rng.standard_normal((2, case.kv_heads, case.dim), np.float32)
                block, offset = table[token // size], token % size
                self._keys[block, :, offset // 16, :, offset % 16] = self._stored(keys)
                self._values[block, :, offset] = self._stored(values)
            # Blocks that no row sees were freed; all tokens of others are the sequence's own.
            table[: first // size] = 0

    def _stored(self, values: Array) -> Array:
        return to_bfloat16(values) if self.case.cache is CacheType.BF16 else values

    def _read(self, stored: Array) -> Array:
        if self.case.cache is CacheType.BF16:
            stored = from_bfloat16(stored)
        return stored.astype(np.float64)

    @property
    def slots(self) -> list[int]:
        size = self.case.block_size
        return [
            int(table[t // size]) * size + t % size
            for table, (context, rows) in zip(self.tables, self.case.sequences, strict=True)
            for t in range(context, context + rows)
        ]

    def read(self, index: int) -> tuple[Array, Array]:
        """Return keys and values of a sequence, float64 [tokens, kv_heads, dim]."""
        table, (context, rows) = self.tables[index], self.case.sequences[index]
        tokens = np.arange(context + rows)
        block, offset = table[tokens // self.case.block_size], tokens % self.case.block_size
        keys = self._keys[block, :, offset // 16, :, offset % 16]
        return self._read(keys), self._read(self._values[block, :, offset])

    def steps(self) -> Steps:
        return Steps(
            positions=np.array(self.case.positions),
            slots=np.array(self.slots),
            sequences=[
                Sequence_(context, rows, table)
                for (context, rows), table in zip(self.case.sequences, self.tables, strict=True)
            ],
            block_size=self.case.block_size,
            pools=[self.pool],
        )


class Layer:
    """The operations of a case, and what numpy makes of their inputs."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rng = rng = np.random.default_rng(case.seed)
        self.cache = Cache(case, rng)
        self.heads = rng.standard_normal((len(case.positions), case.width), np.float32)
        self.frequencies = (10.0 ** rng.uniform(-4, 0, case.rope_dims // 2)).astype(np.float32)
        self.norms = [
            rng.uniform(0.5, 2, case.dim).astype(np.float32) if case.norms else None
            for _ in range(2)
        ]
        self.sinks = rng.standard_normal(case.heads, np.float32) if case.sinks else None

    def operations(self) -> list[Operation]:
        case = self.case
        shared = {"pool": 0, "cache": case.cache, "heads": case.heads, "kv_heads": case.kv_heads,
                  "dim": case.dim}  # fmt: skip
        return [
            operation(
                Code.ROTATE, input=0, rope=0 if case.rope_dims else -1, norm=self.norms[0],
                second_norm=self.norms[1], **shared,
            ),
            operation(
                Code.ATTEND, input=0, output=1, scale=case.scale, window=case.window,
                softcap=case.softcap, sinks=self.sinks, **shared,
            ),
        ]  # fmt: skip

    def compute(self) -> Array:
        """Return the library's result [rows, heads, dim]."""
        case = self.case
        ropes = (
            [
                Rope(
                    case.rope_dims,
                    case.traditional,
                    case.rope_scale,
                    0,
                    self.frequencies.ctypes.data,
                )
            ]
            if case.rope_dims
            else []
        )
        width = -(-case.width // 32) * 32
        inputs = np.zeros((len(self.heads), width), np.float32)
        inputs[:, : case.width] = self.heads
        # The rows of heads lie one after the other: their buffer is as wide as they are.
        attended = np.full((len(inputs), -(-case.heads * case.dim // 32) * 32), 7, np.float32)
        found = compute(
            self.operations(), {0: inputs, 1: attended}, 1, ropes=ropes, steps=self.cache.steps()
        )
        assert (found[:, case.heads * case.dim :] == 7).all()
        return found[:, : case.heads * case.dim].reshape(-1, case.heads, case.dim)

    def compute_alone(self, index: int, row: int) -> Array:
        """Return the result [heads, dim] of a row of a sequence in a step without other rows."""
        alone = Layer(replace(self.case, sequences=((self.case.positions[row], 1),)))
        alone.heads, alone.frequencies = self.heads[row : row + 1].copy(), self.frequencies
        alone.cache.pool, alone.cache.tables = self.cache.pool, [self.cache.tables[index]]
        return alone.compute()[0]

    def rotated(self) -> tuple[Array, Array, Array]:
        """Return queries, keys and values after norms and rotation, float64."""
        case = self.case
        x = self.heads.astype(np.float64).reshape(-1, case.heads + 2 * case.kv_heads, case.dim)
        q, k, v = np.split(x, [case.heads, case.heads + case.kv_heads], axis=1)
        return self._rotate(q, self.norms[0]), self._rotate(k, self.norms[1]), v

    def _rotate(self, x: Array, weight: Array | None) -> Array:
        case = self.case
        if weight is not None:
            x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * weight
        half, found = case.rope_dims // 2, x.copy()
        angles = np.outer(case.positions, self.frequencies)[:, None]
        cos, sin = case.rope_scale * np.cos(angles), case.rope_scale * np.sin(angles)
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if case.traditional else (i, half + i)
            found[..., a] = x[..., a] * cos[..., i] - x[..., b] * sin[..., i]
            found[..., b] = x[..., a] * sin[..., i] + x[..., b] * cos[..., i]
        return found

    def check(self, kernels: str) -> None:
        """The cache has the new keys and values, and rows are attention over what it has."""
        case = self.case
        # These multiply caches of bfloat16 in pairs, and round queries and scores to it, too.
        pairs = kernels in ("avx512_bf16", "amx") and case.dim % 32 == 0
        rounding = 2.0**-9 if pairs and case.cache is CacheType.BF16 else 0.0
        found = self.compute()
        queries, keys, values = self.rotated()
        row = 0
        for index, (context, rows) in enumerate(case.sequences):
            k, v = self.cache.read(index)
            for stored, new in ((k, keys), (v, values)):
                expected = new[row : row + rows]
                allowed = (ROUNDING[case.cache] + 40 * EPS) * np.abs(expected) + 8 * EPS
                assert (np.abs(stored[context:] - expected) <= allowed).all()
            for i in range(rows):
                self._check_row(found[row], queries[row], k, v, context + i, rounding)
                row += 1

    def _check_row(
        self, found: Array, queries: Array, k: Array, v: Array, position: int, rounding: float
    ) -> None:
        case = self.case
        first = max(0, position + 1 - case.window) if case.window else 0
        k, v = k[first : position + 1], v[first : position + 1]
        for head in range(case.heads):
            group = head // (case.heads // case.kv_heads)
            scores = k[:, group] @ queries[head] * case.scale
            if case.softcap:
                scores = case.softcap * np.tanh(scores / case.softcap)
            sink = -np.inf if self.sinks is None else float(self.sinks[head])
            top = max(scores.max(), sink)
            p = np.exp(scores - top)
            expected = p @ v[:, group] / (p.sum() + np.exp(sink - top))
            # Scores differ by roundings in proportion to their terms; so do their exponentials.
            terms = (np.abs(k[:, group]) @ np.abs(queries[head])).max() * case.scale
            off = EPS * (case.dim + 16) * (terms + case.softcap + 1)
            off += 2 * rounding * terms + rounding
            allowed = (off + 64 * EPS) * np.abs(v[:, group]).max()
            assert np.abs(found[head] - expected).max() <= allowed


CASES = {
    "one token": Case(sequences=((0, 1),)),
    "decode": Case(sequences=((1, 1), (15, 1), (16, 1), (17, 1), (100, 1))),
    "prompts": Case(sequences=((0, 1), (0, 16), (0, 17), (0, 40))),
    "chunks and single rows": Case(sequences=((30, 1), (16, 20), (5, 1), (33, 9), (0, 2))),
    "blocks of 32": Case(block_size=32, sequences=((40, 10), (31, 1), (32, 1), (63, 3))),
    "multi-query": Case(heads=16, kv_heads=1, sequences=((20, 1), (3, 12))),
    "groups of 3": Case(heads=9, kv_heads=3, sequences=((20, 1), (3, 12))),
    "groups of 7": Case(heads=14, kv_heads=2, sequences=((20, 1), (3, 12))),
    "no groups": Case(heads=5, kv_heads=5, dim=32, sequences=((20, 1), (3, 12))),
    "many heads for one": Case(heads=80, kv_heads=1, dim=32, sequences=((20, 1), (3, 3))),
    "heads of 80": Case(dim=80),
    "heads of 256": Case(dim=256, cache=CacheType.F16),
    "window": Case(window=20, sequences=((0, 50), (100, 1), (19, 1), (20, 4), (90, 30))),
    "window of 1": Case(window=1, sequences=((0, 20), (40, 1))),
    "window in blocks of 32": Case(window=7, block_size=32, sequences=((70, 30), (95, 2))),
    "softcap": Case(softcap=3.0),
    "sinks": Case(sinks=True, window=8, sequences=((0, 20), (33, 1))),
    "halves": Case(cache=CacheType.F16, sequences=((0, 20), (33, 1))),
    "bfloat16": Case(cache=CacheType.BF16, sequences=((0, 20), (33, 1))),
    "bfloat16, long context and window": Case(
        cache=CacheType.BF16, window=1000, sequences=((3000, 1), (2900, 21), (7, 2))
    ),
    "bfloat16, heads of 80": Case(cache=CacheType.BF16, dim=80),
    "rope": Case(rope_dims=64),
    "rope of pairs": Case(rope_dims=64, traditional=True),
    "partial rope": Case(rope_dims=16, dim=80, cache=CacheType.BF16),
    "partial rope of pairs": Case(rope_dims=32, traditional=True, norms=True),
    "scaled rope": Case(rope_dims=64, rope_scale=1.19, norms=True, sequences=((3000, 4), (0, 9))),
    "long context": Case(sequences=((3000, 1), (2900, 20)), rope_dims=64, cache=CacheType.F16),
    "long context and window": Case(sequences=((3000, 1), (2900, 20)), window=1000),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cases(case: Case, kernels: str) -> None:
    Layer(case).check(kernels)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 4))
    dim = 16 * draw(st.integers(2, 16))
    return Case(
        heads=kv_heads * draw(st.integers(1, 16)),
        kv_heads=kv_heads,
        dim=dim,
        window=draw(st.sampled_from([0, 0, 1, 16, 17, 50])),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0, 50.0])),
        sinks=draw(st.booleans()),
        cache=draw(st.sampled_from(list(CacheType))),
        block_size=draw(st.sampled_from([16, 32])),
        sequences=tuple(
            draw(
                st.lists(
                    st.tuples(st.integers(0, 150), st.sampled_from([1, 1, 2, 3, 8, 9, 30])),
                    min_size=1,
                    max_size=5,
                )
            )
        ),
        rope_dims=2 * draw(st.integers(0, dim // 2)),
        traditional=draw(st.booleans()),
        rope_scale=draw(st.sampled_from([1.0, 1.2])),
        norms=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@pytest.mark.long
@given(case=cases())
def test_any_case(case: Case, kernels: str) -> None:
    Layer(case).check(kernels)


@pytest.mark.parametrize("cache", list(CacheType))
@pytest.mark.parametrize("window", [0, 9, 150, 300])
def test_a_row_is_the_same_alone(cache: CacheType, window: int, kernels: str) -> None:
    """However many queries attend together, and from which token on."""
    whole = Layer(Case(heads=6, cache=cache, window=window, sequences=((0, 420),)))
    expected = whole.compute()
    for row in (150, 167, 315, 419):  # 167 and 315: another row sees tokens of an earlier 16
        np.testing.assert_array_equal(whole.compute_alone(0, row), expected[row])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("cache", list(CacheType))
def test_values_that_are_not_finite_stay_in_their_sequence(
    cache: CacheType, value: float, kernels: str
) -> None:
    """A broken row changes no other sequence, whatever part of it is broken."""
    case = Case(cache=cache, sequences=((20, 1), (0, 9), (40, 1), (3, 5)), rope_dims=64, norms=True)
    clean = Layer(case).compute()
    for head in (0, case.heads, case.heads + case.kv_heads):  # a query, a key, a value
        layer = Layer(case)
        layer.heads[4, head * case.dim : (head + 1) * case.dim] = value  # in the second sequence
        found = layer.compute()
        others = np.r_[0, 10 : len(clean)]
        np.testing.assert_array_equal(found[others], clean[others])
        assert not np.isfinite(found[4]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("cache", list(CacheType))
@pytest.mark.parametrize(("context", "broken"), [(20, 4), (30, 1)], ids=["within", "last of 16"])
def test_values_that_are_not_finite_change_no_earlier_row(
    cache: CacheType, value: float, context: int, broken: int, kernels: str
) -> None:
    """A row does not see the keys and values of later rows of its own sequence."""
    case = Case(cache=cache, sequences=((context, 9),), norms=True)
    clean = Layer(case).compute()
    for head in (0, case.heads, case.heads + case.kv_heads):  # a query, a key, a value
        layer = Layer(case)
        layer.heads[broken, head * case.dim : (head + 1) * case.dim] = value
        found = layer.compute()
        np.testing.assert_array_equal(found[:broken], clean[:broken])
        assert not np.isfinite(found[broken]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_change_no_row_whose_window_is_past_them(
    value: float, kernels: str
) -> None:
    case = Case(sequences=((20, 9),), window=3)
    clean = Layer(case).compute()
    for head in (case.heads, case.heads + case.kv_heads):  # a key, a value
        layer = Layer(case)
        layer.heads[2, head * case.dim : (head + 1) * case.dim] = value
        found = layer.compute()
        np.testing.assert_array_equal(found[[0, 1, 5, 6, 7, 8]], clean[[0, 1, 5, 6, 7, 8]])
        assert not np.isfinite(found[2]).all()


def test_rows_do_not_depend_on_their_batch(kernels: str) -> None:
    """A row alone has the bits that it has beside others."""
    case = Case(sequences=((20, 1), (0, 9), (40, 1)), rope_dims=64)
    together = Layer(case)
    found = together.compute()
    for index, row in ((0, 0), (2, 10)):
        np.testing.assert_array_equal(together.compute_alone(index, row), found[row])


def test_extreme_scores(kernels: str) -> None:
    """Scores far apart, zeros, and equal ones: no overflow, and weights that add up to 1."""
    for factor in (0.0, 1e-30, 100.0, 1e4):
        layer = Layer(Case(sequences=((0, 30), (50, 1))))
        layer.heads[:, : 4 * 64] *= np.float32(factor)
        found = layer.compute()
        assert np.isfinite(found).all()
        for index, rows in ((0, slice(0, 30)), (1, slice(30, 31))):
            _, values = layer.cache.read(index)
            assert np.abs(found[rows]).max() <= np.abs(values).max() * (1 + 100 * EPS)
        if not factor:
            _, values = layer.cache.read(1)
            mean = values.mean(axis=0).repeat(2, axis=0)
            np.testing.assert_allclose(found[30], mean, atol=1e-5)
