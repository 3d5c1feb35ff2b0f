"""Configs, keys and conversions of tiny models with recurrent layers, as llama.cpp writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

Weights = dict[str, np.ndarray]


def key_heads(config: Mapping[str, Any]) -> int | list[int]:
    """Return the number of heads of keys; with recurrent layers, one for each layer."""
    heads: int = config["num_key_value_heads"]
    if "full_attn_idxs" not in config:
        return heads
    attention = config["full_attn_idxs"]
    return [heads if at in attention else 0 for at in range(config["num_hidden_layers"])]


LFM2: dict[str, Any] = {
    "num_hidden_layers": 4,
    "tie_word_embeddings": True,
    "full_attn_idxs": [2],
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "rope_theta": 1e6,
    "block_dim": 64,
    "block_ff_dim": 96,
    "block_multiple_of": 1,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
}
LFM2_MOE: dict[str, Any] = {
    **LFM2,
    "num_dense_layers": 1,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "use_expert_bias": True,
}


_LFM2_NAMES = {
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "switch_mlp": "experts",
    "expert_bias": "expert_bias.bias",
}


def lfm2_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_shortconv_l_cache(config["conv_L_cache"])
    writer.add_vocab_size(config["vocab_size"])


def lfm2_moe_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    lfm2_keys(writer, config)
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_leading_dense_block_count(config["num_dense_layers"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def lfm2(config: Mapping[str, Any], weights: Weights) -> Weights:
    """conversion/lfm2.py: kernels of convolutions in two dimensions."""
    changed = {}
    for name, values in weights.items():
        for old, new in _LFM2_NAMES.items():
            name = name.replace(old, new)
        if ".experts." in name:
            name = name.replace("model.layers", "layers")
        changed[name] = values.squeeze(-1) if ".conv.conv." in name else values
    return changed
