"""EncoderConfig: one view of the config.json of the BERT family's architectures.

They are one transformer with switches: where the norms are, how positions enter, whether the MLP is
gated. Field names of config.json: transformers' configuration_*.py of each architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from modelpack_engine.errors import ModelLoadError

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "tanh"]

_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "swiglu": "silu",  # Nomic's name for a gated MLP with silu
    "tanh": "tanh",
}


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """What the encoder is made of.

    `position_table` is the number of learnt positions, 0 for none; the first token is at
    `position_offset`, and `max_tokens` is the longest input. `pad_token_id` matters where
    positions skip padding (RoBERTa). `rope_bases` and `windows` have one entry per layer: a base
    of None is no rotation, a window of None sees everything, of w sees w tokens to either side.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: Activation
    norm_eps: float
    max_tokens: int
    position_table: int
    position_offset: int
    pad_token_id: int
    type_vocab_size: int
    rope_bases: tuple[float | None, ...]
    windows: tuple[int | None, ...]
    relative_buckets: int = 0
    pre_norm: bool = False
    gated: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    num_labels: int = 0
    head_activation: Activation = "tanh"
    head_norm: bool = False
    head_bias: bool = True
    head_pooling: Literal["cls", "mean"] = "cls"


def parse_encoder_config(config: Mapping[str, Any]) -> EncoderConfig:
    """Return the encoder that config.json describes.

    Raises `ModelLoadError`, naming it, for an architecture or a variant that is not known.
    """
    architecture = str(config.get("model_type"))
    parse = _FAMILIES.get(architecture)
    if parse is None:
        raise ModelLoadError(
            f"the encoder architecture {architecture[:100]!r} is not supported",
            hint=f"supported: {', '.join(sorted(_FAMILIES))}",
        )
    for key in ("quantization", "quantization_config"):
        if config.get(key):
            raise ModelLoadError(f"config.json: {key}: quantised encoders are not supported")
    for key in ("is_decoder", "add_cross_attention"):
        if config.get(key):
            raise ModelLoadError(f"config.json: {key} is set: this is no encoder")
    parsed = parse(_Fields(config))
    if parsed.hidden_size % parsed.num_heads:
        raise ModelLoadError(
            f"config.json: {parsed.num_heads} heads do not divide {parsed.hidden_size}"
        )
    return parsed


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether config.json names an architecture of this family."""
    return config.get("model_type") in _FAMILIES


def is_cross_encoder(config: Mapping[str, Any]) -> bool:
    """Whether config.json describes a model that judges pairs of texts."""
    return any("ForSequenceClassification" in name for name in _architectures(config))


def _architectures(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


class _Fields:
    """Values of config.json, checked as they are read."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def count(self, *names: str, default: int | None = None, least: int = 1) -> int:
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ModelLoadError(f"config.json: {name} is {str(value)[:50]!r}")
            return value
        if default is None:
            raise ModelLoadError(f"config.json: {names[0]} is missing")
        return default

    def number(self, *names: str, default: float) -> float:
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise ModelLoadError(f"config.json: {name} is {str(value)[:50]!r}")
            return float(value)
        return default

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            raise ModelLoadError(f"config.json: {name} is {str(value)[:50]!r}")
        return value

    def expect(self, name: str, *allowed: object) -> None:
        value = self.config.get(name, allowed[0])
        if value not in allowed:
            raise ModelLoadError(f"config.json: {name} {str(value)[:50]!r} is not supported")

    def activation(self, *names: str, default: str = "gelu") -> Activation:
        found = next((self.config[name] for name in names if self.config.get(name)), default)
        if str(found) not in _ACTIVATIONS:
            raise ModelLoadError(f"config.json: the activation {str(found)[:50]!r} is not known")
        return _ACTIVATIONS[str(found)]

    def num_labels(self) -> int:
        """Return how many labels a classifier has, 0 for a model without one."""
        if not is_cross_encoder(self.config):
            return 0
        labels = self.config.get("id2label")
        if isinstance(labels, dict) and labels:
            return len(labels)
        return self.count("num_labels", default=2)


