"""What is corrected in mlx-vlm's towers; `test_oracle.py` compares whole models."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from modelpack_engine.vision.tower_call import TowerCall
from modelpack_engine.vision.tower_corrections import _bicubic, _nearest, correct
from tests.engine.vision import tiny


class Tower(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.activation_fn = nn.GELU(approx="fast")


@pytest.mark.parametrize(
    ("kind", "vision", "approximation"),
    [
        ("llava", {"model_type": "siglip_vision_model"}, "tanh"),
        ("llava_next", {"model_type": "siglip_vision_model"}, "tanh"),
        ("llava", {"model_type": "siglip_vision_model", "hidden_act": "quick_gelu"}, "fast"),
        ("llava", {"model_type": "clip_vision_model"}, "fast"),
        ("llava", {}, "fast"),
        ("granite_vision", {}, "tanh"),
        ("granite4_vision", {}, "tanh"),
        ("idefics2", {}, "tanh"),
        ("phi3_v", {}, "fast"),
    ],
)
def test_activations(kind: str, vision: dict[str, Any], approximation: str) -> None:
    correct(tower := Tower(), {"model_type": kind, "vision_config": vision})
    assert tower.activation_fn._approx == approximation


@pytest.mark.parametrize("side", [8, 27, 70])
def test_places_of_patches(side: int) -> None:
    """Each patch is at the place in which it begins, in all sizes that a view may have."""
    for count in range(1, side + 1):
        found, exact = _nearest(count, side), np.arange(count) * side / count
        assert found[0] == 0
        assert (np.diff(found) >= 1).all()
        # Where it begins with a place, rounding may put it in the one before.
        assert ((found == np.floor(exact)) | (found == np.ceil(exact) - 1)).all()


@pytest.mark.parametrize("kind", ["glm4v", "glm4v_moe"])
def test_patches_of_glm_attend_within_their_picture(kind: str) -> None:
    """mlx-vlm's GLM-4V takes the first two pictures of a call apart only."""
    vision = tiny.tiny_loaded(kind).vision
    assert vision is not None
    place, token_id = vision.processor.place, vision.processor.image_token_id
    media = [place([token_id], [tiny.picture(seed, 36, 52)])[1][0] for seed in range(5)]
    alone = [TowerCall(vision.encoder._model, [each]).finish()[0] for each in media]
    together = TowerCall(vision.encoder._model, media).finish()
    np.testing.assert_allclose(np.array(mx.stack(together)), np.array(mx.stack(alone)), atol=1e-4)


def test_bicubic_weights() -> None:
    assert np.array_equal(_bicubic(24, 24), np.eye(24))
    for count in (1, 7, 23, 50):
        np.testing.assert_allclose(_bicubic(count, 24).sum(axis=1), 1, atol=1e-6)
    # Between two values, by PyTorch's curve (Keys, 1981, with -0.75); the edge's are repeated.
    np.testing.assert_allclose(_bicubic(2, 4)[0], [0.5, 0.59375, -0.09375, 0], atol=1e-6)
    np.testing.assert_allclose(_bicubic(1, 4)[0], [-0.09375, 0.59375, 0.59375, -0.09375])
