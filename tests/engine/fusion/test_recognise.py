"""`reads_like`: a layer is recognised by its source and the functions that the source calls."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import deepseek_v3, llama, qwen3

from modelpack_engine.patches.fused_layers import reads_like


def instance(name: str) -> nn.Module:
    """Return an instance of a class of mlx-lm's models, without calling its constructor."""
    module, _, kind = name.partition(".")
    found: type[nn.Module] = getattr(importlib.import_module(f"mlx_lm.models.{module}"), kind)
    return found.__new__(found)


@pytest.mark.parametrize(
    ("name", "known", "same"),
    [
        ("llama.MLP", llama.MLP, True),
        ("qwen2.MLP", llama.MLP, True),
        ("olmo2.MLP", llama.MLP, True),
        ("gemma2.MLP", llama.MLP, False),
        ("phi3.MLP", llama.MLP, False),
        ("qwen2.Attention", llama.Attention, True),
        ("granite.Attention", llama.Attention, True),
        ("gemma2.Attention", llama.Attention, False),
        ("olmo2.Attention", llama.Attention, False),
        ("qwen3_moe.Attention", qwen3.Attention, True),
        ("qwen3.Attention", llama.Attention, False),
        ("qwen3_moe.Qwen3MoeDecoderLayer", llama.TransformerBlock, True),
        ("mistral3.Model", llama.TransformerBlock, False),
        ("glm4_moe.DecoderLayer", deepseek_v3.DeepseekV3DecoderLayer, True),
        ("gemma3_text.TransformerBlock", llama.TransformerBlock, False),
    ],
)
def test_classes_of_mlx_lm(name: str, known: type[nn.Module], same: bool) -> None:
    assert reads_like(instance(name), known) is same


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return gate * x


class OtherMeaning(nn.Module):
    """A module with the source of Llama's MLP, which calls another function named `swiglu`."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any

    def __call__(self, x) -> mx.array:  # type: ignore[no-untyped-def]
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]


class Silent(nn.Module):
    """A module without `__call__`."""


@pytest.mark.parametrize("kind", [OtherMeaning, Silent])
def test_other_modules_are_not_recognised(kind: type[nn.Module]) -> None:
    assert not reads_like(kind(), llama.MLP)


def test_a_class_without_source_is_not_recognised() -> None:
    scope: dict[str, Any] = {}
    exec("def __call__(self, x):\n    return x", scope)  # a class without a source file
    kind = type("Made", (nn.Module,), {"__call__": scope["__call__"]})
    assert not reads_like(kind(), llama.MLP)