def _bert(fields: _Fields, *, skips_padding: bool = False) -> EncoderConfig:
    fields.expect("position_embedding_type", "absolute", None)
    layers = fields.count("num_hidden_layers")
    hidden = fields.count("hidden_size")
    table = fields.count("max_position_embeddings", default=512)
    pad = fields.count("pad_token_id", default=1 if skips_padding else 0, least=0)
    offset = pad + 1 if skips_padding else 0
    if table <= offset:
        raise ModelLoadError(f"config.json: max_position_embeddings is {table}")
    return EncoderConfig(
        architecture=str(fields.config["model_type"]),
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=fields.count("num_attention_heads"),
        intermediate_size=fields.count("intermediate_size"),
        activation=fields.activation("hidden_act"),
        norm_eps=fields.number("layer_norm_eps", default=1e-12),
        max_tokens=table - offset,
        position_table=table,
        position_offset=offset,
        pad_token_id=pad,
        type_vocab_size=fields.count("type_vocab_size", default=2),
        rope_bases=(None,) * layers,
        windows=(None,) * layers,
        num_labels=fields.num_labels(),
    )


def _roberta(fields: _Fields) -> EncoderConfig:
    return _bert(fields, skips_padding=True)


def _mpnet(fields: _Fields) -> EncoderConfig:
    fields.expect("relative_attention_num_buckets", 32)
    return replace(
        _bert(fields, skips_padding=True),
        type_vocab_size=0,
        relative_buckets=32,
    )


def _distilbert(fields: _Fields) -> EncoderConfig:
    layers = fields.count("n_layers", "num_hidden_layers", default=6)
    table = fields.count("max_position_embeddings", default=512)
    return EncoderConfig(
        architecture="distilbert",
        vocab_size=fields.count("vocab_size"),
        hidden_size=fields.count("dim", "hidden_size", default=768),
        num_layers=layers,
        num_heads=fields.count("n_heads", "num_attention_heads", default=12),
        intermediate_size=fields.count("hidden_dim", "intermediate_size", default=3072),
        activation=fields.activation("activation"),
        norm_eps=1e-12,
        max_tokens=table,
        position_table=table,
        position_offset=0,
        pad_token_id=fields.count("pad_token_id", default=0, least=0),
        type_vocab_size=0,
        rope_bases=(None,) * layers,
        windows=(None,) * layers,
        num_labels=fields.num_labels(),
        head_activation="relu",
    )


def _check_rotations(fields: _Fields) -> None:
    """Raise `ModelLoadError` for a rotation that is not the plain one of whole heads."""
    for name in ("rope_scaling", "rope_parameters"):
        given = fields.config.get(name) or {}
        if not isinstance(given, dict):
            raise ModelLoadError(f"config.json: {name} is not an object")
        for rope in (given, *(inner for inner in given.values() if isinstance(inner, dict))):
            _Fields(rope).expect("rope_type", "default", None)
            _Fields(rope).expect("type", "default", None)
            _Fields(rope).expect("partial_rotary_factor", 1.0, None)


