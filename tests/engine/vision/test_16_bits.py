"""Towers with weights in 16 bits, as GPUs have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.models import load
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.request import Media
from modelpack_engine.vision.encoder import Vision
from modelpack_engine.vision.tower_call import TowerCall
from tests.engine.vision import tiny, watching

TYPES = [mx.bfloat16, pytest.param(mx.float16, marks=pytest.mark.long)]


def check(directory: Path, dtype: mx.Dtype, place: Callable[[Vision], Media]) -> None:
    """All blocks return bfloat16, and the embeddings are close to those in float32.

    Those with float16 may return float32, which does not overflow.
    """
    made = []
    for each in (mx.float32, dtype):
        vision = load(ModelFiles.from_directory(directory), device="cpu", dtype=each).vision
        assert vision is not None
        call = TowerCall(vision.encoder._model, [place(vision)], outputs=vision.encoder._outputs)
        call.advance(1)
        call.advance(1)
        types = {array.dtype for arrays in call._states for array in arrays}
        if each == mx.bfloat16 and vision.encoder._outputs.found:
            assert types == {each}
        (rows,) = call.finish()
        made.append(np.array(rows.astype(mx.float32)).ravel())
    assert np.corrcoef(made)[0, 1] > 0.999


@pytest.mark.sample(5)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", tiny.kinds(*tiny.KINDS))
def test_pictures(kind: str, dtype: mx.Dtype) -> None:
    """mlx-vlm's towers of 18 types compute in float32 if pixels are."""

    def place(vision: Vision) -> Media:
        pictures = [tiny.picture(1, 64, 96)]
        return vision.processor.place([vision.processor.image_token_id], pictures)[1][0]

    check(tiny.directory(kind), dtype, place)


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", tiny.kinds(*watching.KINDS))
def test_videos(kind: str, dtype: mx.Dtype) -> None:
    def place(vision: Vision) -> Media:
        videos = vision.processor.videos
        assert videos is not None
        return vision.processor.place([videos.token_id], [watching.video(1, 2)])[1][0]

    check(tiny.directory(kind), dtype, place)
