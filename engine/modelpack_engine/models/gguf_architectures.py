"""Map llama.cpp's architectures to mlx-lm's: names of tensors, config fields, small differences.

`ARCHITECTURES` has a row for each architecture that loads; others are rejected by name. A row
needs a tiny model in tests/engine/loaders/tiny_models.py, whose logits are compared with mlx-lm's
and with llama.cpp's. Sources: llama.cpp src/models/*.cpp and conversion/*.py for the contents of a
file, mlx_lm/models/*.py for the fields of a class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from modelpack_engine.models import gguf_gemma as gemma
from modelpack_engine.models import gguf_recurrent as recurrent
from modelpack_engine.models.gguf_file import GGUFFile, Metadata
from modelpack_engine.models.gguf_hyperparameters import (
    SIGMOID,
    SOFTMAX,
    Config,
    Hyperparameters,
    check_sigmoid,
    rope_scaling,
)
from modelpack_engine.models.gguf_tensors import (
    Target,
    by_head,
    halves,
    halves_by_size,
    heads_joined,
    heads_of,
    keys_by_head,
    minus_one,
    one_row,
    transposed,
    values_by_head,
)

# From the stem of a tensor's name to the path of its module: a string, or targets for tensors that
# do not become a parameter as they are.
Names = Mapping[str, str | Target | tuple[Target, ...]]
#: The path of the module and the name of the parameter for each target of a tensor.
Targets = list[tuple[str, str, Target]]


def _parameter(path: str) -> Target:
    """Return a target that is a parameter, and not a module with a weight."""
    return Target(path, is_parameter=True)


def _shifted(names: Names) -> Names:
    """Return `names` for norms that are stored as 1 + w where the class wants w."""
    return {
        name: Target(path, values=minus_one)
        if isinstance(path, str) and path.endswith("norm")
        else path
        for name, path in names.items()
    }


def _shifted_weights(names: Names) -> Names:
    """Return `names` for norms that have a bias, which is not shifted."""
    shifted = {f"{name}.weight": path for name, path in names.items()}
    return {**names, **_shifted(shifted)}


def _experts(module: str, router: str = "gate", switch: str = "switch_mlp") -> Names:
    return {
        "ffn_gate_inp": f"{module}.{router}",
        "ffn_gate_exps": f"{module}.{switch}.gate_proj",
        "ffn_up_exps": f"{module}.{switch}.up_proj",
        "ffn_down_exps": f"{module}.{switch}.down_proj",
    }


def _mlp(module: str, suffix: str = "") -> Names:
    return {f"ffn_{part}{suffix}": f"{module}.{part}_proj" for part in ("gate", "up", "down")}


# Experts that are chosen by a score with a bias for each, and experts that all tokens share.
_ROUTED: Names = {
    **_mlp("mlp"),
    **_mlp("mlp.shared_experts", "_shexp"),
    **_experts("mlp"),
    "exp_probs_b": _parameter("mlp.gate.e_score_correction_bias"),
}
_OUTER: Names = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# What a layer for multi-token prediction has around its block, as modules of `models.mtp.MtpHead`.
_NEXTN: Names = {
    "nextn.enorm": "embedding_norm",
    "nextn.hnorm": "state_norm",
    "nextn.eh_proj": "projection",
    "nextn.shared_head_norm": "norm",
    "nextn.embed_tokens": "embed_tokens",
    "nextn.shared_head_head": "head",
}
_NORM: Names = {"attn_norm": "input_layernorm"}
_QKV: Names = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
# For classes that rotate halves of a head; llama.cpp rotates pairs.
_QKV_OF_PAIRS: Names = {
    **_QKV,
    "attn_q": Target("self_attn.q_proj", rows=halves("num_attention_heads")),
    "attn_k": Target("self_attn.k_proj", rows=halves("num_key_value_heads")),
}
_ATTENTION: Names = {**_NORM, **_QKV}
_QK_NORM: Names = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FFN_NORM: Names = {"ffn_norm": "post_attention_layernorm"}
_LATER_NORMS: Names = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LLAMA: Names = {**_ATTENTION, **_FFN_NORM, **_mlp("mlp")}
_GEMMA: Names = {
    **_ATTENTION,
    **_mlp("mlp"),
    **_LATER_NORMS,
    "ffn_norm": "pre_feedforward_layernorm",
}
_JOINED_QKV: Names = {
    "attn_qkv": tuple(
        Target(f"self_attn.{part}_proj", rows=heads_of(at)) for at, part in enumerate("qkv")
    ),
}
_PHI2: Names = {
    **_ATTENTION,
    **_JOINED_QKV,
    "attn_output": "self_attn.dense",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_DECI: Names = {
    **_LLAMA,
    "attn_q": Target("self_attn.q_proj", rows=halves_by_size),
    "attn_k": Target("self_attn.k_proj", rows=halves_by_size),
}
_PHI3: Names = {
    **_NORM,
    **_FFN_NORM,
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_STARCODER2: Names = {**_ATTENTION, **_FFN_NORM, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
_QWEN2_MOE: Names = {
    **_ATTENTION,
    **_FFN_NORM,
    **_experts("mlp"),
    **_mlp("mlp.shared_expert", "_shexp"),
    "ffn_gate_inp_shexp": Target("mlp.shared_expert_gate", values=one_row),
}
_GLM4: Names = {
    **_ATTENTION,
    **_FFN_NORM,
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_GRANITE: Names = {**_LLAMA, **_QKV_OF_PAIRS}
_GPT_OSS: Names = {
    **_ATTENTION,
    "post_attention_norm": "post_attention_layernorm",
    "attn_sinks": _parameter("self_attn.sinks"),
    **_experts("mlp", "router", "experts"),
}

#: The field of a config whose weights have rows as llama.cpp permutes them: pairs of a rotation.
PERMUTED = "permuted_by_llama_cpp"


@dataclass(frozen=True, slots=True)
class Architecture:
    """How a GGUF architecture becomes an mlx-lm model.

    `layer` maps the names of tensors inside a layer to paths inside a layer, which is in `layers`;
    `outer` maps those of other tensors. `extend` adds fields to the config. With `partial_rope`,
    the class rotates a part of each head; without `scaled_rope`, a scaled rotation is rejected.
    With `rotates_pairs`, llama.cpp's converter permutes the rows of queries and keys, which stay in
    this order: the class rotates pairs, as it can, and not halves of a head.
    Tensors for which `is_unused` is true are left out. `empty_layers` returns those without any.
    Without `attends`, no layer has heads. `scalars` returns parameters that a file has as metadata:
    for a path inside of a layer, a number for each layer. `predicting` has the names inside a layer
    for multi-token prediction where they are not those of `layer`.
    """

    model_type: str
    layer: Names
    extend: Callable[[Hyperparameters, Config], None] = field(default=lambda values, config: None)
    outer: Names = field(default_factory=lambda: _OUTER)
    layers: str = "model.layers"
    partial_rope: bool = False
    scaled_rope: bool = True
    rotates_pairs: bool = False
    is_unused: Callable[[Hyperparameters, str], bool] = lambda values, tensor: False
    empty_layers: Callable[[Hyperparameters], set[int]] = lambda values: set()
    attends: bool = True
    scalars: Callable[[Hyperparameters], Mapping[str, list[float]]] = lambda values: {}
    predicting: Names | None = None

    def config(self, values: Hyperparameters) -> Config:
        """Return the config for mlx-lm's class. Raises `ModelLoadError`, naming a missing value."""
        embeddings = "token_embd.weight"
        if embeddings not in values.file:
            raise values.metadata.error(f"the tensor {embeddings!r} is missing")
        config: Config = {
            "model_type": self.model_type,
            "hidden_size": values.integer("embedding_length"),
            "num_hidden_layers": values.layers,
            "max_position_embeddings": values.integer("context_length"),
            "vocab_size": values.file[embeddings].shape[0],
            "tie_word_embeddings": "output.weight" not in values.file,
        }
        if "feed_forward_length" in values:
            config["intermediate_size"] = values.largest("feed_forward_length")
        if "attention.layer_norm_rms_epsilon" in values:
            config["rms_norm_eps"] = values.number("attention.layer_norm_rms_epsilon")
        if "attention.layer_norm_epsilon" in values:
            config["layer_norm_eps"] = values.number("attention.layer_norm_epsilon")
        if self.attends:
            self._add_attention(values, config)
        if self.rotates_pairs:
            # Configs of other files may have the first field; adapters have to tell them apart.
            config["rope_traditional"] = config[PERMUTED] = True
        self.extend(values, config)
        return config

    def _add_attention(self, values: Hyperparameters, config: Config) -> None:
        """Add the fields of heads and of their rope."""
        if values.heads < 1 or values.head_dim < 1:
            raise values.metadata.error("the model has no attention heads, or heads of size 0")
        config |= {
            "num_attention_heads": values.heads,
            "num_key_value_heads": values.key_heads,
            "head_dim": values.head_dim,
            "rope_theta": values.number("rope.freq_base", 10000.0),
        }
        scaling = rope_scaling(values)
        if scaling and not self.scaled_rope:
            raise values.unsupported(f"rope scaling {scaling['rope_type']!r}")
        if scaling:
            config["rope_scaling"] = scaling
        rotated = values.integer("rope.dimension_count", values.head_dim)
        if self.partial_rope:
            config["partial_rotary_factor"] = rotated / values.head_dim
        elif rotated not in (0, values.head_dim):
            raise values.unsupported("rope on a part of each head")

    def targets(self, tensor: str) -> Targets:
        """Return the module's path and the parameter's name for each target of a tensor.

        There are none for an unknown tensor.
        """
        parts = tensor.split(".", 2)
        if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal():
            return _targets(self.layer, parts[2], f"{self.layers}.{parts[1]}.")
        return _targets(self.outer, tensor, "")

    def predicting_targets(self, tensor: str) -> Targets:
        """Return the targets in `models.mtp.MtpHead` of a tensor of a layer that it drafts with."""
        name = tensor.split(".", 2)[2]
        return _targets(_NEXTN, name, "") or _targets(self.predicting or self.layer, name, "block.")


