"""Configs, keys and conversions of tiny models with recurrent layers, as llama.cpp writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

Weights = dict[str, np.ndarray]


def key_heads(config: Mapping[str, Any]) -> int | list[int]:
    """Return the number of heads of keys; with recurrent layers, one for each layer."""
    heads: int = config.get("num_key_value_heads", 0)
    layers = range(config["num_hidden_layers"])
    if "full_attn_idxs" in config:
        return [heads if at in config["full_attn_idxs"] else 0 for at in layers]
    if "hybrid_override_pattern" in config:
        return [heads if kind == "*" else 0 for kind in config["hybrid_override_pattern"]]
    if "layers_block_type" in config:
        return [heads if kind == "attention" else 0 for kind in config["layers_block_type"]]
    if "layer_types" in config:
        return [heads if kind.endswith("attention") else 0 for kind in config["layer_types"]]
    return heads


def feed_forward_sizes(config: Mapping[str, Any]) -> int | list[int]:
    """Return the size of feed-forward layers; with layers of other kinds, one for each layer."""
    size: int = config["intermediate_size"]
    if "state_size" in config:
        return 0
    if "hybrid_override_pattern" in config:
        return [size if kind in "-E" else 0 for kind in config["hybrid_override_pattern"]]
    return size


def ssm_keys(
    writer: gguf.GGUFWriter, *, kernel: int, state: int, heads: int, inner: int, groups: int
) -> None:
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_group_count(groups)


def mamba2(weights: Weights, groups: int) -> Weights:
    """conversion/mamba.py: Mamba2Model.modify_tensors."""
    changed = {}
    for name, values in weights.items():
        if name.endswith("dt_bias"):
            name = name.replace("dt_bias", "dt_proj.bias")
        elif name.endswith("conv1d.weight"):
            values = values.squeeze(-1)
        elif name.endswith("A_log"):
            values = -np.exp(values).reshape(-1, 1)
        elif name.endswith(".D"):
            values = values.reshape(-1, 1)
        elif name.endswith(("mixer.norm.weight", "mamba.norm.weight")):
            values = values.reshape(groups, -1)
        changed[name] = values
    return changed


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


NEMOTRON_H: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hybrid_override_pattern": ["M", "-", "*", "M"],
    "head_dim": 32,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "layer_norm_epsilon": 1e-5,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_proj_bias": False,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "n_groups": 2,
    "use_conv_bias": True,
}
NEMOTRON_H_MOE: dict[str, Any] = {
    **NEMOTRON_H,
    "hybrid_override_pattern": ["M", "E", "*", "E"],
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}


def nemotron_h_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    ssm_keys(
        writer,
        kernel=config["conv_kernel"],
        state=config["ssm_state_size"],
        heads=config["mamba_num_heads"],
        inner=config["mamba_num_heads"] * config["mamba_head_dim"],
        groups=config["n_groups"],
    )


def nemotron_h_moe_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    nemotron_h_keys(writer, config)
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["moe_shared_expert_intermediate_size"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_group_count(config["n_group"])


def nemotron_h(config: Mapping[str, Any], weights: Weights) -> Weights:
    """conversion/nemotron.py: Mamba 2's tensors, and the experts under other names."""
    changed = {}
    for name, values in mamba2(weights, config["n_groups"]).items():
        if ".switch_mlp." in name:
            name = name.replace("backbone", "model").replace("mixer.switch_mlp", "mlp.experts")
            name = name.replace("fc1", "up_proj").replace("fc2", "down_proj")
        name = name.replace("dt_proj.bias", "dt.bias")
        changed[name.replace("correction_bias", "correction.bias")] = values
    return changed


