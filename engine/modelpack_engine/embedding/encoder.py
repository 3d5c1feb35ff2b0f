"""Encoder: the BERT family as one MLX module, from token ids to hidden states.

Sources: Devlin et al. 2019 (BERT), Song et al. 2020 (MPNet: relative positions), Warner et al. 2024
(ModernBERT: rotary, alternating local attention, gated MLP), and transformers' modeling files for
what the papers leave open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "tanh"]

#: The most queries whose scores are in memory at once: those of 8192 tokens need gigabytes.
_QUERY_CHUNK = 1024
_RELATIVE_DISTANCE = 128  # MPNet's; its config does not contain it

_FUNCTIONS: Mapping[Activation, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_tanh": nn.gelu_approx,
    "quick_gelu": nn.gelu_fast_approx,
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": mx.tanh,
}


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """The structure of an encoder.

    `position_table` is the number of learnt positions, 0 for none; the first token is at
    `position_offset`, and `max_tokens` is the longest input. `pad_token_id` matters where
    positions skip padding (RoBERTa). `rope_bases` and `windows` have one entry per layer: a base
    of None means no rotation; a window of w covers w tokens on either side, None the whole text.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: Activation
    norm_eps: float
    max_tokens: int
    rope_bases: tuple[float | None, ...]
    windows: tuple[int | None, ...]
    position_table: int = 0
    position_offset: int = 0
    pad_token_id: int = 0
    type_vocab_size: int = 0
    relative_buckets: int = 0
    pre_norm: bool = False
    gated: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    num_labels: int = 0
    head_activation: Activation = "tanh"
    head_norm: bool = False
    head_bias: bool = True
    head_pooling: Literal["cls", "mean"] = "cls"


class Encoder(nn.Module):  # type: ignore[misc]  # mlx.nn has no annotations
    """A bidirectional transformer: each token attends to the whole text or a window of it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.embeddings = _Embeddings(config)
        self.layers = [_Layer(config, index) for index in range(config.num_layers)]
        if config.relative_buckets:
            self.relative_bias = nn.Embedding(config.relative_buckets, config.num_heads)
        if config.pre_norm:
            self.final_norm = _norm(config)
        if config.num_labels:
            self.head = _Head(config)

    def __call__(self, token_ids: mx.array, lengths: mx.array, type_ids: mx.array) -> mx.array:
        """Return hidden states, [texts, tokens, hidden_size].

        `token_ids` and `type_ids`, int32 [texts, tokens], are padded on the right; `lengths` int32
        [texts] counts the real tokens. Hidden states of padding are meaningless.
        """
        count = token_ids.shape[1]
        places = mx.arange(count)
        real = places[None, :] < lengths[:, None]  # [texts, tokens]
        hidden = self.embeddings(token_ids, type_ids)
        biases = {
            window: self._bias(real, places, window, hidden.dtype)
            for window in set(self.config.windows)
        }
        for layer, window in zip(self.layers, self.config.windows, strict=True):
            hidden = layer(hidden, biases[window])
        if self.config.pre_norm:
            hidden = self.final_norm(hidden)
        return hidden

    def classify(self, hidden: mx.array, lengths: mx.array) -> mx.array:
        """Return the classifier's logits, [texts, num_labels], of the hidden states."""
        logits: mx.array = self.head(hidden, lengths)
        return logits

    def _bias(
        self, real: mx.array, places: mx.array, window: int | None, dtype: mx.Dtype
    ) -> mx.array:
        """Return the bias to add to scores, which broadcasts to [texts, heads, tokens, tokens]."""
        seen = real[:, None, None, :]
        if window is not None:
            seen = seen & (mx.abs(places[:, None] - places[None, :]) <= window)
        lowest = mx.array(-3e4 if dtype == mx.float16 else -1e9, dtype)
        bias = mx.where(seen, mx.array(0, dtype), lowest)
        if self.config.relative_buckets:
            buckets = _relative_buckets(places, self.config.relative_buckets)
            bias = bias + self.relative_bias(buckets).transpose(2, 0, 1)[None]
        return bias


class _Embeddings(nn.Module):  # type: ignore[misc]
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self._config = config
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_table:
            self.position = nn.Embedding(config.position_table, config.hidden_size)
        if config.type_vocab_size:
            self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = _norm(config)

    def __call__(self, token_ids: mx.array, type_ids: mx.array) -> mx.array:
        config = self._config
        hidden = self.word(token_ids)
        if config.type_vocab_size:
            if config.type_vocab_size == 1:
                type_ids = mx.zeros_like(token_ids)
            hidden = hidden + self.token_type(type_ids)
        if config.position_table:
            hidden = hidden + self.position(self._positions(token_ids))
        normed: mx.array = self.norm(hidden)
        return normed

    def _positions(self, token_ids: mx.array) -> mx.array:
        if not self._config.position_offset:
            return mx.arange(token_ids.shape[1])[None, :]
        # RoBERTa numbers the tokens that are not padding, from the padding's id + 1.
        counted = (token_ids != self._config.pad_token_id).astype(mx.int32)
        positions: mx.array = mx.cumsum(counted, axis=1) * counted + self._config.pad_token_id
        return positions


