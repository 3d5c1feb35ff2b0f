"""The weights of linear layers, plain or quantised, and the joint weights of several layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.layers.blocks import BlockEmbedding, BlockLinear, BlockType

_PARAMETERS = ("weight", "scales", "biases", "bias")
#: The inputs of a kernel that has no second weights, that of an up projection.
NO_UP: dict[str, mx.array | None] = {f"{name}_up": None for name in _PARAMETERS}


@dataclass(frozen=True, slots=True)
class Weights:
    """The parameters of a linear layer, or of the experts of one: plain weights [..., out, in].

    With `bits`, weights are quantised: packed in uint32, low bits first, with scales and biases
    [..., out, in / group], or if `blocks` is set, rows of words of that type. `transposed` is a
    view of plain weights, made once for all steps.
    """

    weight: mx.array
    scales: mx.array | None
    biases: mx.array | None
    bias: mx.array | None
    bits: int | None
    group_size: int
    mode: str
    transposed: mx.array | None = None
    blocks: BlockType | None = None

    @classmethod
    def plain(cls, weight: mx.array, bias: mx.array | None = None) -> Weights:
        """Return weights that are not quantised."""
        return cls(weight, None, None, bias, None, 0, "")

    @property
    def num_outputs(self) -> int:
        """The number of outputs."""
        return self.weight.shape[-2]

    @property
    def num_inputs(self) -> int:
        """The number of inputs."""
        if self.blocks is not None:
            return self.blocks.inputs(self.weight.shape[-1])
        return self.weight.shape[-1] * (32 // self.bits if self.bits else 1)

    def inputs(self, suffix: str = "") -> dict[str, mx.array | None]:
        """Return the parameters as a kernel's inputs, whose names end in `suffix`."""
        parameters = self.weight, self.scales, self.biases, self.bias
        return {name + suffix: array for name, array in zip(_PARAMETERS, parameters, strict=True)}

    def ready(self) -> Weights:
        """Return these weights with `transposed` set, which each step would compute otherwise."""
        if self.bits is not None:
            return self
        transposed = self.weight.T
        mx.eval(transposed)
        return replace(self, transposed=transposed)


def weights_of(layer: nn.Module) -> Weights | None:
    """Return the parameters of a linear layer, or of an embedding used as one; None for others.

    Swapped classes count as their originals; layers that are sharded over devices do not.
    """
    if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return quantised_weights(layer)
    if isinstance(layer, BlockLinear | BlockEmbedding):
        return _block_weights(layer)
    if isinstance(layer, nn.Linear | nn.Embedding):
        return Weights.plain(layer["weight"], layer.get("bias"))
    return None


def quantised_weights(layer: Any) -> Weights:
    """Return the parameters of any quantised layer."""
    return Weights(
        layer["weight"], layer["scales"], layer.get("biases"), layer.get("bias"),
        layer.bits, layer.group_size, layer.mode,
    )  # fmt: skip


def _block_weights(layer: BlockLinear | BlockEmbedding) -> Weights:
    kind = layer.kind
    bits = kind.low + kind.high
    return Weights(
        layer["weight"], None, None, layer.get("bias"), bits, kind.group, "gguf", blocks=kind
    )


def can_join(layers: Sequence[nn.Module]) -> bool:
    """Return whether layers are linears of one kind, with inputs and types that are equal."""
    kinds = {type(layer) for layer in layers}
    if kinds not in ({nn.Linear}, {nn.QuantizedLinear}, {BlockLinear}):
        return False
    names = {tuple(sorted(layer)) for layer in layers}
    widths = {layer["weight"].shape[1] for layer in layers}
    dtypes = {tuple(layer[name].dtype for name in sorted(layer)) for layer in layers}
    how = {
        tuple(getattr(layer, name, None) for name in ("group_size", "bits", "mode", "kind"))
        for layer in layers
    }
    return all(len(values) == 1 for values in (names, widths, dtypes, how))


def join(layers: Sequence[nn.Module]) -> Weights:
    """Return the joint weights of layers for which `can_join` is true: their outputs concatenated.

    The layers' parameters become views of the joint ones, so no memory is used twice.
    """
    joint: dict[str, mx.array] = {}
    for name in _PARAMETERS:
        if name not in layers[0]:
            continue
        joint[name] = mx.concatenate([layer[name] for layer in layers])
        mx.eval(joint[name])
        start = 0
        for layer in layers:
            size = layer[name].shape[0]
            layer[name] = joint[name][start : start + size]
            start += size
        mx.eval([layer[name] for layer in layers])
    first = weights_of(layers[0])
    assert first is not None, "plain layers have weights"
    return replace(
        first,
        weight=joint["weight"],
        scales=joint.get("scales"),
        biases=joint.get("biases"),
        bias=joint.get("bias"),
    ).ready()


def random_weights(
    dtype: mx.Dtype,
    bits: int,
    shape: tuple[int, ...],
    scale: float,
    key: mx.array,
    of_bias: mx.array,
    group_size: int = 32,
    *,
    biased: bool = True,
) -> tuple[Weights, mx.array, mx.array]:
    """Return random weights for a test, and the same weights and their bias in float32.

    Unless they are `biased`, they have no bias, and zeros are returned: a kernel that is compared
    without one need not be compiled again for most models.
    """
    full = (mx.random.normal(shape, key=key) * scale).astype(dtype)
    bias = mx.random.normal(shape[:-1], key=of_bias).astype(dtype)
    weights = Weights.plain(full, bias)
    if bits < 16:
        packed = mx.quantize(full, group_size, bits)
        full = mx.dequantize(*packed, group_size, bits)
        weights = Weights(*packed, bias, bits, group_size, "affine")
    if not biased:
        weights, bias = replace(weights, bias=None), mx.zeros_like(bias)
    return weights, full.astype(mx.float32), bias.astype(mx.float32)
