"""Matmuls with packed weights: which kernel multiplies what, and the kernels on an emulated GPU."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack_engine.kernels import launch
from modelpack_engine.layers import matmul, packed, packed_wide, strips
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
    monkeypatch.setattr(packed_wide, "verdict", lambda *_: None)
    monkeypatch.setattr(packed, "verdict", lambda *_: None)
    monkeypatch.setattr(packed, "row_verdict", lambda *_: None)
    monkeypatch.setattr(strips, "verdict", lambda *_: None)


@pytest.mark.usefixtures("on_hopper")
def test_the_smallest_tile_for_the_rows_multiplies() -> None:
    for rows in (1, 8):
        x = mx.zeros((rows, 256), BF16)
        assert packed.tile_for(x, weights()) == packed.TILE
        assert packed_wide.tile_for(x, weights()) is None
    for rows, swiglu in itertools.product((9, 32, 33, 64, 65, 128, 129, 512), (False, True)):
        x = mx.zeros((rows, 256), BF16)
        assert packed.tile_for(x, weights()) is None
        tile = packed_wide.tile_for(x, weights(), swiglu=swiglu)
        assert tile is not None
        assert tile.rows >= min(rows, 128)
        assert all(other.rows < rows for other in packed_wide.TILES if other.rows < tile.rows)
    for rows, swiglu, fits in ((513, False, False), (768, True, True), (769, True, False)):
        x = mx.zeros((rows, 256), BF16)
        assert (packed_wide.tile_for(x, weights(), swiglu=swiglu) is not None) is fits


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
    assert packed_wide.tile_for(mx.zeros((40, made.num_inputs), x), made) is None


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("with_weights", "fits"),
    [
        ({"inputs": 384}, True),
        ({"inputs": 320}, False),  # no whole steps
        ({"inputs": 320, "bits": 8}, False),  # an odd number of groups
        ({"inputs": 448, "bits": 8, "group_size": 32}, True),
        ({"inputs": 128, "group_size": 128}, False),  # scales of a group have no whole copies
        ({"inputs": 128, "group_size": 32}, True),
        ({"shape": (49, 256)}, True),
    ],
)
def test_what_warpgroups_multiply(with_weights: dict[str, Any], fits: bool) -> None:
    inputs = with_weights.get("inputs", 256)
    made = weights(**{"shape": (48, inputs)} | with_weights)
    x = mx.zeros((40, 1, inputs), BF16)
    assert (packed_wide.tile_for(x, made) is not None) is fits
    gated = packed_wide.tile_for(x, made, swiglu=True)
    assert (gated is not None) is (fits and made.num_outputs % 2 == 0)


@pytest.mark.usefixtures("on_hopper")
def test_without_warpgroups_or_by_a_problem_few_rows_or_none_are_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few, many = mx.zeros((4, 256), BF16), mx.zeros((40, 256), BF16)
    assert packed_wide.tile_for(many, weights()) is not None
    monkeypatch.setattr(packed_wide, "verdict", lambda *_: "it is off")
    assert packed_wide.tile_for(many, weights()) is None
    monkeypatch.setattr(packed_wide, "verdict", lambda *_: None)
    monkeypatch.setattr(packed, "has_warpgroups", lambda: False)
    assert packed.tile_for(few, weights()) is not None
    assert packed_wide.tile_for(many, weights()) is None
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


@given(outputs=st.integers(1, 200_000), chunks=st.integers(1, 128))
def test_parts_of_a_row_are_whole_chunks(outputs: int, chunks: int) -> None:
    parts = packed.num_parts_of_row(outputs, chunks * 128)
    assert chunks % parts == 0
    assert 1 <= parts <= 8
    assert parts == 1 or chunks // parts >= 32


@given(rows=st.integers(1, 8), outputs=st.integers(1, 200_000), steps=st.integers(1, 300))
def test_parts_are_whole_steps(rows: int, outputs: int, steps: int) -> None:
    tile = packed.TILE
    parts = packed.num_parts(tile, rows, outputs, steps * tile.depth)
    assert steps % parts == 0
    assert 1 <= parts <= 8
    assert max(tile.shared_bytes(8, 32, span) for span in (4, 8)) <= 227 << 10


@given(
    tile=st.sampled_from(packed_wide.TILES), rows=st.integers(9, 512),
    outputs=st.integers(1, 200_000), steps=st.integers(1, 300), bits=st.sampled_from((4, 8)),
)  # fmt: skip
def test_blocks_of_parts_run_together(
    tile: packed_wide.WideTile, rows: int, outputs: int, steps: int, bits: int
) -> None:
    inputs = steps * packed_wide.step_of(bits)
    made = replace(weights(), weight=mx.zeros((outputs, inputs * bits // 32), mx.uint32), bits=bits)
    parts = packed_wide.num_parts(tile, rows, made)
    assert steps % parts == 0
    assert 1 <= parts <= 8
    blocks = -(-outputs // tile.outputs) * -(-rows // tile.rows)
    assert parts == 1 or (blocks * parts <= 132 * tile.beside and steps // parts >= tile.stages)


@pytest.mark.parametrize("tile", [*packed_wide.TILES, packed_wide.GATED])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_wide_tiles_fit_a_multiprocessor(
    tile: packed_wide.WideTile, bits: int, group_size: int
) -> None:
    span = packed_wide.span_of(1024, bits, group_size)
    assert span is not None
    assert tile.shared_bytes(bits, group_size, span) * tile.beside <= 227 << 10
    assert tile.threads * tile.beside <= 2048


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    verdicts = packed.verdict, packed.row_verdict, strips.verdict, packed_wide.verdict
    with emulated(monkeypatch, *verdicts) as found:
        monkeypatch.setattr(launch, "backend", lambda: "cuda")
        monkeypatch.setattr(packed, "has_warpgroups", lambda: True)
        yield found


@pytest.mark.long
@pytest.mark.parametrize("rows", [3, 20, 70])
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
    assert {body for body, _ in host.calls} == ({"packed"} if rows <= 8 else WIDE)


#: The kernels of 20 rows, those of their verdict included.
WIDE = {"arrange", "packed_wide", "add_norm", "add_norm_arranged"}


@pytest.mark.parametrize("also_in_rows", [False, True])
def test_norms_and_swiglu_are_computed_in_the_order_of_the_next_matmul(
    host: Host, monkeypatch: pytest.MonkeyPatch, also_in_rows: bool
) -> None:
    """And in rows only if something else reads these; emulated kernels all run when called."""
    monkeypatch.setattr(packed_wide, "verdict", lambda *_: None)
    keys = mx.random.split(mx.random.key(5), 3)
    a, b = (mx.random.normal((20, 1, 256), key=key).astype(BF16) for key in keys[:2])
    norm = mx.random.uniform(0.5, 1.5, (256,), key=keys[2]).astype(BF16)
    gates, down = weights(shape=(256, 256)), weights(8, 32, shape=(48, 128))
    sums = Sums()
    total = sums.add(a, b)
    x = sums.norm(total, norm, 1e-5)
    assert x is not None
    hidden = sums.swiglu(x, gates)
    found = sums.multiply(hidden, down, in_rows=also_in_rows)
    bodies = [
        (body, call.get("ARRANGED", 0) or call.get("BITS", 0))
        for body, call in host.calls
        if body != "packed_wide" or call["SWIGLU"]
    ]
    in_order = [("add_norm", 0), ("add_norm_arranged", 4), ("packed_wide", 4)]
    assert bodies == [*in_order, ("arrange", 8) if also_in_rows else ("packed_wide", 8)]
    np.testing.assert_array_equal(sums.value(total).astype(mx.float32), (a + b).astype(mx.float32))
    rows = matmul.swiglu(mx.fast.rms_norm(a + b, norm, 1e-5), gates)
    expected = matmul.multiply(rows, down)
    product = found.array if found.count == 1 else found.array.sum(axis=0)
    np.testing.assert_allclose(
        product.astype(mx.float32), expected.astype(mx.float32), rtol=0.02, atol=0.05
    )


def test_sums_are_freed_at_once(host: Host) -> None:
    """A draft makes its own sums: their memory is free as soon as they are not used."""

    class Known(Sums):
        """Sums that can be watched."""

    sums = Known()
    watched = weakref.ref(sums)
    a = mx.zeros((20, 1, 256), BF16)
    gc.disable()
    try:
        sums.norm(sums.add(a, a), mx.ones((256,), BF16), 1e-5)
        del sums
        assert watched() is None
    finally:
        gc.enable()


@pytest.mark.long
def test_the_verdict_names_a_wrong_kernel(host: Host) -> None:
    host.break_by(lambda _, text: text.replace("- Codes::OFFSET * scale", ""))
    problem = packed.verdict(BF16, 4, 64, packed.TILE)
    assert problem is not None
    assert "the sum of 13 rows is off" in problem


@pytest.mark.parametrize(
    ("tile", "dtype", "bits", "group_size"),
    [
        pytest.param(tile, dtype, bits, size, marks=[] if quick else [pytest.mark.long])
        for tile in (*packed_wide.TILES, packed_wide.GATED)
        for dtype in (BF16, mx.float16)
        for bits in (4, 8)
        for size in (32, 64, 128)
        for quick in [tile == packed_wide.TILES[0] and dtype == BF16 and bits == 4 and size == 64]
    ],
)
def test_warpgroups_agree_with_mlx(
    host: Host, tile: packed_wide.WideTile, dtype: mx.Dtype, bits: int, group_size: int
) -> None:
    biased = group_size != 64
    assert packed_wide.verdict(dtype, bits, group_size, tile, biased) is None
    gated = [call["SWIGLU"] for body, call in host.calls if body == "packed_wide"]
    assert set(gated) == ({True} if tile == packed_wide.GATED else {False, True})
    assert {call["BIAS"] for body, call in host.calls if body == "packed_wide"} == {biased}


@pytest.mark.long
@pytest.mark.parametrize(
    ("bits", "tile", "wrong", "problem"),
    [
        (4, 0, ("0x72007200u", "0x72807280u"), "SwiGLU of 37 rows"),
        (4, 0, ("0x00f000f0u : 0x000f000fu", "0x000f000fu : 0x000f000fu"), "SwiGLU of 37 rows"),
        (4, 0, ("pair >= 2 : pair >= 1) word >>= 8", "false : false)"), "SwiGLU of 37 rows"),
        (8, 0, ("pair >= 2 : pair >= 1) word >>= 8", "false : false)"), "SwiGLU of 37 rows"),
        (4, 0, ("k / 4 * (MT * 128) + k % 4 * 32", "k % 4 * 32"), "SwiGLU of 37 rows"),
        (4, 1, ("at / GROUP % SPAN", "0"), "SwiGLU of 69 rows"),
        (4, 1, ("place == RING - 1 ? 0 : place + 1", "place"), "SwiGLU of 69 rows"),
        (4, 2, ("? M - row0 : MT", "? 2 : MT"), "SwiGLU of 133 rows"),
        (4, 0, ("part * steps;", "0;"), "the sum of 37 rows"),
        (4, 0, ("value += float(bias[to])", "value += 0.0f"), "SwiGLU of 37 rows"),
        (4, 0, ("at * VEC + e", "at * VEC + (e ^ 1)"), "a norm in order"),
        (4, 0, ("v, first + at", "v, at"), "SwiGLU in order"),
    ],
)
def test_the_verdict_names_wrong_warpgroups(
    host: Host, bits: int, tile: int, wrong: tuple[str, str], problem: str
) -> None:
    host.break_by(lambda _, text: text.replace(*wrong))
    found = packed_wide.verdict(BF16, bits, 64, packed_wide.TILES[tile], True)
    assert str(found).startswith(f"{problem} is off")


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
