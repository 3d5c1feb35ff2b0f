"""Towers of Qwen's models, which compute the positions of pictures of a size once."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.vision import grids
from tests.engine.vision import tiny

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")


def model_of(kind: str) -> Any:
    vision = tiny.tiny_loaded(kind).vision
    assert vision is not None
    return vision.encoder._model


def patches_of(model: Any, *sizes: tuple[int, int, int]) -> mx.array:
    embed = model.vision_tower.patch_embed
    width = embed.in_channels * embed.temporal_patch_size * embed.patch_size**2
    return mx.random.normal((sum(t * h * w for t, h, w in sizes), width), key=mx.random.key(3))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[grids.Grids]:
    """The sizes whose positions are computed."""
    found: list[grids.Grids] = []
    compute = grids._layout

    def noted(tower: Any, sizes: grids.Grids, dtype: mx.Dtype) -> Any:
        found.append(sizes)
        return compute(tower, sizes, dtype)

    monkeypatch.setattr(grids, "_layout", noted)
    return found


@pytest.mark.parametrize("kind", [*KINDS, "qwen3_omni_moe"])
@pytest.mark.parametrize(
    "sizes",
    [
        [(1, 8, 8)],
        [(1, 6, 10)],
        [(1, 4, 14)],
        [(1, 2, 2)],
        [(3, 4, 6)],
        [(1, 8, 8), (1, 6, 4)],
        [(2, 4, 4), (1, 10, 6)],
    ],
    ids=str,
)
def test_rows_are_those_of_mlx_vlm(kind: str, sizes: list[tuple[int, int, int]]) -> None:
    """Its towers attend in one window, and one frame, after the other."""
    model = model_of(kind)
    of_mlx_vlm = type(model.vision_tower).__mro__[1]
    peer = of_mlx_vlm(model.vision_tower.config)
    peer.update(model.vision_tower.parameters())
    patches = patches_of(model, *sizes)
    for _ in range(2):  # the second time with positions that are kept
        ours = model.vision_tower(patches, mx.array(sizes))
        wanted = peer(patches, mx.array(sizes))
        if not isinstance(wanted, tuple):
            ours, wanted = (ours, []), (wanted, [])
        assert len(ours[1]) == len(wanted[1])
        for made, expected in zip([ours[0], *ours[1]], [wanted[0], *wanted[1]], strict=True):
            np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_sizes_used_last_are_kept(kind: str, computed: list[grids.Grids]) -> None:
    model = model_of(kind)
    model.vision_tower._layouts = grids._Layouts()
    computed.clear()

    def encode(columns: int) -> None:
        size = (1, 2, columns)
        mx.eval(model.vision_tower(patches_of(model, size), mx.array([size])))

    for columns in (2, 4, 6, 8, 2, 10, 2, 8, 4, 6):
        encode(columns)
    assert [columns for ((_, _, columns),) in computed] == [2, 4, 6, 8, 10, 4, 6]
    assert len(model.vision_tower._layouts._kept) == grids._MAX_GRIDS


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_evaluated(
    kind: str, computed: list[grids.Grids], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph is only built; else the host would wait for the steps that the GPU computes.

    In a function that is traced, nothing can be evaluated that depends on its arguments. What does
    not is computed for the first picture of a size only.
    """
    model, size = model_of(kind), (1, 4, 6)
    token_ids = mx.full((6,), model.config.image_token_id)

    def embed(pixels: mx.array) -> mx.array:
        inputs = {"pixel_values": pixels, "image_grid_thw": mx.array([size])}
        made: mx.array = model.embed(token_ids, inputs)
        return made

    patches = patches_of(model, size)
    expected = embed(patches)
    mx.eval(expected)
    computed.clear()
    with monkeypatch.context() as patched:
        patched.setattr(mx, "eval", None)
        again = mx.compile(embed)(patches)
    assert not computed
    assert mx.allclose(again, expected, atol=1e-5)
    if kind == "qwen3_vl":  # mlx-vlm's evaluates DeepStack's
        with pytest.raises(ValueError, match="eval"):
            mx.compile(lambda pixels: of_peer(model, token_ids, pixels, size))(patches)


def of_peer(model: Any, token_ids: mx.array, pixels: mx.array, size: tuple[int, ...]) -> mx.array:
    grid = mx.array([size])
    made = model.get_input_embeddings(token_ids[None], pixels, image_grid_thw=grid)
    rows: mx.array = made.inputs_embeds
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_those_of_the_tokens(kind: str) -> None:
    model, size = model_of(kind), (1, 4, 6)
    inputs = {"pixel_values": patches_of(model, size), "image_grid_thw": mx.array([size])}
    with pytest.raises(ValueError, match="6 embeddings for 5 tokens"):
        model.embed(mx.full((5,), model.config.image_token_id), inputs)
