"""Tiny random models of every architecture, in mlx-lm and as GGUF files.

The conversion follows llama.cpp's (conversion/*.py): its map of names, the permutation of q and k
for llama, 1 added to the norms of Gemma. It uses no code of the loader.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from modelpack_engine.models.mtp import LAYOUTS, MtpHead
from modelpack_engine.patches.corrections import correct
from tests.engine.loaders import tiny_hybrids as hybrids
from tests.engine.loaders.vocabularies import Vocabulary, finish

Weights = dict[str, np.ndarray]

VOCABULARY = "bpe"
VOCABULARY_SIZE = 435
PROMPT = [72, 300, 17, 5, 260, 41, 99, 7, 33, 280, 12, 64, 3, 310]

_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def _keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """Write the keys that all converters write."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(hybrids.feed_forward_sizes(config))
    writer.add_head_count(config.get("num_attention_heads", 0))
    writer.add_head_count_kv(hybrids.key_heads(config))
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "rope_theta" in config:
        writer.add_rope_freq_base(config["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _permuted(config: Mapping[str, Any], weights: Weights) -> Weights:
    """conversion/llama.py: LlamaModel.permute."""
    changed = dict(weights)
    for name, value in weights.items():
        for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if f".{part}_proj." in name:
                halves = value.reshape(config[heads], 2, -1, *value.shape[1:])
                changed[name] = halves.swapaxes(1, 2).reshape(value.shape)
    return changed


def _shifted(config: Mapping[str, Any], weights: Weights) -> Weights:
    """conversion/gemma.py: data_torch + 1 for norms."""
    return {
        name: value + 1 if name.endswith("norm.weight") else value
        for name, value in weights.items()
    }


def _experts(config: Mapping[str, Any], weights: Weights) -> Weights:
    return {name.replace("switch_mlp", "experts"): value for name, value in weights.items()}


def _routed(config: Mapping[str, Any], weights: Weights) -> Weights:
    names = {"switch_mlp": "experts", "e_score_correction_bias": "e_score_correction.bias"}
    return _renamed(names, weights)


def _split_latent(config: Mapping[str, Any], weights: Weights) -> Weights:
    """conversion/deepseek.py: `kv_b_proj` becomes `k_b_proj`, transposed, and `v_b_proj`."""
    split = {}
    for name, value in _routed(config, weights).items():
        if "kv_b_proj" in name:
            heads = value.reshape(config["num_attention_heads"], -1, value.shape[-1])
            keys, values = np.split(heads, [config["qk_nope_head_dim"]], axis=1)
            split[name.replace("kv_b", "k_b")] = np.ascontiguousarray(keys.swapaxes(1, 2))
            split[name.replace("kv_b", "v_b")] = np.ascontiguousarray(values)
        else:
            split[name.replace("embed_q", "k_b_proj").replace("unembed_out", "v_b_proj")] = value
    return split


def _joined_latent(config: Mapping[str, Any], weights: Weights) -> Weights:
    """Join keys and values to `kv_b_proj`, as DeepSeek publishes them."""
    joined = _routed(config, weights)
    for name in [name for name in joined if "embed_q" in name]:
        keys = joined.pop(name).swapaxes(1, 2)
        values = joined.pop(name.replace("embed_q", "unembed_out"))
        heads = np.concatenate([keys, values], axis=1)
        joined[name.replace("embed_q", "kv_b_proj")] = heads.reshape(-1, heads.shape[-1])
    return joined


def _sinks(config: Mapping[str, Any], weights: Weights) -> Weights:
    return {f"{n}.weight" if n.endswith("sinks") else n: value for n, value in weights.items()}


def _unchanged(config: Mapping[str, Any], weights: Weights) -> Weights:
    return weights


def _llama_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_rope_dimension_count(_head_dim(config))


def _moe_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _phi3_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    rotated = int(_head_dim(config) * config.get("partial_rotary_factor", 1))
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    writer.add_sliding_window(0)
    scaling = config.get("rope_scaling")
    if scaling:
        ratio = config["max_position_embeddings"] / config["original_max_position_embeddings"]
        factor = np.sqrt(1 + np.log(ratio) / np.log(config["original_max_position_embeddings"]))
        writer.add_rope_scaling_attn_factors(float(factor))
        for name in ("long", "short"):
            values = np.array(scaling[f"{name}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", values)


def _gemma2_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(4096)


def _gemma3_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    if config["sliding_window_pattern"] != 6:
        writer.add_uint32(
            "gemma3.attention.sliding_window_pattern", config["sliding_window_pattern"]
        )
    if config.get("rope_scaling"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config["rope_scaling"]["factor"])


def _gemma4_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """conversion/gemma.py: Gemma4Model."""
    sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    layers, shared = len(sliding), config["num_kv_shared_layers"]
    wide = config["use_double_wide_mlp"]
    heads = (config["num_global_key_value_heads"], config["num_key_value_heads"])
    size = config["global_head_dim"]
    for name in ("key_length", "value_length", "head_count_kv"):
        writer.kv_data[0].pop(f"gemma4.attention.{name}", None)
    writer.kv_data[0].pop("gemma4.feed_forward_length")
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_key_length_swa(config["head_dim"])
    writer.add_value_length_swa(config["head_dim"])
    writer.add_rope_dimension_count(size)
    writer.add_rope_dimension_count_swa(config["head_dim"])
    writer.add_head_count_kv([heads[slides] for slides in sliding])
    writer.add_feed_forward_length(
        [
            config["intermediate_size"] * (1 + (wide and at >= layers - shared))
            for at in range(layers)
        ]
    )
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(sliding)
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    rotated = int(size * rope["full_attention"]["partial_rotary_factor"]) // 2
    factors = [1.0] * rotated + [1e30] * (size // 2 - rotated)
    writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    if config.get("enable_moe_block"):
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["top_k_experts"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _gemma4(config: Mapping[str, Any], weights: Weights) -> Weights:
    """Join gate and up of experts, and add keys to the layers that share others'."""
    names = {
        "experts.switch_glu.down_proj.weight": "experts.down_proj.weight",
        "router.per_expert_scale": "experts.down_proj.scale",
        "router.scale": "router.proj.scale",
        "layer_scalar": "layer_scalar.weight",
    }
    changed = _renamed(names, weights)
    for name in [name for name in changed if "switch_glu.gate_proj" in name]:
        parts = [changed.pop(name), changed.pop(name.replace("gate", "up"))]
        new = name.replace("switch_glu.gate_proj", "gate_up_proj")
        changed[new] = np.concatenate(parts, axis=1)
    if config["num_kv_shared_layers"]:
        last = f"model.layers.{config['num_hidden_layers'] - 1}.self_attn"
        for name in ("k_proj", "v_proj", "k_norm"):
            changed[f"{last}.{name}.weight"] = np.ones_like(
                changed[
                    f"model.layers.{config['layer_types'].index('full_attention')}.self_attn.{name}.weight"
                ]
            )
    return changed


def _gemma3n_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """conversion/gemma.py: Gemma3NModel."""
    text = config["text_config"]
    writer.add_altup_active_idx(text["altup_active_idx"])
    writer.add_altup_num_inputs(text["altup_num_inputs"])
    writer.add_embedding_length_per_layer_input(text["hidden_size_per_layer_input"])
    writer.add_shared_kv_layers(text["num_kv_shared_layers"])
    parts = text["activation_sparsity_pattern"]
    scales = [NormalDist().inv_cdf(part) if part else -np.inf for part in parts]
    writer.add_activation_sparsity_scale([float(scale) for scale in scales])
    sliding = [kind == "sliding_attention" for kind in text["layer_types"]]
    writer.add_sliding_window_pattern(sliding)
    writer.add_sliding_window(text["sliding_window"])


def _gemma3n(config: Mapping[str, Any], weights: Weights) -> Weights:
    """Stack the projections of alternating updates."""
    names = {"language_model.": "", "correct_output_scale": "correct_output_scale.weight"}
    changed = _renamed(names, weights)
    for name in ("altup_projections", "altup_unembed_projections"):
        parts = [changed.pop(f"model.{name}.{at}.weight") for at in range(3)]
        changed[f"model.{name}.weight"] = np.stack(parts)
    return changed


def _gpt_oss_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_dimension_count(config["head_dim"])
    scaling = config["rope_scaling"]
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])


def _yarn_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    scaling = config["rope_scaling"]
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])


def _starcoder2_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_layer_norm_eps(config["norm_epsilon"])


def _llama3_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """conversion/llama.py: generate_extra_tensors."""
    _llama_keys(writer, config)
    scaling, dim = config["rope_scaling"], _head_dim(config)
    old = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for frequency in 1.0 / config["rope_theta"] ** (np.arange(0, dim, 2) / dim):
        length = 2 * np.pi / frequency
        if length < old / high:
            factors.append(1.0)
        elif length > old / low:
            factors.append(scaling["factor"])
        else:
            smooth = (old / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))


