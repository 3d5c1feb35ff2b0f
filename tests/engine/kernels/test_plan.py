"""Plans of decode attention: the conditions that the kernel relies on, for any shape."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from modelpack_engine.kernels.plan import (
    MAX_FLIGHT_BYTES,
    MAX_PARTS,
    MAX_SHARED_BYTES,
    MERGE_SIMDGROUPS,
    AttentionShape,
    accumulators,
    plan_decode,
    plan_write,
    refusal,
    vector_width,
)

DIMS = (8, 12, 16, 20, 32, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256, 512)
USUAL = tuple(dim for dim in DIMS if 64 <= dim <= 256)


@st.composite
def shapes(draw: st.DrawFn, dims: tuple[int, ...] = DIMS) -> AttentionShape:
    kv_heads = draw(st.integers(1, 16))
    latent = draw(st.booleans())
    key_dim = draw(st.sampled_from(dims))
    value_dim = draw(st.sampled_from(dims))
    if latent:
        value_dim = min(value_dim, key_dim)
    return AttentionShape(
        num_heads=kv_heads * draw(st.integers(1, 72)),
        num_kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        extra_dim=draw(st.sampled_from([0, 8, 64])) if latent else 0,
        latent=latent,
        block_size=draw(st.sampled_from([8, 16, 32])),
        window=draw(st.sampled_from([None, 128, 4096])),
    )


@given(
    shapes(), st.sampled_from([2, 4]), st.integers(1, 256), st.integers(1, 1 << 17),
    st.sampled_from([1, 2, 4, 8, None]), st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_plans_are_what_the_kernel_relies_on(
    shape: AttentionShape,
    itemsize: int,
    rows: int,
    context: int,
    simdgroups: int | None,
    steps: int,
) -> None:
    assume(refusal(shape, itemsize) is None)
    plan = plan_decode(shape, itemsize, rows, context, None, simdgroups, steps)
    c = dict(plan.constants)
    for dim in (c["DK"], c["DX"], c["DV"]):
        assert dim % c["VEC"] == 0
    assert c["VEC"] * itemsize <= 16
    assert c["LPT"] in (1, 2, 4, 8, 16, 32)
    chunk = 32 // c["LPT"] * c["STEPS"]
    assert c["BLOCK"] % chunk == 0, "a simdgroup's chunk lies in one block"
    assert simdgroups in (None, c["NSG"])
    if simdgroups is None:
        assert plan.shared_bytes <= MAX_SHARED_BYTES
    assert c["G"] * c["HK"] == shape.num_heads
    assert (plan.groups - 1) * c["HEADS"] < c["G"] <= plan.groups * c["HEADS"]
    assert plan.threads == 32 * c["NSG"] <= 1024
    assert 1 <= plan.parts <= MAX_PARTS
    assert plan.parts & (plan.parts - 1) == 0, "few different numbers of parts"
    assert c["SPLIT"] == (plan.parts > 1)


@given(shapes(), st.sampled_from([2, 4]))
def test_plans_fit_into_shared_memory(shape: AttentionShape, itemsize: int) -> None:
    fits = refusal(shape, itemsize) is None
    plan = plan_decode(shape, itemsize, 1, 1)
    assert fits == (plan.shared_bytes <= MAX_SHARED_BYTES)
    assert not fits or 4 * MERGE_SIMDGROUPS * shape.value_dim <= MAX_SHARED_BYTES
    if shape.key_dim + shape.extra_dim <= 256:
        assert fits, "every usual head has a kernel"


@given(shapes(USUAL))
def test_plans_for_metal_fit_into_its_registers(shape: AttentionShape) -> None:
    """The 32-bit registers of a thread: accumulators, pending loads, scores, and a few more."""
    assume(refusal(shape, 2) is None)
    assume(shape.key_dim + shape.extra_dim <= 256)
    plan = plan_decode(shape, 2, 1, 1, max_accumulators=accumulators("metal"))
    c = dict(plan.constants)
    row = -(-c["DV"] // (c["VEC"] * c["LPT"])) * c["VEC"]
    taken = c["HEADS"] * row + MAX_FLIGHT_BYTES // 4 + c["HEADS"] * c["STEPS"]
    assert taken + 3 * c["HEADS"] <= 128 - 24
    assert plan.shared_bytes <= plan_decode(shape, 2, 1, 1).shared_bytes


@pytest.mark.parametrize(
    ("rows", "kv_heads", "context", "window", "parts"),
    [
        (128, 8, 1024, None, 1),  # rows enough
        (32, 8, 4096, None, 1),
        (16, 8, 4096, None, 2),
        (1, 8, 8192, None, 32),
        (64, 8, 2048, None, 1),
        (1, 8, 256, None, 1),  # too short
        (1, 8, 8192, 128, 1),  # a short window
        (1, 8, 8192, 1024, 8),
        (1, 1, 1 << 20, None, 64),  # there is a limit
    ],
)
def test_only_few_long_rows_are_split(
    rows: int, kv_heads: int, context: int, window: int | None, parts: int
) -> None:
    shape = AttentionShape(4 * kv_heads, kv_heads, 64, 64, window=window)
    assert plan_decode(shape, 2, rows, context).parts == parts
    assert plan_decode(shape, 2, rows, context, 3).parts == 3


@pytest.mark.parametrize(
    ("rows", "dim", "context", "window", "simdgroups", "parts"),
    [
        (128, 64, 544, None, 2, 1),  # as benchmarks/results/kernels-h200.md has it
        (128, 64, 1024, None, 4, 1),
        (64, 64, 544, None, 4, 1),
        (32, 64, 4096, None, 8, 1),
        (16, 64, 2048, None, 8, 2),
        (8, 64, 32768, None, 8, 4),
        (1, 64, 544, None, 8, 1),
        (1, 64, 32768, None, 8, 32),
        (1, 64, 256, None, 4, 1),
        (1, 64, 32768, 128, 4, 1),
        (1, 512, 4096, None, 4, 32),  # eight would need too much shared memory
    ],
)
def test_cuda_has_more_simdgroups_where_there_are_few_threadgroups(
    rows: int, dim: int, context: int, window: int | None, simdgroups: int, parts: int
) -> None:
    shape = AttentionShape(32, 8, dim, dim, window=window)
    plan = plan_decode(shape, 2, rows, context, simdgroups=None)
    assert (dict(plan.constants)["NSG"], plan.parts) == (simdgroups, parts)


@pytest.mark.parametrize(
    ("itemsize", "widths", "vector"),
    [(2, (64, 64), 8), (4, (64, 64), 4), (2, (20, 12), 4), (2, (72, 0), 8), (2, (6, 64), 2),
     (2, (7, 64), 1)],
)  # fmt: skip
def test_vectors_divide_all_widths(itemsize: int, widths: tuple[int, int], vector: int) -> None:
    assert vector_width(itemsize, *widths) == vector
    assert plan_write(itemsize, *widths) == (vector, max(widths) // vector)


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        (AttentionShape(5, 2, 64, 64), "evenly"),
        (AttentionShape(4, 2, 64, 64, block_size=24), "block size"),
        (AttentionShape(4, 2, 64, 64, 8), "extra_dim requires latent"),
        (AttentionShape(4, 2, 64, 72, latent=True), "longer than"),
        (AttentionShape(4, 2, 4, 4), "too small"),
        (AttentionShape(128, 1, 4096, 4096), "shared memory"),
    ],
)
def test_shapes_without_a_kernel_are_refused(shape: AttentionShape, why: str) -> None:
    found = refusal(shape, 2)
    assert found is not None
    assert why in found
