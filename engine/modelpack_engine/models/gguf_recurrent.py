"""Rows of `gguf_architectures` for models with recurrent layers: names and config fields.

Metadata tell a recurrent layer by its number of heads of keys, which is 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from modelpack_engine.models.gguf_hyperparameters import Config, Hyperparameters, check_sigmoid
from modelpack_engine.models.gguf_tensors import (
    Target,
    by_key_head,
    columns_by_key_head,
    flat,
    key_heads_joined,
    log_of_decay,
    one_channel,
    per_head,
    values_by_key_head,
)

Names = Mapping[str, str | Target | tuple[Target, ...]]


def _mamba(module: str) -> Names:
    return {
        "ssm_in": f"{module}.in_proj",
        "ssm_conv1d": Target(f"{module}.conv1d", values=one_channel),
        "ssm_x": f"{module}.x_proj",
        "ssm_dt": f"{module}.dt_proj",
        "ssm_a": Target(f"{module}.A_log", values=log_of_decay, is_parameter=True),
        "ssm_d": Target(f"{module}.D", values=flat, is_parameter=True),
        "ssm_out": f"{module}.out_proj",
    }


def _mamba2(module: str) -> Names:
    return {
        **_mamba(module),
        "ssm_dt": Target(f"{module}.dt_bias", is_parameter=True),
        "ssm_norm": Target(f"{module}.norm", values=flat),
    }


BACKBONE: Names = {
    "token_embd": "backbone.embeddings",
    "output_norm": "backbone.norm_f",
    "output": "lm_head",
}
MAMBA: Names = {"attn_norm": "norm", **_mamba("mixer")}
MAMBA2: Names = {"attn_norm": "norm", **_mamba2("mixer")}


LFM2_OUTER: Names = {
    "token_embd": "model.embed_tokens",
    "token_embd_norm": "model.embedding_norm",  # llama.cpp's name for the last norm
    "output_norm": "model.embedding_norm",
}
_LFM2: Names = {
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.conv": Target("conv.conv", values=one_channel),
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
}
LFM2: Names = {
    **_LFM2,
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}
LFM2_MOE: Names = {
    **_LFM2,
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
    "ffn_gate_inp": "feed_forward.gate",
    "ffn_gate_exps": "feed_forward.switch_mlp.gate_proj",
    "ffn_up_exps": "feed_forward.switch_mlp.up_proj",
    "ffn_down_exps": "feed_forward.switch_mlp.down_proj",
    "exp_probs_b": Target("feed_forward.expert_bias", is_parameter=True),
}


def _nemotron_attention(module: str) -> Names:
    parts = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "output": "o_proj"}
    return {f"attn_{part}": f"{module}.{name}" for part, name in parts.items()}


def _nemotron_experts(module: str) -> Names:
    return {
        "ffn_gate_inp": f"{module}.gate",
        "exp_probs_b": Target(f"{module}.gate.e_score_correction_bias", is_parameter=True),
        "ffn_up_exps": f"{module}.switch_mlp.fc1",
        "ffn_down_exps": f"{module}.switch_mlp.fc2",
        "ffn_up_shexp": f"{module}.shared_experts.up_proj",
        "ffn_down_shexp": f"{module}.shared_experts.down_proj",
        "ffn_latent_down": f"{module}.fc1_latent_proj",
        "ffn_latent_up": f"{module}.fc2_latent_proj",
    }


NEMOTRON_H: Names = {
    "attn_norm": "norm",
    **_nemotron_attention("mixer"),
    "ffn_up": "mixer.up_proj",
    "ffn_down": "mixer.down_proj",
    **_mamba2("mixer"),
}
NEMOTRON_H_MOE: Names = {**NEMOTRON_H, **_nemotron_experts("mixer")}
# For multi-token prediction, a layer of attention and one of experts are written as one.
NEMOTRON_H_PREDICTING: Names = {
    "attn_norm": "input_layernorm",
    **_nemotron_attention("self_attn"),
    "post_attention_norm": "post_attention_layernorm",
    **_nemotron_experts("mlp"),
}
FINAL_NORM_OUTER: Names = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.final_layernorm",
    "output": "lm_head",
}
JAMBA: Names = {
    **_mamba("mamba"),
    "ssm_dt_norm": "mamba.dt_layernorm",
    "ssm_b_norm": "mamba.b_layernorm",
    "ssm_c_norm": "mamba.c_layernorm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "pre_ff_layernorm",
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
    "ffn_gate_inp": "feed_forward.router",
    "ffn_gate_exps": "feed_forward.switch_mlp.gate_proj",
    "ffn_up_exps": "feed_forward.switch_mlp.up_proj",
    "ffn_down_exps": "feed_forward.switch_mlp.down_proj",
}
GRANITE_HYBRID: Names = {
    **_mamba2("mamba"),
    "ffn_gate_shexp": "shared_mlp.input_linear",
    "ffn_up_shexp": Target("shared_mlp.input_linear", place=1),
    "ffn_down_shexp": "shared_mlp.output_linear",
}
FALCON_H1: Names = {
    **_mamba2("mamba"),
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    # Files name it without `.weight`.
    "ffn_norm": Target("pre_ff_layernorm.weight", is_parameter=True),
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
}
# Other layers have the names of latent attention, which are listed apart.
KIMI_DELTA: Names = {
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    **{
        f"ssm_conv1d_{part}": Target(f"self_attn.{part}_conv.conv", values=one_channel)
        for part in "qkv"
    },
    "ssm_f_a": "self_attn.f_a_proj",
    "ssm_f_b": "self_attn.f_b_proj",
    "ssm_g_a": "self_attn.g_a_proj",
    "ssm_g_b": "self_attn.g_b_proj",
    "ssm_beta": "self_attn.b_proj",
    "ssm_a": Target("self_attn.A_log", values=per_head, is_parameter=True),
    "ssm_dt": Target("self_attn.dt_bias", is_parameter=True),
    "ssm_norm": "self_attn.o_norm",
    "exp_probs_b": Target("mlp.e_score_correction_bias", is_parameter=True),
}
QWEN35_OUTER: Names = {
    "token_embd": "language_model.model.embed_tokens",
    "output_norm": "language_model.model.norm",
    "output": "language_model.lm_head",
}
# Norms are stored as 1 + w, as mlx-lm's classes have them.
_QWEN: Names = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ssm_norm": "linear_attn.norm",
}
_QWEN3_NEXT_INPUT = "linear_attn.in_proj_qkvz"
QWEN3_NEXT: Names = {
    **_QWEN,
    "attn_qkv": Target(_QWEN3_NEXT_INPUT, join=key_heads_joined),
    "attn_gate": Target(_QWEN3_NEXT_INPUT, place=1, join=key_heads_joined),
    "ssm_in": _QWEN3_NEXT_INPUT,  # files from before 2026 have both in one tensor
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_conv1d": Target("linear_attn.conv1d", values=one_channel),
    "ssm_dt": Target("linear_attn.dt_bias", is_parameter=True),
    "ssm_a": Target("linear_attn.A_log", values=log_of_decay, is_parameter=True),
    "ssm_out": "linear_attn.out_proj",
}
QWEN35: Names = {
    **_QWEN,
    "attn_qkv": Target("linear_attn.in_proj_qkv", rows=values_by_key_head),
    "attn_gate": Target("linear_attn.in_proj_z", rows=by_key_head),
    "ssm_beta": Target("linear_attn.in_proj_b", rows=by_key_head),
    "ssm_alpha": Target("linear_attn.in_proj_a", rows=by_key_head),
    "ssm_conv1d": Target("linear_attn.conv1d", rows=values_by_key_head, values=one_channel),
    "ssm_dt": Target("linear_attn.dt_bias", rows=by_key_head, is_parameter=True),
    "ssm_a": Target("linear_attn.A_log", rows=by_key_head, values=log_of_decay, is_parameter=True),
    "ssm_out": Target("linear_attn.out_proj", columns=columns_by_key_head),
}


def layers_with(values: Hyperparameters, name: str) -> list[int]:
    """Return the numbers of the layers whose value is not 0.

    Raises `ModelLoadError` if the file does not have a value for each layer.
    """
    found = values.flags(name)
    if found is None or len(found) < values.layers:
        raise values.unsupported(f"a {name} that is not given for each layer")
    return [layer for layer, there in enumerate(found[: values.layers]) if there]


def some_layer_has(values: Hyperparameters, tensor: str) -> bool:
    """Return whether any layer has a tensor, named without its layer."""
    return any(f"blk.{layer}.{tensor}" in values.file for layer in range(values.layers))


def lfm2(values: Hyperparameters, config: Config) -> None:
    if not config["tie_word_embeddings"]:
        raise values.unsupported("a separate output layer")
    if values.integer("attention.sliding_window", 0):
        raise values.unsupported("sliding windows")
    attention = layers_with(values, "attention.head_count_kv")
    if not attention:
        raise values.unsupported("no layer with attention")
    config |= {
        "norm_eps": values.number("attention.layer_norm_rms_epsilon"),
        "full_attn_idxs": attention,
        "conv_L_cache": values.integer("shortconv.l_cache"),
        "conv_bias": False,
        "block_dim": config["hidden_size"],
        # The file has the adjusted size.
        "block_auto_adjust_ff_dim": False,
        "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0,
    }


def lfm2_moe(values: Hyperparameters, config: Config) -> None:
    lfm2(values, config)
    check_sigmoid(values)
    config |= {
        "num_experts": values.integer("expert_count"),
        "num_experts_per_tok": values.experts()[1],
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "num_dense_layers": values.integer("leading_dense_block_count"),
        "norm_topk_prob": True,
        "routed_scaling_factor": values.number("expert_weights_scale", 0.0) or 1.0,
        "use_expert_bias": some_layer_has(values, "exp_probs_b.bias"),
    }


def nemotron_h(values: Hyperparameters, config: Config) -> None:
    if config["tie_word_embeddings"]:
        raise values.unsupported("tied embeddings")
    attention = layers_with(values, "attention.head_count_kv")
    wide = layers_with(values, "feed_forward_length")
    experts = values.integer("expert_count", 0)
    heads = values.integer("ssm.time_step_rank")
    config |= {
        "hybrid_override_pattern": [
            "*" if at in attention else ("E" if experts else "-") if at in wide else "M"
            for at in range(values.layers)
        ],
        "attention_bias": some_layer_has(values, "attn_q.bias"),
        "mlp_bias": some_layer_has(values, "ffn_up.bias"),
        "use_bias": False,
        "layer_norm_epsilon": values.number("attention.layer_norm_rms_epsilon"),
        "mamba_num_heads": heads,
        "mamba_head_dim": values.integer("ssm.inner_size") // heads,
        "mamba_proj_bias": False,
        "ssm_state_size": values.integer("ssm.state_size"),
        "conv_kernel": values.integer("ssm.conv_kernel"),
        "n_groups": values.integer("ssm.group_count"),
        "use_conv_bias": some_layer_has(values, "ssm_conv1d.bias"),
    }


def nemotron_h_moe(values: Hyperparameters, config: Config) -> None:
    nemotron_h(values, config)
    if values.integer("expert_group_count", 1) > 1:
        raise values.unsupported("groups of experts")
    config |= {
        "n_routed_experts": values.integer("expert_count"),
        "num_experts_per_tok": values.experts()[1],
        "n_shared_experts": values.integer("expert_shared_count", 0) or None,
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": values.integer("expert_shared_feed_forward_length"),
        "moe_latent_size": values.integer("moe_latent_size", 0) or None,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": values.flag("expert_weights_norm", False),
        "routed_scaling_factor": values.number("expert_weights_scale", 0.0) or 1.0,
    }


def mamba(values: Hyperparameters, config: Config) -> None:
    """Add the fields of Mamba 1, and those that Mamba 2 has under the same names."""
    if not math.isclose(config["rms_norm_eps"], 1e-5, rel_tol=1e-6):  # that of the classes
        raise values.unsupported("norms with another epsilon")
    if values.flag("ssm.dt_b_c_rms", False):
        raise values.unsupported("norms in recurrent layers")
    config |= {
        "intermediate_size": values.integer("ssm.inner_size"),
        "state_size": values.integer("ssm.state_size"),
        "conv_kernel": values.integer("ssm.conv_kernel"),
        "time_step_rank": values.integer("ssm.time_step_rank"),
        "use_bias": False,
        "use_conv_bias": some_layer_has(values, "ssm_conv1d.bias"),
    }


def mamba2(values: Hyperparameters, config: Config) -> None:
    mamba(values, config)
    config |= {
        "num_heads": config["time_step_rank"],
        "head_dim": config["intermediate_size"] // config["time_step_rank"],
        "n_groups": values.integer("ssm.group_count"),
        "layer_norm_epsilon": 1e-5,
        "time_step_limit": (0.0, float("inf")),
    }


def jamba(values: Hyperparameters, config: Config) -> None:
    attention = layers_with(values, "attention.head_count_kv")
    config |= {
        "layers_block_type": [
            "attention" if at in attention else "mamba" for at in range(values.layers)
        ],
        "attn_layer_offset": 0,
        "attn_layer_period": 1,
        **_places_of_experts(values),
        "num_experts": max(1, values.integer("expert_count", 0)),
        "num_experts_per_tok": max(1, values.integer("expert_used_count", 0)),
        "mamba_expand": values.integer("ssm.inner_size") // config["hidden_size"],
        "mamba_d_conv": values.integer("ssm.conv_kernel"),
        "mamba_d_state": values.integer("ssm.state_size"),
        "mamba_dt_rank": values.integer("ssm.time_step_rank"),
        "mamba_conv_bias": some_layer_has(values, "ssm_conv1d.bias"),
    }


def _places_of_experts(values: Hyperparameters) -> Config:
    """Return the fields that tell which layers have experts: offset + layer is a whole period."""
    router = "blk.{}.ffn_gate_inp.weight"
    layers = [at for at in range(values.layers) if router.format(at) in values.file]
    period = layers[1] - layers[0] if len(layers) > 1 else values.layers
    offset = -layers[0] % period if layers else 0
    return {"expert_layer_offset": offset, "expert_layer_period": period}


def _mamba2_fields(values: Hyperparameters) -> Config:
    """Return the fields of Mamba 2's layers by the names of Granite and Falcon."""
    heads = values.integer("ssm.time_step_rank")
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": values.integer("ssm.inner_size") // heads,
        "mamba_d_state": values.integer("ssm.state_size"),
        "mamba_d_conv": values.integer("ssm.conv_kernel"),
        "mamba_n_groups": values.integer("ssm.group_count"),
        "mamba_conv_bias": some_layer_has(values, "ssm_conv1d.bias"),
        "mamba_proj_bias": False,
        "attention_bias": some_layer_has(values, "attn_q.bias"),
    }


