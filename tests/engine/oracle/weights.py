"""Deterministic weights for the models of the oracle: from a tensor's name and shape alone."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

#: What every model of the oracle reads: ids below every vocabulary, more than every window.
TOKENS = [(7 * index * index + 3 * index + 1) % 61 + 3 for index in range(24)]
#: The positions whose logits are compared.
POSITIONS = (11, 23)


def weight(name: str, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return the tensor; scales are such that a wrong rotation or mask changes the logits."""
    # RandomState's streams never change between versions of numpy.
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if len(shape) <= 1:
        centre = 1.0 if name.endswith(("weight", "scalar", "scale", "layernorm", ".D")) else 0.0
        noise = centre + 0.2 * noise
        if name.endswith("e_score_correction_bias"):
            noise = 1.0 + noise  # so that no expert of a chosen group scores less than a masked one
    elif "conv" in name:
        noise = 0.5 * noise
    else:
        noise = 1.6 / shape[-1] ** 0.5 * noise
    return np.asarray(noise, dtype=np.float32)
