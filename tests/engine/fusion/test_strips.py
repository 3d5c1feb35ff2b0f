"""Matmuls of few rows by strips: what the kernel multiplies, and the kernel on an emulated GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack_engine.kernels import launch
from modelpack_engine.layers import blocks, matmul, packed, strips
from modelpack_engine.layers.blocks import BLOCK_TYPES
from modelpack_engine.layers.dots import Normed
from modelpack_engine.layers.strips import Format
from modelpack_engine.layers.weights import Weights
from tests.engine.kernels.onhost import Host, emulated

LONG = pytest.mark.long
BF16, F16, F32 = mx.bfloat16, mx.float16, mx.float32
OF_64, Q6_K = Format(4, 64), Format(6, 16, BLOCK_TYPES["Q6_K"])


def stored(name: str) -> Format:
    """Return the format of a block type; that of halves of superblocks if the name is `name/2`."""
    kind = BLOCK_TYPES[name.removesuffix("/2")]
    return Format(kind.low + kind.high, kind.group, kind.halved if name.endswith("/2") else kind)


def weights(form: Format = OF_64, outputs: int = 48, inputs: int = 512) -> tuple[Weights, mx.array]:
    """Return weights in bfloat16 with a bias, and what they stand for: [out, in], bias last."""
    made, full, bias = strips.random_weights_of(BF16, form, (outputs, inputs), biased=True)
    return made, mx.concatenate([full, bias[:, None]], axis=1)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with emulated(monkeypatch, strips.verdict) as found:
        monkeypatch.setattr(launch, "backend", lambda: "cuda")
        monkeypatch.setattr(packed, "has_warpgroups", lambda: True)
        yield found


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    monkeypatch.setattr(packed, "has_warpgroups", lambda: True)
    monkeypatch.setattr(strips, "verdict", lambda *_: None)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("shape", "form", "inputs", "fits"),
    [
        ((1, 512), OF_64, 512, True),
        ((8, 2, 256), OF_64, 512, True),
        ((9, 512), OF_64, 512, False),
        ((4, 256), Format(4, 32), 256, True),
        ((4, 256), OF_64, 256, False),  # a row's scales have no whole copies of 16 bytes
        ((4, 1024), Format(4, 128), 1024, True),
        ((4, 512), Format(4, 128), 512, False),
        ((4, 512), Format(8, 64), 512, True),
        ((8, 4096), Format(8, 64), 4096, True),
        ((1, 14336), OF_64, 14336, True),
        ((1, 14336), Format(8, 64), 14336, True),
        ((8, 14336), OF_64, 14336, False),  # the rows fit in parts only
        ((1, 256), Q6_K, 256, True),
        ((8, 4096), Q6_K, 4096, True),
        ((1, 11008), Q6_K, 11008, True),
        ((8, 14336), Q6_K, 14336, False),
        ((9, 256), Q6_K, 256, False),
        ((2, 288), stored("IQ4_NL"), 288, False),  # no whole unit
        ((2, 768), stored("MXFP4"), 768, True),
    ],
)
def test_what_the_kernel_of_strips_multiplies(
    shape: tuple[int, ...], form: Format, inputs: int, fits: bool
) -> None:
    made, _ = weights(form, 8, inputs)
    x = mx.zeros(shape, BF16)
    assert (strips.strips_for(x, made) is not None) is fits
    in_parts = strips.strips_for(x, made, parted=True)
    assert in_parts is not None or not fits


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("form", [OF_64, Q6_K])
def test_strips_are_for_hopper_and_for_kernels_that_are_right(
    monkeypatch: pytest.MonkeyPatch, form: Format
) -> None:
    x, (made, _) = mx.zeros((1, 512), BF16), weights(form)
    monkeypatch.setattr(strips, "verdict", lambda *_: "it is off")
    assert strips.strips_for(x, made) is None
    monkeypatch.setattr(strips, "verdict", lambda *_: None)
    assert strips.strips_for(x, made) is not None
    for other in (F32, F16):  # of rows, and of a bias
        assert strips.strips_for(x.astype(other), made) is None
    monkeypatch.setattr(packed, "has_warpgroups", lambda: False)
    assert strips.strips_for(x, made) is None


@given(
    rows=st.integers(1, 8), pieces=st.integers(1, 128),
    form=st.sampled_from(
        [*(Format(bits, size) for bits in (4, 8) for size in (32, 64, 128)), Q6_K,
         *map(stored, ("Q2_K", "Q5_1", "Q6_K/2", "MXFP4", "NVFP4"))]
    ),
)  # fmt: skip
def test_strips_fit_a_multiprocessor(rows: int, pieces: int, form: Format) -> None:
    inputs = pieces * form.step
    found = strips.plan(rows, inputs, form, parted=True)
    if found is None:
        return
    units, least = inputs // found.parts // 256, form.step // 256
    assert inputs % (found.parts * 256) == 0
    assert found.rows >= rows
    assert found.stages >= 2
    assert found.shared_bytes * (found.blocks * found.parts // 132 or 1) <= 227 << 10
    # All stages of a strip, and a shorter last one, are whole copies; no warp has nothing to do.
    assert found.warps % least == units % least == 0
    assert found.warps <= min(units, 16)
    assert found.threads <= 608  # as kernels/bounds.h declares


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("dtype", "group_size"), [(BF16, 64), (BF16, 32), (F16, 128), (F16, 64)])
def test_strips_agree_with_mlx(
    host: Host, dtype: mx.Dtype, group_size: int, bits: int, rows: int
) -> None:
    biased = group_size != 64
    assert strips.verdict(dtype, Format(bits, group_size), rows, biased) is None
    calls = [call for _, call in host.calls]
    assert {(call["BITS"], call["BIAS"]) for call in calls} == {(bits, biased)}
    assert max(call["STRIDE"] for call in calls) < 21  # blocks compute several strips
    assert {call["ROWS"] for call in calls} == {rows}
    fewer = 4 if group_size == 128 else 6
    sizes = {(call["D"] // 256, call["WARPS"]) for call in calls}
    assert sizes == {
        (16, 16), (8, 8 if rows == 8 else fewer), *([(16, fewer)] if rows == 1 else [])
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype", "rows"),
    [
        pytest.param(name, dtype, rows, marks=[] if (name, rows) == ("Q6_K", 1) else LONG)
        for name in (*sorted(BLOCK_TYPES), "Q4_K/2", "Q6_K/2")
        for dtype, rows in ((BF16, 1), (F16, 1), (BF16, 2), (F16, 4), (BF16, 8))
    ],
)
def test_strips_of_block_types(host: Host, name: str, dtype: mx.Dtype, rows: int) -> None:
    biased = dtype == F16
    assert strips.verdict(dtype, stored(name), rows, biased) is None
    body = "digit_strips" if stored(name).in_digits(rows) else "block_strips"
    assert (body == "digit_strips") is (rows <= 2 and "FP4" not in name)
    assert {(name, call["BIAS"]) for name, call in host.calls} == {(body, biased)}
    assert max(call["STRIDE"] for _, call in host.calls) < 21
    sizes = {(call["WHOLE"], call["D"] // 256, call["WARPS"]) for _, call in host.calls}
    assert sizes == {
        (True, 14, 14), (False, 7, 7 if rows == 8 else 4), *([(False, 14, 4)] if rows == 1 else [])
    }  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(
    ("form", "rows", "wrong", "problem"),
    [
        (OF_64, 8, ("= Pairs::WHOLE", "= 1.0f"), "the product of 8 rows is off"),
        (OF_64, 8, ("1.0f / Pairs::WHOLE", "1.0f"), "the product of 8 rows is off"),
        (OF_64, 8, ("c % (GROUPS / 2)", "0"), "the product of 8 rows is off"),
        (Format(4, 32), 1, ("c * 2 % GROUPS) * ROWS", "0) * ROWS"), "the product of 1 rows is off"),
        (OF_64, 8, ("BITS == 8 ? v.y : v.z", "v.y"), "the product of 8 rows is off"),
        (OF_64, 4, ("r % ROWS) * 4 + c", "r % ROWS) * 4"), "the sum of parts is off"),
        (OF_64, 8, ("* VECTORS + v, c)", "* VECTORS + v, 0)"), "the product of 8 rows is off"),
        (OF_64, 8, ("mask < 4", "mask < 2"), "the product of 8 rows is off"),
        (Format(8, 64), 8, ("e * 2 + p / 2", "e * 2"), "the product of 8 rows is off"),
        (Format(8, 64), 2, ("p % 2 : p", "0 : p"), "the product of 2 rows is off"),
        (
            OF_64,
            1,
            ("(PA_X + turn * STRIDE) * OUTPUTS + o", "PA_X * OUTPUTS + o"),
            "the product of 1 rows is off",
        ),
        (OF_64, 4, ("PA_Z * D + first * UNIT", "first * UNIT"), "the sum of parts is off"),
        (
            Format(8, 64),
            1,
            ("part < PARTS", "part < 1"),
            "the product of a norm in a stage is off",
        ),
        (Q6_K, 4, ("value *= FACTOR, up *= FACTOR;", ""), "the product of 4 rows is off"),
        (Q6_K, 1, ("first_scale(first) % 16", "0"), "the sum of parts is off"),
        (Q6_K, 4, ("first_scale(first) % 16", "0"), "the sum of parts is off"),
        (Q6_K, 2, ("+ (WHOLE ? UNITS * HIGHS :", "+ (WHOLE ? 0 :"), "the product of 2 rows is off"),
        (stored("Q5_K"), 4, ("read_line(chunk, h, ", "read_line(chunk, 0, "), "the product of 4"),
        (stored("Q5_K"), 8, ("eight(vector / 4 * 4 + lane,", "eight(lane,"), "the product of 8"),
        (stored("IQ4_XS"), 4, ("eight / 4 % 4", "eight % 4"), "the sum of parts is off"),
        (Q6_K, 1, ("number[h] * sum[j]", "sum[j]"), "the product of 1 rows is off"),
        (Q6_K, 2, ("|| half == c / 2", "|| true"), "the product of 2 rows is off"),
        (stored("Q2_K"), 2, ("c % 2 ? 0.0f : sum", "sum"), "the product of 2 rows is off"),
        (stored("Q3_K"), 1, ("0x7362", "0x5140"), "the product of 1 rows is off"),
        (stored("Q5_K"), 1, ("+ 256.0f *", "+ 0.0f *"), "the product of 1 rows is off"),
        (stored("IQ4_NL"), 1, ("65536.0f", "1.0f"), "the product of 1 rows is off"),
        (
            stored("MXFP4"),
            1,
            ("Scaled::PLACE - Codes", "9 - Codes"),
            "the product of 1 rows is off",
        ),
        (stored("MXFP4"), 4, ("0x80008000u, moved", "0x80000000u, moved"), "the product of 4"),
        (stored("NVFP4"), 2, ("[e * 8 / GROUP]", "[0]"), "the product of 2 rows is off"),
    ],
)
def test_the_verdict_names_wrong_strips(
    host: Host, form: Format, rows: int, wrong: tuple[str, str], problem: str
) -> None:
    edited = []

    def broken(_: str, text: str) -> str:
        edited.append(wrong[0] in text)
        return text.replace(*wrong)

    host.break_by(broken)
    assert str(strips.verdict(BF16, form, rows, True)).startswith(problem)
    assert any(edited)


@pytest.mark.parametrize("name", ["Q6_K", "Q5_K", "IQ4_NL"])
def test_digits_lose_nothing_beside_large_inputs(host: Host, name: str) -> None:
    """Tensor cores add up integers: sums of float32 in any order are less exact."""
    form = stored(name)
    made, full, _ = strips.random_weights_of(BF16, form, (16, 512), biased=False)
    x = np.random.default_rng(1).normal(size=(2, 512)).astype(np.float32)
    x[0, 5], x[1, ::3] = 3e4, 1e-20
    rows = mx.array(x).astype(BF16)
    plan = strips.plan(2, 512, form)
    assert plan is not None
    halves = strips.multiply(rows, made, replace(plan, parts=2, warps=1))
    assert halves.dtype == F32
    exact = np.array(rows.astype(F32), np.float64)
    weight = np.array(full, np.float64)
    most = 1e-6 * (np.abs(exact) @ np.abs(weight.T))
    assert np.all(np.abs(np.array(halves.sum(axis=0)) - exact @ weight.T) <= most)
    assert [body for body, _ in host.calls] == ["digit_strips"]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(("dtype", "size"), [(BF16, 1), (F16, 1), (F16, 1e-5), (F16, 5e3)])
@pytest.mark.parametrize("form", [OF_64, pytest.param(Format(4, 32), marks=LONG),
                                  pytest.param(Format(8, 128), marks=LONG)])  # fmt: skip
def test_offsets_are_multiplied_by_exact_sums(
    host: Host, form: Format, dtype: mx.Dtype, size: float, rows: int
) -> None:
    """A sum of a group is two numbers, of 16 bits together."""
    inputs = form.step * 2
    made, _, _ = strips.random_weights_of(dtype, form, (16, inputs), biased=False)
    assert made.scales is not None
    assert made.biases is not None
    given = replace(made, scales=made.scales / 64, biases=made.biases * 64)
    weight = mx.dequantize(
        given.weight, given.scales.astype(F32), given.biases.astype(F32), form.group_size, form.bits
    )  # fmt: skip
    x = (size * (mx.random.normal((rows, inputs), key=mx.random.key(2)) + 0.5)).astype(dtype)
    plan = strips.plan(rows, inputs, form)
    assert plan is not None
    plan = replace(plan, parts=2, warps=min(plan.warps, inputs // 512))
    found = np.array(strips.multiply(x, given, plan).sum(axis=0), np.float64)
    exact, full = np.array(x.astype(F32), np.float64), np.array(weight, np.float64)
    most = 2.0**-15 * (np.abs(exact) @ np.abs(full.T))
    assert np.all(np.abs(found - exact @ full.T) <= most)
    assert [body for body, _ in host.calls] == ["packed_strips"]


@pytest.mark.parametrize("form", [OF_64, Q6_K])
@pytest.mark.parametrize("outputs", [8, 20, 24, 48])
def test_the_last_strip_has_fewer_outputs(host: Host, form: Format, outputs: int) -> None:
    made, full, _ = strips.random_weights_of(BF16, form, (outputs, 512), biased=False)
    x = mx.random.normal((3, 512), key=mx.random.key(5)).astype(BF16)
    plan = strips.plan(3, 512, form)
    assert plan is not None
    expected = x.astype(F32) @ full.T
    gate, up = mx.split(expected, 2, axis=1)
    for swiglu, wanted in ((False, expected), (True, gate * mx.sigmoid(gate) * up)):
        found = strips.multiply(x, made, plan, swiglu=swiglu).astype(F32)
        np.testing.assert_allclose(found, wanted, rtol=0.03, atol=0.03)
    assert len(host.calls) == 2


@pytest.mark.parametrize("rows", [1, 8])
def test_sums_of_the_largest_numbers_are_finite(host: Host, rows: int) -> None:
    form = Format(4, 128)
    made, full, _ = strips.random_weights_of(F16, form, (16, 2048), biased=False)
    plan = strips.plan(rows, 2048, form)
    assert plan is not None
    halves = replace(plan, parts=2, warps=min(plan.warps, 4))
    found = strips.multiply(mx.full((rows, 2048), 65504, F16), made, halves).sum(axis=0)
    expected = 65504 * np.array(full, np.float64).sum(axis=1)
    np.testing.assert_allclose(np.array(found), np.tile(expected, (rows, 1)), rtol=1e-3, atol=99)
    assert [body for body, _ in host.calls] == ["packed_strips"]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("name", "byte"), [
    *(("MXFP4", 127 + power) for power in (-22, -12, 0, 2)),
    *(("NVFP4", byte) for byte in (1, 8, 126, 129, 254)),
])  # fmt: skip
def test_floats_of_4_bits_are_exact(
    host: Host, name: str, byte: int, dtype: mx.Dtype, rows: int
) -> None:
    """Products of codes and scales are numbers of the rows' type."""
    form = stored(name)
    assert form.blocks is not None
    words = blocks.random_words(form.blocks, 16, 512)
    words[:, 64 : 64 + 512 // form.group_size // 4] = byte * 0x01010101
    given, *_ = strips.random_weights_of(dtype, form, (16, 512), biased=False)
    made = replace(given, weight=mx.array(words))
    plan = strips.plan(rows, 512, form)
    assert plan is not None
    x = mx.random.randint(-8, 9, (rows, 512), key=mx.random.key(6)).astype(dtype)
    found = strips.multiply(x, made, replace(plan, parts=2, warps=1)).sum(axis=0)
    full = np.array(blocks.computed_values(made.weight, form.blocks, F32), np.float64)
    expected = np.array(x.astype(F32), np.float64) @ full.T
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-6)
    assert np.abs(expected).max() > 0