def _pictures_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """conversion/qwenvl.py: the parts of a head that rotate by time, height and width."""
    pairs = _head_dim(config) // 2
    third = pairs // 3
    writer.add_rope_dimension_sections([pairs - 2 * third, third, third, 0])
    if "num_experts" in config:
        _moe_keys(writer, config)


def _ernie_moe_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """conversion/ernie.py."""
    writer.add_expert_count(config["moe_num_experts"])
    writer.add_expert_used_count(config["moe_k"])
    writer.add_interleave_moe_layer_step(config["moe_layer_interval"])
    writer.add_leading_dense_block_count(config["moe_layer_start_index"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["moe_num_shared_experts"])
    shared = config["moe_num_shared_experts"] * config["moe_intermediate_size"]
    writer.add_expert_shared_feed_forward_length(shared)


def _ernie_moe(config: Mapping[str, Any], weights: Weights) -> Weights:
    """Add biases that leave the choice of experts as it is: mlx-lm's class has none."""
    biases = {
        name.replace("gate.weight", "moe_statics.e_score_correction.bias"): np.full(
            len(value), 0.25, np.float32
        )
        for name, value in weights.items()
        if name.endswith("mlp.gate.weight")
    }
    return {**_experts(config, weights), **biases}


def _mixtral_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    _llama_keys(writer, config)
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])


def _qwen2_moe_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    _moe_keys(writer, config)
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _window_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])


def _cohere_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_logit_scale(config["logit_scale"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def _cohere2_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    _cohere_keys(writer, config)
    _window_keys(writer, config)
    writer.add_rope_dimension_count(config["head_dim"])


def _partial_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_rope_dimension_count(int(_head_dim(config) * config["partial_rotary_factor"]))


def _routed_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if config["n_group"] > 1:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
    softmax, sigmoid = gguf.ExpertGatingFuncType.SOFTMAX, gguf.ExpertGatingFuncType.SIGMOID
    writer.add_expert_gating_func(sigmoid if config["norm_topk_prob"] else softmax)


def _mistral3_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    _llama_keys(writer, config)
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
    writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])


def _bailing_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    numbers = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}
    _glm4_moe_keys(writer, {**config, **{new: config[old] for new, old in numbers.items()}})
    writer.add_expert_shared_feed_forward_length(config["moe_intermediate_size"])


def _bailing(config: Mapping[str, Any], weights: Weights) -> Weights:
    names = {
        "switch_mlp": "experts",
        "mlp.gate.gate_proj": "mlp.gate",
        "mlp.gate.expert_bias": "mlp.gate.e_score_correction.bias",
    }
    return _renamed(names, weights)


def _olmoe_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])


def _nemotron_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    _partial_keys(writer, config)
    writer.add_layer_norm_eps(config["norm_eps"])


def _mla_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """conversion/deepseek.py: heads are of the latent keys, their real sizes are named mla."""
    _deepseek_keys(writer, config)
    latent = config["kv_lora_rank"]
    writer.add_key_length(latent + config["qk_rope_head_dim"])
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    writer.add_value_length_mla(config["v_head_dim"])


def _mistral4_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """conversion/mistral.py: Mistral4Model; the experts' scores are those of a softmax."""
    rope = config["rope_parameters"]
    _mla_keys(writer, {**config, "rope_scaling": rope})
    del writer.kv_data[0]["mistral4.expert_gating_func"]
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    writer.add_attn_temperature_length(rope["original_max_position_embeddings"])


def _old_mla_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """Files from before April 2025."""
    _deepseek_keys(writer, config)
    writer.add_key_length(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    writer.add_value_length(config["v_head_dim"])


def _deepseek_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    _routed_keys(writer, config)
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    writer.add_vocab_size(config["vocab_size"])
    if config["q_lora_rank"]:
        writer.add_q_lora_rank(config["q_lora_rank"])
    if scaling := config["rope_scaling"]:
        _yarn_keys(writer, config)
        writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])


def _glm4_moe_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    _partial_keys(writer, config)
    _routed_keys(writer, config)


def _phi2_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    _partial_keys(writer, config)
    writer.add_layer_norm_eps(config["layer_norm_eps"])


def _stablelm_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    _phi2_keys(writer, config)
    writer.add_parallel_residual(config.get("use_parallel_residual", False))


