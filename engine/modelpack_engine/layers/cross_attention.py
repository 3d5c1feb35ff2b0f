"""Layers that attend to pictures instead of earlier tokens: those of Llama 3.2 Vision (mllama).

Their keys and values are those of a picture, the same for all tokens that see it, so they are kept
with the picture and not in the KV cache. A token that sees no picture skips these layers, as in
Meta's code; transformers lets tokens before the first picture attend to all of them.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.nn.layers.base import Module
from mlx_lm.models import llama

#: Ends of the paths of layers whose outputs are kept with pictures, for requests of any adapter.
SHARED = (".cross_attn.k_proj", ".cross_attn.v_proj")


class Crossing:
    """The cross-attention layers of a model, and what the rows of the next step see.

    `spans` has rows [start, stop) of the step with the pictures that they see: the keys and values
    [layers, 2, heads, tokens, head size] that `keys_and_values` returned.
    """

    def __init__(self) -> None:
        self.layers: list[CrossAttentionLayer] = []
        self.spans: tuple[tuple[int, int, tuple[mx.array, ...]], ...] = ()

    def spans_of(self, index: int) -> list[tuple[int, int, mx.array]]:
        """Return `spans` with the keys and values [2, heads, tokens, head size] of one layer.

        Rows that see the same pictures share one array. Joining them layer by layer takes a
        fraction of the memory of the pictures.
        """
        joined: dict[tuple[int, ...], mx.array] = {}
        made = []
        for start, stop, seen in self.spans:
            key = tuple(map(id, seen))
            if key not in joined:
                joined[key] = mx.concatenate([picture[index] for picture in seen], axis=-2)
            made.append((start, stop, joined[key]))
        return made

    def keys_and_values(self, states: mx.array) -> mx.array:
        """Return a picture's keys and values in all layers, from its states [tokens, width]."""
        return mx.stack([layer.cross_attn.keys_and_values(states) for layer in self.layers])

    @property
    def bytes_per_token(self) -> int:
        """The bytes of the keys and values of one token of a picture."""
        attention = [layer.cross_attn for layer in self.layers]
        return sum(2 * one.kv_heads * one.head_dim * one.dtype.size for one in attention)


class CrossAttention(Module):  # type: ignore[misc]
    """Attention of text to the keys and values of pictures."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        width, self.heads = args.hidden_size, args.num_attention_heads
        self.kv_heads = args.num_key_value_heads
        self.head_dim = width // self.heads
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=args.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=args.rms_norm_eps)

    @property
    def dtype(self) -> mx.Dtype:
        """The type of keys and values."""
        found: mx.Dtype = self.k_norm.weight.dtype
        return found

    def keys_and_values(self, states: mx.array) -> mx.array:
        """Return the keys and values [2, heads, tokens, head size] of states [tokens, width]."""
        states = states.astype(self.dtype)
        keys, values = (
            linear(states).reshape(len(states), self.kv_heads, -1).swapaxes(0, 1)
            for linear in (self.k_proj, self.v_proj)
        )
        return mx.stack([self.k_norm(keys), values])

    def __call__(self, x: mx.array, spans: list[tuple[int, int, mx.array]]) -> mx.array:
        """Return the outputs of rows x, of which those in `spans` see keys and values."""
        count = x.size // x.shape[-1]
        queries = self.q_norm(self.q_proj(x).reshape(count, self.heads, -1)).swapaxes(0, 1)[None]
        outputs = mx.zeros(queries.shape, queries.dtype)
        for start, stop, seen in spans:
            outputs[:, :, start:stop] = mx.fast.scaled_dot_product_attention(
                queries[:, :, start:stop], *seen[:, None], scale=self.head_dim**-0.5
            )
        made: mx.array = self.o_proj(outputs[0].swapaxes(0, 1).reshape(*x.shape[:-1], -1))
        return made


class CrossAttentionLayer(Module):  # type: ignore[misc]
    """A block of a Llama that attends to pictures, with the interface of mlx-lm's blocks."""

    use_sliding = False

    def __init__(self, args: Any, crossing: Crossing) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(args)
        self.mlp = llama.MLP(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.cross_attn_attn_gate = mx.zeros(1)
        self.cross_attn_mlp_gate = mx.zeros(1)
        self.crossing, self.index = crossing, len(crossing.layers)
        crossing.layers.append(self)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Return the outputs of rows x [..., width]; rows that see no picture are unchanged."""
        if not self.crossing.spans:
            return x
        spans = self.crossing.spans_of(self.index)
        attended = self.cross_attn(self.input_layernorm(x), spans)
        h = x + mx.tanh(self.cross_attn_attn_gate) * attended
        made = h + mx.tanh(self.cross_attn_mlp_gate) * self.mlp(self.post_attention_layernorm(h))
        sees = np.zeros((x.size // x.shape[-1],), np.bool_)
        for start, stop, _ in spans:
            sees[start:stop] = True
        return mx.where(mx.array(sees).reshape(*x.shape[:-1], 1), made, x)


def insert_layers(model: Any, layers: list[int]) -> Crossing:
    """Replace these layers of a Llama of mlx-lm by layers that attend to pictures."""
    inner, args, crossing = model.model, model.args, Crossing()
    for index in layers:
        inner.layers[index] = CrossAttentionLayer(args, crossing)
    inner.fa_idx = next(at for at in range(len(inner.layers)) if at not in layers)
    return crossing
