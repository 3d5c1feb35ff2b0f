"""Map llama.cpp's architectures to mlx-lm's: config fields, names of tensors, small differences.

Sources: llama.cpp src/models/*.cpp and conversion/*.py for the contents of a file,
mlx_lm/models/*.py for the fields of a class. Architectures missing from `ARCHITECTURES` are
rejected by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models.gguf_file import GGUFFile, Metadata

Config = dict[str, Any]

# From the stem of a tensor's name to the path of its module.
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FFN_NORM = {"ffn_norm": "post_attention_layernorm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_LLAMA = {**_ATTENTION, **_FFN_NORM, **_MLP}
_GEMMA = {
    **_ATTENTION,
    **_MLP,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {
    **_FFN_NORM,
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_STARCODER2 = {**_ATTENTION, **_FFN_NORM, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
_QWEN3_MOE = {
    **_ATTENTION,
    **_QK_NORM,
    **_FFN_NORM,
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
}
_GPT_OSS = {
    **_ATTENTION,
    "post_attention_norm": "post_attention_layernorm",
    "attn_sinks": "self_attn.sinks",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """The hyperparameters of a model, by their names without the prefix of the architecture."""

    architecture: str
    metadata: Metadata
    file: GGUFFile

    def __contains__(self, name: str) -> bool:
        return self._key(name) in self.metadata

    def integer(self, name: str, default: int | None = None) -> int:
        return self.metadata.integer(self._key(name), default)

    def number(self, name: str, default: float | None = None) -> float:
        return self.metadata.number(self._key(name), default)

    def text(self, name: str, default: str | None = None) -> str:
        return self.metadata.text(self._key(name), default)

    def flags(self, name: str) -> list[bool] | None:
        """Return a flag for each layer, or None if the value is not an array."""
        key = self._key(name)
        if not self.metadata.is_array(key):
            return None
        return list(map(bool, self.metadata.numbers(key).tolist()))

    def unsupported(self, what: str) -> ModelLoadError:
        """Return the error for a supported architecture with an unsupported feature, `what`."""
        return self.metadata.error(f"{self.architecture} with {what} is not supported")

    @property
    def layers(self) -> int:
        return self.integer("block_count")

    @property
    def heads(self) -> int:
        return self.integer("attention.head_count")

    @property
    def head_dim(self) -> int:
        return self.integer("attention.key_length", self.integer("embedding_length") // self.heads)

    def _key(self, name: str) -> str:
        return f"{self.architecture}.{name}"


@dataclass(frozen=True, slots=True)
class Architecture:
    """How a GGUF architecture becomes an mlx-lm model.

    `layer_names` maps the names of tensors inside a layer to module paths inside a layer.
    `shifted_norms`: norms are stored as 1 + w where the class wants w.
    """

    model_type: str
    layer_names: Mapping[str, str]
    extend: Callable[[Hyperparameters, Config], None] = field(default=lambda values, config: None)
    shifted_norms: bool = False
    rope_scaling: bool = True

    def config(self, values: Hyperparameters) -> Config:
        """Return the config for mlx-lm's class. Raises `ModelLoadError`, naming a missing value."""
        if values.heads < 1 or values.head_dim < 1:
            raise values.metadata.error("the model has no attention heads, or heads of size 0")
        embeddings = "token_embd.weight"
        if embeddings not in values.file:
            raise values.metadata.error(f"the tensor {embeddings!r} is missing")
        config: Config = {
            "model_type": self.model_type,
            "hidden_size": values.integer("embedding_length"),
            "num_hidden_layers": values.layers,
            "num_attention_heads": values.heads,
            "num_key_value_heads": values.integer("attention.head_count_kv", values.heads),
            "head_dim": values.head_dim,
            "max_position_embeddings": values.integer("context_length"),
            "rope_theta": values.number("rope.freq_base", 10000.0),
            "vocab_size": values.file[embeddings].shape[0],
            "tie_word_embeddings": "output.weight" not in values.file,
        }
        if "feed_forward_length" in values:
            config["intermediate_size"] = values.integer("feed_forward_length")
        if "attention.layer_norm_rms_epsilon" in values:
            config["rms_norm_eps"] = values.number("attention.layer_norm_rms_epsilon")
        scaling = _rope_scaling(values)
        if scaling and not self.rope_scaling:
            raise values.unsupported(f"rope scaling {scaling['rope_type']!r}")
        if scaling:
            config["rope_scaling"] = scaling
        if self.model_type != "phi3" and values.integer(
            "rope.dimension_count", values.head_dim
        ) not in (0, values.head_dim):
            raise values.unsupported("rope on a part of each head")
        self.extend(values, config)
        return config

    def module_path(self, tensor: str) -> tuple[str, str] | None:
        """Return the path of a tensor's module and the parameter's name, or None if unknown."""
        stem, dot, parameter = tensor.rpartition(".")
        if not dot or parameter not in ("weight", "bias"):
            return None
        if stem in _OUTER:
            return _OUTER[stem], parameter
        parts = stem.split(".")
        if len(parts) != 3 or parts[0] != "blk" or not parts[1].isdecimal():
            return None
        inner = self.layer_names.get(parts[2])
        if inner is None:
            return None
        path = f"model.layers.{parts[1]}.{inner}"
        if inner.endswith(".sinks"):  # a parameter of the attention module itself
            module, _, parameter = path.rpartition(".")
            return module, parameter
        return path, parameter


