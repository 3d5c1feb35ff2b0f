"""Random blocks of ggml's types, with scales like those of weights."""

from __future__ import annotations

import gguf
import numpy as np

# Byte offsets of the float16 scales in a block; for MXFP4 and NVFP4, those of bytes.
_SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "IQ1_M": (),  # its scale is spread over the block
}


def random_blocks(dtype: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Return random blocks, uint8 [rows, bytes of a row], with all bit patterns of codes."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((rows, columns)).astype(np.float32)
    if dtype == "F32":
        return values.view(np.uint8)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint8)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]
    blocks = random.integers(0, 256, (rows * columns // elements, size), dtype=np.uint8)
    if dtype == "MXFP4":
        blocks[:, 0] = random.integers(110, 130, len(blocks))
    elif dtype == "NVFP4":
        blocks[:, :4] = random.integers(0, 64, (len(blocks), 4))
    elif dtype == "IQ1_M":
        # The top nibbles of four shorts are one float16.
        shorts = blocks[:, 48:56].view(np.uint16)
        scale = random.uniform(0.001, 0.1, len(blocks)).astype(np.float16).view(np.uint16)
        for at in range(4):
            shorts[:, at] = (shorts[:, at] & 0x0FFF) | ((scale >> (4 * at)) & 0xF) << 12
        blocks[:, 48:56] = shorts.view(np.uint8)
    else:
        for at in _SCALES.get(dtype, (0,)):
            scale = random.uniform(-0.1, 0.1, (len(blocks), 1)).astype(np.float16)
            blocks[:, at : at + 2] = scale.view(np.uint8)
    return blocks.reshape(rows, -1)
