"""Quantisation: rows of keys and values in 8 or 4 bits.

The elements of a row are divided into groups. Each group has a scale and a bias, so that x is about
scale * code + bias, as in MLX's affine quantisation. A row is one run of 32-bit words: the codes,
lowest bits first, then one word for each group, with the bias in its upper half and the scale in
its lower half, both bfloat16. So a pool is a single array.

The bias is rounded down and the scale up: the codes cover every element, and the error is at most
half a scale. If a group has a value that is not finite, all its values decode as not finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

#: Group sizes, in order of preference.
GROUPS = (64, 32)
_UPPER = 0xFFFF0000


@dataclass(frozen=True, slots=True)
class Quantisation:
    """A format of `bits` (8 or 4) per code, and `group` elements per scale."""

    bits: int
    group: int

    def words(self, width: int) -> int:
        """Return the number of words of a row with `width` elements."""
        assert width % self.group == 0, (width, self.group)
        return width * self.bits // 32 + width // self.group

    def width(self, words: int) -> int:
        """Return the number of elements of a row with `words` words."""
        return words * 32 * self.group // (self.bits * self.group + 32)

    def encode(self, rows: mx.array) -> mx.array:
        """Return rows [..., width] as uint32 [..., words]."""
        *lead, width = rows.shape
        groups = rows.astype(mx.float32).reshape(*lead, width // self.group, self.group)
        low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
        low = low.view(mx.uint32)
        low = (low + (low >> 31) * 0xFFFF) & _UPPER  # away from zero if it is negative
        bias = low.view(mx.float32)
        top = (1 << self.bits) - 1
        # MLX's min and max may ignore NaN; a sum does not.
        poison = groups.sum(axis=-1, keepdims=True) * 0
        scale = ((high - bias) * (1 / top) + poison).view(mx.uint32)
        scale = (scale + 0xFFFF) & _UPPER
        steps = scale.view(mx.float32)
        inverse = mx.where(steps > 1e-30, 1 / steps, 0)
        codes = mx.minimum(mx.round((groups - bias) * inverse), top).astype(mx.uint8)
        codes = codes.reshape(*lead, width)
        if self.bits == 4:
            codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
        scales = (low | (scale >> 16)).reshape(*lead, -1)
        return mx.concatenate([codes.view(mx.uint32), scales], axis=-1)

    def decode(self, words: mx.array, dtype: mx.Dtype) -> mx.array:
        """Return the rows [..., width] that `encode` has encoded, in `dtype`."""
        *lead, length = words.shape
        width = self.width(length)
        split = width * self.bits // 32
        codes = mx.contiguous(words[..., :split]).view(mx.uint8)
        if self.bits == 4:
            codes = mx.stack([codes & 15, codes >> 4], axis=-1)
        scales = words[..., split:, None]
        steps, bias = (scales << 16).view(mx.float32), (scales & _UPPER).view(mx.float32)
        groups = codes.reshape(*lead, -1, self.group).astype(mx.float32)
        return (groups * steps + bias).reshape(*lead, width).astype(dtype)


def quantisation(bits: int, *dims: int) -> Quantisation | None:
    """Return the format with the largest group size that divides every head size, or None."""
    for group in GROUPS:
        if all(dim % group == 0 for dim in dims):
            return Quantisation(bits, group)
    return None