def _rope_scaling(values: Hyperparameters) -> Config | None:
    kind = values.text("rope.scaling.type", "none")
    factor = values.number("rope.scaling.factor", values.number("rope.scale_linear", 1.0))
    if kind == "none" and factor == 1.0:
        return None
    if kind in ("none", "linear"):
        return {"rope_type": "linear", "type": "linear", "factor": factor} if factor != 1 else None
    if kind == "yarn":
        attention = values.number("rope.scaling.yarn_attn_factor", 1.0)
        attention *= values.number("rope.scaling.attn_factor", 1.0)
        extrapolation = values.number("rope.scaling.yarn_ext_factor", 1.0)
        if attention != 1.0 or extrapolation != 1.0:
            raise values.unsupported("a yarn rope that scales attention")
        return {
            "rope_type": "yarn",
            "type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": values.integer(
                "rope.scaling.original_context_length", values.integer("context_length")
            ),
            "beta_fast": values.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": values.number("rope.scaling.yarn_beta_slow", 1.0),
        }
    if kind == "longrope":  # its factors are tensors, which `GGUFLoader` adds
        return None
    raise values.unsupported(f"rope scaling {kind!r}")


def _llama(values: Hyperparameters, config: Config) -> None:
    if values.integer("expert_count", 0):
        raise values.unsupported("experts (Mixtral)")
    config["rope_traditional"] = True  # the rows of q and k are stored in its order
    config["attention_bias"] = "blk.0.attn_q.bias" in values.file
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in values.file
    if "rope_freqs.weight" in values.file:
        # This only selects the class of the rope; `GGUFLoader` sets the file's own frequencies.
        config["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0}


def _smollm3(values: Hyperparameters, config: Config) -> None:
    config["rope_traditional"] = True
    config["no_rope_layer_interval"] = 4


def _qwen3_moe(values: Hyperparameters, config: Config) -> None:
    config |= {
        "num_experts": values.integer("expert_count"),
        "num_experts_per_tok": values.integer("expert_used_count"),
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    config.setdefault("intermediate_size", config["moe_intermediate_size"])


def _phi3(values: Hyperparameters, config: Config) -> None:
    rotated = values.integer("rope.dimension_count", values.head_dim)
    config["partial_rotary_factor"] = rotated / values.head_dim
    config["original_max_position_embeddings"] = values.integer(
        "rope.scaling.original_context_length", config["max_position_embeddings"]
    )
    config["sliding_window"] = values.integer("attention.sliding_window", 0)


def _starcoder2(values: Hyperparameters, config: Config) -> None:
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
    config |= {
        "num_local_experts": values.integer("expert_count"),
        "num_experts_per_tok": values.integer("expert_used_count"),
        "intermediate_size": values.integer("expert_feed_forward_length"),
        "sliding_window": values.integer("attention.sliding_window"),
        "layer_types": [kinds[layer % 2] for layer in range(values.layers)],
    }


def _sliding_pattern(values: Hyperparameters, default: int) -> int:
    """Return n: every n-th layer attends to the whole context, the others to a window."""
    name = "attention.sliding_window_pattern"
    sliding = values.flags(name)
    if sliding is None:
        return values.integer(name, default)
    if sliding != [layer % default < default - 1 for layer in range(len(sliding))]:
        raise values.unsupported("another pattern of sliding windows")
    return default


#: The architectures that load, by the name that GGUF files give them.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", _LLAMA, _llama),  # Mistral, SmolLM2, … are written as llama
    "qwen2": Architecture("qwen2", _LLAMA),
    "qwen3": Architecture("qwen3", {**_LLAMA, **_QK_NORM}),
    "qwen3moe": Architecture("qwen3_moe", _QWEN3_MOE, _qwen3_moe),
    "smollm3": Architecture("smollm3", _LLAMA, _smollm3),
    "phi3": Architecture("phi3", _PHI3, _phi3, rope_scaling=False),
    "starcoder2": Architecture("starcoder2", _STARCODER2, _starcoder2),
    "gemma2": Architecture("gemma2", _GEMMA, _gemma2, shifted_norms=True),
    "gemma3": Architecture("gemma3_text", {**_GEMMA, **_QK_NORM}, _gemma3, shifted_norms=True),
    "gpt-oss": Architecture("gpt_oss", _GPT_OSS, _gpt_oss),
}


def architecture_of(metadata: Metadata) -> tuple[str, Architecture]:
    """Return the name of a file's architecture, and how to load it.

    Raises `ModelLoadError` that names the architecture and lists those that load.
    """
    name = metadata.text("general.architecture")
    found = ARCHITECTURES.get(name)
    if found is None:
        raise metadata.error(
            f"the architecture {name[:100]!r} is not supported in GGUF",
            hint=f"use one of {', '.join(sorted(ARCHITECTURES))}, or load the model from"
            " safetensors, which supports many more",
        )
    return name, found