def _granite_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    _llama_keys(writer, config)
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def _minimax_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_rope_dimension_count(config["rotary_dim"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _llama4_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """conversion/llama.py."""
    text = config["text_config"]
    writer.kv_data[0].pop("llama4.feed_forward_length")
    writer.add_feed_forward_length(text["intermediate_size_mlp"])
    writer.add_interleave_moe_layer_step(text["interleave_moe_layer_step"])
    writer.add_expert_feed_forward_length(text["intermediate_size"])
    writer.add_expert_count(text["num_local_experts"])
    writer.add_expert_used_count(text["num_experts_per_tok"])
    _llama3_keys(writer, text)


def _llama4(config: Mapping[str, Any], weights: Weights) -> Weights:
    return {name.removeprefix("language_model."): value for name, value in weights.items()}


def _gpt2_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def _apertus_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """conversion/llama.py: ApertusModel, which writes the activations' parameters as metadata."""
    _llama3_keys(writer, config)
    layers = [layer.mlp.act_fn for layer in TINY_MODELS["apertus"].build().layers]
    writer.add_xielu_alpha_n([float(one.alpha_n) for one in layers])
    writer.add_xielu_alpha_p([float(one.alpha_p) for one in layers])
    writer.add_xielu_beta([float(one.beta) for one in layers])
    writer.add_xielu_eps([float(one.eps) for one in layers])


def _apertus(config: Mapping[str, Any], weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if "act_fn" not in name}


def _openelm_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """conversion/openelm.py: an array of heads, and one of feed-forward sizes."""
    for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        del writer.kv_data[0][f"openelm.{name}"]
    writer.add_head_count(config["num_query_heads"])
    writer.add_head_count_kv(config["num_kv_heads"])
    writer.add_feed_forward_length([96, 160])
    writer.add_rope_dimension_count(config["head_dim"])


def _openelm(config: Mapping[str, Any], weights: Weights) -> Weights:
    """conversion/openelm.py: `proj_1` becomes a gate and an up projection."""
    split = dict(weights)
    for name in [name for name in weights if "proj_1" in name]:
        new = name.replace("transformer.layers", "model.layers").replace(
            "ffn.proj_1", "mlp.{}_proj"
        )
        split[new.format("gate")], split[new.format("up")] = np.split(split.pop(name), 2)
    return split


def _qwen_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """conversion/qwen.py: QwenModel, which writes twice the size of the layers."""
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])


def _gpt_neox_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_rope_dimension_count(int(_head_dim(config) * config["rotary_pct"]))
    writer.add_parallel_residual(config["use_parallel_residual"])


def _gpt_neox(config: Mapping[str, Any], weights: Weights) -> Weights:
    """conversion/gptneox.py: queries, keys and values, each for all heads."""
    changed = {}
    for name, value in weights.items():
        if "query_key_value" in name:
            heads = value.reshape(config["num_attention_heads"], 3, -1, *value.shape[1:])
            value = heads.swapaxes(0, 1).reshape(value.shape)
        new = name.replace("model.h.", "gpt_neox.layers.").replace("model.", "gpt_neox.")
        changed[new.replace("gpt_neox.embed_out", "embed_out")] = value
    return changed


def _minicpm_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def _granite_moe_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    _granite_keys(writer, config)
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])


def _exaone4_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    _llama3_keys(writer, config)
    _window_keys(writer, config)
    pattern, layers = config["sliding_window_pattern"], range(config["num_hidden_layers"])
    writer.add_sliding_window_pattern([pattern[layer % len(pattern)] == "L" for layer in layers])


def _renamed(names: Mapping[str, str], weights: Weights) -> Weights:
    """Replace parts of mlx-lm's names by those of transformers."""
    changed = {}
    for name, value in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        changed[name] = value
    return changed


def _deepseek1(config: Mapping[str, Any], weights: Weights) -> Weights:
    return _routed(config, _permuted(config, weights))