def _targets(names: Names, tensor: str, prefix: str) -> Targets:
    stem, _, parameter = tensor.rpartition(".")
    if parameter not in ("weight", "bias"):
        stem, parameter = tensor, ""
    found = names.get(f"{stem}.{parameter}", names.get(stem, ()))
    if isinstance(found, str):
        found = Target(found)
    targets = found if isinstance(found, tuple) else (found,)
    return [
        (*target.resolved(prefix, parameter), target)
        for target in targets
        if parameter or target.is_parameter
    ]


def _llama(values: Hyperparameters, config: Config) -> None:
    config["attention_bias"] = values.has("attn_q.bias")
    config["mlp_bias"] = values.has("ffn_gate.bias")
    _llama3_rope(values, config)


def _exaone(values: Hyperparameters, config: Config) -> None:
    """Add the rope of Llama 3, on halves of each head."""
    _llama3_rope(values, config)
    config["attention_bias"] = config["mlp_bias"] = False


def _llama3_rope(values: Hyperparameters, config: Config) -> None:
    if "rope_freqs.weight" in values.file:
        # This only selects the class of the rope; `GGUFLoader` sets the file's own frequencies.
        config["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0}


def _apertus(values: Hyperparameters, config: Config) -> None:
    config |= {
        "attention_bias": False,
        "mlp_bias": values.has("ffn_up.bias"),
        "post_norm": False,
        "qk_norm": True,
    }
    _llama3_rope(values, config)


def _xielu(values: Hyperparameters) -> dict[str, list[float]]:
    """Return the parameters of xIELU, whose keys do not begin with the architecture."""
    found = {}
    for name in ("alpha_n", "alpha_p", "beta", "eps"):
        found[f"mlp.act_fn.{name}"] = values.numbers_at(f"xielu.{name}")
    return found


def _deci(values: Hyperparameters, config: Config) -> None:
    """Add the layers of a searched architecture: some have no attention, or no feed-forward."""
    _llama(values, config)
    blocks = []
    for heads, keys, size in zip(
        values.each_layer("attention.head_count"),
        values.each_layer("attention.head_count_kv"),
        values.each_layer("feed_forward_length"),
        strict=True,
    ):
        if heads not in (0, values.heads) or (heads and not keys):
            raise values.unsupported("linear attention, or another number of heads in some layers")
        attention = {"n_heads_in_group": heads // keys} if heads else {"no_op": True}
        # The class rounds two thirds of this up to 256.
        feed = {"ffn_mult": 1.5 * size / config["hidden_size"]} if size else {"no_op": True}
        blocks.append({"attention": attention, "ffn": feed})
    config["block_configs"] = blocks


def _empty_of_deci(values: Hyperparameters) -> set[int]:
    """Return the layers that have neither attention nor a feed-forward."""
    heads = values.each_layer("attention.head_count")
    sizes = values.each_layer("feed_forward_length")
    return {at for at, pair in enumerate(zip(heads, sizes, strict=True)) if pair == (0, 0)}


def _mixtral(values: Hyperparameters, config: Config) -> None:
    _llama(values, config)
    _count_experts(values, config, "num_local_experts")
    if values.head_dim * values.heads != config["hidden_size"]:
        raise values.unsupported("experts, and heads of another size than its width / heads")


def _count_experts(values: Hyperparameters, config: Config, name: str = "num_experts") -> None:
    config[name], config["num_experts_per_tok"] = values.experts()


def _mistral3(values: Hyperparameters, config: Config) -> None:
    """Add the rope, and the growth of attention with the position that Llama 4 introduced."""
    context = values.integer(
        "rope.scaling.original_context_length", values.integer("context_length")
    )
    rope: Config = config.pop("rope_scaling", None) or {"rope_type": "default"}
    if rope["rope_type"] == "yarn":
        attention = values.number("rope.scaling.yarn_log_multiplier", 0.0)
        rope |= {"mscale": 1.0, "mscale_all_dim": attention}
    config["rope_parameters"] = {
        **rope,
        "rope_theta": config["rope_theta"],
        "original_max_position_embeddings": context,
        "llama_4_scaling_beta": values.number("attention.temperature_scale", 0.0),
    }


def _nemotron(values: Hyperparameters, config: Config) -> None:
    config |= {
        "hidden_act": "relu2",
        "norm_eps": config.pop("layer_norm_eps", None),
        "attention_bias": values.has("attn_q.bias"),
        "mlp_bias": values.has("ffn_up.bias"),
    }


def _smollm3(values: Hyperparameters, config: Config) -> None:
    config["no_rope_layer_interval"] = 4


def _qwen2_moe(values: Hyperparameters, config: Config) -> None:
    _count_experts(values, config)
    config["moe_intermediate_size"] = values.integer("expert_feed_forward_length")
    config["shared_expert_intermediate_size"] = values.integer("expert_shared_feed_forward_length")
    config.setdefault("intermediate_size", config["moe_intermediate_size"])


def _qwen3_moe(values: Hyperparameters, config: Config) -> None:
    _count_experts(values, config)
    config |= {
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    config.setdefault("intermediate_size", config["moe_intermediate_size"])


def _routed_experts(values: Hyperparameters, config: Config) -> None:
    """Add the fields of classes whose experts are those of DeepSeek V2 or V3."""
    _count_experts(values, config, "n_routed_experts")
    config |= {
        "n_shared_experts": values.integer("expert_shared_count", 0) or None,
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "first_k_dense_replace": values.integer("leading_dense_block_count", 0),
        "norm_topk_prob": values.flag("expert_weights_norm", False),
        "routed_scaling_factor": values.number("expert_weights_scale", 0.0) or 1.0,
        "n_group": values.integer("expert_group_count", 0) or 1,
        "topk_group": values.integer("expert_group_used_count", 0) or 1,
    }


def _minimax_m2(values: Hyperparameters, config: Config) -> None:
    check_sigmoid(values)
    _count_experts(values, config, "num_local_experts")
    size = values.integer("expert_feed_forward_length")
    config |= {
        "intermediate_size": size,
        "shared_intermediate_size": 0,
        "rotary_dim": values.integer("rope.dimension_count", values.head_dim),
    }


def _llama4(values: Hyperparameters, config: Config) -> None:
    if config["tie_word_embeddings"]:
        raise values.unsupported("tied embeddings")
    chunk = values.integer("attention.sliding_window", 8192)
    if not chunk:
        raise values.unsupported("attention that is not cut into chunks")
    config.setdefault("rope_scaling", None)
    _llama3_rope(values, config)
    _count_experts(values, config, "num_local_experts")
    config |= {
        "attention_bias": values.has("attn_q.bias"),
        "attention_chunk_size": chunk,
        "interleave_moe_layer_step": values.integer("interleave_moe_layer_step"),
        "intermediate_size_mlp": config["intermediate_size"],
        "intermediate_size": values.integer("expert_feed_forward_length"),
        # llama.cpp tells Maverick, which has no norms of queries and keys, by its experts.
        "use_qk_norm": values.integer("expert_count") != 128,
    }
    config["text_config"] = dict(config)


def _gpt2(values: Hyperparameters, config: Config) -> None:
    config |= {
        "n_embd": config["hidden_size"],
        "n_head": config["num_attention_heads"],
        "n_layer": config["num_hidden_layers"],
        "n_ctx": config["max_position_embeddings"],
        "n_positions": config["max_position_embeddings"],
        "layer_norm_epsilon": values.number("attention.layer_norm_epsilon"),
    }


def _openelm(values: Hyperparameters, config: Config) -> None:
    width = values.positive("embedding_length")
    config |= {
        "model_dim": width,
        "num_transformer_layers": values.layers,
        "num_query_heads": values.each_layer("attention.head_count"),
        "num_kv_heads": values.each_layer("attention.head_count_kv"),
        # A file has the sizes of the layers, which the class computes and rounds.
        "ffn_multipliers": [size / width for size in values.each_layer("feed_forward_length")],
        "ffn_dim_divisor": 1,
        "normalize_qk_projections": values.has("attn_q_norm.weight"),
        "share_input_output_layers": config["tie_word_embeddings"],
        "rope_freq_constant": config["rope_theta"],
    }


def _qwen(values: Hyperparameters, config: Config) -> None:
    if config["rope_theta"] != 10000:
        raise values.unsupported(f"a rope of base {config['rope_theta']:g}")
    config["layer_norm_epsilon"] = values.number("attention.layer_norm_rms_epsilon")
    config["kv_channels"] = config["head_dim"]


def _gpt_neox(values: Hyperparameters, config: Config) -> None:
    config |= {
        "rotary_emb_base": config["rope_theta"],
        "rotary_pct": config["partial_rotary_factor"],
        "use_parallel_residual": values.flag("use_parallel_residual"),
    }


def _glm4_moe(values: Hyperparameters, config: Config) -> None:
    check_sigmoid(values)
    if config["tie_word_embeddings"]:
        raise values.unsupported("tied embeddings")
    _routed_experts(values, config)
    config.setdefault("rope_scaling", None)
    config["attention_bias"] = values.has("attn_q.bias")
    config["use_qk_norm"] = values.has("attn_q_norm.weight")


def _dots1(values: Hyperparameters, config: Config) -> None:
    check_sigmoid(values)
    _routed_experts(values, config)


def _bailing_moe2(values: Hyperparameters, config: Config) -> None:
    check_sigmoid(values)
    if values.head_dim * values.heads != config["hidden_size"]:
        raise values.unsupported("heads of another size than its width / heads")
    _routed_experts(values, config)
    config |= {
        "num_experts": config.pop("n_routed_experts"),
        "num_shared_experts": config.pop("n_shared_experts") or 0,
        "score_function": "sigmoid",
        "use_qk_norm": True,
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": values.integer(
            "expert_shared_feed_forward_length", config["moe_intermediate_size"]
        ),
    }


def _deepseek1(values: Hyperparameters, config: Config) -> None:
    """Add the experts of DeepSeek MoE 16B, whose scores are those of the softmax."""
    if config["tie_word_embeddings"]:
        raise values.unsupported("tied embeddings")
    if values.head_dim * values.heads != config["hidden_size"]:
        raise values.unsupported("heads of another size than its width / heads")
    _routed_experts(values, config)
    if config["norm_topk_prob"] or config["routed_scaling_factor"] != 1.0:
        raise values.unsupported("normalised or scaled scores of experts")
    config["attention_bias"] = values.has("attn_q.bias")


def _period(values: Hyperparameters, config: Config) -> None:
    """Add sliding windows in all layers but each fourth, which has no rope."""
    period = _sliding_pattern(values, 4)
    if period != 4:
        raise values.unsupported("another pattern of sliding windows")
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    config["sliding_window"] = values.positive("attention.sliding_window")
    config["layer_types"] = [kinds[layer % 4] for layer in range(values.layers)]


def _afmoe(values: Hyperparameters, config: Config) -> None:
    check_sigmoid(values)
    _count_experts(values, config)
    _period(values, config)
    config |= {
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "num_shared_experts": values.integer("expert_shared_count", 0),
        "num_dense_layers": values.integer("leading_dense_block_count", 0),
        "route_norm": values.flag("expert_weights_norm", False),
        "route_scale": values.number("expert_weights_scale", 1.0),
        "mup_enabled": True,
    }


def _exaone_moe(values: Hyperparameters, config: Config) -> None:
    check_sigmoid(values)
    _routed_experts(values, config)
    _period(values, config)
    config.setdefault("rope_scaling", None)
    _llama3_rope(values, config)
    dense = config["first_k_dense_replace"]
    config |= {
        "num_experts": config.pop("n_routed_experts"),
        "num_shared_experts": config.pop("n_shared_experts") or 0,
        "is_moe_layer": [layer >= dense for layer in range(values.layers)],
    }


def _hunyuan_moe(values: Hyperparameters, config: Config) -> None:
    if not config.pop("tie_word_embeddings"):
        raise values.unsupported("a separate output layer")
    if values.head_dim * values.heads != config["hidden_size"]:
        raise values.unsupported("heads of another size than its width / heads")
    _count_experts(values, config)
    size = config["intermediate_size"]
    if size <= 0:
        raise values.unsupported("experts without a size")
    shared, rest = divmod(values.integer("expert_shared_feed_forward_length", 0), size)
    if rest:
        raise values.unsupported("shared experts of another size than the others")
    config |= {
        "attention_bias": values.has("attn_q.bias"),
        "moe_topk": config.pop("num_experts_per_tok"),
        "num_shared_expert": shared,
        "use_mixed_mlp_moe": shared > 0,
        "use_qk_norm": values.has("attn_q_norm.weight"),
        "use_cla": False,
        "cla_share_factor": 2,
        # llama.cpp's converter has put alpha into the base.
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1.0},
    }


def _starcoder(values: Hyperparameters, config: Config) -> None:
    if values.key_heads != 1:
        raise values.unsupported("more than one head of keys")
    config |= {
        "n_embd": config["hidden_size"],
        "n_head": values.heads,
        "n_layer": values.layers,
        "n_inner": config["intermediate_size"],
        "n_positions": config["max_position_embeddings"],
        "layer_norm_epsilon": values.number("attention.layer_norm_epsilon"),
    }


def _deepseek(values: Hyperparameters, config: Config) -> None:
    """Add the fields of multi-head latent attention (MLA) and of the experts."""
    if config["tie_word_embeddings"]:
        raise values.unsupported("tied embeddings")
    if values.number("attention.temperature_scale", 0.0) and config["model_type"] != "mistral4":
        raise values.unsupported("attention scaled by the position")
    _routed_experts(values, config)
    split = values.has("attn_k_b.weight")  # its metadata are those of attention to one latent head
    head_dim = values.integer("attention.key_length_mla" if split else "attention.key_length")
    rotated = values.integer("rope.dimension_count")
    config |= {
        "q_lora_rank": values.integer("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": values.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": head_dim - rotated,
        "v_head_dim": values.integer(
            "attention.value_length_mla" if split else "attention.value_length"
        ),
    }
    if scaling := config.get("rope_scaling"):
        attention = 10 * values.number("rope.scaling.yarn_log_multiplier", 0.0)
        scaling |= {"mscale": attention, "mscale_all_dim": attention}


def _deepseek2(values: Hyperparameters, config: Config) -> None:
    _deepseek(values, config)
    if values.integer("expert_gating_func", SOFTMAX) != SOFTMAX:
        raise values.unsupported("experts that are scored by another function")
    if config["n_group"] > 1 or config["norm_topk_prob"]:
        raise values.unsupported("groups of experts, or normalised scores, of a softmax")
    config.setdefault("rope_scaling", {"type": "yarn", "factor": 1.0})


def _mistral4(values: Hyperparameters, config: Config) -> None:
    _deepseek(values, config)
    if values.integer("expert_gating_func", SOFTMAX) != SOFTMAX:
        raise values.unsupported("experts that are scored by another function")
    rope: Config = config.pop("rope_scaling", None) or {"rope_type": "default", "type": "default"}
    context = rope.get("original_max_position_embeddings", values.integer("context_length"))
    # The class has one field for both.
    if values.integer("attention.temperature_length", context) != context:
        raise values.unsupported("attention scaled by the position from another length on")
    config["rope_parameters"] = {
        **rope,
        "rope_theta": config["rope_theta"],
        "original_max_position_embeddings": context,
        "llama_4_scaling_beta": values.number("attention.temperature_scale", 0.0),
    }


def _phi3(values: Hyperparameters, config: Config) -> None:
    config["original_max_position_embeddings"] = values.integer(
        "rope.scaling.original_context_length", config["max_position_embeddings"]
    )
    config["sliding_window"] = values.integer("attention.sliding_window", 0)


def _starcoder2(values: Hyperparameters, config: Config) -> None:
    config["norm_epsilon"] = config.pop("layer_norm_eps", None)
    config["norm_epsilon"] = values.number("attention.layer_norm_epsilon")
    config["sliding_window"] = values.integer("attention.sliding_window", 0)


def _attention_scalar(values: Hyperparameters, deepest: int) -> float:
    """Return the square of the queries' divisor; a Gemma of `deepest` layers has its own."""
    if values.layers == deepest:
        return values.integer("embedding_length") // values.heads
    return values.head_dim


def _gemma2(values: Hyperparameters, config: Config) -> None:
    config |= {
        "query_pre_attn_scalar": _attention_scalar(values, 46),
        "attn_logit_softcapping": values.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": values.number("final_logit_softcapping", 30.0),
        "sliding_window": values.integer("attention.sliding_window", 4096),
    }
    if not config["tie_word_embeddings"]:
        raise values.unsupported("a separate output layer")


def _gemma3(values: Hyperparameters, config: Config) -> None:
    if values.number("final_logit_softcapping", 0.0):
        raise values.unsupported("softcapped logits")
    window = values.integer("attention.sliding_window", 0)
    pattern = _sliding_pattern(values, 6) if window else 1
    config |= {
        "query_pre_attn_scalar": _attention_scalar(values, 62),
        "sliding_window": window or config["max_position_embeddings"],
        "sliding_window_pattern": pattern,
        "rope_local_base_freq": values.number("rope.freq_base_swa", 10000.0),
    }


def _gpt_oss(values: Hyperparameters, config: Config) -> None:
    if _sliding_pattern(values, 2) != 2:
        raise values.unsupported("another pattern of sliding windows")
    if config["tie_word_embeddings"]:
        raise values.unsupported("tied embeddings")
    kinds = ("sliding_attention", "full_attention")
    _count_experts(values, config, "num_local_experts")
    config |= {
        "intermediate_size": values.integer("expert_feed_forward_length"),
        "sliding_window": values.positive("attention.sliding_window"),
        "layer_types": [kinds[layer % 2] for layer in range(values.layers)],
    }


def _cohere(values: Hyperparameters, config: Config) -> None:
    config["logit_scale"] = values.number("logit_scale")
    config["attention_bias"] = values.has("attn_q.bias")
    config["use_qk_norm"] = values.has("attn_q_norm.weight")
    if not config.pop("tie_word_embeddings"):
        raise values.unsupported("a separate output layer")


def _cohere2(values: Hyperparameters, config: Config) -> None:
    _cohere(values, config)
    config["sliding_window"] = values.positive("attention.sliding_window")
    config["sliding_window_pattern"] = _sliding_pattern(values, 4)


def _olmo3(values: Hyperparameters, config: Config) -> None:
    period = _sliding_pattern(values, 4)
    kinds = ["sliding_attention"] * (period - 1) + ["full_attention"]
    config["sliding_window"] = values.positive("attention.sliding_window")
    config["layer_types"] = [kinds[layer % period] for layer in range(values.layers)]


def _glm4(values: Hyperparameters, config: Config) -> None:
    config["attention_bias"] = values.has("attn_q.bias") or values.has("attn_qkv.bias")


def _granite(values: Hyperparameters, config: Config) -> None:
    config |= {
        "attention_multiplier": values.number("attention.scale", values.head_dim**-0.5),
        "embedding_multiplier": values.number("embedding_scale", 1.0),
        "residual_multiplier": values.number("residual_scale", 1.0),
        "logits_scaling": values.number("logit_scale", 1.0),
        "attention_bias": values.has("attn_q.bias"),
        "mlp_bias": values.has("ffn_gate.bias"),
    }


def _minicpm(values: Hyperparameters, config: Config) -> None:
    """Add the scales; old files have none, and are of MiniCPM 1B or 2B."""
    _granite(values, config)
    config |= {
        "embedding_multiplier": values.number("embedding_scale", 12.0),
        "residual_multiplier": values.number("residual_scale", 1.4 / values.layers**0.5),
        "logits_scaling": values.number("logit_scale", config["hidden_size"] / 256),
    }


def _granite_moe(values: Hyperparameters, config: Config) -> None:
    _granite(values, config)
    _count_experts(values, config, "num_local_experts")


def _granite_hybrid(values: Hyperparameters, config: Config) -> None:
    _granite(values, config)
    recurrent.granite_hybrid(values, config)


def _stablelm(values: Hyperparameters, config: Config) -> None:
    if values.has("attn_q_norm.weight"):
        raise values.unsupported("norms of queries and keys")
    config["use_qkv_bias"] = values.has("attn_q.bias")
    config["use_parallel_residual"] = values.flag("use_parallel_residual", False)


def _exaone4(values: Hyperparameters, config: Config) -> None:
    window = values.integer("attention.sliding_window", 0)
    config.setdefault("rope_scaling", None)
    _llama3_rope(values, config)
    config["sliding_window"] = window or None
    period = _sliding_pattern(values, 4) if window else 0
    config["sliding_window_pattern"] = "L" * (period - 1) + "G" if period else None


def _hunyuan(values: Hyperparameters, config: Config) -> None:
    config["attention_bias"] = values.has("attn_q.bias")
    config["use_qk_norm"] = values.has("attn_q_norm.weight")


def _ernie(values: Hyperparameters, config: Config) -> None:
    config["use_bias"] = values.has("attn_q.bias")


def _ernie_moe(values: Hyperparameters, config: Config) -> None:
    _ernie(values, config)
    count, used = values.experts()
    config |= {
        "moe_num_experts": count,
        "moe_k": used,
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "moe_num_shared_experts": values.integer("expert_shared_count", 0),
        "moe_layer_start_index": values.integer("leading_dense_block_count", 0),
        "moe_layer_interval": values.integer("interleave_moe_layer_step"),
    }


def _seed_oss(values: Hyperparameters, config: Config) -> None:
    config["attention_bias"] = values.has("attn_q.bias")
    config["attention_out_bias"] = values.has("attn_output.bias")


def _sliding_pattern(values: Hyperparameters, default: int) -> int:
    """Return n: every n-th layer attends to the whole context, the others to a window."""
    name = "attention.sliding_window_pattern"
    sliding = values.flags(name)
    if sliding is None:
        return values.integer(name, default)
    if sliding != [layer % default < default - 1 for layer in range(len(sliding))]:
        raise values.unsupported("another pattern of sliding windows")
    return default


_WITHOUT_HEAD: Names = {name: path for name, path in _OUTER.items() if name != "output"}
_PHI2_OUTER: Names = {**_OUTER, "output_norm": "model.final_layernorm"}
_HUNYUAN_NORMS: Names = {
    "attn_q_norm": "self_attn.query_layernorm",
    "attn_k_norm": "self_attn.key_layernorm",
}
_LATE_NORMS: Names = {**_QKV, **_QK_NORM, **_LATER_NORMS, **_mlp("mlp")}
_ERNIE_MOE: Names = {
    **_LLAMA,
    **_ROUTED,
    "exp_probs_b": _parameter("mlp.moe_statics.e_score_correction_bias"),
}
_SEED_OSS: Names = {**_LLAMA, "post_attention_norm": "post_attention_layernorm"}
_GRANITE_MOE: Names = {
    **_NORM,
    **_FFN_NORM,
    **_QKV_OF_PAIRS,
    **_experts("block_sparse_moe", "router.layer"),
}
_MIXTRAL: Names = {**_ATTENTION, **_FFN_NORM, **_experts("block_sparse_moe")}
_QWEN3_MOE: Names = {**_ATTENTION, **_QK_NORM, **_FFN_NORM, **_experts("mlp")}
_GLM4_MOE: Names = {
    **_ATTENTION,
    **_QK_NORM,
    "post_attention_norm": "post_attention_layernorm",
    **_ROUTED,
}
_DOTS1: Names = {
    **_ATTENTION,
    **_QK_NORM,
    **_FFN_NORM,
    **_ROUTED,
    **_experts("mlp", switch="experts"),
}
_BAILING_MOE2: Names = {
    **_NORM,
    **_FFN_NORM,
    **_ROUTED,
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "attn_q_norm": "attention.query_layernorm",
    "attn_k_norm": "attention.key_layernorm",
    "ffn_gate_inp": "mlp.gate.gate_proj",
    "exp_probs_b": _parameter("mlp.gate.expert_bias"),
}
_MLA: Names = {
    **_NORM,
    **_FFN_NORM,
    **_ROUTED,
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_output": "self_attn.o_proj",
}
# Files from before April 2025 have keys and values in one tensor.
_DEEPSEEK3: Names = {
    **_MLA,
    "attn_k_b": "self_attn.embed_q",
    "attn_v_b": "self_attn.unembed_out",
    "attn_kv_b": (
        Target("self_attn.embed_q", rows=keys_by_head, values=transposed),
        Target("self_attn.unembed_out", rows=values_by_head),
    ),
}
_DEEPSEEK2: Names = {
    **_MLA,
    "attn_k_b": Target("self_attn.kv_b_proj", values=transposed, join=heads_joined),
    "attn_v_b": Target("self_attn.kv_b_proj", place=1, join=heads_joined),
    "attn_kv_b": "self_attn.kv_b_proj",
}
_DEEPSEEK1: Names = {**_NORM, **_FFN_NORM, **_ROUTED, **_QKV_OF_PAIRS}
_AFMOE: Names = {
    **_ATTENTION,
    **_QK_NORM,
    **_LATER_NORMS,
    "ffn_norm": "pre_mlp_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
    "attn_gate": "self_attn.gate_proj",
    **_ROUTED,
    **_experts("mlp", "router.gate", "experts"),
    "exp_probs_b": _parameter("mlp.expert_bias"),
}
_HUNYUAN_MOE: Names = {
    **_ATTENTION,
    **_FFN_NORM,
    **_HUNYUAN_NORMS,
    **_experts("mlp", "gate.wg"),
    **_mlp("mlp.shared_mlp", "_shexp"),
}
_CHATGLM: Names = {
    **_ATTENTION,
    **_FFN_NORM,
    **_JOINED_QKV,
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_MINIMAX_M2: Names = {
    **_ATTENTION,
    **_QK_NORM,
    **_FFN_NORM,
    **_experts("block_sparse_moe"),
    "exp_probs_b": _parameter("block_sparse_moe.e_score_correction_bias"),
}
_LLAMA4: Names = {
    **_ATTENTION,
    **_FFN_NORM,
    **_mlp("feed_forward"),
    **_mlp("feed_forward.shared_expert", "_shexp"),
    **_experts("feed_forward", "router", "experts"),
}
_GPT2: Names = {
    "attn_norm": "ln_1",
    "ffn_norm": "ln_2",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT_NEOX: Names = {
    **_NORM,
    **_FFN_NORM,
    "attn_qkv": Target("attention.query_key_value", rows=by_head),
    "attn_output": "attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_APERTUS: Names = {
    **_QKV,
    **_QK_NORM,
    "attn_norm": "attention_layernorm",
    "ffn_norm": "feedforward_layernorm",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OPENELM: Names = {
    "attn_norm": "attn_norm",
    "attn_qkv": "attn.qkv_proj",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "attn_output": "attn.out_proj",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "ffn.proj_1",
    "ffn_up": Target("ffn.proj_1", place=1),
    "ffn_down": "ffn.proj_2",
}
_QWEN: Names = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_gate": "mlp.w2",
    "ffn_up": "mlp.w1",
    "ffn_down": "mlp.c_proj",
}
_NEMOTRON: Names = {**_LLAMA, **_shifted_weights(_NORM), **_shifted_weights(_FFN_NORM)}

#: The architectures that load, by the name that GGUF files give them.
ARCHITECTURES: Mapping[str, Architecture] = {
    # Mistral, SmolLM2, … are written as llama.
    "llama": Architecture("llama", _LLAMA, _llama, rotates_pairs=True),
    "internlm2": Architecture("llama", _LLAMA, _llama, rotates_pairs=True),
    "exaone": Architecture("llama", _LLAMA, _exaone),
    "minicpm": Architecture("granite", _GRANITE, _minicpm),
    "apertus": Architecture("apertus", _APERTUS, _apertus, scalars=_xielu),
    "openelm": Architecture(
        "openelm",
        _OPENELM,
        _openelm,
        outer={
            "token_embd": "transformer.token_embeddings",
            "output_norm": "transformer.norm",
            "output": "lm_head",
        },
        layers="transformer.layers",
        scaled_rope=False,
    ),
    "qwen": Architecture(
        "qwen",
        _QWEN,
        _qwen,
        outer={
            "token_embd": "transformer.wte",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        layers="transformer.h",
        scaled_rope=False,
    ),
    "qwen2": Architecture("qwen2", _LLAMA),
    "qwen2moe": Architecture("qwen2_moe", _QWEN2_MOE, _qwen2_moe),
    "qwen3": Architecture("qwen3", {**_LLAMA, **_QK_NORM}),
    "qwen3moe": Architecture("qwen3_moe", _QWEN3_MOE, _qwen3_moe),
    # Models of pictures, without their encoder: text has one position where pictures have three.
    "qwen2vl": Architecture("qwen2", _LLAMA),
    "qwen3vl": Architecture("qwen3", {**_LLAMA, **_QK_NORM}),
    "qwen3vlmoe": Architecture("qwen3_moe", _QWEN3_MOE, _qwen3_moe),
    "smollm3": Architecture("smollm3", _LLAMA, _smollm3, rotates_pairs=True),
    "phi2": Architecture("phi", _PHI2, outer=_PHI2_OUTER, partial_rope=True, scaled_rope=False),
    "phi3": Architecture("phi3", _PHI3, _phi3, partial_rope=True, scaled_rope=False),
    "starcoder2": Architecture("starcoder2", _STARCODER2, _starcoder2),
    "gemma": Architecture(
        "gemma", _shifted(_LLAMA), outer=_shifted(_WITHOUT_HEAD), scaled_rope=False
    ),
    "gemma2": Architecture("gemma2", _shifted(_GEMMA), _gemma2, outer=_shifted(_OUTER)),
    "gemma3": Architecture(
        "gemma3_text", _shifted({**_GEMMA, **_QK_NORM}), _gemma3, outer=_shifted(_OUTER)
    ),
    "gemma4": Architecture(
        "gemma4_text",
        {**_GEMMA, **_QK_NORM, **gemma.LAYER},
        gemma.gemma4,
        outer={**_OUTER, **gemma.OUTER},
        scaled_rope=False,
        is_unused=gemma.is_unused,
    ),
    "gemma3n": Architecture(
        "gemma3n",
        {**_GEMMA, **_QK_NORM, **gemma.GEMMA3N_LAYER},
        gemma.gemma3n,
        outer=gemma.GEMMA3N_OUTER,
        layers=f"{gemma.GEMMA3N_MODEL}.layers",
        scaled_rope=False,
    ),
    "mistral3": Architecture("ministral3", _GRANITE, _mistral3),
    "olmoe": Architecture("olmoe", _QWEN3_MOE, _count_experts),
    "nemotron": Architecture(
        "nemotron",
        _NEMOTRON,
        _nemotron,
        outer={**_OUTER, "output_norm.weight": Target("model.norm", values=minus_one)},
        partial_rope=True,
        scaled_rope=False,
    ),
    "bailingmoe2": Architecture(
        "bailing_moe",
        _BAILING_MOE2,
        _bailing_moe2,
        outer={**_OUTER, "token_embd": "model.word_embeddings"},
        partial_rope=True,
    ),
    "deepseek2": Architecture("deepseek_v2", _DEEPSEEK2, _deepseek2, partial_rope=True),
    "deci": Architecture("nemotron-nas", _DECI, _deci, empty_layers=_empty_of_deci),
    "mistral4": Architecture("mistral4", _DEEPSEEK3, _mistral4, partial_rope=True),
    "dots1": Architecture("dots1", _DOTS1, _dots1),
    "deepseek": Architecture("deepseek", _DEEPSEEK1, _deepseek1, scaled_rope=False),
    "afmoe": Architecture("afmoe", _AFMOE, _afmoe),
    "exaone-moe": Architecture(
        "exaone_moe", {**_ATTENTION, **_QK_NORM, **_FFN_NORM, **_ROUTED}, _exaone_moe
    ),
    "hunyuan-moe": Architecture(
        "hunyuan", _HUNYUAN_MOE, _hunyuan_moe, outer=_WITHOUT_HEAD, scaled_rope=False
    ),
    "chatglm": Architecture("glm", _CHATGLM, _glm4, partial_rope=True, scaled_rope=False),
    "starcoder": Architecture(
        "gpt_bigcode",
        _GPT2,
        _starcoder,
        outer={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        layers="transformer.h",
        scaled_rope=False,
    ),
    "gpt-oss": Architecture("gpt_oss", _GPT_OSS, _gpt_oss),
    "command-r": Architecture(
        "cohere", {**_LLAMA, **_QK_NORM}, _cohere, outer=_WITHOUT_HEAD, scaled_rope=False
    ),
    "cohere2": Architecture("cohere2", _LLAMA, _cohere2, outer=_WITHOUT_HEAD, scaled_rope=False),
    "olmo2": Architecture("olmo2", _LATE_NORMS),
    "glm4": Architecture("glm4", _GLM4, _glm4, partial_rope=True),
    "glm4moe": Architecture("glm4_moe", _GLM4_MOE, _glm4_moe, partial_rope=True),
    "granite": Architecture("granite", _GRANITE, _granite),
    "granitemoe": Architecture("granitemoe", _GRANITE_MOE, _granite_moe),
    "stablelm": Architecture("stablelm", _LLAMA, _stablelm, partial_rope=True, scaled_rope=False),
    "exaone4": Architecture(
        "exaone4", {**_QKV, **_QK_NORM, **_LATER_NORMS, **_mlp("mlp")}, _exaone4
    ),
    "hunyuan-dense": Architecture("hunyuan_v1_dense", {**_LLAMA, **_HUNYUAN_NORMS}, _hunyuan),
    "ernie4_5": Architecture("ernie4_5", _LLAMA, _ernie),
    "ernie4_5-moe": Architecture("ernie4_5_moe", _ERNIE_MOE, _ernie_moe),
    "seed_oss": Architecture("seed_oss", _SEED_OSS, _seed_oss),
    "minimax-m2": Architecture(
        "minimax", _MINIMAX_M2, _minimax_m2, partial_rope=True, scaled_rope=False
    ),
    "llama4": Architecture(
        "llama4",
        _LLAMA4,
        _llama4,
        outer={name: f"language_model.{path}" for name, path in _OUTER.items()},
        layers="language_model.model.layers",
        scaled_rope=False,
    ),
    "gpt2": Architecture(
        "gpt2",
        _GPT2,
        _gpt2,
        outer={
            "token_embd": "model.wte",
            "position_embd": "model.wpe",
            "output_norm": "model.ln_f",
        },
        layers="model.h",
        scaled_rope=False,
        # The embeddings again, in files of older converters.
        is_unused=lambda values, tensor: tensor == "output.weight",
    ),
    "gptneox": Architecture(
        "gpt_neox",
        _GPT_NEOX,
        _gpt_neox,
        outer={
            "token_embd": "model.embed_in",
            "output_norm": "model.final_layer_norm",
            "output": "model.embed_out",
        },
        layers="model.h",
        partial_rope=True,
        scaled_rope=False,
    ),
    # Models with recurrent layers
    "mamba": Architecture(
        "mamba",
        recurrent.MAMBA,
        recurrent.mamba,
        outer=recurrent.BACKBONE,
        layers="backbone.layers",
        attends=False,
    ),
    "jamba": Architecture(
        "jamba",
        recurrent.JAMBA,
        recurrent.jamba,
        outer=recurrent.FINAL_NORM_OUTER,
        scaled_rope=False,
    ),
    "mamba2": Architecture(
        "mamba2",
        recurrent.MAMBA2,
        recurrent.mamba2,
        outer=recurrent.BACKBONE,
        layers="backbone.layers",
        attends=False,
    ),
    "lfm2": Architecture(
        "lfm2", recurrent.LFM2, recurrent.lfm2, outer=recurrent.LFM2_OUTER, scaled_rope=False
    ),
    "lfm2moe": Architecture(
        "lfm2_moe",
        recurrent.LFM2_MOE,
        recurrent.lfm2_moe,
        outer=recurrent.LFM2_OUTER,
        scaled_rope=False,
    ),
    "nemotron_h": Architecture(
        "nemotron_h",
        recurrent.NEMOTRON_H,
        recurrent.nemotron_h,
        outer=recurrent.BACKBONE,
        layers="backbone.layers",
        partial_rope=True,  # files name a rotation, which the model does not use
    ),
    "nemotron_h_moe": Architecture(
        "nemotron_h",
        recurrent.NEMOTRON_H_MOE,
        recurrent.nemotron_h_moe,
        outer=recurrent.BACKBONE,
        layers="backbone.layers",
        partial_rope=True,
        predicting=recurrent.NEMOTRON_H_PREDICTING,
    ),
    "granitehybrid": Architecture(
        "granitemoehybrid",
        {**_GRANITE_MOE, **_mlp("mlp"), **recurrent.GRANITE_HYBRID},
        _granite_hybrid,
        scaled_rope=False,
    ),
    "falcon-h1": Architecture(
        "falcon_h1",
        recurrent.FALCON_H1,
        recurrent.falcon_h1,
        outer=recurrent.FINAL_NORM_OUTER,
        scaled_rope=False,
    ),
    "kimi-linear": Architecture(
        "kimi_linear",
        {**_DEEPSEEK3, **recurrent.KIMI_DELTA},
        recurrent.kimi_linear,
        partial_rope=True,  # files name a rotation, which the model does not use
        scaled_rope=False,
    ),
    "qwen3next": Architecture(
        "qwen3_next",
        {**_QWEN2_MOE, **recurrent.QWEN3_NEXT},
        recurrent.qwen3_next,
        partial_rope=True,
    ),
    "qwen35": Architecture(
        "qwen3_5",
        {**recurrent.QWEN35, **_mlp("mlp")},
        recurrent.qwen35,
        outer=recurrent.QWEN35_OUTER,
        layers="language_model.model.layers",
        partial_rope=True,
        scaled_rope=False,
    ),
    "qwen35moe": Architecture(
        "qwen3_5_moe",
        {**_QWEN2_MOE, **recurrent.QWEN35},
        recurrent.qwen35_moe,
        outer=recurrent.QWEN35_OUTER,
        layers="language_model.model.layers",
        partial_rope=True,
        scaled_rope=False,
    ),
}

#: Variants with classes of their own, by the metadata that tells them.
#: With 0, any value but 0 does.
VARIANTS: Mapping[tuple[str, str, int], Architecture] = {
    ("llama", "expert_count", 0): Architecture("mixtral", _MIXTRAL, _mixtral, rotates_pairs=True),
    ("olmo2", "attention.sliding_window", 0): Architecture("olmo3", _LATE_NORMS, _olmo3),
    # DeepSeek V3 and GLM 4.7 Flash
    ("deepseek2", "expert_gating_func", SIGMOID): Architecture(
        "deepseek_v3", _DEEPSEEK3, _deepseek, partial_rope=True
    ),
}


#: mlx-lm's classes of models that read pictures: their tokens have positions on three axes.
WITH_AXES: Mapping[str, str] = {
    "qwen2vl": "qwen2_vl",
    "qwen3vl": "qwen3_vl",
    "qwen3vlmoe": "qwen3_vl_moe",
}
_LANGUAGE = "language_model."


def _with_axes(architecture: Architecture, model_type: str) -> Architecture:
    """Return an architecture as the language model inside a class that reads pictures."""

    def extend(values: Hyperparameters, config: Config) -> None:
        architecture.extend(values, config)
        sections = values.integers("rope.dimension_sections")
        if len(sections) < 3 or any(sections[3:]):
            raise values.unsupported(f"a rotation in the sections {sections}")
        rope: Config = {"mrope_section": sections[:3]}
        if model_type == "qwen2_vl":
            rope |= {"rope_type": "mrope", "type": "mrope"}
        else:
            rope |= {"rope_type": "default", "type": "default", "mrope_interleaved": True}
        if config.get("rope_scaling"):
            raise values.unsupported("rope scaling, and a projector")
        config["text_config"] = {**config, "rope_scaling": rope}
        config["model_type"] = model_type

    outer = {
        name: Target(_LANGUAGE + target) if isinstance(target, str) else target
        for name, target in architecture.outer.items()
    }
    return replace(architecture, layers=_LANGUAGE + architecture.layers, outer=outer, extend=extend)


def architecture_of(file: GGUFFile, *, with_pictures: bool = False) -> tuple[str, Architecture]:
    """Return the name of a file's architecture, and how to load it.

    `with_pictures` is for a model beside a projector, see `WITH_AXES`. Raises `ModelLoadError` that
    names the architecture and lists those that load.
    """
    metadata: Metadata = file.metadata
    name = metadata.text("general.architecture")
    found = ARCHITECTURES.get(name)
    if found is None:
        raise metadata.error(
            f"the architecture {name[:100]!r} is not supported in GGUF",
            hint=f"use one of {', '.join(sorted(ARCHITECTURES))}, or load the model from"
            " safetensors, which supports many more",
        )
    for (variant, key, value), architecture in VARIANTS.items():
        given = metadata.integer(f"{name}.{key}", 0) if variant == name else 0
        if given and value in (0, given):
            return name, architecture
    if with_pictures and name in WITH_AXES:
        return name, _with_axes(found, WITH_AXES[name])
    return name, found
