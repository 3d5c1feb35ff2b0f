"""Mixtures of experts, with full or sliding attention."""

from __future__ import annotations

from typing import Any

from tests.engine.zoo.configuration import Configuration
from tests.engine.zoo.dense import ALTERNATING, ROPES

QWEN: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "shared_expert_intermediate_size": 32,
}
#: Arguments of experts with DeepSeek's names, which many architectures use.
ROUTED: dict[str, Any] = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "attention_bias": False,
    "rope_scaling": None,
}
BAILING: dict[str, Any] = {
    **QWEN,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}

EXPERTS = [
    Configuration(
        "Klear", {**QWEN, "attention_bias": False, "n_shared_experts": 1, "num_key_value_heads": 2}
    ),
    Configuration(
        "afmoe",
        {
            **QWEN,
            "layer_types": ALTERNATING,
            "sliding_window": 8,
            "num_shared_experts": 1,
            "num_dense_layers": 1,
        },
        embedding=0.1,
    ),
    Configuration("bailing_moe", BAILING),
    Configuration(
        "dbrx",
        {
            "d_model": 64,
            "n_layers": 4,
            "n_heads": 4,
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        },
    ),
    Configuration("deepseek", ROUTED),
    Configuration("dots1", ROUTED),
    Configuration(
        "ernie4_5_moe",
        {
            "use_bias": False,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 3,
        },
        seed=8,
    ),
    Configuration(
        "exaone_moe",
        {
            **QWEN,
            "num_shared_experts": 1,
            "sliding_window": 8,
            "layer_types": ALTERNATING,
            "is_moe_layer": [False, True, True, True],
        },
    ),
    Configuration("glm4_moe", {**ROUTED, "partial_rotary_factor": 0.5, "use_qk_norm": True}),
    Configuration(
        "gpt_oss", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8}
    ),
    Configuration(
        "granitemoe",
        {
            "logits_scaling": 1.0,
            "attention_multiplier": 0.25,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_bias": False,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    Configuration(
        "hunyuan",
        {
            "attention_bias": False,
            "moe_topk": 2,
            "num_experts": 8,
            "num_shared_expert": 1,
            "use_mixed_mlp_moe": True,
            "use_qk_norm": True,
            "use_cla": True,
            "cla_share_factor": 2,
            "moe_intermediate_size": 32,
            "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
        },
    ),
    Configuration(
        "laguna",
        {
            **QWEN,
            "sliding_window": 8,
            "layer_types": ALTERNATING,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        },
    ),
    Configuration(
        "mellum",
        {**QWEN, "sliding_window": 8, "layer_types": ALTERNATING, "rope_parameters": ROPES},
    ),
    Configuration(
        "mimo_v2_flash",
        {
            **ROUTED,
            "hybrid_layer_pattern": [1, 0, 1, 0],
            "moe_layer_freq": [0, 1, 1, 1],
            "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False,
            "sliding_window_size": 8,
            "layernorm_epsilon": 1e-5,
            "swa_rope_theta": 10000.0,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "v_head_dim": 8,
            "swa_head_dim": 16,
            "swa_v_head_dim": 8,
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": False,
        },
    ),
    Configuration(
        "minimax",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "rotary_dim": 8,
        },
    ),
    Configuration("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    Configuration("olmoe", QWEN),
    Configuration(
        "phimoe",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "original_max_position_embeddings": 512,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [1.0] * 8,
                "short_mscale": 1.0,
                "long_mscale": 1.0,
                "original_max_position_embeddings": 512,
            },
        },
    ),
    Configuration(
        "phixtral",
        {
            "num_vocab": 256,
            "model_dim": 64,
            "num_heads": 4,
            "num_layers": 4,
            "rotary_dim": 8,
            "num_local_experts": 8,
        },
    ),
    Configuration("qwen2_moe", QWEN),
    Configuration("qwen3_moe", QWEN),
    Configuration(
        "solar_open", {**ROUTED, "partial_rotary_factor": 0.5, "tie_word_embeddings": False}
    ),
    Configuration(
        "step3p5",
        {
            "num_attention_groups": 2,
            "sliding_window": 8,
            "layer_types": ALTERNATING,
            "moe_num_experts": 8,
            "moe_top_k": 2,
            "moe_intermediate_size": 32,
            "share_expert_dim": 32,
            "moe_layers_enum": "1,2,3",
            "attention_other_setting": {
                "attention_type": "sliding_attention",
                "num_attention_heads": 4,
                "num_attention_groups": 2,
                "head_dim": 16,
            },
        },
    ),
]