_MAMBA2: dict[str, Any] = {
    "attention_bias": False,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
GRANITE_HYBRID: dict[str, Any] = {
    **_MAMBA2,
    "num_hidden_layers": 3,
    "layer_types": ["mamba", "attention", "mamba"],
    "attention_multiplier": 0.3,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 3.0,
    "position_embedding_type": "nope",
    "time_step_limit": (0.0, float("inf")),
}
GRANITE_HYBRID_MOE: dict[str, Any] = {
    **GRANITE_HYBRID,
    "tie_word_embeddings": True,
    "position_embedding_type": "rope",  # Bamba
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 48,
}
MAMBA: dict[str, Any] = {
    "model_type": "mamba",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "intermediate_size": 128,
    "state_size": 16,
    "conv_kernel": 4,
    "time_step_rank": 8,
    "use_bias": False,
    "use_conv_bias": True,
}
MAMBA2: dict[str, Any] = {
    **MAMBA,
    "model_type": "mamba2",
    "num_heads": 8,
    "head_dim": 16,
    "n_groups": 1,
    "layer_norm_epsilon": 1e-5,
    "time_step_limit": (0.0, float("inf")),
}
FALCON_H1: dict[str, Any] = {
    **_MAMBA2,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 2,
    "head_dim": 32,
    "rope_theta": 1e11,
    "tie_word_embeddings": True,
    "mamba_rms_norm": False,
    "projectors_bias": False,
    "mlp_bias": False,
    "embedding_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
}


def mamba2_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    ssm_keys(
        writer,
        kernel=config["mamba_d_conv"],
        state=config["mamba_d_state"],
        heads=config["mamba_n_heads"],
        inner=config["mamba_n_heads"] * config["mamba_d_head"],
        groups=config["mamba_n_groups"],
    )


JAMBA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "mamba", "attention", "mamba"],
    "attn_layer_offset": 2,
    "attn_layer_period": 4,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 8,
    "mamba_expand": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def jamba_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """conversion/jamba.py."""
    writer.add_ssm_conv_kernel(config["mamba_d_conv"])
    writer.add_ssm_inner_size(config["mamba_expand"] * config["hidden_size"])
    writer.add_ssm_state_size(config["mamba_d_state"])
    writer.add_ssm_time_step_rank(config["mamba_dt_rank"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])


def jamba(config: Mapping[str, Any], weights: Weights) -> Weights:
    made = mamba(config, weights)
    return {
        name.replace("feed_forward.switch_mlp", "mlp.experts"): values
        for name, values in made.items()
    }


def mamba_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """conversion/mamba.py: no heads, and no feed-forward layers."""
    name = f"{config['model_type']}.attention"
    for key in ("key_length", "value_length", "head_count_kv"):
        writer.kv_data[0].pop(f"{name}.{key}", None)
    writer.add_ssm_conv_kernel(config["conv_kernel"])
    writer.add_ssm_inner_size(config["intermediate_size"])
    writer.add_ssm_state_size(config["state_size"])
    writer.add_ssm_time_step_rank(config["time_step_rank"])
    if "n_groups" in config:
        writer.add_ssm_group_count(config["n_groups"])
    else:
        writer.add_ssm_dt_b_c_rms(False)


def mamba(config: Mapping[str, Any], weights: Weights) -> Weights:
    """conversion/mamba.py: MambaModel.modify_tensors."""
    changed = {}
    for name, values in weights.items():
        if name.endswith(".A_log"):
            values = -np.exp(values)
        changed[name] = values.squeeze(-1) if name.endswith("conv1d.weight") else values
    return changed


def granite_hybrid_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    mamba2_keys(writer, config)
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])
    writer.add_rope_scaling_finetuned(config["position_embedding_type"] == "rope")
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    if config.get("num_local_experts"):
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])


def granite_hybrid(config: Mapping[str, Any], weights: Weights) -> Weights:
    """conversion/granite.py: Mamba 2's tensors, and the halves of the shared expert."""
    changed = {}
    for name, values in mamba2(weights, config["mamba_n_groups"]).items():
        if name.endswith("shared_mlp.input_linear.weight"):
            for part, half in zip(("gate", "up"), np.split(values, 2), strict=True):
                changed[
                    name.replace("shared_mlp.input_linear", f"mlp.shared_expert.{part}_proj")
                ] = half
        else:
            changed[name.replace("block_sparse_moe.switch_mlp", "mlp.experts")] = values
    return changed


def falcon_h1(config: Mapping[str, Any], weights: Weights) -> Weights:
    """conversion/falcon_h1.py; the multipliers are 1."""
    return mamba2(weights, config["mamba_n_groups"])


QWEN35: dict[str, Any] = {
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "head_dim": 32,
    "linear_num_value_heads": 6,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
}
QWEN35_MOE: dict[str, Any] = {
    **QWEN35,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}


QWEN3_NEXT: dict[str, Any] = {
    **QWEN35_MOE,
    "linear_num_value_heads": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "partial_rotary_factor": 0.25,
}


KIMI_LINEAR: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "mla_use_nope": True,
    "model_max_length": 512,
    "num_experts": 8,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "linear_attn_config": {
        "full_attn_layers": [2, 4],
        "kda_layers": [1, 3],
        "num_heads": 4,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
    },
}