def _modernbert(fields: _Fields) -> EncoderConfig:
    _check_rotations(fields)
    layers = fields.count("num_hidden_layers", default=22)
    every = fields.count("global_attn_every_n_layers", default=3)
    kinds = fields.config.get("layer_types") or [
        "sliding_attention" if index % every else "full_attention" for index in range(layers)
    ]
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise ModelLoadError("config.json: layer_types are not one kind of attention per layer")
    bases = {
        "full_attention": fields.number("global_rope_theta", default=160_000.0),
        "sliding_attention": fields.number("local_rope_theta", default=10_000.0),
    }
    for kind, given in (fields.config.get("rope_parameters") or {}).items():
        if kind in bases and isinstance(given, dict):
            rope = _Fields(given)
            rope.expect("rope_type", "default")
            bases[kind] = rope.number("rope_theta", default=bases[kind])
    half = fields.count("local_attention", default=128) // 2
    pooling = fields.config.get("classifier_pooling", "cls")
    fields.expect("classifier_pooling", "cls", "mean")
    max_tokens = fields.count("max_position_embeddings", default=8192)
    return EncoderConfig(
        architecture="modernbert",
        vocab_size=fields.count("vocab_size"),
        hidden_size=fields.count("hidden_size"),
        num_layers=layers,
        num_heads=fields.count("num_attention_heads"),
        intermediate_size=fields.count("intermediate_size"),
        activation=fields.activation("hidden_activation"),
        norm_eps=fields.number("norm_eps", default=1e-5),
        max_tokens=max_tokens,
        position_table=0,
        position_offset=0,
        pad_token_id=fields.count("pad_token_id", default=0, least=0),
        type_vocab_size=0,
        rope_bases=tuple(bases[kind] for kind in kinds),
        windows=tuple(half if kind == "sliding_attention" else None for kind in kinds),
        pre_norm=True,
        gated=True,
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        norm_bias=fields.flag("norm_bias", False),
        num_labels=fields.num_labels(),
        head_activation=fields.activation("classifier_activation"),
        head_norm=True,
        head_bias=fields.flag("classifier_bias", False),
        head_pooling="mean" if pooling == "mean" else "cls",
    )


def _nomic(fields: _Fields) -> EncoderConfig:
    """nomic-embed-text: GPT-2's names in the configs of its own code, BERT's in transformers'."""
    for name, allowed in {
        "prenorm": (False,),
        "rotary_emb_fraction": (1.0, 1),
        "rotary_emb_interleaved": (False,),
        "rotary_emb_scale_base": (None,),
        "rotary_scaling_factor": (None, 1, 1.0, 2, 2.0),  # beyond the trained length only
        "use_rms_norm": (False,),
        "parallel_block": (False,),
        "num_experts": (0, None),
        "moe_every_n_layers": (0, -1, None),
    }.items():
        fields.expect(name, *allowed)
    if fields.num_labels():
        raise ModelLoadError("cross-encoders of nomic_bert are not supported")
    _check_rotations(fields)
    layers = fields.count("n_layer", "num_hidden_layers")
    rope = _Fields(fields.config.get("rope_parameters") or {})
    rope.expect("rope_type", "default")
    base = rope.number("rope_theta", default=fields.number("rotary_emb_base", default=1000.0))
    trained = fields.count("max_trained_positions", "max_position_embeddings", default=2048)
    fields.expect("activation_function", "swiglu")
    fields.expect("hidden_act", "silu")
    return EncoderConfig(
        architecture="nomic_bert",
        vocab_size=fields.count("vocab_size"),
        hidden_size=fields.count("n_embd", "hidden_size"),
        num_layers=layers,
        num_heads=fields.count("n_head", "num_attention_heads"),
        intermediate_size=fields.count("n_inner", "intermediate_size"),
        activation="silu",
        norm_eps=fields.number("layer_norm_epsilon", "layer_norm_eps", default=1e-12),
        max_tokens=trained,
        position_table=0,
        position_offset=0,
        pad_token_id=fields.count("pad_token_id", default=0, least=0),
        type_vocab_size=fields.count("type_vocab_size", default=2),
        rope_bases=(base,) * layers,
        windows=(None,) * layers,
        gated=True,
        attention_bias=fields.flag("qkv_proj_bias", False),
        mlp_bias=fields.flag("mlp_fc1_bias", False),
    )


_FAMILIES: Mapping[str, Callable[[_Fields], EncoderConfig]] = {
    "bert": _bert,
    "camembert": _roberta,
    "distilbert": _distilbert,
    "modernbert": _modernbert,
    "mpnet": _mpnet,
    "nomic_bert": _nomic,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
}