def granite_hybrid(values: Hyperparameters, config: Config) -> None:
    if values.integer("ssm.group_count") > 1:
        raise values.unsupported("norms of several groups in recurrent layers")
    attention = layers_with(values, "attention.head_count_kv")
    config |= _mamba2_fields(values)
    config |= {
        "layer_types": ["attention" if at in attention else "mamba" for at in range(values.layers)],
        "position_embedding_type": (
            "rope" if values.flag("rope.scaling.finetuned", False) else "nope"
        ),
        "time_step_limit": (0.0, float("inf")),
        "num_local_experts": values.integer("expert_count", 0) or None,
        "num_experts_per_tok": values.integer("expert_used_count", 0) or None,
        "shared_intermediate_size": values.integer("expert_shared_feed_forward_length", 0) or None,
    }


def falcon_h1(values: Hyperparameters, config: Config) -> None:
    if some_layer_has(values, "ssm_norm.weight"):
        raise values.unsupported("norms in recurrent layers")
    config |= _mamba2_fields(values)
    config |= {
        "mamba_d_ssm": values.integer("ssm.inner_size"),
        "mamba_rms_norm": False,
        "mlp_bias": some_layer_has(values, "ffn_gate.bias"),
        "projectors_bias": False,
        # The file's weights are multiplied already.
        "embedding_multiplier": 1.0,
        "lm_head_multiplier": 1.0,
    }


