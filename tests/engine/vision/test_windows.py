"""Attention in windows, with the kernel that rotates and gathers patches on an emulated GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.vision import windows
from modelpack_engine.vision.tower_call import TowerCall
from tests.engine.kernels.onhost import Host, emulated
from tests.engine.vision import tiny
from tests.engine.vision.tiny import picture


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    windows._warn.cache_clear()
    with emulated(monkeypatch, windows.verdict) as found:
        yield found


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(16, 80), (2, 16), (3, 6), (1, 2)])
def test_the_kernel_returns_what_mlx_does(
    host: Host, dtype: mx.Dtype, heads: int, width: int
) -> None:
    keys = mx.random.split(mx.random.key(1), 2)
    joint = mx.random.normal((40, 3, heads, width), key=keys[0]).astype(dtype)
    angles = mx.random.uniform(-1, 1, (40, width), key=keys[1])
    places = mx.array(np.random.default_rng(2).integers(0, 40, (5, 7)), mx.int32)
    expected = windows.by_mlx(joint, angles, places)
    for ours, wanted in zip(windows.by_kernel(joint, angles, places), expected, strict=True):
        assert (ours.shape, ours.dtype) == ((5, 7, heads, width), dtype)
        np.testing.assert_allclose(
            np.array(ours.astype(mx.float32)), np.array(wanted.astype(mx.float32)),
            rtol=0, atol=windows._TOLERANCES[dtype],
        )  # fmt: skip
    assert mx.array_equal(expected[2], windows.by_kernel(joint, angles, places)[2])
    assert windows.verdict(dtype, heads, width) is None
    assert {body for body, _ in host.calls} == {"windows", "rows"}


@pytest.mark.parametrize(
    ("body", "wrong", "found"),
    [
        ("windows", ("- y * at", "+ y * at"), "queries"),
        ("windows", ("kind < 2", "kind < 1"), "keys"),
        ("windows", ("kind < 2", "kind < 3"), "values"),
        ("windows", ("row = index[place]", "row = place"), "queries"),
        ("rows", ("index[line % rows]", "line % rows"), "rows"),
    ],
)
def test_a_wrong_kernel_is_not_used(
    host: Host, body: str, wrong: tuple[str, str], found: str, caplog: pytest.LogCaptureFixture
) -> None:
    host.break_by(lambda name, text: text.replace(*wrong) if name == body else text)
    problem = windows.verdict(mx.float32, 2, 16)
    assert problem is not None
    assert problem.startswith(found)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not windows._has_kernel(mx.float32, 2, 16)
    assert caplog.messages == [f"MLX rotates the patches of pictures: {problem}"]


@pytest.mark.parametrize(("dtype", "width"), [(mx.float32, 15), (mx.uint32, 16)])
def test_other_heads_are_left_to_mlx(host: Host, dtype: mx.Dtype, width: int) -> None:
    assert f"have {width} elements" in str(windows.verdict(dtype, 2, width))
    assert not windows._has_kernel(dtype, 2, width)
    assert not host.calls


@pytest.mark.parametrize("size", [(64, 64), (36, 52), (20, 24)])
def test_embeddings_are_those_without_the_kernel(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For pictures whose windows are full, and cut by their edges; one, and three together."""
    vision = tiny.tiny_loaded("qwen2_5_vl").vision
    assert vision is not None
    token_id = vision.processor.image_token_id
    pictures = [picture(seed, *size) for seed in range(3)]
    media = [vision.processor.place([token_id], [each])[1][0] for each in pictures]
    for files in (media[:1], media):
        expected = TowerCall(vision.encoder._model, files).finish()
        mx.eval(expected)
        with monkeypatch.context() as patched, emulated(patched, windows.verdict) as host:
            found = TowerCall(vision.encoder._model, files).finish()
            mx.eval(found)
        calls = sum(body == "windows" for body, _ in host.calls)
        assert calls == 3, "the comparison with MLX, and both blocks"
        for ours, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.array(ours), np.array(wanted), rtol=0, atol=1e-5)
