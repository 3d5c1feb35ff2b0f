"""The attention of a layer for multi-token prediction, on rows with caches of its own.

mlx-lm's modules attend within their call, over one sequence. `attention_of` splits that call in
two: `project` makes the queries, keys and values of rows of any sequences, and `output` projects
what they attended to. `models.mtp` uses the modules' own weights, norms and rotations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True, slots=True)
class Projected:
    """Queries, keys and values [rows, heads, dim]; `gate` [rows, heads * dim] scales the output."""

    queries: mx.array
    keys: mx.array
    values: mx.array
    gate: mx.array | None = None


class Attention(Protocol):
    """One kind of attention. A key has `key_dim` elements, a value `value_dim`."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    def project(self, x: mx.array, positions: mx.array) -> Projected:
        """Return the projections of rows `x` [rows, hidden] at `positions` [rows]."""

    def output(self, attended: mx.array, gate: mx.array | None) -> mx.array:
        """Return the output [rows, hidden] of what rows attended to [rows, heads * value_dim]."""


def attention_of(module: Any) -> Attention:
    """Return the attention of a module of mlx-lm, by what it projects."""
    if "embed_q" in module:
        return _Latent(module)
    return _Heads(module)


class _Heads:
    """Keys and values per head, with norms, rotation and output gate where the module has them.

    Qwen's gate comes with the queries: `q_proj` has twice the width that `o_proj` reads.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._num_heads = _number(module, "n_heads", "num_attention_heads", "num_heads")
        self.num_kv_heads = _number(module, "n_kv_heads", "num_key_value_heads")
        self.key_dim = _width(module.k_proj) // self.num_kv_heads
        self.value_dim = _width(module.v_proj) // self.num_kv_heads
        self._value_scale: float | None = getattr(module, "value_scale", None)  # MiMo V2's
        self._gated = _width(module.q_proj) == 2 * self._num_heads * self.key_dim

    def project(self, x: mx.array, positions: mx.array) -> Projected:
        module, gate = self._module, None
        queries = module.q_proj(x).reshape(len(x), self._num_heads, -1)
        if self._gated:
            queries, gate = mx.split(queries, 2, axis=-1)
            gate = gate.reshape(len(x), -1)
        keys, values = (
            linear(x).reshape(len(x), self.num_kv_heads, -1)
            for linear in (module.k_proj, module.v_proj)
        )
        if self._value_scale is not None:
            values = values * self._value_scale
        if "q_norm" in module:
            queries, keys = module.q_norm(queries), module.k_norm(keys)
        if "rope" in module:
            queries, keys = (
                module.rope(heads[:, :, None], offset=positions)[:, :, 0]
                for heads in (queries, keys)
            )
        return Projected(queries, keys, values, gate)

    def output(self, attended: mx.array, gate: mx.array | None) -> mx.array:
        if gate is not None:
            attended = attended * mx.sigmoid(gate)
        found: mx.array = self._module.o_proj(attended)
        return found


class _Latent:
    """DeepSeek's latent attention: all heads attend to one compressed vector of each token.

    A key is this vector and its rotated part, a value the vector alone. Source: DeepSeek-AI,
    DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """

    num_kv_heads = 1

    def __init__(self, module: Any) -> None:
        self._module = module
        self._num_heads = int(module.num_heads)
        self.value_dim = int(module.kv_lora_rank)
        self.key_dim = self.value_dim + int(module.qk_rope_head_dim)

    def project(self, x: mx.array, positions: mx.array) -> Projected:
        module = self._module
        if "q_proj" in module:
            queries = module.q_proj(x)
        else:
            queries = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(x)))
        queries = queries.reshape(len(x), self._num_heads, 1, -1)
        plain, rotated = mx.split(queries, [module.qk_nope_head_dim], axis=-1)
        plain = module.embed_q(plain.transpose(2, 1, 0, 3))[0].transpose(1, 0, 2)
        queries = mx.concatenate([plain, module.rope(rotated, positions)[:, :, 0]], axis=-1)
        latent, key = mx.split(module.kv_a_proj_with_mqa(x), [self.value_dim], axis=-1)
        values = module.kv_a_layernorm(latent)[:, None]
        key = module.rope(key[:, None, None], positions)[:, :, 0]
        return Projected(queries, mx.concatenate([values, key], axis=-1), values)

    def output(self, attended: mx.array, gate: mx.array | None) -> mx.array:
        rows = len(attended)
        heads = attended.reshape(rows, self._num_heads, -1).transpose(1, 0, 2)
        values = self._module.unembed_out(heads[None])[0].transpose(1, 0, 2)
        found: mx.array = self._module.o_proj(values.reshape(rows, -1))
        return found


def _number(module: nn.Module, *names: str) -> int:
    """Return the first of these attributes that a module has."""
    return int(next(getattr(module, name) for name in names if hasattr(module, name)))


def _width(linear: nn.Module) -> int:
    """Return the output size of a linear layer, quantised or not."""
    return int(linear.weight.shape[0])
