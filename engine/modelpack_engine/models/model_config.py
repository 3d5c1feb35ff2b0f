"""Normalise config.json: one spelling of each field, the one that mlx-lm's classes read.

Sources: transformers' PreTrainedConfig and modeling_rope_utils of 4.57 and 5.x, the ModelArgs of
mlx_lm.models.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.patches.corrections import TEXT_PARTS

Config = dict[str, Any]

_DEFAULT = "default"
_ORIGINAL = "original_max_position_embeddings"
_FULL, _SLIDING = "full_attention", "sliding_attention"
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
# Names that classes use for the base of the rotation and for the rotated part of a head.
_THETAS = ("rope_theta", "rotary_emb_base", "rope_base")
_PARTS = ("partial_rotary_factor", "rotary_pct", "rope_pct")
_LOCAL_THETAS = ("rope_local_base_freq", "local_rope_theta", "swa_rope_theta")


def normalised(config: Mapping[str, Any]) -> Config:
    """Return config.json with rotations and dtypes in every spelling that a class may read.

    `rope_parameters` of transformers 5 becomes `rope_theta`, `rope_scaling` and
    `partial_rotary_factor` as well, one rotation per layer type too; the older spelling becomes
    `rope_parameters`. Raises `ModelLoadError` for two spellings that disagree.
    """
    result: Config = without_tags(config)
    _check_dtypes(result)
    _normalise_rope(result, "")
    _fill_inner_base(result)
    for part in TEXT_PARTS:
        if isinstance(result.get(part), dict):
            _normalise_rope(result[part], f"{part}.")
            if "vocab_size" in result[part]:
                result.setdefault("vocab_size", result[part]["vocab_size"])
    return result


def without_tags(value: Any) -> Any:
    """Return a copy with numbers for the tags of transformers 5 ({"__float__": "Infinity"})."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in _FLOATS:
            return _FLOATS[value["__float__"]]
        return {key: without_tags(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_tags(item) for item in value]
    return value


def _fill_inner_base(config: Config) -> None:
    """Fill in the base of the rotation where dbrx's class reads it."""
    theta, inner = config.get("rope_theta"), config.get("attn_config")
    if theta is None or not isinstance(inner, dict):
        return
    if inner.setdefault("rope_theta", theta) != theta:
        raise _disagreement("attn_config.rope_theta", inner["rope_theta"], "rope_theta", theta)


def _check_dtypes(config: Config) -> None:
    names = {
        str(config[key]).removeprefix("torch.")
        for key in ("dtype", "torch_dtype")
        if config.get(key) is not None
    }
    if len(names) > 1:
        raise _disagreement("dtype", config["dtype"], "torch_dtype", config["torch_dtype"])


def _fill_original_length(config: Config) -> None:
    """Fill in the length that yarn extends, as transformers does; mlx-lm assumes 4096."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name)
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) != "yarn":
            continue
        length = config.get(_ORIGINAL) or config.get("max_position_embeddings")
        if rope.get(_ORIGINAL) is None and length is not None:
            config[name] = {**rope, _ORIGINAL: length}


def _normalise_rope(config: Config, where: str) -> None:
    _fill_original_length(config)
    if config.get("rope_parameters") is None:
        _add_parameters(config, where)
    given = config.get("rope_parameters")
    if given is None:
        return
    if not isinstance(given, dict):
        raise ModelLoadError(f"config.json: {where}rope_parameters is not an object")
    kinds = {key: value for key, value in given.items() if isinstance(value, dict)}
    if not kinds:
        _spread(config, where, given)
        config["rope_parameters"] = _with_both_types(given)
        return
    _spread(config, where, kinds.get(_FULL, next(iter(kinds.values()))))
    _put(config, where, _LOCAL_THETAS, kinds.get(_SLIDING, {}), "rope_theta")


def _spread(config: Config, where: str, rope: Mapping[str, Any]) -> None:
    """Write one rotation of transformers 5 in the older spelling too."""
    _put(config, where, _THETAS, rope, "rope_theta")
    _put(config, where, _PARTS, rope, "partial_rotary_factor")
    scaling = scaling_of(rope)
    other = config.get("rope_scaling")
    if isinstance(other, dict) and scaling_of(other) != scaling:
        raise _disagreement("rope_scaling", other, f"{where}rope_parameters", dict(rope))
    config["rope_scaling"] = scaling


def _put(
    config: Config, where: str, names: Sequence[str], rope: Mapping[str, Any], key: str
) -> None:
    """Copy `key` of a rotation, if it has one, to the names that classes use for it."""
    if key not in rope:
        return
    for name in names:
        value = config.get(name)
        if value is not None and value != rope[key]:
            raise _disagreement(f"{where}{name}", value, f"{where}rope_parameters", rope[key])
        config[name] = rope[key]


def scaling_of(rope: Mapping[str, Any]) -> Config | None:
    """Return the scaling settings of a rotation, or None if it is not scaled."""
    kind = rope.get("rope_type", rope.get("type", _DEFAULT))
    scaling = {
        key: value
        for key, value in rope.items()
        if key not in ("rope_theta", "partial_rotary_factor", "rope_type", "type")
        and value is not None
    }
    if kind in (_DEFAULT, None) and not scaling:
        return None
    kind = kind or _DEFAULT
    return _with_both_types({"rope_type": kind, "type": rope.get("type", kind), **scaling})


def _with_both_types(rope: Mapping[str, Any]) -> Config:
    kind = rope.get("rope_type", rope.get("type"))
    if kind is None:
        return dict(rope)
    if {rope.get("rope_type", kind), rope.get("type", kind)} - {kind, "mrope", "su"}:
        raise _disagreement("rope_type", rope.get("rope_type"), "type", rope.get("type"))
    return {**rope, "rope_type": kind, "type": rope.get("type", kind)}


def _add_parameters(config: Config, where: str) -> None:
    """Write the older spelling as `rope_parameters`, for classes that read nothing else."""
    scaling = config.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, dict):
        raise ModelLoadError(f"config.json: {where}rope_scaling is not an object")
    if isinstance(scaling, dict):
        scaling = _with_both_types(scaling)
        config["rope_scaling"] = scaling
    theta = config.get("rope_theta")
    if theta is None:
        return
    rope: Config = {"rope_type": _DEFAULT, "type": _DEFAULT, **(scaling or {}), "rope_theta": theta}
    if config.get("partial_rotary_factor") is not None:
        rope["partial_rotary_factor"] = config["partial_rotary_factor"]
    config["rope_parameters"] = rope


def _disagreement(one: str, value: Any, other: str, second: Any) -> ModelLoadError:
    return ModelLoadError(
        f"config.json: {one} is {_shown(value)}, but {other} says {_shown(second)}",
        hint="remove the one that is wrong",
    )


def _shown(value: Any) -> str:
    return repr(value)[:100]


# The same number under the names that configs and classes give it.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Values that transformers' classes use but leave out of config.json, by model type.
_CONSTANTS: Mapping[str, Config] = {
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "gemma4_unified_text": {"hidden_size_per_layer_input": 0},
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "granitemoehybrid": {"time_step_limit": [0.0, math.inf]},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "minimax_m2": {"shared_intermediate_size": 0},
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
    "solar_open": {"first_k_dense_replace": 0, "partial_rotary_factor": 1.0},
}
# LlamaConfig's defaults, which text_config of LLaVA 1.5 leaves out.
_LLAMA: Config = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 32000,
}
# Fields under the name that mlx-lm's class reads, and the one that transformers writes.
_SYNONYMS: Mapping[str, Mapping[str, str]] = {
    "gpt2": {"n_ctx": "n_positions"},
    "lfm2": {"block_dim": "hidden_size"},
    "solar_open": {"intermediate_size": "moe_intermediate_size"},
}
# mlx-lm's names for the layer types that transformers 5 writes.
_LAYERS: Mapping[str, Mapping[str, str]] = {
    "granitemoehybrid": {"linear_attention": "mamba", _FULL: "attention"},
}
# Classes that do not read layer_types, only the period of layers without a window.
_PATTERNS = ("cohere2", "gemma3_text")
_HEAD = "lm_head.weight"


def completed(config: Config, arguments: type) -> Config:
    """Return the config with the fields that the class requires and transformers leaves out.

    Raises `ModelLoadError` for layer types that the class cannot express.
    """
    result = dict(config)
    text = result.get("text_config")
    if result.get("model_type") == "llava" and isinstance(text, dict):
        result["text_config"] = {**(_LLAMA if text.get("model_type") == "llama" else {}), **text}
    for part in TEXT_PARTS:
        if isinstance(result.get(part), dict):
            result[part] = _with_names(result[part], str(config.get("model_type")))
    result = _with_names(result, "")
    required = {
        name
        for name, parameter in inspect.signature(arguments).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    width, heads = result.get("hidden_size"), result.get("num_attention_heads")
    asked = "head_dim" in required or result.get("model_type") == "falcon_h1"
    if asked and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        result.setdefault("head_dim", width // heads)
    if "rope_scaling" in required:
        result.setdefault("rope_scaling", None)
    return result


def with_tied_embeddings(config: Config, names: Collection[str]) -> Config:
    """Return the config with `tie_word_embeddings` wherever a class may look for it.

    transformers 4 reads the one of the text model, 5 the outer one, and either may be left out. If
    they differ, or both are missing, the weights' `names` decide: a model with a head is not tied.
    """
    parts = [part for part in TEXT_PARTS if isinstance(config.get(part), dict)]
    given = {
        holder["tie_word_embeddings"]
        for holder in (config, *(config[part] for part in parts))
        if isinstance(holder.get("tie_word_embeddings"), bool)
    }
    has_head = any(name.endswith(_HEAD) for name in names)
    if not given and not parts and has_head:
        return config  # the class's default applies
    tied = given.pop() if len(given) == 1 else not has_head
    result = {**config, "tie_word_embeddings": tied}
    for part in parts:
        result[part] = {**config[part], "tie_word_embeddings": tied}
    return result


def _with_names(config: Config, outer: str) -> Config:
    """Return one part of the config with every field under the name that the class reads."""
    kind = str(config.get("model_type") or outer)
    given = next((config[name] for name in _EXPERTS if config.get(name) is not None), None)
    result = dict(config) if given is None else {**dict.fromkeys(_EXPERTS, given), **config}
    for name, value in _CONSTANTS.get(kind, {}).items():
        result.setdefault(name, value)
    for name, other in _SYNONYMS.get(kind, {}).items():
        if other in result:
            result.setdefault(name, result[other])
    layers = result.get("layer_types")
    if isinstance(layers, list):
        words = _LAYERS.get(kind, {})
        result["layer_types"] = layers = [words.get(layer, layer) for layer in layers]
        if kind == "exaone4":
            pattern = "".join("G" if layer == _FULL else "L" for layer in layers)
            result["sliding_window_pattern"] = pattern if "L" in pattern else None
        elif kind in _PATTERNS:
            result["sliding_window_pattern"] = _pattern_of(layers, kind)
    if kind == "granitemoehybrid":
        result["position_embedding_type"] = result.get("position_embedding_type") or "nope"
    elif kind == "mamba2" and {"num_heads", "head_dim"} <= result.keys():
        result.setdefault("intermediate_size", result["num_heads"] * result["head_dim"])
    elif kind == "exaone_moe" and isinstance(result.get("mlp_layer_types"), list):
        sparse = [layer == "sparse" for layer in result["mlp_layer_types"]]
        result.setdefault("is_moe_layer", sparse)
    elif kind == "minimax_m2" and isinstance(result.get("head_dim"), int):
        part = result.get("partial_rotary_factor") or 1.0
        result.setdefault("rotary_dim", int(result["head_dim"] * part))
    elif kind == "minimax_m3_vl_text" and isinstance(result.get("head_dim"), int):
        part = result.get("partial_rotary_factor")
        if part is not None:  # transformers does not read rotary_dim
            result["rotary_dim"] = int(result["head_dim"] * part)
    return result


def _pattern_of(layers: Sequence[Any], kind: str) -> int:
    """Return n: every n-th layer has no window. Raise `ModelLoadError` for other patterns."""
    period = layers.index(_FULL) + 1 if _FULL in layers else 0
    if not period or any(
        (layer == _FULL) != (number % period == 0) for number, layer in enumerate(layers, start=1)
    ):
        raise ModelLoadError(
            f"config.json: these layer_types of {kind} are not supported; expected full attention"
            " in every n-th layer"
        )
    return period
