"""Rows of `gguf_architectures` for Gemma 3n and Gemma 4, whose layers have inputs of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping

from modelpack_engine.models import gguf_blocks
from modelpack_engine.models.gguf_hyperparameters import Config, Hyperparameters
from modelpack_engine.models.gguf_tensors import Target, half, matrix

_ROPE_FREQS = "rope_freqs.weight"
_PER_LAYER = "per_layer_token_embd.weight"
_ALTUP_INPUTS = 4  # of all files: the converter knows no other number

Names = Mapping[str, str | Target | tuple[Target, ...]]


def _per_layer(model: str) -> Names:
    return {
        "per_layer_token_embd": f"{model}.embed_tokens_per_layer",
        "per_layer_model_proj": f"{model}.per_layer_model_projection",
        "per_layer_proj_norm": f"{model}.per_layer_projection_norm",
    }


def _altup(module: str) -> tuple[Target, ...]:
    return tuple(Target(f"{module}.{at}", rows=matrix(at)) for at in range(_ALTUP_INPUTS - 1))


OUTER = _per_layer("model")
GEMMA3N_MODEL = "model.language_model"
GEMMA3N_OUTER: Names = {
    **_per_layer(GEMMA3N_MODEL),
    "token_embd": f"{GEMMA3N_MODEL}.embed_tokens",
    "output_norm": f"{GEMMA3N_MODEL}.norm",
    "altup_proj": _altup(f"{GEMMA3N_MODEL}.altup_projections"),
    "altup_unembd_proj": _altup(f"{GEMMA3N_MODEL}.altup_unembed_projections"),
}
_LAYER_INPUT: Names = {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
#: What a layer of Gemma 3n has besides the tensors of Gemma 3.
GEMMA3N_LAYER: Names = {
    **_LAYER_INPUT,
    "altup_correct_coef": "altup.correction_coefs",
    "altup_correct_scale": Target("altup.correct_output_scale", is_parameter=True),
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
}
#: What a layer of Gemma 4 has besides the tensors of Gemma 3.
LAYER: Names = {
    **_LAYER_INPUT,
    "layer_output_scale": Target("layer_scalar", is_parameter=True),
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_inp.scale": Target("router.scale", is_parameter=True),
    "ffn_gate_up_exps": (
        Target("experts.switch_glu.gate_proj", rows=half(0)),
        Target("experts.switch_glu.up_proj", rows=half(1)),
    ),
    "ffn_gate_exps": "experts.switch_glu.gate_proj",
    "ffn_up_exps": "experts.switch_glu.up_proj",
    "ffn_down_exps": "experts.switch_glu.down_proj",
    "ffn_down_exps.scale": Target("router.per_expert_scale", is_parameter=True),
}


def gemma3n(values: Hyperparameters, config: Config) -> None:
    """Add the fields of mlx-lm's class for Gemma 3n, which are nested."""
    if not config["tie_word_embeddings"]:
        raise values.unsupported("a separate output layer")
    if values.integer("altup.num_inputs", _ALTUP_INPUTS) != _ALTUP_INPUTS:
        raise values.unsupported("another number of alternating updates")
    sliding = values.flags("attention.sliding_window_pattern") or []
    if len(sliding) < values.layers or len(set(sliding[: values.layers])) < 2:
        raise values.unsupported("windows in all layers, or in none")
    rank = values.file["blk.0.laurel_l.weight"] if values.has("laurel_l.weight") else None
    scales = values.numbers("activation_sparsity_scale")
    config["text_config"] = {
        **config,
        "layer_types": _layer_types(values, sliding),
        "num_kv_shared_layers": values.integer("attention.shared_kv_layers"),
        "sliding_window": values.positive("attention.sliding_window"),
        "rope_local_base_freq": values.number("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": values.number("final_logit_softcapping", 30.0),
        # The file has numbers of standard deviations, the class parts of a normal distribution.
        "activation_sparsity_pattern": [(1 + math.erf(x / math.sqrt(2))) / 2 for x in scales],
        "hidden_size_per_layer_input": values.integer("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": config["vocab_size"],
        "altup_num_inputs": _ALTUP_INPUTS,
        "altup_active_idx": values.integer("altup.active_idx", 0),
        "altup_coef_clip": None,
        "altup_correct_scale": True,
        "laurel_rank": 0 if rank is None else rank.shape[0],
    }


def _layer_types(values: Hyperparameters, sliding: list[bool]) -> list[str]:
    return [
        "sliding_attention" if slides else "full_attention" for slides in sliding[: values.layers]
    ]


def gemma4(values: Hyperparameters, config: Config) -> None:
    """Add the fields of mlx-lm's class for Gemma 4 to the config of a file."""
    sliding = values.flags("attention.sliding_window_pattern") or []
    if len(sliding) < values.layers or len(set(sliding[: values.layers])) < 2:
        raise values.unsupported("windows in all layers, or in none")
    own_keys = values.layers - values.integer("attention.shared_kv_layers", 0)
    full = [layer for layer in range(values.layers) if not sliding[layer]]
    heads, widths = (
        values.each_layer("attention.head_count_kv"),
        values.each_layer("feed_forward_length"),
    )
    config |= {
        "layer_types": _layer_types(values, sliding),
        "num_kv_shared_layers": values.layers - own_keys,
        "head_dim": values.integer("attention.key_length_swa"),
        "global_head_dim": values.head_dim,
        "num_key_value_heads": heads[sliding.index(True)],
        "num_global_key_value_heads": heads[full[0]],
        "attention_k_eq_v": f"blk.{full[0]}.attn_v.weight" not in values.file,
        "sliding_window": values.positive("attention.sliding_window"),
        "intermediate_size": min(widths),
        "use_double_wide_mlp": max(widths) > min(widths),
        "final_logit_softcapping": values.number("final_logit_softcapping", 0.0) or None,
        "hidden_size_per_layer_input": values.integer("embedding_length_per_layer_input", 0),
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": config["rope_theta"],
                "partial_rotary_factor": _rotated_part(values),
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": values.number("rope.freq_base_swa", 10000.0),
            },
        },
    }
    if _PER_LAYER in values.file:
        config["vocab_size_per_layer_input"] = values.file[_PER_LAYER].shape[0]
    if experts := values.integer("expert_count", 0):
        config |= {
            "enable_moe_block": True,
            "num_experts": experts,
            "top_k_experts": values.experts()[1],
            "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        }


def is_unused(values: Hyperparameters, tensor: str) -> bool:
    """Return whether the class needs no such tensor: keys and values of layers that share others'.

    The factors of the rope are in the config.
    """
    prefix, _, stem = tensor.partition(".")
    layer, _, stem = stem.partition(".")
    if prefix != "blk":
        return tensor == _ROPE_FREQS
    shared = values.integer("attention.shared_kv_layers", 0)
    names = ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")
    return stem in names and layer.isdecimal() and int(layer) >= values.layers - shared


def _rotated_part(values: Hyperparameters) -> float:
    """Return the part of each head that rotates: the other factors of the rope are very large."""
    if _ROPE_FREQS not in values.file:
        raise values.metadata.error(f"the tensor {_ROPE_FREQS!r} is missing")
    factors = gguf_blocks.dense(values.file[_ROPE_FREQS]).reshape(-1)
    if 2 * len(factors) != values.head_dim:
        raise values.metadata.error(
            f"expected {values.head_dim // 2} rope factors, got {len(factors)}"
        )
    rotated = int((factors == 1).sum())
    if not ((factors[:rotated] == 1).all() and (factors[rotated:] > 1e20).all()):
        raise values.unsupported("other factors of its rope")
    return rotated / len(factors)