class _Layer(nn.Module):  # type: ignore[misc]
    def __init__(self, config: EncoderConfig, index: int) -> None:
        super().__init__()
        self._pre_norm = config.pre_norm
        self.attention = _Attention(config, config.rope_bases[index])
        if not (config.pre_norm and index == 0):  # the norm of the embeddings replaces the first
            self.attention_norm = _norm(config)
        self.mlp = _MLP(config)
        self.mlp_norm = _norm(config)

    def __call__(self, hidden: mx.array, bias: mx.array) -> mx.array:
        if self._pre_norm:
            before = self.attention_norm(hidden) if "attention_norm" in self else hidden
            hidden = hidden + self.attention(before, bias)
            return hidden + self.mlp(self.mlp_norm(hidden))
        hidden = self.attention_norm(hidden + self.attention(hidden, bias))
        normed: mx.array = self.mlp_norm(hidden + self.mlp(hidden))
        return normed


class _Attention(nn.Module):  # type: ignore[misc]
    def __init__(self, config: EncoderConfig, rope_base: float | None) -> None:
        super().__init__()
        self._heads = config.num_heads
        self._head_dim = config.hidden_size // config.num_heads
        self._rope_base = rope_base
        for name in ("query", "key", "value", "output"):
            linear = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
            setattr(self, name, linear)

    def __call__(self, hidden: mx.array, bias: mx.array) -> mx.array:
        texts, tokens, size = hidden.shape
        query, key, value = (
            linear(hidden).reshape(texts, tokens, self._heads, self._head_dim).swapaxes(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        if self._rope_base is not None:
            query, key = (
                mx.fast.rope(
                    part, self._head_dim, traditional=False, base=self._rope_base, scale=1, offset=0
                )
                for part in (query, key)
            )
        chunks = [slice(at, at + _QUERY_CHUNK) for at in range(0, tokens, _QUERY_CHUNK)]
        parts = [
            mx.fast.scaled_dot_product_attention(
                query[:, :, chunk],
                key,
                value,
                scale=self._head_dim**-0.5,
                mask=bias if bias.shape[2] == 1 else bias[:, :, chunk],
            )
            for chunk in chunks
        ]
        seen = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
        attended: mx.array = self.output(seen.swapaxes(1, 2).reshape(texts, tokens, size))
        return attended


class _MLP(nn.Module):  # type: ignore[misc]
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self._activation = _FUNCTIONS[config.activation]
        inner, size = config.intermediate_size, config.hidden_size
        if config.gated:
            self.gate = nn.Linear(size, inner, bias=config.mlp_bias)
        self.up = nn.Linear(size, inner, bias=config.mlp_bias)
        self.down = nn.Linear(inner, size, bias=config.mlp_bias)

    def __call__(self, hidden: mx.array) -> mx.array:
        if "gate" in self:
            inner = self._activation(self.gate(hidden)) * self.up(hidden)
        else:
            inner = self._activation(self.up(hidden))
        projected: mx.array = self.down(inner)
        return projected


class _Head(nn.Module):  # type: ignore[misc]
    """The classifier of a cross-encoder: over the first token, or over all of them."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self._pooling = config.head_pooling
        self._activation = _FUNCTIONS[config.head_activation]
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.head_bias)
        if config.head_norm:
            self.norm = _norm(config)
        self.out = nn.Linear(config.hidden_size, config.num_labels)

    def __call__(self, hidden: mx.array, lengths: mx.array) -> mx.array:
        if self._pooling == "mean":
            real = (mx.arange(hidden.shape[1])[None, :] < lengths[:, None])[..., None]
            pooled = mx.where(real, hidden, 0).sum(axis=1) / lengths[:, None].astype(hidden.dtype)
        else:
            pooled = hidden[:, 0]
        pooled = self._activation(self.dense(pooled))
        if "norm" in self:
            pooled = self.norm(pooled)
        logits: mx.array = self.out(pooled)
        return logits


def _norm(config: EncoderConfig) -> Any:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


def _relative_buckets(places: mx.array, num_buckets: int) -> mx.array:
    """Return the bucket of each distance, int32 [tokens, tokens], as T5 and MPNet number them."""
    distance = places[:, None] - places[None, :]  # how far the key is before the query
    half = num_buckets // 2
    exact = half // 2
    far = mx.abs(distance)
    scale = (half - exact) / math.log(_RELATIVE_DISTANCE / exact)
    large = exact + (mx.log(mx.maximum(far, 1) / exact) * scale).astype(mx.int32)
    large = mx.minimum(large, half - 1)
    return mx.where(distance < 0, half, 0) + mx.where(far < exact, far, large)
