"""Hunyuan's mixtures of experts, compared with their equations.

The reference is written out here: PyTorch, which transformers' `HunYuanMoEV1` needs, is not a
requirement of the tests.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from modelpack_engine.patches.corrections import correct
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.configuration import Configuration

Floats = NDArray[np.float64]


def mixture(top_k: Any) -> Any:
    """Return the mixture of the first layer of a corrected model."""
    given = next(c for c in CATALOGUE if c.id == "hunyuan")
    args = {**given.args, "moe_topk": top_k}
    model: Any = Configuration("hunyuan", args).build()
    correct(model, {"model_type": "hunyuan"})
    return model.layers[0].mlp


def silu(x: Floats) -> Floats:
    return np.asarray(x / (1 + np.exp(-x)))


def of(array: mx.array) -> Floats:
    return np.array(array, np.float64)


def expected(block: Any, x: Floats, top_k: int) -> Floats:
    """Return the outputs by transformers' equations: several scores add up to 1, one stays."""
    logits = x @ of(block.gate.wg.weight).T
    gates = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    shared = block.shared_mlp
    gate, up, down = (of(getattr(shared, f"{n}_proj").weight) for n in ("gate", "up", "down"))
    outputs: Floats = (silu(x @ gate.T) * (x @ up.T)) @ down.T
    experts = block.switch_mlp
    gate, up, down = (of(getattr(experts, f"{n}_proj").weight) for n in ("gate", "up", "down"))
    for row, scores in enumerate(gates):
        chosen = np.argsort(-scores)[:top_k]
        total = scores[chosen].sum() if top_k > 1 else 1.0
        for expert in chosen:
            hidden = silu(gate[expert] @ x[row]) * (up[expert] @ x[row])
            outputs[row] += scores[expert] / total * (down[expert] @ hidden)
    return outputs


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_scores_of_several_experts_add_up_to_one(top_k: int) -> None:
    block = mixture(top_k)
    x = mx.random.normal((5, 64), key=mx.random.key(3))
    found = of(block(x[None])[0])
    np.testing.assert_allclose(found, expected(block, of(x), top_k), rtol=1e-3, atol=1e-4)


def test_each_layer_has_its_own_number_of_experts() -> None:
    given = next(c for c in CATALOGUE if c.id == "hunyuan")
    model: Any = Configuration("hunyuan", {**given.args, "moe_topk": [1, 2, 1, 2]}).build()
    before = [type(layer.mlp) for layer in model.layers]
    correct(model, {"model_type": "hunyuan"})
    changed = [
        type(layer.mlp) is not kind for layer, kind in zip(model.layers, before, strict=True)
    ]
    assert changed == [False, True, False, True]
