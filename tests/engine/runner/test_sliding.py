"""Models with sliding windows in all layers serve requests longer than the KV cache."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.errors import OutOfMemoryError
from modelpack_engine.request import SamplingParams
from modelpack_engine.runner.model_layout import find_layout
from tests.engine.runner.models import Attention, Model
from tests.engine.serving.tiny import tiny_loaded

WINDOW, CONTEXT = 24, 512
PROMPT = [(7 * i * i + i) % 200 for i in range(300)]
PARAMS = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True)


class Sliding(Model):
    """Layers of our own making, each "sliding" or "full"; mlx-lm's llama has to have a full one."""

    def __init__(self, *layers: str) -> None:
        super().__init__(*[Attention for _ in layers])
        self.embed = nn.Embedding(257, 8)
        self.kinds = layers

    def make_cache(self) -> list[Any]:
        return [RotatingKVCache(WINDOW) if kind == "sliding" else KVCache() for kind in self.kinds]

    def __call__(self, inputs: mx.array, cache: Any) -> mx.array:
        x = self.embed(inputs)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = x + layer(x, create_attention_mask(x, layer_cache), layer_cache)
        return self.embed.as_linear(x)


def sliding(*layers: str) -> nn.Module:
    mx.random.seed(3)
    model = Sliding(*layers)
    model.update({"embed": {"weight": mx.random.normal((257, 8))}})
    mx.eval(model.parameters())
    return model


def engine(model: nn.Module, num_blocks: int, **settings: Any) -> Engine:
    loaded: Any = tiny_loaded()
    names = list(type(loaded).__dataclass_fields__)
    given = {name: getattr(loaded, name) for name in names} | {"model": model}
    given["context_length"] = CONTEXT
    layout = find_layout(model)
    config = {
        "max_num_seqs": 2, "max_num_batched_tokens": 32, "device": "cpu",
        "kv_cache_bytes": num_blocks * 16 * layout.bytes_per_token,
    } | settings  # fmt: skip
    return Engine(type(loaded)(**given), EngineConfig(**config))


def wanted(model: nn.Module, prompt: list[int]) -> list[int]:
    cache = make_prompt_cache(model)
    assert all(isinstance(layer, RotatingKVCache) for layer in cache)
    steps = generate_step(mx.array(prompt), model, max_tokens=50, prompt_cache=cache)
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize("caching", [True, False])
def test_requests_longer_than_the_cache_give_mlx_lm_s_tokens(caching: bool) -> None:
    model = sliding("sliding", "sliding")
    other = [*PROMPT[100:], *PROMPT[:100]]
    expected = [wanted(model, prompt) for prompt in (PROMPT, other)]
    small = engine(model, 10, enable_prefix_caching=caching)
    assert small.max_model_len == CONTEXT
    found = [
        [token for event in events for token in event.token_ids]
        for events in small.generate([PROMPT, other], PARAMS)
    ]
    assert found == expected
    assert small.stats().num_preemptions == 0
    assert small.stats().blocks_total == 8 < 350 // 16, "of both requests"


def test_a_layer_that_sees_all_keeps_all() -> None:
    """With a full layer, no blocks are released: a block has the keys of all layers."""
    mixed = sliding("sliding", "full")
    assert find_layout(mixed).window is None
    assert find_layout(sliding("sliding", "sliding")).window == WINDOW
    with pytest.raises(OutOfMemoryError, match="fewer than max_model_len"):
        engine(mixed, 10, max_model_len=CONTEXT)


def test_a_cache_below_the_window_limits_the_context_as_before() -> None:
    assert engine(sliding("sliding", "sliding"), 4).max_model_len == 3 * 16 + 1