def _gated_delta(values: Hyperparameters, config: Config) -> None:
    """Add the fields of Qwen's layers with gated deltas, and of their place among the others."""
    interval = values.integer("full_attention_interval", 4)
    expected = [(layer + 1) % interval != 0 for layer in range(values.layers)]
    name = "attention.recurrent_layers"
    if name in values and (values.flags(name) or [])[: values.layers] != expected:
        raise values.unsupported("layers that are recurrent in another pattern")
    heads = values.integer("ssm.time_step_rank")
    config |= {
        "full_attention_interval": interval,
        "linear_num_value_heads": heads,
        "linear_num_key_heads": values.integer("ssm.group_count"),
        "linear_key_head_dim": values.integer("ssm.state_size"),
        "linear_value_head_dim": values.integer("ssm.inner_size") // heads,
        "linear_conv_kernel_dim": values.integer("ssm.conv_kernel"),
    }


def _gated_delta_experts(values: Hyperparameters, config: Config) -> None:
    config |= {
        "num_experts": values.integer("expert_count"),
        "num_experts_per_tok": values.experts()[1],
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "shared_expert_intermediate_size": values.integer("expert_shared_feed_forward_length"),
        "norm_topk_prob": True,
    }


def kimi_linear(values: Hyperparameters, config: Config) -> None:
    check_sigmoid(values)
    attention = layers_with(values, "attention.head_count_kv")
    if not 0 < len(attention) < values.layers:
        raise values.unsupported("no layer with attention, or no other layer")
    rotated = values.integer("rope.dimension_count")
    config |= {
        "linear_attn_config": {
            "full_attn_layers": [at + 1 for at in attention],
            "kda_layers": [at + 1 for at in range(values.layers) if at not in attention],
            "num_heads": values.heads,
            "head_dim": values.integer("kda.head_dim"),
            "short_conv_kernel_size": values.integer("ssm.conv_kernel"),
        },
        "model_max_length": config["max_position_embeddings"],
        "kv_lora_rank": values.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": values.integer("attention.key_length_mla") - rotated,
        "v_head_dim": values.integer("attention.value_length_mla"),
        "mla_use_nope": True,
        "num_experts": values.integer("expert_count"),
        "num_experts_per_token": values.experts()[1],
        "num_shared_experts": values.integer("expert_shared_count", 0),
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "first_k_dense_replace": values.integer("leading_dense_block_count", 0),
        "routed_scaling_factor": values.number("expert_weights_scale", 0.0) or 1.0,
        "moe_renormalize": True,
    }


def qwen3_next(values: Hyperparameters, config: Config) -> None:
    _gated_delta(values, config)
    _gated_delta_experts(values, config)
    config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    config.setdefault("intermediate_size", config["moe_intermediate_size"])


def qwen35(values: Hyperparameters, config: Config) -> None:
    _gated_delta(values, config)
    config["rope_parameters"] = {
        "type": "default",
        "rope_theta": config["rope_theta"],
        "partial_rotary_factor": config["partial_rotary_factor"],
    }


def qwen35_moe(values: Hyperparameters, config: Config) -> None:
    qwen35(values, config)
    _gated_delta_experts(values, config)
