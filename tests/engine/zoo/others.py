"""Text parts of vision models, and unusual architectures."""

from __future__ import annotations

from typing import Any

from tests.engine.zoo.configuration import VOCABULARY, Configuration
from tests.engine.zoo.dense import ALTERNATING
from tests.engine.zoo.experts import QWEN

GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 16.0,
}
MROPE = {"type": "default", "mrope_section": [2, 3, 3]}

OTHERS = [
    Configuration(
        "afm7",
        {
            "hidden_dim": 64,
            "num_layers": 4,
            "num_kv_reuse_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
        },
    ),
    Configuration(
        "deepseek_v41",
        {
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "o_groups": 2,
            "o_lora_rank": 16,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "compress_ratios": (0, 0, 0, 0),
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 8,
            "hc_mult": 2,
        },
    ),
    Configuration("gemma3", GEMMA3, nested="text_config"),
    Configuration(
        "gemma3n",
        {
            "sliding_window": 8,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 30.0,
            "layer_types": ALTERNATING,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
        },
        nested="text_config",
        embedding=0.1,
    ),
    Configuration(
        "gemma4",
        {
            "model_type": "gemma4_text",
            "sliding_window": 8,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "layer_types": ALTERNATING,
            "global_head_dim": 16,
            "final_logit_softcapping": 30.0,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        nested="text_config",
        seed=9,
    ),
    Configuration(
        "llama4",
        {
            "attention_bias": False,
            "attention_chunk_size": 8,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 128,
            "num_experts_per_tok": 1,
            "num_local_experts": 4,
            "rope_scaling": None,
            "use_qk_norm": True,
        },
        nested="text_config",
    ),
    Configuration(
        "minimax_m3_vl",
        {
            "dense_intermediate_size": 64,
            "shared_intermediate_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_layer_freq": [0, 1, 1, 1],
            "sparse_attention_freq": [0, 1, 1, 1],
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 4,
            "index_topk_blocks": 2,
        },
        nested="text_config",
    ),
    Configuration("mistral3", {"model_type": "llama"}, nested="text_config"),
    Configuration(
        "nemotron-nas",
        {
            "block_configs": [
                {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}},
                {"attention": {"no_op": True}, "ffn": {"ffn_mult": 2.0}},
                {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
                {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 1.0}},
            ],
        },
    ),
    Configuration("pixtral", {"model_type": "llama"}, nested="text_config"),
    Configuration("qwen2_vl", {"model_type": "qwen2", "rope_scaling": None}, nested="text_config"),
    Configuration("qwen3_vl", {"model_type": "qwen3", "rope_scaling": None}, nested="text_config"),
    Configuration(
        "qwen3_vl_moe",
        {**QWEN, "model_type": "qwen3_moe", "rope_scaling": None},
        nested="text_config",
    ),
]