def kimi_linear_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """conversion/kimi_linear.py."""
    linear, latent = config["linear_attn_config"], config["kv_lora_rank"]
    for name in ("head_count_kv", "key_length", "value_length"):
        writer.kv_data[0].pop(f"kimi-linear.attention.{name}")
    layers = range(1, config["num_hidden_layers"] + 1)
    writer.add_head_count_kv([int(at in linear["full_attn_layers"]) for at in layers])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_ssm_conv_kernel(linear["short_conv_kernel_size"])
    writer.add_kda_head_dim(linear["head_dim"])
    writer.add_kv_lora_rank(latent)
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_key_length(latent + config["qk_rope_head_dim"])
    writer.add_key_length_mla(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_token"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["num_shared_experts"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def kimi_linear(config: Mapping[str, Any], weights: Weights) -> Weights:
    """conversion/kimi_linear.py: kernels and decays with the dimensions that llama.cpp wants."""
    names = {
        "switch_mlp": "experts",
        "mlp.e_score_correction_bias": "mlp.gate.e_score_correction.bias",
        "_conv.conv.": "_conv1d.",
        "dt_bias": "dt_proj.bias",
        "embed_q": "k_b_proj",
        "unembed_out": "v_b_proj",
    }
    changed = {}
    for name, values in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if name.endswith("conv1d.weight"):
            values = values.reshape(1, len(values), 1, -1)
        elif name.endswith("A_log"):
            values = -np.exp(values)
        changed[name] = values
    return changed


def qwen35_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    heads = config["linear_num_value_heads"]
    ssm_keys(
        writer,
        kernel=config["linear_conv_kernel_dim"],
        state=config["linear_key_head_dim"],
        heads=heads,
        inner=heads * config["linear_value_head_dim"],
        groups=config["linear_num_key_heads"],
    )
    writer.add_full_attention_interval(config["full_attention_interval"])
    writer.add_rope_dimension_count(8)
    writer.add_rope_dimension_sections([2, 1, 1, 0])
    if config.get("num_experts"):
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def qwen35(config: Mapping[str, Any], weights: Weights) -> Weights:
    """conversion/qwen.py: heads of values in the order of repeated heads of keys.

    Norms stay as they are, because mlx-lm's class has 1 + w too.
    """
    keys, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    start = 2 * keys * config["linear_key_head_dim"]
    order = np.arange(heads).reshape(keys, -1).T.reshape(-1)

    def repeated(values: np.ndarray) -> np.ndarray:
        return values.reshape(heads, -1, *values.shape[1:])[order].reshape(values.shape)

    changed = {}
    for name, values in weights.items():
        name = name.removeprefix("language_model.").replace("switch_mlp", "experts")
        if name.endswith((".A_log", ".dt_bias", "_z.weight", "_a.weight", "_b.weight")):
            values = repeated(values)
        elif name.endswith(("in_proj_qkv.weight", "linear_attn.conv1d.weight")):
            values = np.concatenate([values[:start], repeated(values[start:])])
        elif name.endswith("linear_attn.out_proj.weight"):
            values = np.ascontiguousarray(repeated(values.T).T)
        if name.endswith(".A_log"):
            values = -np.exp(values)
        elif name.endswith("conv1d.weight"):
            values = values.squeeze(-1)
        elif name.endswith("shared_expert_gate.weight"):
            values = values.reshape(-1)
        changed[name.replace(".dt_bias", ".dt_proj.bias")] = values
    return changed


def qwen3_next_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    qwen35_keys(writer, config)
    interval = config["full_attention_interval"]
    recurrent = [(at + 1) % interval != 0 for at in range(config["num_hidden_layers"])]
    writer.add_array("qwen3next.attention.recurrent_layers", recurrent)


def qwen3_next(config: Mapping[str, Any], weights: Weights) -> Weights:
    """conversion/qwen.py: Qwen3NextModel, which splits queries, keys and values from gates."""
    keys, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
    changed = {}
    for name, values in qwen3_next_joined(config, weights).items():
        if name.endswith("in_proj_qkvz.weight"):
            heads = values.reshape(keys, -1, values.shape[-1])
            gates = (heads.shape[1] - 2 * size) // 2
            *parts, gate = np.split(heads, [size, 2 * size, 2 * size + gates], axis=1)
            rows = [part.reshape(-1, values.shape[-1]) for part in parts]
            changed[name.replace("qkvz", "qkv")] = np.concatenate(rows)
            changed[name.replace("qkvz", "z")] = gate.reshape(-1, values.shape[-1])
        else:
            changed[name] = values
    return changed


def qwen3_next_joined(config: Mapping[str, Any], weights: Weights) -> Weights:
    """The same, with queries, keys, values and gates in one tensor, as in files from 2025."""
    changed = {}
    for name, values in weights.items():
        name = name.replace("switch_mlp", "experts").replace(".dt_bias", ".dt_proj.bias")
        if name.endswith(".A_log"):
            values = -np.exp(values)
        elif name.endswith("conv1d.weight"):
            values = values.squeeze(-1)
        elif name.endswith("shared_expert_gate.weight"):
            values = values.reshape(-1)
        changed[name] = values
    return changed
