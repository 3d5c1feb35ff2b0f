"""Latent attention: a compressed vector per token instead of keys and values."""

from __future__ import annotations

from typing import Any

from tests.engine.zoo.configuration import Configuration
from tests.engine.zoo.experts import ROUTED

MLA: dict[str, Any] = {
    **ROUTED,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
#: Sparse attention: an indexer selects the tokens to attend to, so few that some are left out.
INDEXED = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8}
LONGCAT: dict[str, Any] = {
    **MLA,
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "ffn_hidden_size": 128,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 32,
    "zero_expert_num": 2,
    "num_layers": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}

LATENT = [
    Configuration(
        "deepseek_v2",
        {
            **MLA,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "q_lora_rank": None,
            "rope_scaling": YARN,
        },
    ),
    Configuration("deepseek_v3", MLA),
    Configuration("deepseek_v32", {**MLA, **INDEXED}),
    Configuration("glm4_moe_lite", MLA),
    Configuration(
        "glm_moe_dsa",
        {**MLA, **INDEXED, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    ),
    Configuration("kimi_k25", MLA, nested="text_config"),
    Configuration("kimi_vl", MLA, nested="text_config"),
    Configuration("longcat_flash", LONGCAT),
    Configuration(
        "longcat_flash_ngram",
        {**LONGCAT, "ngram_vocab_size_ratio": 2, "emb_neighbor_num": 3, "emb_split_num": 2},
    ),
    Configuration(
        "minicpm3",
        {
            **MLA,
            "scale_depth": 1.4,
            "dim_model_base": 64,
            "scale_emb": 2,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [1.0] * 4,
                "original_max_position_embeddings": 512,
            },
        },
    ),
    Configuration(
        "mistral4",
        {
            **MLA,
            "rope_parameters": {
                "rope_theta": 10000.0,
                "rope_type": "default",
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    Configuration("youtu_llm", MLA, embedding=0.3, seed=8),
]
