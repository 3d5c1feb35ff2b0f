"""Rotation: what of a model's rotary embedding the kernel has to know.

As `mx.fast.rope` computes it: an element pair i of a head is turned by position * scale * inverse
frequency i (RoFormer, https://arxiv.org/abs/2104.09864).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import Llama3RoPE, SuScaledRoPE, YarnRoPE


@dataclass(frozen=True, slots=True)
class Rotation:
    """`inverse` float32 [dims / 2], the scale of positions included; `factor` of the elements.

    `interleaved` pairs are neighbours, else halves of the first `dims` elements.
    """

    inverse: mx.array
    dims: int
    factor: float
    interleaved: bool

    def angles(self, positions: mx.array) -> mx.array:
        """Return cosines and sines at positions [n], times the factor: float32 [n, dims / 2, 2]."""
        angles = positions.astype(mx.float32)[:, None] * self.inverse
        return mx.stack([mx.cos(angles), mx.sin(angles)], axis=-1) * self.factor


#: Those of a model's layers, which are few: equal ones are the same.
_KNOWN: dict[tuple[object, ...], Rotation] = {}


def find_rotation(rope: nn.Module) -> Rotation | None:
    """Return the rotation of a rotary embedding; None for kinds that are not known."""
    found: Any = rope
    if type(rope) is nn.RoPE:
        exponents = mx.arange(0, found.dims, 2, dtype=mx.float32) / found.dims
        inverse = mx.power(mx.array(found.base, mx.float32), -exponents) * found.scale
        return _rotation(inverse, found.dims, 1.0, found.traditional)
    if type(rope) is Llama3RoPE:
        return _rotation(1 / found._freqs, found.dims, 1.0, found.traditional)
    if type(rope) is YarnRoPE:
        return _rotation(1 / found._freqs, found.dims, found.mscale, found.traditional)
    if type(rope) is SuScaledRoPE:
        return _rotation(1 / found._freqs, found.dim, found._scale, False)
    return None


def _rotation(inverse: mx.array, dims: int, factor: Any, interleaved: bool) -> Rotation | None:
    inverse = inverse.astype(mx.float32).reshape(-1)
    if inverse.size != dims // 2 or dims % 2:
        return None
    mx.eval(inverse)
    rotation = Rotation(inverse, dims, float(factor), bool(interleaved))
    key = (str(inverse.tolist()), dims, rotation.factor, rotation.interleaved)
    return _KNOWN.setdefault(key, rotation)
