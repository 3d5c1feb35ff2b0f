"""Short depthwise convolutions of recurrent layers, as sums of products.

On CUDA, MLX uses cuDNN, which takes tens of milliseconds to plan each new prompt length.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from modelpack_engine.kernels import launch

_LONGEST = 8


def takes(
    x: mx.array,
    weight: mx.array,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    **_: object,
) -> bool:
    """Return whether `mx.conv1d` with these arguments is a short depthwise convolution on CUDA."""
    return (
        launch.backend() == "cuda"
        and (stride, padding, dilation) == (1, 0, 1)
        and groups == x.shape[-1] == weight.shape[0]
        and weight.shape[2] == 1
        and weight.shape[1] <= _LONGEST
    )


def convolve(x: mx.array, weight: mx.array) -> mx.array:
    """Return x [batch, length, channels] convolved with weight [channels, size, 1].

    The result has length - size + 1 positions, in x's type. Sums are computed in float32.
    """
    size = weight.shape[1]
    length = x.shape[1] - size + 1
    parts = [x[:, i : i + length] for i in range(size)]
    return _sum(*parts, *(weight[:, i, 0] for i in range(size)))


@partial(mx.compile, shapeless=True)
def _sum(*terms: mx.array) -> mx.array:
    """Return the sum of the products of the first half of `terms` with the second half."""
    half = len(terms) // 2
    total = mx.array(0.0)
    for x, weight in zip(terms[:half], terms[half:], strict=True):
        total = total + x.astype(mx.float32) * weight.astype(mx.float32)
    return total.astype(terms[0].dtype)
