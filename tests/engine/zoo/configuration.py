"""Configuration: a tiny model of one architecture, with random weights that make it talkative."""

from __future__ import annotations

import importlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

VOCABULARY = 256

#: The usual names of dimensions; mlx-lm ignores unknown names.
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Configuration:
    """One architecture (mlx-lm's module) and its arguments, in addition to the common ones.

    `nested` puts all arguments under that key, as models with a text part do. `embedding` scales
    the token embeddings: if they are too large, a model repeats its last token forever.
    `cache_window` is the size of the reference's rotating caches.
    """

    architecture: str
    args: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    nested: str | None = None
    embedding: float = 1.0
    seed: int = 7
    cache_window: int | None = None

    @property
    def id(self) -> str:
        return self.architecture + (f": {self.name}" if self.name else "")

    def build(self) -> nn.Module:
        """Return the model with random float32 weights, always the same."""
        module = importlib.import_module(f"mlx_lm.models.{self.architecture}")
        args = {**COMMON, "model_type": self.architecture, **self.args}
        if self.nested is not None:
            args = {"model_type": self.architecture, self.nested: args, "vocab_size": VOCABULARY}
        mx.random.seed(self.seed)
        model: nn.Module = module.Model(module.ModelArgs.from_dict(args))
        parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
        model.load_weights([(name, self._random(name, v)) for name, v in parameters], strict=False)
        model.eval()
        mx.eval(model.parameters())
        return model

    def _random(self, name: str, value: mx.array) -> mx.array:
        if value.dtype not in (mx.float32, mx.float16, mx.bfloat16):
            return value
        if any(part in name for part in ("A_log", "dt_bias", "freqs", "rope")) or name.endswith(
            ".D"
        ):
            return value
        noise = mx.random.normal(value.shape)
        if value.ndim <= 1:
            return (1.0 if name.endswith("weight") else 0.0) + 0.2 * noise
        if "conv" in name:
            return 0.5 * noise
        scale = 1.6 / value.shape[-1] ** 0.5
        if any(part in name for part in ("embed", "wte", "embd")):
            scale *= self.embedding
        return scale * noise


def prompts() -> list[list[int]]:
    """Return five prompts of 1 to 48 tokens, two of which share their first 32."""
    rng = random.Random(3)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(1, VOCABULARY) for _ in range(count)]

    shared = tokens(32)
    return [shared + tokens(5), tokens(19), [7], shared + tokens(9), tokens(48)]
