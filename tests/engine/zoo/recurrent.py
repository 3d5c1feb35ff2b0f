"""Recurrent layers, alone or with attention."""

from __future__ import annotations

from typing import Any

from tests.engine.zoo.configuration import Configuration
from tests.engine.zoo.dense import NO_BIAS
from tests.engine.zoo.experts import BAILING, QWEN
from tests.engine.zoo.latent import MLA

GATED_DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "rope_scaling": None,
}
MAMBA2: dict[str, Any] = {
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_proj_bias": False,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "n_groups": 2,
    "use_bias": False,
    "use_conv_bias": True,
    "layer_norm_epsilon": 1e-5,
}
LFM2: dict[str, Any] = {
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "full_attn_idxs": [1, 3],
    "layer_types": ["conv", "full_attention"] * 2,
}
MROPE = {
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "type": "default",
    "mrope_section": [1, 1, 2],
}

RECURRENT = [
    Configuration(
        "baichuan_m1",
        {
            "sliding_window": 8,
            "sliding_window_layers": [0, 2],
            "conv_window": 2,
            "tie_word_embeddings": False,
        },
    ),
    Configuration(
        "bailing_hybrid",
        {**BAILING, **MLA, "layer_group_size": 2, "group_norm_size": 2, "num_experts": 8},
    ),
    Configuration("bailing_moe_linear", {**BAILING, "layer_group_size": 2, "group_norm_size": 2}),
    Configuration(
        "bailing_moe_v3",
        {
            **BAILING,
            **MLA,
            "num_experts": 8,
            "layer_group_size": 2,
            "moe_shared_expert_intermediate_size": 32,
            "short_conv_kernel_size": 4,
        },
    ),
    Configuration(
        "falcon_h1",
        {
            **NO_BIAS,
            "mamba_d_conv": 4,
            "mamba_d_ssm": 64,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_chunk_size": 64,
            "mamba_expand": 1,
            "mamba_norm_before_gate": True,
            "mamba_rms_norm": False,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            "projectors_bias": False,
            "attention_in_multiplier": 1.0,
            "attention_out_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "key_multiplier": 1.0,
            "lm_head_multiplier": 1.0,
            "mlp_multipliers": [1.0, 1.0],
            "ssm_in_multiplier": 1.0,
            "ssm_out_multiplier": 1.0,
            "ssm_multipliers": [1.0] * 5,
            "mamba_use_mlp": True,
            "num_logits_to_keep": 1,
            "rope_scaling": None,
        },
    ),
    Configuration(
        "gear",
        {
            "layer_types": ["conv_mixer", "sliding_attention", "conv_mixer", "full_attention"],
            "sliding_window": 8,
        },
    ),
    Configuration(
        "gear",
        {
            "layer_types": ["conv_mixer", "sliding_attention", "conv_mixer", "full_attention"],
            "sliding_window": 8,
            "attn_logit_softcapping": 5.0,
        },
        "capped scores",
        embedding=0.3,
        seed=9,
    ),
    Configuration(
        "granitemoehybrid",
        {
            **NO_BIAS,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 0.25,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_n_groups": 1,
            "mamba_proj_bias": False,
            "mamba_conv_bias": True,
            "position_embedding_type": "rope",
            "time_step_limit": (0.001, 100.0),
        },
    ),
    Configuration(
        "jamba",
        {
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_conv": 4,
            "mamba_d_state": 16,
            "mamba_expand": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_dt_rank": 8,
            "mamba_proj_bias": False,
            "mamba_conv_bias": True,
        },
    ),
    Configuration(
        "kimi_k3",
        {
            **MLA,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "num_shared_experts": 1,
            "linear_attn_config": {
                "full_attn_layers": [2, 4],
                "kda_layers": [1, 3],
                "num_heads": 4,
                "head_dim": 16,
                "short_conv_kernel_size": 4,
            },
        },
        nested="text_config",
        seed=8,
    ),
    Configuration(
        "kimi_linear",
        {
            **MLA,
            "q_lora_rank": None,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "num_shared_experts": 1,
            "model_max_length": 512,
            "linear_attn_config": {
                "full_attn_layers": [2, 4],
                "kda_layers": [1, 3],
                "num_heads": 4,
                "head_dim": 16,
                "short_conv_kernel_size": 4,
            },
        },
    ),
    Configuration(
        "lfm2",
        {
            **LFM2,
            "block_dim": 64,
            "block_ff_dim": 128,
            "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    Configuration(
        "lfm2-vl",
        {
            **LFM2,
            "model_type": "lfm2",
            "block_dim": 64,
            "block_ff_dim": 128,
            "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
        },
        nested="text_config",
    ),
    Configuration("lfm2_moe", {**LFM2, **QWEN, "use_expert_bias": True, "num_dense_layers": 1}),
    Configuration(
        "mamba",
        {
            "state_size": 16,
            "conv_kernel": 4,
            "use_bias": False,
            "use_conv_bias": True,
            "time_step_rank": 8,
        },
    ),
    Configuration(
        "mamba2",
        {
            "num_heads": 4,
            "head_dim": 32,
            "state_size": 16,
            "conv_kernel": 4,
            "n_groups": 2,
            "expand": 2,
            "use_bias": False,
            "use_conv_bias": True,
            "layer_norm_epsilon": 1e-5,
            "time_step_limit": (0.001, 100.0),
            "time_step_rank": "auto",
            "chunk_size": 64,
        },
    ),
    Configuration(
        "nemotron_h",
        {**NO_BIAS, **MAMBA2, "hybrid_override_pattern": ["M", "-", "*", "M"]},
    ),
    Configuration(
        "olmo_hybrid",
        {
            **GATED_DELTA,
            "linear_allow_neg_eigval": True,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
    Configuration(
        "plamo2",
        {
            "hidden_size_per_head": 16,
            "mamba_d_state": 16,
            "mamba_num_heads": 4,
            "mamba_step": 2,
        },
    ),
    Configuration(
        "qwen3_5",
        {
            **QWEN,
            **GATED_DELTA,
            "num_experts": 0,
            "model_type": "qwen3_5_text",
            "rope_parameters": MROPE,
        },
        nested="text_config",
    ),
    Configuration(
        "qwen3_5_moe",
        {**QWEN, **GATED_DELTA, "model_type": "qwen3_5_moe_text", "rope_parameters": MROPE},
        nested="text_config",
        embedding=0.3,
        seed=9,
    ),
    Configuration("qwen3_next", {**QWEN, **GATED_DELTA}),
    Configuration(
        "recurrent_gemma",
        {
            "conv1d_width": 4,
            "logits_soft_cap": 30.0,
            "attention_bias": False,
            "attention_window_size": 8,
            "block_types": ["recurrent", "attention"],
            "lru_width": 64,
            "embeddings_scale_by_sqrt_dim": True,
            "attention_types": None,
            "rms_norm_eps": 1e-6,
        },
    ),
    Configuration(
        "rwkv7",
        {
            "norm_eps": 1e-5,
            "a_low_rank_dim": 8,
            "v_low_rank_dim": 8,
            "gate_low_rank_dim": 8,
            "decay_low_rank_dim": 8,
        },
    ),
]
