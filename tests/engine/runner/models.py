"""Small models and hand-made batches for tests of the runner."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention

from modelpack_engine.core.batch import Chunk, StepBatch


def tiny_llama(**args: Any) -> nn.Module:
    """Return mlx-lm's llama with three layers and random weights."""
    mx.random.seed(5)
    common = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 64,
    }
    model: nn.Module = llama.Model(llama.ModelArgs.from_dict({**common, **args}))
    mx.eval(model.parameters())
    return model


class Attention(nn.Module):
    """One head of width 8; subclasses may transform the cached keys in `twist`."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.rope = nn.RoPE(8)

    def twist(self, keys: mx.array) -> mx.array:
        return keys

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        queries, keys, values = (a[:, None] for a in mx.split(self.project(x), 3, axis=-1))
        queries = self.rope(queries, offset=cache.offset)
        keys = self.rope(keys, offset=cache.offset)
        keys, values = cache.update_and_fetch(keys, values)
        return scaled_dot_product_attention(
            queries, self.twist(keys), values, cache=cache, scale=1.0, mask=mask
        )[:, 0]


class Copying(Attention):
    """Loses its handles, as MLX's functions return plain arrays."""

    def twist(self, keys: mx.array) -> mx.array:
        return keys + 0


class Meddling(Attention):
    """Keeps its handles, but treats its batch as sequences instead of rows."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        return super().__call__(x, mask, cache) + mx.arange(x.shape[0])[:, None, None]


class Crowded(Attention):
    """Computes wrong results in steps with many rows."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        found = super().__call__(x, mask, cache)
        return found if x.shape[0] < 64 else 40 * mx.arange(8) - found


class Model(nn.Module):
    """Layers of the given attention over a vocabulary of 32."""

    def __init__(self, *kinds: type[Attention]) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.layers = [kind() for kind in kinds]

    def __call__(self, inputs: mx.array, cache: Any) -> mx.array:
        x = self.embed(inputs)
        mask = create_attention_mask(x, cache[0])
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = x + layer(x, mask, layer_cache)
        return self.embed.as_linear(x)


def make_model(*kinds: type[Attention]) -> Model:
    mx.random.seed(3)
    model = Model(*kinds)
    model.update({"embed": {"weight": mx.random.normal((32, 8))}})
    mx.eval(model.parameters())
    return model


def prefill(seq_id: int, tokens: list[int], table: list[int], block_size: int = 16) -> StepBatch:
    """Return a step with one whole prompt, its last row sampled."""
    count = len(tokens)
    return StepBatch(
        token_ids=tokens,
        positions=list(range(count)),
        slots=[table[p // block_size] * block_size + p % block_size for p in range(count)],
        from_previous=(),
        num_decode=0,
        decode_tables=[],
        decode_lengths=[],
        decode_seq_ids=(),
        chunks=(Chunk(0, count, count, count, tuple(table), seq_id),),
        sample_rows=(count - 1,),
        sample_seqs=(),
    )


def decode(seq_id: int, token: int, length: int, table: list[int]) -> StepBatch:
    """Return a step with one decode row; `length` counts its own token."""
    position = length - 1
    return StepBatch(
        token_ids=[token],
        positions=[position],
        slots=[table[position // 16] * 16 + position % 16],
        from_previous=(),
        num_decode=1,
        decode_tables=[table],
        decode_lengths=[length],
        decode_seq_ids=(seq_id,),
        chunks=(),
        sample_rows=(0,),
        sample_seqs=(),
    )


def token_ids(batch: StepBatch) -> mx.array:
    return mx.array(batch.token_ids, mx.int32)
