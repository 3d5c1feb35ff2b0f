"""Rotations by matrices equal those of `mx.fast.rope`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from modelpack_engine.attention.metadata import FEW_ROWS, make_positions
from modelpack_engine.patches import functions
from modelpack_engine.patches.functions import native_rope

POSITIONS = [0, 1, 17, 4000]
FREQUENCIES = mx.array([1.0, 3.0, 10.0, 50.0])
KINDS: list[tuple[int, dict[str, Any]]] = [
    (8, {"traditional": False, "base": 1e4, "scale": 1.0}),
    (8, {"traditional": True, "base": 1e4, "scale": 0.25}),
    (4, {"traditional": False, "base": 5e5, "scale": 1.0}),
    (8, {"traditional": False, "base": None, "scale": 1.0, "freqs": FREQUENCIES}),
]


@pytest.fixture
def natively(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes for which MLX's own function is called."""
    shapes: list[tuple[int, ...]] = []

    def counted(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        shapes.append(tuple(x.shape))
        return native_rope(x, *args, **kwargs)

    functions.install()
    monkeypatch.setattr(functions, "native_rope", counted)
    return shapes


def rotate(x: mx.array, offset: mx.array, dims: int, how: dict[str, Any]) -> mx.array:
    return mx.fast.rope(x, dims, offset=offset, **how)


@pytest.mark.parametrize(("dims", "how"), KINDS)
def test_equal(dims: int, how: dict[str, Any], natively: list[tuple[int, ...]]) -> None:
    positions = make_positions(POSITIONS, rotate=True)
    for heads in (1, 3):
        x = mx.random.normal((len(POSITIONS), heads, 1, 8))
        expected = native_rope(x, dims, offset=mx.array(POSITIONS), **how)
        assert mx.allclose(rotate(x, positions, dims, how), expected, atol=1e-6).item()
    assert natively == [(4, 8, 1, 8)], "once for all layers"


def test_kinds_are_told_apart() -> None:
    functions.install()
    positions = make_positions(POSITIONS, rotate=True)
    x = mx.random.normal((len(POSITIONS), 2, 1, 8))
    others = [(8, {**KINDS[3][1], "freqs": FREQUENCIES * 2})]
    for dims, how in [*KINDS, *others, *KINDS]:
        expected = native_rope(x, dims, offset=mx.array(POSITIONS), **how)
        assert mx.allclose(rotate(x, positions, dims, how), expected, atol=1e-6).item()


def test_frequencies_made_anew_at_every_call_are_not_confused() -> None:
    functions.install()
    positions = make_positions(POSITIONS, rotate=True)
    x = mx.random.normal((len(POSITIONS), 2, 1, 8))
    for factor in range(1, 30):
        how = {**KINDS[3][1], "freqs": FREQUENCIES * factor}
        expected = native_rope(x, 8, offset=mx.array(POSITIONS), **how)
        assert mx.allclose(rotate(x, positions, 8, how), expected, atol=1e-6).item()
        del how


def whole(x: mx.array) -> mx.array:
    return mx.fast.rope(x, 8, offset=3, **KINDS[0][1])


def many(x: mx.array) -> mx.array:
    positions = make_positions([5] * (FEW_ROWS + 1), rotate=True)
    rows = mx.random.normal((FEW_ROWS + 1, 1, 1, 8))
    return mx.fast.rope(rows, 8, offset=positions, **KINDS[0][1])


def half(x: mx.array) -> mx.array:
    positions = make_positions(POSITIONS, rotate=True)
    return mx.fast.rope(x.astype(mx.float16), 8, offset=positions, **KINDS[0][1])


def ended(x: mx.array) -> mx.array:
    positions = make_positions(POSITIONS, rotate=False)
    return mx.fast.rope(x, 8, offset=positions, **KINDS[0][1])


@pytest.mark.parametrize("call", [whole, many, half, ended])
def test_left_to_mlx(call: Callable[[mx.array], mx.array], natively: list[tuple[int, ...]]) -> None:
    output = call(mx.random.normal((len(POSITIONS), 1, 1, 8)))
    assert natively == [tuple(output.shape)]


@pytest.mark.parametrize("scalar", [False, True], ids=["a position each", "one for all"])
@pytest.mark.parametrize(("rows", "heads", "calls"), [(31, 16, 1), (64, 16, 3), (300, 3, 3)])
def test_cuda_rotates_some_rows_at_a_time(
    rows: int,
    heads: int,
    calls: int,
    scalar: bool,
    natively: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of few elements: a call of rows * heads / 4 from 128 on cannot be launched."""
    monkeypatch.setattr(functions, "_on_cuda", lambda: True)
    x = mx.random.normal((rows, heads, 1, 64))
    offset = mx.array(7) if scalar else mx.arange(rows, dtype=mx.int32)
    how: dict[str, Any] = {"traditional": False, "base": 1e4, "scale": 1.0}
    found = rotate(x, offset, 16, how)
    assert mx.array_equal(found, native_rope(x, 16, offset=offset, **how))
    assert len(natively) == calls
    assert all(shape[0] * -(-heads // 4) < 128 for shape in natively)
    natively.clear()
    rotate(x, offset, 32, how)
    assert len(natively) == 1
