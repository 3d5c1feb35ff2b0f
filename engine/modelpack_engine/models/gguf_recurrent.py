"""Rows of `gguf_architectures` for models with recurrent layers: names and config fields.

Metadata tell a recurrent layer by its number of heads of keys, which is 0.
"""

from __future__ import annotations

from collections.abc import Mapping

from modelpack_engine.models.gguf_hyperparameters import Config, Hyperparameters
from modelpack_engine.models.gguf_tensors import Target, one_channel

Names = Mapping[str, str | Target | tuple[Target, ...]]

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
_SIGMOID = 2  # llama.cpp's number of the function that scores experts


def layers_with(values: Hyperparameters, name: str) -> list[int]:
    """Return the numbers of the layers whose value is not 0.

    Raises `ModelLoadError` if the file does not have a value for each layer.
    """
    found = values.flags(name)
    if found is None or len(found) < values.layers:
        raise values.unsupported(f"a {name} that is not given for each layer")
    return [layer for layer, there in enumerate(found[: values.layers]) if there]


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
    if values.integer("expert_gating_func", _SIGMOID) != _SIGMOID:
        raise values.unsupported("experts that are not scored by a sigmoid")
    config |= {
        "num_experts": values.integer("expert_count"),
        "num_experts_per_tok": values.integer("expert_used_count"),
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "num_dense_layers": values.integer("leading_dense_block_count"),
        "norm_topk_prob": True,
        "routed_scaling_factor": values.number("expert_weights_scale", 0.0) or 1.0,
        "use_expert_bias": any(".exp_probs_b" in name for name in values.file.names),
    }
