"""MtpHead: a model's own layer for multi-token prediction, which drafts tokens.

Models such as MiMo are trained with a further layer that predicts one more token, from the output
of the model's last layer, before the norm, and the embedding of the next token. mlx-lm's classes
drop its weights; `load_mtp_head` reads them from the model's files. `speculation.eagle` drafts with
it as with an EAGLE-3 head.

Sources: Xiaomi, MiMo, arXiv:2505.07608, and its vLLM, whose model returns the state before the
norm; DeepSeek-AI, DeepSeek-V3, arXiv:2412.19437, section 2.2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models.eagle import load_tensors, tensor_shapes
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.models.loader import LoadedModel

#: The prefix of the layer's tensors, by model type. Of several layers, the first drafts all tokens.
PREFIXES = {"mimo": "model.mtp_layers.0."}

_HINT = "choose --speculative-method ngram, or a draft model"


class MtpHead(nn.Module):  # type: ignore[misc]  # MLX has no types here
    """The layer of `model`, a Llama-like block of the model's own class, without weights yet.

    It has the interface of `EagleHead`. Its vocabulary, embeddings and output layer are the
    model's. Make it before a runner adapts the model's modules.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        inner, args = model.model, model.args
        block = type(inner.layers[0])(args)
        self.token_layernorm, self.hidden_layernorm, self.final_layernorm = (
            nn.RMSNorm(args.hidden_size, args.rms_norm_eps) for _ in range(3)
        )
        self.input_proj = nn.Linear(2 * args.hidden_size, args.hidden_size, bias=False)
        self.self_attn, self.mlp = block.self_attn, block.mlp
        self.input_layernorm = block.input_layernorm
        self.post_attention_layernorm = block.post_attention_layernorm
        # Copies, with the same weights: the runner replaces the calls of the model's own modules.
        tied = "lm_head" not in model
        output = copy.copy(inner.embed_tokens if tied else model.lm_head)
        self._output: Callable[[mx.array], mx.array] = output.as_linear if tied else output

    def project(
        self, hidden: mx.array, embedded: mx.array, positions: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Return the residual, queries, keys and values of rows [rows, hidden] at `positions`.

        Queries, keys and values have the shape [rows, heads, dim].
        """
        both = [self.hidden_layernorm(hidden), self.token_layernorm(embedded)]
        residual = self.input_proj(mx.concatenate(both, axis=-1))
        attention, x = self.self_attn, self.input_layernorm(residual)

        def heads(product: mx.array, count: int) -> mx.array:
            return product.reshape(-1, count, 1, self.head_dim)

        queries = attention.rope(heads(attention.q_proj(x), attention.n_heads), offset=positions)
        keys = attention.rope(heads(attention.k_proj(x), self.num_kv_heads), offset=positions)
        values = heads(attention.v_proj(x), self.num_kv_heads)
        return residual, queries[:, :, 0], keys[:, :, 0], values[:, :, 0]

    def finish(self, residual: mx.array, attended: mx.array) -> mx.array:
        """Return the hidden states of rows whose attention output is [rows, heads * dim]."""
        hidden: mx.array = residual + self.self_attn.o_proj(attended)
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        found: mx.array = self.final_layernorm(hidden)
        return found

    def logits(self, hidden: mx.array) -> mx.array:
        """Return the logits of the vocabulary, from hidden states of `finish`."""
        return self._output(hidden)

    def token_ids(self, drafted: mx.array) -> mx.array:
        """Return the token ids of columns of the logits."""
        return drafted.astype(mx.int32)

    @property
    def num_kv_heads(self) -> int:
        """The heads of the layer's keys and values."""
        return int(self.self_attn.n_kv_heads)

    @property
    def head_dim(self) -> int:
        """The elements of each head."""
        return int(self.self_attn.q_proj.weight.shape[0]) // int(self.self_attn.n_heads)

    @property
    def dtype(self) -> mx.Dtype:
        """The type of the layer's keys and values."""
        dtype: mx.Dtype = self.final_layernorm.weight.dtype
        return dtype

    @property
    def scale(self) -> float:
        """The factor of the attention's scores."""
        return float(self.self_attn.scale)

    @property
    def weight_bytes(self) -> int:
        """The bytes of the weights that the model itself does not have."""
        flat: Any = tree_flatten(self.parameters())
        return sum(array.nbytes for _, array in flat)


def load_mtp_head(files: ModelFiles, loaded: LoadedModel) -> MtpHead:
    """Load the multi-token-prediction layer of a model from its files.

    Raises `ModelLoadError` for a model without one, for an architecture or a format whose layer is
    not read, and for tensors that are missing or of the wrong shape.
    """
    kind = str(loaded.config.get("model_type") or loaded.architecture)
    what = "speculative method mtp"
    if kind not in PREFIXES:
        raise ModelLoadError(
            f"{what}: multi-token-prediction layers of {kind!r} are not supported, expected "
            f"{', '.join(sorted(PREFIXES))}",
            hint=_HINT,
        )
    if files.format != "safetensors" or loaded.packed is not None:
        raise ModelLoadError(
            f"{what}: needs safetensors and MLX, the model is {files.format}",
            hint=_HINT + ", or --backend mlx with the published safetensors",
        )
    prefix, shapes = PREFIXES[kind], tensor_shapes(files)
    if not any(name.startswith(prefix) for name in shapes):
        raise ModelLoadError(
            f"{what}: the files have no tensors {prefix}*",
            hint="use the published files: conversions by mlx-lm drop these tensors",
        )
    head = MtpHead(loaded.model)
    flat: Any = tree_flatten(head.parameters())
    wanted = {prefix + name: tuple(array.shape) for name, array in flat}
    arrays = load_tensors(files, wanted, "the multi-token-prediction layer")
    head.load_weights([(name.removeprefix(prefix), array) for name, array in arrays.items()])
    mx.eval(head.parameters())
    return head
