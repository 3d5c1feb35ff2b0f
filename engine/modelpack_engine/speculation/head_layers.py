"""The layer of a drafting head on rows of many sequences, whose keys and values are in pools.

`HeadLayer` calls an EAGLE-3 head or a layer for multi-token prediction as it is. `FusedLayer`
computes an EAGLE-3 head by fewer kernels, on GPUs: launching a kernel takes longer than the kernel
of such a small layer. `head_layer` chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.attention.kv_pools import TokenMajorPools
from modelpack_engine.kernels import launch
from modelpack_engine.layers import drafts, kernels
from modelpack_engine.layers.add_norm import Sums
from modelpack_engine.layers.kernels import Rotation, find_rotation, take, take_rows
from modelpack_engine.layers.matmul import embedded, multiply, multiply_in_parts
from modelpack_engine.layers.weights import Weights, can_join, join, weights_of
from modelpack_engine.models.eagle import EagleHead
from modelpack_engine.models.mtp import MtpHead

Embed = Callable[[mx.array], mx.array]
#: The most rows that a head reads at a time.
_MOST_ROWS = 4096
#: What rows carry from `write` to `finish`.
Carried = Any


class HeadLayer:
    """The layer of `head`; `embed` are the embeddings that it reads."""

    def __init__(self, head: EagleHead | MtpHead, embed: Embed) -> None:
        self._head, self._embed = head, embed

    def write(
        self,
        hidden: mx.array,
        ids: mx.array,
        positions: mx.array,
        slots: mx.array,
        pools: TokenMajorPools,
    ) -> tuple[Carried, mx.array]:
        """Write the keys and values of rows to `slots`; return the rows' queries.

        `hidden` is [rows, hidden], the tokens are the last column of `ids` int32 [rows, columns],
        `positions` and `slots` are int32 [rows], and the queries [rows, heads, dim].
        """
        embedded = self._embed(ids[:, -1])
        carried, queries, keys, values = self._head.project(hidden, embedded, positions)
        pools.write(keys, values, slots, None)
        return carried, queries

    def take(self, carried: Carried, rows: mx.array) -> Carried:
        """Return what some rows carry, int32 [n]."""
        if isinstance(carried, tuple):
            return tuple(self.take(part, rows) for part in carried)
        return None if carried is None else take_rows(carried, rows)

    def finish(self, carried: Carried, attended: mx.array) -> tuple[mx.array, mx.array]:
        """Return hidden states and logits of rows, whose attention is [rows, heads * dim]."""
        hidden = self._head.finish(carried, attended)
        return hidden, self._head.logits(hidden)


class FusedLayer:
    """The layer of an EAGLE-3 head by the kernels of fused decoder layers."""

    def __init__(self, head: EagleHead, embed: Embed, rotation: Rotation) -> None:
        layer, config = head.midlayer, head.config
        attention, mlp = layer.self_attn, layer.mlp
        self._embed, self._rotation = embed, rotation
        # A runner may have replaced the class of a model's embeddings by one derived from it.
        plain = isinstance(embed, nn.Embedding) and embed["weight"].dtype == head.dtype
        self._table: mx.array | None = embed["weight"] if plain else None  # type: ignore[index]
        packed = isinstance(embed, nn.QuantizedEmbedding)
        self._packed = weights_of(embed) if packed else None
        self._numbers = mx.arange(_MOST_ROWS, dtype=mx.int32)[:, None]
        self._odd = mx.arange(1, 2 * _MOST_ROWS, 2, dtype=mx.int32)
        mx.eval(self._numbers, self._odd)
        self._ends: dict[tuple[int, int], mx.array] = {}  # by shape: the last column's places
        self._heads, self._dtype = (config.num_heads, config.num_kv_heads), head.dtype
        self._normed_residual = config.norm_before_residual
        self._weights = layer.input_layernorm["weight"], layer.hidden_norm["weight"]
        self._after_attention, self._last = layer.post_attention_layernorm, head.norm
        self._epsilon = config.rms_norm_eps
        self._heads_by = join([attention.q_proj, attention.k_proj, attention.v_proj])
        self._gates = join([mlp.gate_proj, mlp.up_proj])
        self._output, self._down, self._logits = (
            _ready(linear) for linear in (attention.o_proj, mlp.down_proj, head.lm_head)
        )

    def write(
        self,
        hidden: mx.array,
        ids: mx.array,
        positions: mx.array,
        slots: mx.array,
        pools: TokenMajorPools,
    ) -> tuple[Carried, mx.array]:
        """Do as `HeadLayer.write`."""
        # Norms in float32 would make the model's states float32.
        hidden, table = hidden.astype(self._dtype), self._table
        if table is None:
            last = self._last_column(ids)
            rows = None if self._packed is None else embedded(last, self._packed)
            table = (self._embed(last) if rows is None else rows).astype(self._dtype)
            ids = self._numbers[: len(ids)]
        rows = drafts.norm_beside(table, ids, hidden, *self._weights, self._epsilon)
        residual = hidden
        if self._normed_residual:  # the second half of each row; a slice would be copied by MLX
            count, dim = hidden.shape
            residual = take_rows(rows.reshape(2 * count, dim), self._odd[:count])
        joint = multiply_in_parts(rows, self._heads_by)
        queries = kernels.rotate_and_write(
            joint.array, joint.count, self._dtype, pools, positions, slots, self._rotation,
            self._heads, None,
        )  # fmt: skip
        return residual, queries

    def _last_column(self, ids: mx.array) -> mx.array:
        """Return the last column of ids [n, columns] by a kernel; MLX would copy a slice."""
        count, columns = ids.shape
        if count == 1 or columns == 1:
            return ids[:, -1]
        if (count, columns) not in self._ends:
            end = mx.array([row * columns + columns - 1 for row in range(count)], mx.int32)
            mx.eval(end)
            self._ends[count, columns] = end
        return take(ids.reshape(-1), self._ends[count, columns])

    def take(self, carried: Carried, rows: mx.array) -> Carried:
        """Do as `HeadLayer.take`."""
        return take_rows(carried, rows)

    def finish(self, carried: Carried, attended: mx.array) -> tuple[mx.array, mx.array]:
        """Do as `HeadLayer.finish`."""
        sums, shape, dtype = Sums(), carried.shape, self._dtype

        def plus(rows: mx.array, product: mx.array, by: Weights) -> mx.array:
            parts = sums.multiply(product, by)
            return sums.add(rows, sums.of_parts(parts, shape, dtype))

        def normed(rows: mx.array, norm: Any) -> mx.array:
            found = sums.norm(rows, norm["weight"], self._epsilon)
            assert found is not None, "the rows are a sum"
            return found

        hidden = plus(carried, attended, self._output)
        gated = sums.swiglu(normed(hidden, self._after_attention), self._gates)
        hidden = plus(hidden, gated, self._down)
        logits = sums.whole(normed(hidden, self._last), self._logits)
        return sums.value(hidden), logits


def head_layer(head: EagleHead | MtpHead, embed: Embed) -> HeadLayer | FusedLayer:
    """Return the layer of a head, fused if it is EAGLE-3's and all kernels are right."""
    if not isinstance(head, EagleHead) or launch.backend() == "none":
        return HeadLayer(head, embed)
    attention, rotation = head.midlayer.self_attn, find_rotation(head._rope)
    fits = (
        rotation is not None
        and head.config.head_dim % 32 == 0
        and can_join([attention.q_proj, attention.k_proj, attention.v_proj])
        and can_join([head.midlayer.mlp.gate_proj, head.midlayer.mlp.up_proj])
        and kernels.verdict(head.dtype) is None
        and drafts.norm_verdict(head.dtype) is None
    )
    if rotation is None or not fits:
        return HeadLayer(head, embed)
    return FusedLayer(head, embed, rotation)


def linear_of_rows(linear: nn.Linear) -> Callable[[mx.array], mx.array]:
    """Return what computes a linear layer for rows [n, inputs], by our kernels on CUDA."""
    if launch.backend() != "cuda":
        return linear  # type: ignore[no-any-return]
    weights = _ready(linear)
    return lambda rows: multiply(rows, weights)


def _ready(linear: nn.Module) -> Weights:
    weights = weights_of(linear)
    assert weights is not None, "the layers of a head are linears"
    return weights.ready()
