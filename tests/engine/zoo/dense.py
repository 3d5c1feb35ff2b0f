"""Dense decoders with full or sliding attention."""

from __future__ import annotations

from typing import Any

from tests.engine.zoo.configuration import VOCABULARY, Configuration

ALTERNATING = ["sliding_attention", "full_attention"] * 2
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES = {
    kind: {"rope_theta": 10000.0, "rope_type": "default"}
    for kind in ("sliding_attention", "full_attention")
}
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
GPT: dict[str, Any] = {
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 4,
    "n_ctx": 512,
    "n_inner": 128,
    "n_positions": 512,
    "layer_norm_epsilon": 1e-5,
}

DENSE = [
    Configuration("apertus", {**NO_BIAS, "post_norm": False, "qk_norm": True}, seed=8),
    Configuration("cohere", {"layer_norm_eps": 1e-5, "logit_scale": 1.0}),
    Configuration("ernie4_5", {"use_bias": False}),
    Configuration("exaone", {"num_layers": 4, "layer_norm_epsilon": 1e-5}),
    Configuration("gemma"),
    Configuration(
        "gemma2",
        {"query_pre_attn_scalar": 16.0, "attn_logit_softcapping": 5.0},
        embedding=0.3,
        seed=9,
    ),
    Configuration("glm"),
    Configuration("glm4", {"attention_bias": False, "partial_rotary_factor": 0.5}),
    Configuration("gpt2", GPT, seed=8),
    Configuration("gpt_bigcode", GPT, seed=9),
    Configuration(
        "gpt_neox",
        {"layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.25},
        seed=8,
    ),
    Configuration("gptj", {**GPT, "rotary_dim": 8}),
    Configuration(
        "granite",
        {
            **NO_BIAS,
            "logits_scaling": 1.0,
            "attention_multiplier": 0.25,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
        },
    ),
    Configuration("helium", NO_BIAS),
    Configuration("hunyuan_v1_dense"),
    Configuration("internlm2"),
    Configuration("internlm3"),
    Configuration(
        "lille-130m",
        {
            "block_size": 512,
            "layer_norm_eps": 1e-5,
            "n_embd": 64,
            "n_head": 4,
            "n_kv_heads": 2,
            "n_layer": 4,
        },
    ),
    Configuration("llama"),
    Configuration("llama", {"rope_scaling": LLAMA3_ROPE}, "Llama 3 rope"),
    Configuration(
        "llama4_text",
        {
            "attention_chunk_size": 8,
            "no_rope_layers": [1, 1, 1, 0],
            "intermediate_size_mlp": 128,
            "rope_scaling": None,
            "use_qk_norm": True,
            "attention_bias": False,
        },
    ),
    Configuration("mimo"),
    Configuration(
        "minicpm", {"scale_depth": 1.4, "dim_model_base": 64, "scale_emb": 2, "rope_scaling": None}
    ),
    Configuration(
        "ministral3",
        {
            "rope_parameters": {
                "rope_theta": 10000.0,
                "llama_4_scaling_beta": 0.1,
                "rope_type": "default",
                "original_max_position_embeddings": 16,
            },
            "layer_types": ["full_attention"] * 4,
        },
    ),
    Configuration("nanbeige"),
    Configuration("nanbeige", {"num_loops": 2}, "two loops"),
    Configuration("nanochat"),
    Configuration("nemotron", {"hidden_act": "relu2", "norm_eps": 1e-5}),
    Configuration("olmo2", NO_BIAS, embedding=0.3, seed=8),
    Configuration(
        "openelm",
        {
            "num_transformer_layers": 4,
            "model_dim": 64,
            "ffn_dim_divisor": 16,
            "num_query_heads": [4, 4, 4, 4],
            "num_kv_heads": [2, 2, 2, 2],
            "ffn_multipliers": [1.0, 1.5, 2.0, 2.0],
        },
    ),
    Configuration("phi", {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5}),
    Configuration("phi3", {"rope_scaling": None}),
    Configuration("plamo", {"n_shared_head": 2}),
    Configuration("qwen", {"kv_channels": 16, "layer_norm_epsilon": 1e-5}),
    Configuration("qwen2"),
    Configuration("qwen3"),
    Configuration("seed_oss", {"rope_scaling": None}),
    Configuration("smollm3", {"no_rope_layer_interval": 2, "no_rope_layers": None}),
    Configuration(
        "stablelm", {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, "use_qkv_bias": False}
    ),
    Configuration("starcoder2", {"norm_epsilon": 1e-5}, embedding=0.3),
    Configuration("talkie"),
    Configuration("telechat3"),
]

SLIDING = [
    Configuration(
        "cohere2",
        {
            "layer_norm_eps": 1e-5,
            "logit_scale": 1.0,
            "sliding_window": 8,
            "sliding_window_pattern": 2,
        },
    ),
    Configuration(
        "exaone4", {"sliding_window": 8, "sliding_window_pattern": "LG", "rope_scaling": None}
    ),
    Configuration(
        "gemma3_text",
        {
            "sliding_window": 8,
            "sliding_window_pattern": 2,
            "rope_local_base_freq": 10000.0,
            "query_pre_attn_scalar": 16.0,
        },
    ),
    Configuration(
        "gemma4_text",
        {
            "sliding_window": 8,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "layer_types": ALTERNATING,
            "global_head_dim": 16,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        seed=9,
    ),
    Configuration(
        "gemma4_text",
        {
            "sliding_window": 8,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "layer_types": ALTERNATING,
            "global_head_dim": 32,
            "final_logit_softcapping": 30.0,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        "shared keys",
    ),
    Configuration(
        "iquestloopcoder", {"loop_num": 2, "loop_window_size": 8, "tie_word_embeddings": False}
    ),
    Configuration("llama", {"sliding_window": 8, "layer_types": ALTERNATING}, "sliding windows"),
    Configuration(
        "muse_glimmer",
        {
            "sliding_window": 8,
            "layer_types": ALTERNATING,
            "layer_rope_theta": [10000.0, 0.0] * 2,
        },
    ),
    Configuration("olmo3", {"sliding_window": 8, "layer_types": ALTERNATING}),
    Configuration("plamo3", {"window_size": 8, "sliding_window_pattern": 2}, cache_window=9),
    Configuration(
        "spark2_5",
        {
            "sliding_window": 8,
            "layer_types": ALTERNATING,
            "rope_parameters": ROPES,
        },
    ),
]