@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan")])
def test_a_row_that_is_not_finite_does_not_change_another(host: Host, wrong: float) -> None:
    made, _ = weights(Q6_K)
    x = mx.random.normal((2, 512), key=mx.random.key(4)).astype(BF16)
    plan = strips.plan(2, 512, Q6_K)
    assert plan is not None
    expected = strips.multiply(x, made, plan)[1]
    found = strips.multiply(mx.where(mx.arange(1024).reshape(2, 512) == 9, wrong, x), made, plan)
    assert mx.isnan(found[0]).all()
    assert mx.array_equal(found[1], expected)
    assert {body for body, _ in host.calls} == {"digit_strips"}


@pytest.mark.parametrize(
    ("form", "rows", "body"),
    [
        pytest.param(form, rows, body, marks=[] if rows == 3 else LONG)
        for form, body in ((OF_64, "packed_strips"), (Format(8, 64), "packed_strips"),
                           (Q6_K, "block_strips"))
        for rows in (1, 3, 8)
    ],
)  # fmt: skip
def test_layers_multiply_few_rows_by_strips(
    host: Host, monkeypatch: pytest.MonkeyPatch, form: Format, rows: int, body: Any
) -> None:
    monkeypatch.setattr(strips, "verdict", lambda *_: None)
    made, full = weights(form)
    x = mx.random.normal((rows, 512), key=mx.random.key(1)).astype(BF16)
    expected = x.astype(F32) @ full[:, :-1].T + full[:, -1]
    gate, up = mx.split(expected, 2, axis=1)
    parts = matmul.multiply_in_parts(x[:, None], made)
    total = parts.array if parts.count == 1 else parts.array.sum(axis=0)
    for found, wanted in (
        (matmul.multiply(x, made), expected),
        (total, expected),
        (matmul.swiglu(x, made), gate * mx.sigmoid(gate) * up),
    ):
        np.testing.assert_allclose(found.astype(F32), wanted, rtol=0.03, atol=0.03)
    assert {name for name, _ in host.calls} == {
        "digit_strips" if (form, rows) == (Q6_K, 1) else body
    }


def test_a_row_of_block_types_is_normed_by_its_matmul(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "verdict", lambda *_: None)
    made, full = weights(Q6_K)
    a, b = (mx.random.normal((1, 512), key=mx.random.key(key)).astype(BF16) for key in (1, 2))
    norm = mx.random.uniform(0.5, 1.5, (512,), key=mx.random.key(3)).astype(BF16)
    found = matmul.multiply_normed(Normed(a, b, 1, norm, 1e-5), made)
    assert found is not None
    x = mx.fast.rms_norm(a + b, norm, 1e-5).astype(F32)
    expected = x @ full[:, :-1].T + full[:, -1]
    np.testing.assert_allclose(found[0].astype(F32), expected, rtol=0.02, atol=0.02)
    np.testing.assert_array_equal(found[1].astype(F32), (a + b).astype(F32))
    assert [name for name, _ in host.calls] == ["digit_strips"]
