"""How small the models of the oracle are, by the names of fields in transformers' configs."""

from __future__ import annotations

from typing import Any

#: Model types of transformers that mlx-lm's classes run, some under another name.
KINDS = """
    afmoe apertus bailing_hybrid bitnet cohere cohere2 dbrx deepseek_v2 deepseek_v3 deepseek_v32
    dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon_h1 falcon_mamba gemma gemma2 gemma3
    gemma3_text gemma3n gemma4 gemma4_text gemma4_unified glm glm4 glm4_moe glm4_moe_lite
    glm_moe_dsa gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid helium
    hunyuan_v1_dense internlm3 iquestcoder jamba kimi_k25 kimi_linear laguna lfm2 lfm2_moe llama
    llama4 llama4_text llava longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3 minimax
    minimax_m2 minimax_m3_vl ministral3 mistral mistral3 mistral4 mixtral muse_glimmer muse_spark
    nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe phi phi3 phimoe pixtral qwen2
    qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_moe qwen3_next qwen3_vl
    qwen3_vl_moe recurrent_gemma seed_oss smollm3 solar_open stablelm starcoder2 step3p5
""".split()  # noqa: SIM905 - a list of this length is easier to read so
#: Those of them that are left out, and why.
SKIPPED: dict[str, str] = {
    "bitnet": "mlx-lm computes it with a Metal kernel",
    "gemma3n": "its encoder of images has a fixed size, of 300 million parameters",
    "mistral4": "transformers has it as a part of mistral3 only",
    "muse_spark": "mlx-lm computes it with Metal kernels",
    "pixtral": "in transformers it is the encoder of images alone",
    "step3p5": "transformers has it as a part of step3p7 only",
}

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "lru_width": 64,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "shared_intermediate_size": 32,
    "n_inner": 96,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "depth": 1,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 48,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "sliding_window": 6,
    "attention_chunk_size": 8,
    "attention_window_size": 6,
    "query_pre_attn_scalar": 24,
    "hidden_size_per_layer_input": 8,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_n_heads": 8,
    "mamba_d_ssm": 128,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_n_groups": 2,
    "n_groups": 2,
    "ssm_state_size": 8,
    "time_step_rank": 8,
    "mamba_dt_rank": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 8,
    "rotary_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": 61,
    "image_token_index": 61,
    "video_token_id": 62,
    "vision_start_token_id": 60,
    "vision_end_token_id": 59,
    "audio_token_id": 60,
    "image_size": 28,
    "patch_size": 14,
    "num_nextn_predict_layers": 0,
}

_LATENT = {"num_key_value_heads": 4, "head_dim": 8, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
# For classes without sliding windows, longer than what the models read.
_WIDE = {"sliding_window": 64}
_YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.7,
    }
}
_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [2, 3, 3],
        "rope_theta": 500.0,
    }
}

#: What some need beside `SIZES`, by the model type of the config or of its part.
EXTRA: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {
        "num_hidden_layers": 4,
        "layer_group_size": 2,
        "num_experts_per_token": 2,
        "num_expert_group": 2,
        **_LATENT,
    },
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {**_LATENT, "n_group": 2, "topk_group": 1, **_YARN},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "kimi_linear": {**_LATENT, "num_experts_per_tok": 2, "n_group": 1, "num_expert_group": 1},
    "longcat_flash": {**_LATENT, "moe_topk": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "minicpm3": {
        **_LATENT,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.2, 1.5, 2.0],
            "long_factor": [1.0, 1.2, 1.5, 2.0],
            "original_max_position_embeddings": 64,
        },
    },
    "mistral4": _LATENT,
    "qwen2_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "qwen3_vl_text": _MROPE,
    "qwen3_vl_moe_text": _MROPE,
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "step3p5": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_sliding_attention_heads": 4,
        "share_expert_dim": 32,
    },
    "gemma2": _WIDE,
    "gemma3_text": {"num_hidden_layers": 6},
    "gpt2": {"n_inner": None},
    "gpt_neox": {"intermediate_size": 256},
    "gptj": {"n_inner": None},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "llama4_text": {"num_experts_per_tok": 1},
    "minimax_m3_vl_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        **_WIDE,
    },
    "ministral3": _WIDE,
    "mistral": _WIDE,
    "mixtral": _WIDE,
    "phi3": _WIDE,
    "phimoe": {"attention_bias": True, "lm_head_bias": True, **_WIDE},
    "recurrent_gemma": {"num_key_value_heads": 1},
    "starcoder2": _WIDE,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
}