def _window_experts_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """conversion/afmoe.py and conversion/exaone.py: ExaoneMoEModel."""
    _moe_keys(writer, config)
    _window_keys(writer, config)
    writer.add_expert_shared_count(config["num_shared_experts"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    dense = config.get("num_dense_layers", config.get("first_k_dense_replace"))
    writer.add_leading_dense_block_count(dense)
    writer.add_expert_weights_norm(config.get("route_norm", config.get("norm_topk_prob")))
    scale = config.get("route_scale", config.get("routed_scaling_factor"))
    writer.add_expert_weights_scale(scale)
    writer.add_rope_dimension_count(config["head_dim"])


def _afmoe(config: Mapping[str, Any], weights: Weights) -> Weights:
    return _renamed({"mlp.expert_bias": "mlp.expert_bias.bias"}, weights)


def _hunyuan_moe_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """conversion/hunyuan.py: HunYuanMoEModel."""
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["moe_topk"])
    writer.add_expert_shared_count(config["num_shared_expert"])
    writer.add_expert_shared_feed_forward_length(
        config["num_shared_expert"] * config["intermediate_size"]
    )
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def _starcoder_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def _chatglm(config: Mapping[str, Any], weights: Weights) -> Weights:
    """Join queries, keys and values, as ChatGLM publishes them."""
    joined = dict(weights)
    for name in [name for name in joined if ".q_proj." in name]:
        parts = [joined.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        new = name.replace("model.layers", "encoder.layers")
        new = new.replace("self_attn.q_proj", "self_attention.query_key_value")
        joined[new] = np.concatenate(parts)
    return joined


def _deci_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """conversion/deci.py: arrays of heads and of feed-forward sizes."""
    _llama3_keys(writer, config)
    blocks, heads = config["block_configs"], config["num_attention_heads"]
    for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        del writer.kv_data[0][f"deci.{name}"]
    groups = [block["attention"].get("n_heads_in_group") for block in blocks]
    writer.add_head_count([heads if group else 0 for group in groups])
    writer.add_head_count_kv([heads // group if group else 0 for group in groups])
    sizes = [block["ffn"].get("ffn_mult", 0) * config["hidden_size"] for block in blocks]
    writer.add_feed_forward_length([int(2 * size / 3) for size in sizes])


def _deci(config: Mapping[str, Any], weights: Weights) -> Weights:
    """Permute queries and keys, as `_permuted`; the number of keys' heads differs."""
    changed = dict(weights)
    for name, value in weights.items():
        if ".q_proj." in name or ".k_proj." in name:
            halves = value.reshape(-1, 2, _head_dim(config) // 2, value.shape[-1])
            changed[name] = halves.swapaxes(1, 2).reshape(value.shape)
    return changed


def _joined_heads(config: Mapping[str, Any], weights: Weights) -> Weights:
    """Join queries, keys and values, as in files of Phi-2 from 2023."""
    joined = dict(weights)
    for name in weights:
        if "q_proj" in name:
            parts = [joined.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            joined[name.replace("q_proj", "query_key_value")] = np.concatenate(parts)
    return joined


_MIXTRAL = {
    "switch_mlp.gate_proj": "experts.w1",
    "switch_mlp.down_proj": "experts.w2",
    "switch_mlp.up_proj": "experts.w3",
}
_GRANITE_MOE = {"block_sparse_moe.switch_mlp": "mlp.experts"}


# The names of what `MtpHead` has around its block.
_NEXTN = {
    "embedding_norm": "enorm",
    "state_norm": "hnorm",
    "projection": "eh_proj",
    "norm": "shared_head_norm",
    "embed_tokens": "embed_tokens",
    "head": "shared_head_head",
}


def _count_predicting(writer: gguf.GGUFWriter, arch: str) -> None:
    """Count one more layer, which predicts, in the keys that count layers or have a value of each.

    It has attention and a feed-forward, and no recurrent layer.
    """
    values = writer.kv_data[0]
    values[f"{arch}.block_count"].value += 1
    for key in ("attention.head_count_kv", "feed_forward_length", "attention.recurrent_layers"):
        found = values.get(f"{arch}.{key}")
        if found is not None and isinstance(found.value, list):
            found.value.append(False if found.value[0] is True else max(found.value))
    writer.add_nextn_predict_layers(1)


@dataclass(frozen=True)
class TinyModel:
    """A tiny model: its `arch` in GGUF, its config for mlx-lm, and how it is converted."""

    arch: str
    config: dict[str, Any]
    keys: Callable[[gguf.GGUFWriter, Mapping[str, Any]], None] = lambda writer, config: None
    converted: Callable[[Mapping[str, Any], Weights], Weights] = _unchanged
    #: The tolerance of llama.cpp's logits, as 1 - cosine; larger where mlx-lm computes differently.
    tolerance: float = 1e-6
    seed: int = 0

    def build(self) -> Any:
        """Return mlx-lm's model, corrected, with random weights that spread its logits widely."""
        module = importlib.import_module(f"mlx_lm.models.{self.config['model_type']}")
        model = module.Model(module.ModelArgs.from_dict(self.config))
        correct(model, self.config)
        if self.config.get("tie_word_embeddings") and hasattr(model, "sanitize"):
            given = dict(tree_flatten(model.parameters()))
            model.sanitize({n: v for n, v in given.items() if not n.startswith("lm_head")})
        model.load_weights([(n, mx.array(v)) for n, v in self.weights(model).items()])
        model.eval()
        mx.eval(model.parameters())
        return model

    def weights(self, model: Any) -> Weights:
        random = np.random.default_rng(self.seed)
        made = {}
        for name, array in sorted(tree_flatten(model.parameters())):
            near_one = ("norm.weight", "norm_1.weight", "norm_2.weight", "scale", "layer_scalar")
            shifted = self.config["model_type"] in ("gemma", "gemma2", "gemma3_text")
            norm = name.endswith(near_one) and not shifted
            scale = 0.1 if array.ndim <= 1 else 2.0 / np.sqrt(array.shape[-1])
            values = random.standard_normal(array.shape) * scale + (1 if norm else 0)
            made[name] = values.astype(np.float32)
        return made

    def write(
        self,
        path: Path,
        quantize: Callable[[str, np.ndarray], Any] | None = None,
        predicting: Weights | None = None,
    ) -> Path:
        """Write the GGUF file; `quantize(name, values)` may return (bytes, type) for a tensor.

        `predicting` are the weights of an `MtpHead`, which are written as its layer.
        """
        weights = {n: np.array(v) for n, v in tree_flatten(self.build().parameters())}
        writer = gguf.GGUFWriter(path, self.arch)
        _keys(writer, self.config)
        self.keys(writer, self.config)
        Vocabulary.read(VOCABULARY).add_to(writer, pre="gpt-2", special=("bos", "eos"))
        tensors = self._tensors(weights)
        if predicting is not None:
            _count_predicting(writer, self.arch)
            tensors |= self._predicting(predicting, weights)
        for name, values in tensors.items():
            packed = quantize(name, values) if quantize and values.ndim > 1 else None
            if packed is None:
                writer.add_tensor(name, values)
            else:
                raw, kind = packed
                writer.add_tensor(name, raw, raw_shape=raw.shape, raw_dtype=kind)
        finish(writer)
        return path

    def head(self) -> Weights:
        """Return random weights of a layer for multi-token prediction, by names of `MtpHead`."""
        model = self.build()
        return self.weights(MtpHead(model, LAYOUTS[self.config["model_type"]]))

    def write_predicting(self, path: Path) -> Path:
        """Write the model with a layer for multi-token prediction."""
        return self.write(path, predicting=self.head())

    def _tensors(self, weights: Weights) -> Weights:
        """Return weights as llama.cpp converts and names them."""
        arch = next(at for at, name in gguf.MODEL_ARCH_NAMES.items() if name == self.arch)
        names = gguf.get_tensor_name_map(arch, self.config["num_hidden_layers"])
        tensors = {}
        for name, values in self.converted(self.config, weights).items():
            new = names.get_name(name, try_suffixes=(".weight", ".bias", ".scale"))
            assert new is not None, name
            tensors[new] = values
        return tensors

    def _predicting(self, head: Weights, weights: Weights) -> Weights:
        """Return the tensors of a layer for multi-token prediction after the model's `weights`.

        As llama.cpp's conversion of GLM, DeepSeek, Qwen and Nemotron: a block, and `nextn.*`.
        """
        start = f"blk.{self.config['num_hidden_layers']}."
        first = next(name for name in weights if ".layers.0." in name).partition(".0.")[0]
        block, tensors = {}, {}
        for name, values in head.items():
            module, _, parameter = name.rpartition(".")
            if module in _NEXTN:
                tensors[f"{start}nextn.{_NEXTN[module]}.{parameter}"] = values
            elif self.arch == "nemotron_h_moe" and module == "block.post_attention_layernorm":
                tensors[f"{start}post_attention_norm.weight"] = values
            else:
                if self.arch == "nemotron_h_moe":
                    name = name.replace("self_attn", "mixer").replace("mlp", "mixer", 1)
                    name = name.replace("input_layernorm", "norm")
                block[name.replace("block", f"{first}.0", 1)] = values
        made = self._tensors(block)
        return tensors | {name.replace("blk.0.", start): value for name, value in made.items()}

    def logits(self, model: Any) -> np.ndarray:
        """Return the logits of all positions of `PROMPT`.

        With a cache: without one, layers of Gemma 3n do not share their keys.
        """
        cache = make_prompt_cache(model)
        return np.array(model(mx.array([PROMPT]), cache=cache)[0].astype(mx.float32))


def _model(arch: str, model_type: str, **changes: Any) -> dict[str, Any]:
    common = {"model_type": model_type, "vocab_size": VOCABULARY_SIZE, "rope_theta": 10000.0}
    return {**_SIZES, **common, **changes}


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONG_ROPE = {
    "type": "longrope",
    "long_factor": [1.0, 1.5, 2.0, 4.0],
    "short_factor": [1.0, 1.0, 1.1, 1.2],
}
_ROUTED = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
}
_QWEN3_MOE = {
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
# Every fourth layer is full and has no rope.
_WINDOWS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "sliding_window": 8,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
}
_AFMOE = {"num_dense_layers": 1, "route_norm": True, "route_scale": 1.5}
_EXAONE_MOE = {
    "first_k_dense_replace": 1,
    "is_moe_layer": [False, True, True, True],
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
_CHATGLM = _model("chatglm", "glm", head_dim=16, partial_rotary_factor=0.5, attention_bias=True)
_STARCODER = {
    **{key: value for key, value in _SIZES.items() if key != "rms_norm_eps"},
    "model_type": "gpt_bigcode",
    "vocab_size": VOCABULARY_SIZE,
    "num_key_value_heads": 1,
    "multi_query": True,
    "n_embd": 64,
    "n_layer": 2,
    "n_inner": 96,
    "n_head": 4,
    "n_positions": 512,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
_BAILING_MOE2 = _model(
    "bailingmoe2",
    "bailing_moe",
    **{k: v for k, v in _ROUTED.items() if k not in ("n_routed_experts", "n_shared_experts")},
    num_experts=8,
    num_shared_experts=1,
    score_function="sigmoid",
    use_qk_norm=True,
    moe_router_enable_expert_bias=True,
    partial_rotary_factor=0.5,
)
_MLA = {
    **_ROUTED,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "rope_scaling": {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}
_DEEPSEEK3 = _model("deepseek2", "deepseek_v3", **_MLA)
_MISTRAL_ROPE = {
    "rope_type": "yarn",
    "type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
_MISTRAL4 = {
    **{k: v for k, v in _DEEPSEEK3.items() if k not in ("rope_theta", "rope_scaling")},
    "model_type": "mistral4",
    "rope_parameters": _MISTRAL_ROPE,
}
# llama.cpp knows it by its number of layers.
_DEEPSEEK2_LITE = {
    **_DEEPSEEK3,
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "num_hidden_layers": 27,
    "norm_topk_prob": False,
}
_GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "tie_word_embeddings": True,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 8,
    "num_kv_shared_layers": 2,
    "num_key_value_heads": 1,
    "num_global_key_value_heads": 1,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCABULARY_SIZE,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.25,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
_GEMMA4_MOE = {
    **_GEMMA4,
    "num_kv_shared_layers": 0,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "use_double_wide_mlp": False,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
_GEMMA = {"head_dim": 32, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}

# llama.cpp has some numbers of its layers and sizes in its code.
_GEMMA3N = _model(
    "gemma3n",
    "gemma3n",
    **_GEMMA,
    num_hidden_layers=25,
    layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 5,
    num_kv_shared_layers=5,
    sliding_window=8,
    rope_theta=1e6,
    rope_local_base_freq=10000.0,
    intermediate_size=1024,
    activation_sparsity_pattern=[0.95] * 10 + [0.0] * 15,
    final_logit_softcapping=30.0,
    hidden_size_per_layer_input=256,
    vocab_size_per_layer_input=VOCABULARY_SIZE,
    altup_num_inputs=4,
    altup_active_idx=0,
    altup_coef_clip=None,
    altup_correct_scale=True,
    laurel_rank=64,
)

_COHERE = {
    **{key: value for key, value in _SIZES.items() if key != "rms_norm_eps"},
    "model_type": "cohere",
    "vocab_size": VOCABULARY_SIZE,
    "rope_theta": 10000.0,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.25,
    "tie_word_embeddings": True,
}
_LAYER_NORM = {
    **{key: value for key, value in _SIZES.items() if key != "rms_norm_eps"},
    "vocab_size": VOCABULARY_SIZE,
    "rope_theta": 10000.0,
    "layer_norm_eps": 1e-5,
}
_SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
_GRANITE = _model(
    "granite",
    "granite",
    attention_multiplier=0.3,
    embedding_multiplier=2.0,
    residual_multiplier=0.7,
    logits_scaling=3.0,
    attention_bias=False,
    mlp_bias=False,
)

_LLAMA4 = _model(
    "llama4",
    "llama4",
    attention_bias=False,
    attention_chunk_size=8192,
    head_dim=16,
    num_hidden_layers=4,
    interleave_moe_layer_step=2,
    intermediate_size=32,
    intermediate_size_mlp=96,
    num_local_experts=8,
    num_experts_per_tok=1,
    use_qk_norm=True,
    rope_scaling=_LLAMA3_ROPE,
)
_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "n_embd": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_head": 4,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "max_position_embeddings": 512,
    "n_ctx": 512,
    "n_positions": 512,
    "intermediate_size": 256,
    "layer_norm_epsilon": 1e-5,
}
_GPT_NEOX = {
    **{key: value for key, value in _LAYER_NORM.items() if key != "rope_theta"},
    "model_type": "gpt_neox",
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
}

TINY_MODELS: dict[str, TinyModel] = {
    "llama": TinyModel("llama", _model("llama", "llama"), _llama_keys, _permuted),
    "llama-tied": TinyModel(
        "llama", _model("llama", "llama", tie_word_embeddings=True), _llama_keys, _permuted
    ),
    "llama-3": TinyModel(
        "llama",
        _model("llama", "llama", rope_theta=500000.0, rope_scaling=_LLAMA3_ROPE),
        _llama3_keys,
        _permuted,
    ),
    # Mistral NeMo: heads wider than hidden_size / heads.
    "mistral": TinyModel(
        "llama", _model("llama", "llama", head_dim=32, rope_theta=1e6), _llama_keys, _permuted
    ),
    "apertus": TinyModel(
        "apertus",
        _model(
            "apertus",
            "apertus",
            mlp_bias=False,
            attention_bias=False,
            post_norm=False,
            qk_norm=True,
            rope_scaling=_LLAMA3_ROPE,
        ),
        _apertus_keys,
        _apertus,
    ),
    "openelm": TinyModel(
        "openelm",
        _model(
            "openelm",
            "openelm",
            head_dim=16,
            tie_word_embeddings=True,
            model_dim=64,
            num_transformer_layers=2,
            num_query_heads=[4, 2],
            num_kv_heads=[2, 1],
            ffn_multipliers=[1.5, 2.5],
            ffn_dim_divisor=16,
        ),
        _openelm_keys,
        _openelm,
    ),
    "qwen": TinyModel(
        "qwen",
        {
            key: value
            for key, value in {
                **_model("qwen", "qwen", intermediate_size=192, num_key_value_heads=4),
                "kv_channels": 16,
                "layer_norm_epsilon": 1e-5,
            }.items()
            if key != "rms_norm_eps"
        },
        _qwen_keys,
    ),
    "qwen2": TinyModel("qwen2", _model("qwen2", "qwen2", rope_theta=1e6)),
    "qwen2-yarn": TinyModel(
        "qwen2",
        _model(
            "qwen2",
            "qwen2",
            rope_theta=1e6,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
        _yarn_keys,
    ),
    "qwen3": TinyModel("qwen3", _model("qwen3", "qwen3", head_dim=32, rope_theta=1e6)),
    "qwen3moe": TinyModel(
        "qwen3moe",
        _model("qwen3moe", "qwen3_moe", **_QWEN3_MOE),
        _moe_keys,
        _experts,
    ),
    "qwen2vl": TinyModel("qwen2vl", _model("qwen2vl", "qwen2", rope_theta=1e6), _pictures_keys),
    "qwen3vl": TinyModel("qwen3vl", _model("qwen3vl", "qwen3", head_dim=32), _pictures_keys),
    "qwen3vlmoe": TinyModel(
        "qwen3vlmoe", _model("qwen3vlmoe", "qwen3_moe", **_QWEN3_MOE), _pictures_keys, _experts
    ),
    "internlm2": TinyModel(
        "internlm2", _model("internlm2", "llama", rope_theta=1e6), _llama_keys, _permuted
    ),
    "exaone": TinyModel(
        "exaone", _model("exaone", "llama", rope_scaling=_LLAMA3_ROPE), _llama3_keys
    ),
    "minicpm": TinyModel(
        "minicpm", {**_GRANITE, "attention_multiplier": 0.25}, _minicpm_keys, _permuted
    ),
    "smollm3": TinyModel(
        "smollm3",
        _model("smollm3", "smollm3", num_hidden_layers=4, tie_word_embeddings=True),
        _llama_keys,
        _permuted,
    ),
    "phi3": TinyModel(
        "phi3",
        _model("phi3", "phi3", original_max_position_embeddings=512),
        _phi3_keys,
    ),
    # Phi-4-mini: rope rotates a part of each head, with long factors.
    "phi3-long": TinyModel(
        "phi3",
        _model(
            "phi3",
            "phi3",
            original_max_position_embeddings=16,
            partial_rotary_factor=0.5,
            rope_scaling=_LONG_ROPE,
            tie_word_embeddings=True,
        ),
        _phi3_keys,
    ),
    "starcoder2": TinyModel(
        "starcoder2",
        {
            key: value
            for key, value in _model("starcoder2", "starcoder2", norm_epsilon=1e-5).items()
            if key != "rms_norm_eps"
        },
        _starcoder2_keys,
        tolerance=1e-4,  # mlx-lm computes the GELU exactly, llama.cpp by tanh
    ),
    "gemma": TinyModel(
        "gemma",
        _model("gemma", "gemma", **_GEMMA),
        converted=_shifted,
        tolerance=1e-4,  # mlx-lm computes the GELU exactly, llama.cpp by tanh
    ),
    "gemma2": TinyModel(
        "gemma2",
        _model(
            "gemma2",
            "gemma2",
            **_GEMMA,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            query_pre_attn_scalar=32,
        ),
        _gemma2_keys,
        _shifted,
    ),
    "gemma3": TinyModel(
        "gemma3",
        _model(
            "gemma3",
            "gemma3_text",
            **_GEMMA,
            num_hidden_layers=6,
            query_pre_attn_scalar=32,
            sliding_window=8,
            sliding_window_pattern=6,
            rope_theta=1e6,
            rope_local_base_freq=10000.0,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
        _gemma3_keys,
        _shifted,
        tolerance=1e-4,  # mlx-lm rounds the embedding's scale to bfloat16
    ),
    "gemma3n": TinyModel(
        "gemma3n",
        {**_GEMMA3N, "text_config": _GEMMA3N},
        _gemma3n_keys,
        _gemma3n,
        # llama.cpp divides a variance by n - 1, and looks up the GELU in half precision.
        tolerance=1e-3,
        seed=2,
    ),
    # As E2B: layers that share keys, and inputs for each layer.
    "gemma4": TinyModel(
        "gemma4",
        {k: v for k, v in _model("gemma4", "gemma4_text", **_GEMMA4).items() if k != "rope_theta"},
        _gemma4_keys,
        _gemma4,
    ),
    # As 26B: experts, and values that are the keys.
    "gemma4-moe": TinyModel(
        "gemma4",
        {
            k: v
            for k, v in _model("gemma4", "gemma4_text", **_GEMMA4_MOE).items()
            if k != "rope_theta"
        },
        _gemma4_keys,
        _gemma4,
    ),
    "gpt-oss": TinyModel(
        "gpt-oss",
        _model(
            "gpt-oss",
            "gpt_oss",
            head_dim=32,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=8,
            rope_theta=150000.0,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 16,
            },
        ),
        _gpt_oss_keys,
        _sinks,
        tolerance=1e-4,
    ),
    "mixtral": TinyModel(
        "llama",
        _model("llama", "mixtral", num_local_experts=8, num_experts_per_tok=2),
        _mixtral_keys,
        lambda config, weights: _renamed(_MIXTRAL, _permuted(config, weights)),
    ),
    "qwen2moe": TinyModel(
        "qwen2moe",
        _model(
            "qwen2moe",
            "qwen2_moe",
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=64,
        ),
        _qwen2_moe_keys,
        _experts,
    ),
    "olmo2": TinyModel("olmo2", _model("olmo2", "olmo2", num_key_value_heads=4)),
    "olmo3": TinyModel(
        "olmo2",
        _model("olmo2", "olmo3", num_hidden_layers=4, sliding_window=8, num_key_value_heads=4),
        _window_keys,
    ),
    "command-r": TinyModel("command-r", _COHERE, _cohere_keys),
    # llama.cpp knows its norms of queries and keys by the number of layers.
    "command-r-plus": TinyModel(
        "command-r",
        {**_COHERE, **_SMALL, "num_hidden_layers": 64, "use_qk_norm": True},
        _cohere_keys,
    ),
    "cohere2": TinyModel(
        "cohere2",
        {
            **_COHERE,
            "model_type": "cohere2",
            "head_dim": 16,
            "num_hidden_layers": 4,
            "sliding_window": 8,
        },
        _cohere2_keys,
    ),
    "glm4": TinyModel(
        "glm4",
        _model("glm4", "glm4", head_dim=32, partial_rotary_factor=0.5, attention_bias=True),
        _partial_keys,
    ),
    "glm4moe": TinyModel(
        "glm4moe",
        _model(
            "glm4moe",
            "glm4_moe",
            **_ROUTED,
            head_dim=32,
            rope_scaling=None,
            use_qk_norm=True,
            attention_bias=True,
            partial_rotary_factor=0.5,
        ),
        _glm4_moe_keys,
        _routed,
    ),
    "mistral3": TinyModel(
        "mistral3",
        {
            **{
                key: value
                for key, value in _model("mistral3", "ministral3", head_dim=32).items()
                if key != "rope_theta"
            },
            "rope_parameters": _MISTRAL_ROPE,
        },
        _mistral3_keys,
        _permuted,
    ),
    "olmoe": TinyModel(
        "olmoe",
        _model("olmoe", "olmoe", num_key_value_heads=4, num_experts=8, num_experts_per_tok=2),
        _olmoe_keys,
        _experts,
    ),
    "nemotron": TinyModel(
        "nemotron",
        {
            **{key: value for key, value in _LAYER_NORM.items() if key != "layer_norm_eps"},
            "model_type": "nemotron",
            "norm_eps": 1e-5,
            "hidden_act": "relu2",
            "partial_rotary_factor": 0.5,
        },
        _nemotron_keys,
        _shifted,
    ),
    "bailingmoe2": TinyModel("bailingmoe2", _BAILING_MOE2, _bailing_keys, _bailing),
    "dots1": TinyModel(
        "dots1",
        _model("dots1", "dots1", **_ROUTED, head_dim=16, num_key_value_heads=4),
        _routed_keys,
        _routed,
    ),
    "deci": TinyModel(
        "deci",
        _model(
            "deci",
            "nemotron-nas",
            num_hidden_layers=4,
            rope_scaling=_LLAMA3_ROPE,
            block_configs=[
                {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 6.0}},
                {"attention": {"no_op": True}, "ffn": {"ffn_mult": 6.0}},
                {"attention": {"no_op": True}, "ffn": {"no_op": True}},
                {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 12.0}},
            ],
        ),
        _deci_keys,
        _deci,
    ),
    "mistral4": TinyModel("mistral4", _MISTRAL4, _mistral4_keys, _split_latent),
    "deepseek": TinyModel(
        "deepseek",
        _model(
            "deepseek",
            "deepseek",
            **{**_ROUTED, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
        ),
        _routed_keys,
        _deepseek1,
    ),
    "afmoe": TinyModel(
        "afmoe", _model("afmoe", "afmoe", **_WINDOWS, **_AFMOE), _window_experts_keys, _afmoe
    ),
    "exaone-moe": TinyModel(
        "exaone-moe",
        _model("exaone-moe", "exaone_moe", **_WINDOWS, **_EXAONE_MOE),
        _window_experts_keys,
        _routed,
    ),
    "hunyuan-moe": TinyModel(
        "hunyuan-moe",
        _model(
            "hunyuan-moe",
            "hunyuan",
            tie_word_embeddings=True,
            attention_bias=False,
            num_experts=8,
            moe_topk=2,
            num_shared_expert=2,
            use_mixed_mlp_moe=True,
            use_qk_norm=True,
            use_cla=False,
            cla_share_factor=2,
            rope_scaling={"type": "dynamic", "factor": 1.0, "alpha": 1.0},
        ),
        _hunyuan_moe_keys,
        _experts,
    ),
    "chatglm": TinyModel("chatglm", _CHATGLM, _partial_keys, _chatglm),
    # GLM-4-9B of transformers
    "chatglm-glm": TinyModel("chatglm", _CHATGLM, _partial_keys),
    "starcoder": TinyModel("starcoder", _STARCODER, _starcoder_keys),
    "deepseek-v2-lite": TinyModel("deepseek2", _DEEPSEEK2_LITE, _mla_keys, _split_latent),
    "deepseek-v2-lite-old": TinyModel(
        "deepseek2", {**_DEEPSEEK2_LITE, "num_key_value_heads": 4}, _old_mla_keys, _routed
    ),
    "deepseek-v3": TinyModel(
        "deepseek2", {**_DEEPSEEK3, "n_group": 4, "topk_group": 2}, _mla_keys, _split_latent
    ),
    "deepseek-v3-old": TinyModel(
        "deepseek2", {**_DEEPSEEK3, "num_key_value_heads": 4}, _old_mla_keys, _joined_latent
    ),
    # GLM 4.7 Flash: llama.cpp converts it to deepseek2.
    "glm4-moe-lite": TinyModel(
        "deepseek2",
        {**_DEEPSEEK3, "model_type": "glm4_moe_lite", "rope_scaling": None},
        _mla_keys,
        _split_latent,
    ),
    "granite": TinyModel("granite", _GRANITE, _granite_keys, _permuted),
    "granitemoe": TinyModel(
        "granitemoe",
        {**_GRANITE, "model_type": "granitemoe", "num_local_experts": 8, "num_experts_per_tok": 2},
        _granite_moe_keys,
        lambda config, weights: _renamed(_GRANITE_MOE, _permuted(config, weights)),
    ),
    "phi2": TinyModel(
        "phi2", {**_LAYER_NORM, "model_type": "phi", "partial_rotary_factor": 0.5}, _phi2_keys
    ),
    "phi2-joined": TinyModel(
        "phi2",
        {**_LAYER_NORM, "model_type": "phi", "partial_rotary_factor": 0.5},
        _phi2_keys,
        _joined_heads,
    ),
    "stablelm": TinyModel(
        "stablelm",
        {
            **_LAYER_NORM,
            "model_type": "stablelm",
            "partial_rotary_factor": 0.25,
            "use_qkv_bias": True,
        },
        _stablelm_keys,
    ),
    "exaone4": TinyModel(
        "exaone4",
        _model(
            "exaone4",
            "exaone4",
            head_dim=16,
            sliding_window=None,
            sliding_window_pattern=None,
            rope_scaling=_LLAMA3_ROPE,
        ),
        _llama3_keys,
    ),
    # llama.cpp knows its windows by the number of layers.
    "exaone4-32b": TinyModel(
        "exaone4",
        _model(
            "exaone4",
            "exaone4",
            **_SMALL,
            head_dim=16,
            num_hidden_layers=64,
            sliding_window=8,
            sliding_window_pattern="LLLG",
            rope_scaling=_LLAMA3_ROPE,
        ),
        _exaone4_keys,
    ),
    "hunyuan-dense": TinyModel(
        "hunyuan-dense", _model("hunyuan-dense", "hunyuan_v1_dense", head_dim=32)
    ),
    "ernie4_5": TinyModel("ernie4_5", _model("ernie4_5", "ernie4_5", head_dim=32, use_bias=False)),
    "ernie4_5-moe": TinyModel(
        "ernie4_5-moe",
        _model(
            "ernie4_5-moe",
            "ernie4_5_moe",
            head_dim=32,
            num_hidden_layers=4,
            use_bias=False,
            moe_num_experts=8,
            moe_k=2,
            moe_intermediate_size=32,
            moe_num_shared_experts=2,
            moe_layer_start_index=1,
            moe_layer_interval=1,
        ),
        _ernie_moe_keys,
        _ernie_moe,
    ),
    "seed_oss": TinyModel(
        "seed_oss", _model("seed_oss", "seed_oss", head_dim=32, attention_bias=True)
    ),
    "minimax-m2": TinyModel(
        "minimax-m2",
        _model(
            "minimax-m2",
            "minimax",
            head_dim=32,
            rotary_dim=16,
            num_local_experts=8,
            num_experts_per_tok=2,
            shared_intermediate_size=0,
        ),
        _minimax_keys,
        lambda config, weights: _renamed(
            {**_MIXTRAL, "correction_bias": "correction.bias"}, weights
        ),
    ),
    "llama4": TinyModel(
        "llama4",
        {**_LLAMA4, "text_config": _LLAMA4},
        _llama4_keys,
        _llama4,
    ),
    "gpt2": TinyModel(
        "gpt2",
        _GPT2,
        _gpt2_keys,
        lambda config, weights: _renamed({"model.": "transformer."}, weights),
    ),
    "gptneox": TinyModel("gptneox", _GPT_NEOX, _gpt_neox_keys, _gpt_neox),
    "gptneox-serial": TinyModel(
        "gptneox", {**_GPT_NEOX, "use_parallel_residual": False}, _gpt_neox_keys, _gpt_neox
    ),
    # Models with recurrent layers
    "mamba": TinyModel(
        "mamba",
        {**hybrids.MAMBA, "vocab_size": VOCABULARY_SIZE},
        hybrids.mamba_keys,
        hybrids.mamba,
    ),
    "jamba": TinyModel(
        "jamba",
        _model("jamba", "jamba", **hybrids.JAMBA),
        hybrids.jamba_keys,
        hybrids.jamba,
    ),
    "jamba-dense": TinyModel(
        "jamba",
        _model("jamba", "jamba", **{**hybrids.JAMBA, "num_experts": 1, "num_experts_per_tok": 1}),
        hybrids.jamba_keys,
        hybrids.jamba,
    ),
    "mamba2": TinyModel(
        "mamba2",
        {**hybrids.MAMBA2, "vocab_size": VOCABULARY_SIZE},
        hybrids.mamba_keys,
        lambda config, weights: hybrids.mamba2(weights, config["n_groups"]),
    ),
    "lfm2": TinyModel(
        "lfm2", _model("lfm2", "lfm2", **hybrids.LFM2), hybrids.lfm2_keys, hybrids.lfm2
    ),
    "lfm2moe": TinyModel(
        "lfm2moe",
        _model("lfm2moe", "lfm2_moe", **hybrids.LFM2_MOE),
        hybrids.lfm2_moe_keys,
        hybrids.lfm2,
    ),
    "nemotron_h": TinyModel(
        "nemotron_h",
        _model("nemotron_h", "nemotron_h", **hybrids.NEMOTRON_H),
        hybrids.nemotron_h_keys,
        hybrids.nemotron_h,
    ),
    "nemotron_h_moe": TinyModel(
        "nemotron_h_moe",
        _model("nemotron_h_moe", "nemotron_h", **hybrids.NEMOTRON_H_MOE),
        hybrids.nemotron_h_moe_keys,
        hybrids.nemotron_h,
    ),
    "granitehybrid": TinyModel(
        "granitehybrid",
        _model("granitehybrid", "granitemoehybrid", **hybrids.GRANITE_HYBRID),
        hybrids.granite_hybrid_keys,
        lambda config, weights: hybrids.granite_hybrid(config, _permuted(config, weights)),
    ),
    "granitehybrid-moe": TinyModel(
        "granitehybrid",
        _model("granitehybrid", "granitemoehybrid", **hybrids.GRANITE_HYBRID_MOE),
        hybrids.granite_hybrid_keys,
        lambda config, weights: hybrids.granite_hybrid(config, _permuted(config, weights)),
    ),
    "falcon-h1": TinyModel(
        "falcon-h1",
        _model("falcon-h1", "falcon_h1", **hybrids.FALCON_H1),
        hybrids.mamba2_keys,
        hybrids.falcon_h1,
    ),
    "kimi-linear": TinyModel(
        "kimi-linear",
        _model("kimi-linear", "kimi_linear", **hybrids.KIMI_LINEAR),
        hybrids.kimi_linear_keys,
        hybrids.kimi_linear,
    ),
    "qwen3next": TinyModel(
        "qwen3next",
        _model("qwen3next", "qwen3_next", **hybrids.QWEN3_NEXT),
        hybrids.qwen3_next_keys,
        hybrids.qwen3_next,
    ),
    "qwen3next-old": TinyModel(
        "qwen3next",
        _model("qwen3next", "qwen3_next", **hybrids.QWEN3_NEXT),
        hybrids.qwen35_keys,
        hybrids.qwen3_next_joined,
    ),
    "qwen35": TinyModel(
        "qwen35",
        _model("qwen35", "qwen3_5", **hybrids.QWEN35),
        hybrids.qwen35_keys,
        hybrids.qwen35,
    ),
    "qwen35moe": TinyModel(
        "qwen35moe",
        _model("qwen35moe", "qwen3_5_moe", **hybrids.QWEN35_MOE),
        hybrids.qwen35_keys,
        hybrids.qwen35,
    ),
}

#: Models whose layer for multi-token prediction llama.cpp writes, and `models.mtp` reads.
PREDICTING = (
    "glm4moe", "deepseek-v3", "glm4-moe-lite", "qwen3next", "qwen35", "qwen35moe", "nemotron_h_moe",
)  # fmt: skip
