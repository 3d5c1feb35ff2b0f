"""Matmuls with packed weights: which kernel multiplies what, and the kernels on an emulated GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack_engine.kernels import launch
from modelpack_engine.layers import matmul, packed
from modelpack_engine.layers.add_norm import Sums
from modelpack_engine.layers.weights import Weights, random_weights
from tests.engine.kernels.onhost import Host, emulated

BF16 = mx.bfloat16


def weights(bits: int = 4, group_size: int = 64, inputs: int = 256, **more: Any) -> Weights:
    given: dict[str, Any] = {"dtype": BF16, "shape": (48, inputs), **more}
    keys = mx.random.split(mx.random.key(2))
    made, _, _ = random_weights(
        given["dtype"], bits, given["shape"], 1 / 16, keys[0], keys[1], group_size
    )
    return made


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    monkeypatch.setattr(packed, "has_warpgroups", lambda: True)
    monkeypatch.setattr(packed, "verdict", lambda *_: None)
    monkeypatch.setattr(packed, "row_verdict", lambda *_: None)
    monkeypatch.setattr(packed, "strips_verdict", lambda *_: None)


@pytest.mark.usefixtures("on_hopper")
def test_the_smallest_tile_for_the_rows_multiplies() -> None:
    assert packed.tile_for(mx.zeros((257, 256), BF16), weights()) is None
    for rows in (1, 8, 9, 32, 33, 128, 129, 256):
        tile = packed.tile_for(mx.zeros((rows, 256), BF16), weights())
        assert tile is not None
        assert tile.rows >= rows
        assert all(other.rows < rows for other in packed.TILES if other.rows < tile.rows)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("x", "with_weights"),
    [
        (mx.float32, {"dtype": mx.float32}),
        (mx.float16, {}),
        (BF16, {"bits": 16}),
        (BF16, {"inputs": 192}),
        (BF16, {"shape": (3, 320), "group_size": 64}),
    ],
)
def test_other_types_and_sizes_are_left_to_mlx(x: mx.Dtype, with_weights: dict[str, Any]) -> None:
    made = weights(**with_weights)
    assert packed.tile_for(mx.zeros((4, made.num_inputs), x), made) is None


@pytest.mark.usefixtures("on_hopper")
def test_without_warpgroups_or_by_a_problem_few_rows_or_none_are_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed, "has_warpgroups", lambda: False)
    few, many = mx.zeros((4, 256), BF16), mx.zeros((40, 256), BF16)
    assert packed.tile_for(few, weights()) is not None
    assert packed.tile_for(many, weights()) is None
    monkeypatch.setattr(packed, "verdict", lambda *_: "it is off")
    assert packed.tile_for(few, weights()) is None


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("shape", "with_weights", "fits"),
    [
        ((1, 256), {}, True),
        ((1, 4, 64), {"group_size": 32}, True),
        ((1, 256), {"group_size": 128, "dtype": mx.float16}, True),
        ((2, 256), {}, False),
        ((1, 256), {"bits": 8}, False),
        ((1, 192), {"inputs": 192}, False),
        ((1, 16384 + 128), {"shape": (8, 16384 + 128)}, False),
    ],
)
def test_what_the_kernel_of_one_row_multiplies(
    shape: tuple[int, ...], with_weights: dict[str, Any], fits: bool
) -> None:
    made = weights(**with_weights)
    x = mx.zeros(shape, with_weights.get("dtype", BF16))
    assert packed.fits_row(x, made) is fits


@pytest.mark.usefixtures("on_hopper")
def test_a_row_is_left_to_others_if_its_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "row_verdict", lambda *_: "it is off")
    assert not packed.fits_row(mx.zeros((1, 256), BF16), weights())


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("shape", "with_weights", "fits"),
    [
        ((1, 512), {"inputs": 512}, True),
        ((8, 2, 256), {"inputs": 512}, True),
        ((9, 512), {"inputs": 512}, False),
        ((4, 256), {"group_size": 32}, True),
        ((4, 256), {}, False),  # a row's scales have no whole copies of 16 bytes
        ((4, 1024), {"inputs": 1024, "group_size": 128, "dtype": mx.float16}, True),
        ((4, 512), {"inputs": 512, "group_size": 128}, False),
        ((4, 512), {"inputs": 512, "bits": 8}, True),
        ((8, 4096), {"shape": (8, 4096), "bits": 8}, True),
        ((1, 14336), {"shape": (8, 14336)}, True),
        ((1, 14336), {"shape": (8, 14336), "bits": 8}, True),
        ((8, 14336), {"shape": (8, 14336)}, False),  # the rows fit in parts only
    ],
)
def test_what_the_kernel_of_strips_multiplies(
    shape: tuple[int, ...], with_weights: dict[str, Any], fits: bool
) -> None:
    made = weights(**with_weights)
    x = mx.zeros(shape, with_weights.get("dtype", BF16))
    assert (packed.strips_for(x, made) is not None) is fits
    in_parts = packed.strips_for(x, made, parted=True)
    assert in_parts is not None or not fits


@pytest.mark.usefixtures("on_hopper")
def test_strips_are_for_hopper_and_for_kernels_that_are_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, made = mx.zeros((1, 512), BF16), weights(inputs=512)
    monkeypatch.setattr(packed, "strips_verdict", lambda *_: "it is off")
    assert packed.strips_for(x, made) is None
    monkeypatch.setattr(packed, "strips_verdict", lambda *_: None)
    assert packed.strips_for(x, made) is not None
    monkeypatch.setattr(packed, "has_warpgroups", lambda: False)
    assert packed.strips_for(x, made) is None


@given(
    rows=st.integers(1, 8), pieces=st.integers(1, 128), bits=st.sampled_from((4, 8)),
    group_size=st.sampled_from((32, 64, 128)),
)  # fmt: skip
def test_strips_fit_a_multiprocessor(rows: int, pieces: int, bits: int, group_size: int) -> None:
    inputs = pieces * max(256, group_size * 8)
    found = packed.plan_strips(rows, inputs, bits, group_size, parted=True)
    if found is None:
        return
    units, least = inputs // found.parts // 256, max(1, group_size // 32)
    assert inputs % (found.parts * 256) == 0
    assert found.rows >= rows
    assert found.stages >= 2
    assert found.shared_bytes * (found.blocks * found.parts // 132 or 1) <= 227 << 10
    # All stages of a strip, and a shorter last one, are whole copies; no warp has nothing to do.
    assert found.warps % least == units % least == 0
    assert found.warps <= min(units, 16)


@given(outputs=st.integers(1, 200_000), chunks=st.integers(1, 128))
def test_parts_of_a_row_are_whole_chunks(outputs: int, chunks: int) -> None:
    parts = packed.num_parts_of_row(outputs, chunks * 128)
    assert chunks % parts == 0
    assert 1 <= parts <= 8
    assert parts == 1 or chunks // parts >= 32


@given(
    tile=st.sampled_from(packed.TILES), rows=st.integers(1, 4000),
    outputs=st.integers(1, 200_000), steps=st.integers(1, 300),
)  # fmt: skip
def test_parts_are_whole_steps(tile: packed.Tile, rows: int, outputs: int, steps: int) -> None:
    parts = packed.num_parts(tile, rows, outputs, steps * tile.step)
    assert steps % parts == 0
    assert 1 <= parts <= 8
    assert max(tile.shared_bytes(8, 32, span) for span in (4, 8)) <= 227 << 10


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with emulated(monkeypatch, packed.verdict, packed.row_verdict, packed.strips_verdict) as found:
        monkeypatch.setattr(launch, "backend", lambda: "cuda")
        monkeypatch.setattr(packed, "has_warpgroups", lambda: True)
        yield found


@pytest.mark.long
@pytest.mark.parametrize("rows", [3, 20])
def test_layers_multiply_by_the_kernel(host: Host, rows: int) -> None:
    made = weights()
    x = mx.random.normal((rows, 256), key=mx.random.key(1)).astype(BF16)
    assert made.scales is not None
    assert made.biases is not None
    assert made.bias is not None
    expected = mx.quantized_matmul(
        x.astype(mx.float32), made.weight, made.scales.astype(mx.float32),
        made.biases.astype(mx.float32), group_size=64, bits=4,
    ) + made.bias.astype(mx.float32)  # fmt: skip
    gate, up = mx.split(expected, 2, axis=1)
    parts = matmul.multiply_in_parts(x[:, None], made)
    total = parts.array if parts.count == 1 else parts.array.sum(axis=0)
    for found, wanted in (
        (matmul.multiply(x, made), expected),
        (total, expected),
        (matmul.swiglu(x, made), gate * mx.sigmoid(gate) * up),
    ):
        np.testing.assert_allclose(found.astype(mx.float32), wanted, rtol=0.02, atol=0.02)
    assert {body for body, _ in host.calls} == {"packed"}


@pytest.mark.long
def test_the_verdict_names_a_wrong_kernel(host: Host) -> None:
    host.break_by(lambda _, text: text.replace("- Codes::OFFSET * scale", ""))
    problem = packed.verdict(BF16, 4, 64, packed.TILES[0])
    assert problem is not None
    assert "the sum of 13 rows is off" in problem


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "group_size"), [(BF16, 64), (BF16, 32), (mx.float16, 128), (mx.float16, 64)]
)
def test_one_row_agrees_with_mlx(host: Host, dtype: mx.Dtype, group_size: int) -> None:
    assert packed.row_verdict(dtype, group_size) is None
    strides, parts = ({call[name] for _, call in host.calls} for name in ("STRIDE", "PARTS"))
    assert min(strides) < 41  # blocks compute several strips
    assert parts == {1, 2}


@pytest.mark.long
@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (("- Codes::OFFSET * scale", ""), "the product of a row is off"),
        (("item / UNITS * STRIDE, turn", "0, turn"), "the product of a norm is off"),
        (("PARTS; part++", "1; part++"), "the product of a norm is off"),
    ],
)
def test_the_verdict_names_a_wrong_row(host: Host, wrong: tuple[str, str], problem: str) -> None:
    host.break_by(lambda _, text: text.replace(*wrong))
    assert str(packed.row_verdict(BF16, 64)).startswith(problem)


@pytest.mark.long
@pytest.mark.parametrize("gated", [False, True])
def test_a_row_is_added_normed_and_multiplied_by_one_kernel(
    host: Host, monkeypatch: pytest.MonkeyPatch, gated: bool
) -> None:
    monkeypatch.setattr(packed, "row_verdict", lambda *_: None)
    made = weights()
    keys = mx.random.split(mx.random.key(3), 3)
    a, b = (mx.random.normal((1, 1, 256), key=key).astype(BF16) for key in keys[:2])
    norm = mx.random.uniform(0.5, 1.5, (256,), key=keys[2]).astype(BF16)
    sums = Sums()
    total = sums.add(a, b)
    x = sums.norm(total, norm, 1e-5)
    assert x is not None
    host.calls.clear()
    found = sums.swiglu(x, made) if gated else sums.multiply(x, made).array
    assert [body for body, _ in host.calls] == ["packed_row"]
    normed = mx.fast.rms_norm(a + b, norm, 1e-5).reshape(1, -1)
    expected = matmul.multiply(mx.concatenate([normed] * 3), made)[:1].astype(mx.float32)
    if gated:
        gate, up = mx.split(expected, 2, axis=1)
        expected = gate * mx.sigmoid(gate) * up
    np.testing.assert_allclose(found.astype(mx.float32), expected, rtol=0.03, atol=0.05)
    np.testing.assert_array_equal(sums.value(total).astype(mx.float32), (a + b).astype(mx.float32))


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("dtype", "group_size"), [(BF16, 64), (BF16, 32), (mx.float16, 128), (mx.float16, 64)]
)
def test_strips_agree_with_mlx(
    host: Host, dtype: mx.Dtype, group_size: int, bits: int, rows: int
) -> None:
    assert packed.strips_verdict(dtype, bits, group_size, rows) is None
    calls = [call for _, call in host.calls]
    assert {call["BITS"] for call in calls} == {bits}
    assert max(call["STRIDE"] for call in calls) < 21  # blocks compute several strips
    assert {call["ROWS"] for call in calls} == {rows}
    shorter = [call["D"] // 256 % call["WARPS"] for call in calls]
    assert any(shorter) is (rows <= 2)


@pytest.mark.long
@pytest.mark.parametrize(
    ("bits", "rows", "wrong", "problem"),
    [
        (4, 8, ("- Codes::OFFSET * scale", ""), "the product of 8 rows is off"),
        (4, 8, ("r % ROWS, c)", "0, c)"), "the product of 8 rows is off"),
        (8, 8, ("e * 2 + p / 2", "e * 2"), "the product of 8 rows is off"),
        (8, 2, ("p % 2 * 16", "0"), "the product of 2 rows is off"),
        (
            4,
            1,
            ("item / SPLIT * STRIDE;\n    float", "0;\n    float"),
            "the product of 1 rows is off",
        ),
        (4, 4, ("PA_Z * D + first * UNIT", "first * UNIT"), "the sum of parts is off"),
        (8, 1, ("PARTS; part++", "1; part++"), "the product of a norm is off"),
    ],
)
def test_the_verdict_names_wrong_strips(
    host: Host, bits: int, rows: int, wrong: tuple[str, str], problem: str
) -> None:
    def broken(_: str, text: str) -> str:
        return text.replace(*wrong)

    host.break_by(broken)
    assert str(packed.strips_verdict(BF16, bits, 64, rows)).startswith(problem)


@pytest.mark.long
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_layers_multiply_few_rows_by_strips(host: Host, rows: int, bits: int) -> None:
    made = weights(bits, inputs=512)
    x = mx.random.normal((rows, 512), key=mx.random.key(1)).astype(BF16)
    full = mx.dequantize(made.weight, made.scales, made.biases, 64, bits).astype(mx.float32)
    assert made.bias is not None
    expected = x.astype(mx.float32) @ full.T + made.bias.astype(mx.float32)
    gate, up = mx.split(expected, 2, axis=1)
    parts = matmul.multiply_in_parts(x[:, None], made)
    total = parts.array if parts.count == 1 else parts.array.sum(axis=0)
    for found, wanted in (
        (matmul.multiply(x, made), expected),
        (total, expected),
        (matmul.swiglu(x, made), gate * mx.sigmoid(gate) * up),
    ):
        np.testing.assert_allclose(found.astype(mx.float32), wanted, rtol=0.03, atol=0.03)
    assert {body for body, _ in host.calls} == {"packed_strips"}
