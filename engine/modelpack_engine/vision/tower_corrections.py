"""Corrections of mlx-vlm's vision towers that differ from those of transformers, by model type.

One can be removed when mlx-vlm's tower agrees with transformers' without it:
`tests/engine/vision/oracle.py` compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray

from modelpack_engine.patches.corrections import override
from modelpack_engine.patches.modules import Call, ClassSwaps
from modelpack_engine.vision.windows import attend, windows_between

#: Of bicubic interpolation, as in PyTorch.
_SHARPNESS = -0.75


def correct(tower: Module, config: Mapping[str, Any]) -> None:
    """Correct a tower that was just made from `config`, the config.json."""
    if (change := CORRECTIONS.get(config["model_type"])) is not None:
        change(tower, config)


def _override_all(tower: Module, name: str, call: Callable[..., mx.array]) -> None:
    """Replace what modules of the class `name` compute."""
    for module in tower.modules():
        if type(module).__name__ == name:
            override(module, call)


def _siglip(tower: Module, config: Mapping[str, Any]) -> None:
    """Give SigLIP its own GELU: mlx-vlm has that of CLIP for both."""
    for module in tower.modules():
        if isinstance(getattr(module, "activation_fn", None), nn.GELU):
            module.activation_fn = nn.GELU(approx="tanh")


def _llava(tower: Module, config: Mapping[str, Any]) -> None:
    vision = config["vision_config"]
    is_siglip = vision.get("model_type") == "siglip_vision_model"
    if is_siglip and vision.get("hidden_act") != "quick_gelu":
        _siglip(tower, config)


def _idefics2(tower: Module, config: Mapping[str, Any]) -> None:
    _siglip(tower, config)
    _override_all(tower, "VisionEmbeddings", _embed_idefics2)


def _embed_idefics2(self: Any, x: mx.array, mask: mx.array) -> mx.array:
    """Return the embeddings of the patches of views [n, height, width, 3] without padding.

    mlx-vlm takes positions up to two rows and columns before those of the training.
    """
    rows, columns = (_nearest(size, self.num_patches) for size in mask.shape[1:])
    places = mx.array((rows[:, None] * self.num_patches + columns).flatten())
    made: mx.array = self.patch_embedding(x).flatten(1, 2) + self.position_embedding(places)
    return made


def _nearest(count: int, side: int) -> NDArray[np.int64]:
    """Return where `count` patches lie among the `side` patches that a view has at most.

    In float32, as in the training: rounding decides for patches between two places.
    """
    step, one = 1 / side, np.float32(1)
    edges = (step + np.arange(side - 1) * step).astype(np.float32)
    at = np.arange(count, dtype=np.float32) * (one / np.float32(count))
    found: NDArray[np.int64] = np.searchsorted(
        edges, np.minimum(at, one - np.float32(1e-6)), "right"
    )
    return found


def _mllama(tower: Module, config: Mapping[str, Any]) -> None:
    """Give masks the type of the states: MLX refuses mlx-vlm's, in float32, beside 16 bits."""
    swaps = ClassSwaps()
    for module in tower.modules():
        if type(module).__name__ == "MllamaVisionEncoder":
            swaps.override(module, _encode_mllama)


def _encode_mllama(
    original: Call, self: Any, states: mx.array, attention_mask: mx.array | None = None
) -> Any:
    mask = None if attention_mask is None else attention_mask.astype(states.dtype)
    return original(self, states, attention_mask=mask)


def _glm4v(tower: Module, config: Mapping[str, Any]) -> None:
    _override_all(tower, "Glm4vVisionEmbeddings", _embed_glm4v)
    for kind in ("Glm4v", "Glm4vMoe"):
        _override_all(tower, f"{kind}VisionAttention", _attend_glm4v)


def _embed_glm4v(
    self: Any,
    embeddings: mx.array,
    lengths: Sequence[int],
    image_shapes: mx.array,
    h_coords: mx.array,
    w_coords: mx.array,
) -> mx.array:
    """Add positions to patches [rows, width]; `image_shapes` [n, 3] are frames, rows and columns.

    They are interpolated in bicubic curves. mlx-vlm does it in lines, to zeros at the edges.
    """
    table = self.position_embedding.weight
    side, found, first = math.isqrt(len(table)), [], 0
    places = table.astype(mx.float32).reshape(side, -1)
    for length, (_, rows, columns) in zip(lengths, np.array(image_shapes).tolist(), strict=True):
        lines = (mx.array(_bicubic(rows, side)) @ places).reshape(rows, side, -1)
        grid = (mx.array(_bicubic(columns, side)) @ lines).flatten(0, 1)
        at = slice(first, first + int(length))
        found.append(grid[h_coords[at].astype(mx.int32) * columns + w_coords[at].astype(mx.int32)])
        first += int(length)
    return embeddings + mx.concatenate(found).astype(table.dtype)


def _attend_glm4v(
    self: Any, x: mx.array, cu_seqlens: mx.array, rotary_pos_emb: mx.array
) -> mx.array:
    """Return what an attention layer returns for rows `x`; `cu_seqlens` are the pictures' edges.

    mlx-vlm's `glm4v` always splits the rows in three: for one picture, two parts are empty, which
    ends the process on CUDA, and of more than three pictures, all after the second are in the last
    part. Its `glm4v_moe` writes a mask of all rows in each layer.
    """
    angles = mx.concatenate([mx.cos(rotary_pos_emb), mx.sin(rotary_pos_emb)], axis=-1)
    return attend(self, x, _windows(tuple(np.array(cu_seqlens).tolist()), x.dtype), angles)


#: Of the last call, for all of its layers.
_windows = lru_cache(maxsize=1)(windows_between)


def _bicubic(count: int, side: int) -> NDArray[np.float32]:
    """Return the weights [count, side] that interpolate `side` values at `count` places."""
    at = (np.arange(count) + 0.5) * side / count - 0.5
    first = np.floor(at)
    made = np.zeros((count, side))
    for tap in range(-1, 3):
        x = np.abs(at - first - tap)
        inner = ((_SHARPNESS + 2) * x - (_SHARPNESS + 3)) * x * x + 1
        outer = ((x - 5) * x + 8) * x * _SHARPNESS - 4 * _SHARPNESS
        places = np.clip(first + tap, 0, side - 1).astype(int)
        np.add.at(made, (np.arange(count), places), np.where(x <= 1, inner, outer))
    return made.astype(np.float32)


CORRECTIONS: Mapping[str, Callable[[Module, Mapping[str, Any]], None]] = {
    "glm4v": _glm4v,
    "glm4v_moe": _glm4v,
    "granite4_vision": _siglip,
    "granite_vision": _siglip,
    "idefics2": _idefics2,
    "llava": _llava,
    "llava_next": _llava,
    "mllama": _mllama,
}
