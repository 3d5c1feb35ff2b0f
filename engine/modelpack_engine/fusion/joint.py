"""JointLinear: several linear layers of one input as one."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.fusion.products import Weights, weights_of

_PARAMETERS = ("weight", "scales", "biases", "bias")


def can_join(layers: Sequence[nn.Module]) -> bool:
    """Return whether layers are plain ones, of one kind and one input."""
    kinds = {type(layer) for layer in layers}
    if kinds not in ({nn.Linear}, {nn.QuantizedLinear}):
        return False
    names = {tuple(sorted(layer)) for layer in layers}
    widths = {layer["weight"].shape[1] for layer in layers}
    dtypes = {tuple(layer[name].dtype for name in sorted(layer)) for layer in layers}
    how = {
        tuple(getattr(layer, name, None) for name in ("group_size", "bits", "mode"))
        for layer in layers
    }
    return all(len(values) == 1 for values in (names, widths, dtypes, how))


def join(layers: Sequence[nn.Module]) -> Weights:
    """Return the weights of layers that `can_join`: their outputs come one after the other.

    The layers' parameters become views of the joint ones, so that nothing is kept twice.
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
    return Weights(
        joint["weight"], joint.get("scales"), joint.get("biases"), joint.get("bias"),
        first.bits, first.group_size, first.mode,
    ).ready()  # fmt: skip
