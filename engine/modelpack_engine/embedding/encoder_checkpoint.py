"""Load checkpoints of the BERT family: config.json to `EncoderConfig`, tensors to `Encoder`.

The architectures are one transformer with switches: where the norms are, how positions enter,
whether the MLP is gated. Field names of config.json are those of transformers' configuration_*.py.
A checkpoint may have a prefix (`bert.`), heads that an encoder does not use, fused projections, and
BERT's first names of a norm's weights (`gamma`, `beta`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from modelpack.formats.safetensors import read_safetensors_header
from modelpack_engine.embedding.encoder import Activation, Encoder, EncoderConfig
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.models.precision import array_shapes, check_parameters, shapes_of
from modelpack_engine.models.safetensors import read_headers

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


def parse_encoder_config(config: Mapping[str, Any]) -> EncoderConfig:
    """Return the encoder that config.json describes.

    Raises `ModelLoadError` for an architecture or a variant that is not supported.
    """
    architecture = str(config.get("model_type"))
    family = _FAMILIES.get(architecture)
    if family is None:
        raise ModelLoadError(
            f"the encoder architecture {architecture[:100]!r} is not supported",
            hint=f"supported: {', '.join(sorted(_FAMILIES))}",
        )
    for key in ("quantization", "quantization_config"):
        if config.get(key):
            raise ModelLoadError(f"config.json: {key}: quantised encoders are not supported")
    for key in ("is_decoder", "add_cross_attention"):
        if config.get(key):
            raise ModelLoadError(f"config.json: {key} is set, so the model is not an encoder")
    parsed = family.parse(_Fields(config))
    if parsed.hidden_size % parsed.num_heads:
        raise ModelLoadError(
            f"config.json: hidden_size is {parsed.hidden_size}, expected a multiple of the"
            f" {parsed.num_heads} attention heads"
        )
    return parsed


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether config.json names an architecture of this family."""
    return config.get("model_type") in _FAMILIES


def is_cross_encoder(config: Mapping[str, Any]) -> bool:
    """Whether config.json describes a model that judges pairs of texts."""
    names = config.get("architectures")
    return isinstance(names, list) and any("ForSequenceClassification" in str(n) for n in names)


def _unexpected(name: str, value: Any, expected: str) -> ModelLoadError:
    return ModelLoadError(f"config.json: {name} is {str(value)[:50]!r}, expected {expected}")


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
                raise _unexpected(name, value, f"an integer from {least}")
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
                raise _unexpected(name, value, "a positive number")
            return float(value)
        return default

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            raise _unexpected(name, value, "true or false")
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
        raise _unexpected("max_position_embeddings", table, f"more than {offset}")
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


def _mpnet(fields: _Fields) -> EncoderConfig:
    fields.expect("relative_attention_num_buckets", 32)
    return replace(_bert(fields, skips_padding=True), type_vocab_size=0, relative_buckets=32)


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
        pad_token_id=fields.count("pad_token_id", default=0, least=0),
        rope_bases=(None,) * layers,
        windows=(None,) * layers,
        num_labels=fields.num_labels(),
        head_activation="relu",
    )


def _check_rotations(fields: _Fields) -> None:
    """Raise `ModelLoadError` for a rotation that is scaled, or covers only a part of each head."""
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
    fields.expect("classifier_pooling", "cls", "mean")
    return EncoderConfig(
        architecture="modernbert",
        vocab_size=fields.count("vocab_size"),
        hidden_size=fields.count("hidden_size"),
        num_layers=layers,
        num_heads=fields.count("num_attention_heads"),
        intermediate_size=fields.count("intermediate_size"),
        activation=fields.activation("hidden_activation"),
        norm_eps=fields.number("norm_eps", default=1e-5),
        max_tokens=fields.count("max_position_embeddings", default=8192),
        pad_token_id=fields.count("pad_token_id", default=0, least=0),
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
        head_pooling=fields.config.get("classifier_pooling", "cls"),
    )


def _nomic(fields: _Fields) -> EncoderConfig:
    """nomic-embed-text: its own code uses GPT-2's names of fields, transformers uses BERT's."""
    for name, allowed in {
        "prenorm": (False,),
        "rotary_emb_fraction": (1.0, 1),
        "rotary_emb_interleaved": (False,),
        "rotary_emb_scale_base": (None,),
        "rotary_scaling_factor": (None, 1, 1.0, 2, 2.0),  # applies only beyond the trained length
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
        max_tokens=fields.count("max_trained_positions", "max_position_embeddings", default=2048),
        pad_token_id=fields.count("pad_token_id", default=0, least=0),
        type_vocab_size=fields.count("type_vocab_size", default=2),
        rope_bases=(base,) * layers,
        windows=(None,) * layers,
        gated=True,
        attention_bias=fields.flag("qkv_proj_bias", False),
        mlp_bias=fields.flag("mlp_fc1_bias", False),
    )


_Rules = tuple[tuple[str, str], ...]

_PREFIX = re.compile(r"^(?:bert|roberta|distilbert|mpnet|model)\.")
#: Buffers and training heads, which embeddings do not need.
_UNUSED = re.compile(
    r"embeddings\.position_ids|cls\..*|lm_head\..*|pooler\..*|vocab_(?:transform|layer_norm|projector)\..*"
    r"|decoder\..*|head\..*|qa_outputs\..*"
)
_EMBEDDINGS: _Rules = (
    (r"embeddings\.(?:word|tok)_embeddings\.", "embeddings.word."),
    (r"embeddings\.position_embeddings\.", "embeddings.position."),
    (r"embeddings\.token_type_embeddings\.", "embeddings.token_type."),
    (r"(?:embeddings\.(?:LayerNorm|norm)|emb_ln)\.", "embeddings.norm."),
)
_BERT: _Rules = (
    *_EMBEDDINGS,
    (r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.", r"layers.\1.attention.\2."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.attention.output."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.", r"layers.\1.attention_norm."),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.mlp.up."),
    (r"encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.mlp.down."),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"layers.\1.mlp_norm."),
)
_MPNET: _Rules = (
    *_BERT,
    (r"encoder\.layer\.(\d+)\.attention\.attn\.q\.", r"layers.\1.attention.query."),
    (r"encoder\.layer\.(\d+)\.attention\.attn\.k\.", r"layers.\1.attention.key."),
    (r"encoder\.layer\.(\d+)\.attention\.attn\.v\.", r"layers.\1.attention.value."),
    (r"encoder\.layer\.(\d+)\.attention\.attn\.o\.", r"layers.\1.attention.output."),
    (r"encoder\.layer\.(\d+)\.attention\.LayerNorm\.", r"layers.\1.attention_norm."),
    (r"encoder\.relative_attention_bias\.", "relative_bias."),
)
_DISTILBERT: _Rules = (
    *_EMBEDDINGS,
    (r"transformer\.layer\.(\d+)\.attention\.q_lin\.", r"layers.\1.attention.query."),
    (r"transformer\.layer\.(\d+)\.attention\.k_lin\.", r"layers.\1.attention.key."),
    (r"transformer\.layer\.(\d+)\.attention\.v_lin\.", r"layers.\1.attention.value."),
    (r"transformer\.layer\.(\d+)\.attention\.out_lin\.", r"layers.\1.attention.output."),
    (r"transformer\.layer\.(\d+)\.sa_layer_norm\.", r"layers.\1.attention_norm."),
    (r"transformer\.layer\.(\d+)\.ffn\.lin1\.", r"layers.\1.mlp.up."),
    (r"transformer\.layer\.(\d+)\.ffn\.lin2\.", r"layers.\1.mlp.down."),
    (r"transformer\.layer\.(\d+)\.output_layer_norm\.", r"layers.\1.mlp_norm."),
)
_MODERNBERT: _Rules = (
    *_EMBEDDINGS,
    (r"layers\.(\d+)\.attn\.Wqkv\.", r"layers.\1.attention.query+key+value."),
    (r"layers\.(\d+)\.attn\.Wo\.", r"layers.\1.attention.output."),
    (r"layers\.(\d+)\.attn_norm\.", r"layers.\1.attention_norm."),
    (r"layers\.(\d+)\.mlp\.Wi\.", r"layers.\1.mlp.gate+up."),
    (r"layers\.(\d+)\.mlp\.Wo\.", r"layers.\1.mlp.down."),
    (r"layers\.(\d+)\.mlp_norm\.", r"layers.\1.mlp_norm."),
    (r"final_norm\.", "final_norm."),
)
_NOMIC: _Rules = (
    *_EMBEDDINGS,
    (r"(?:encoder\.)?layers\.(\d+)\.attn\.Wqkv\.", r"layers.\1.attention.query+key+value."),
    (r"layers\.(\d+)\.self_attn\.q_proj\.", r"layers.\1.attention.query."),
    (r"layers\.(\d+)\.self_attn\.k_proj\.", r"layers.\1.attention.key."),
    (r"layers\.(\d+)\.self_attn\.v_proj\.", r"layers.\1.attention.value."),
    (r"(?:encoder\.)?layers\.(\d+)\.attn\.out_proj\.", r"layers.\1.attention.output."),
    (r"layers\.(\d+)\.self_attn\.o_proj\.", r"layers.\1.attention.output."),
    (r"(?:encoder\.)?layers\.(\d+)\.mlp\.(?:fc12|gate_proj)\.", r"layers.\1.mlp.gate."),
    (r"(?:encoder\.)?layers\.(\d+)\.mlp\.(?:fc11|up_proj)\.", r"layers.\1.mlp.up."),
    (r"(?:encoder\.)?layers\.(\d+)\.mlp\.(?:fc2|down_proj)\.", r"layers.\1.mlp.down."),
    (r"(?:encoder\.)?layers\.(\d+)\.norm1\.", r"layers.\1.attention_norm."),
    (r"layers\.(\d+)\.post_attention_layernorm\.", r"layers.\1.attention_norm."),
    (r"(?:encoder\.)?layers\.(\d+)\.(?:norm2|post_mlp_layernorm)\.", r"layers.\1.mlp_norm."),
)
#: llama.cpp's names, the same for all architectures.
GGUF_NAMES: _Rules = (
    (r"token_embd\.", "embeddings.word."),
    (r"position_embd\.", "embeddings.position."),
    (r"token_types\.", "embeddings.token_type."),
    (r"token_embd_norm\.", "embeddings.norm."),
    (r"blk\.(\d+)\.attn_q\.", r"layers.\1.attention.query."),
    (r"blk\.(\d+)\.attn_k\.", r"layers.\1.attention.key."),
    (r"blk\.(\d+)\.attn_v\.", r"layers.\1.attention.value."),
    (r"blk\.(\d+)\.attn_qkv\.", r"layers.\1.attention.query+key+value."),
    (r"blk\.(\d+)\.attn_output\.", r"layers.\1.attention.output."),
    (r"blk\.(\d+)\.attn_output_norm\.", r"layers.\1.attention_norm."),
    (r"blk\.(\d+)\.ffn_gate\.", r"layers.\1.mlp.gate."),
    (r"blk\.(\d+)\.ffn_up\.", r"layers.\1.mlp.up."),
    (r"blk\.(\d+)\.ffn_down\.", r"layers.\1.mlp.down."),
    (r"blk\.(\d+)\.layer_output_norm\.", r"layers.\1.mlp_norm."),
    (r"cls\.output\.", "head.out."),
    (r"cls\.", "head.dense."),
)
_ROBERTA_HEAD: _Rules = (
    (r"classifier\.dense\.", "head.dense."),
    (r"classifier\.out_proj\.", "head.out."),
)
_OUT = (r"classifier\.", "head.out.")
_BERT_HEAD: _Rules = ((r"pooler\.dense\.", "head.dense."), _OUT)
_DISTILBERT_HEAD: _Rules = ((r"pre_classifier\.", "head.dense."), _OUT)
_MODERNBERT_HEAD: _Rules = ((r"head\.(dense|norm)\.", r"head.\1."), _OUT)


@dataclass(frozen=True, slots=True)
class _Family:
    """How to read a config; the names of tensors, and of those of a cross-encoder's head."""

    parse: Callable[[_Fields], EncoderConfig]
    rules: _Rules
    head: _Rules = ()


_ROBERTA = _Family(partial(_bert, skips_padding=True), _BERT, _ROBERTA_HEAD)
#: By the model type of config.json.
_FAMILIES: Mapping[str, _Family] = {
    "bert": _Family(_bert, _BERT, _BERT_HEAD),
    "camembert": _ROBERTA,
    "distilbert": _Family(_distilbert, _DISTILBERT, _DISTILBERT_HEAD),
    "modernbert": _Family(_modernbert, _MODERNBERT, _MODERNBERT_HEAD),
    "mpnet": _Family(_mpnet, _MPNET, _ROBERTA_HEAD),
    "nomic_bert": _Family(_nomic, _NOMIC),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}


def rename_tensors(
    config: EncoderConfig, tensors: Mapping[str, mx.array], names: _Rules | None = None
) -> dict[str, mx.array]:
    """Return the tensors under the encoder's names for them; an unknown name stays unchanged.

    `names` replaces the rules for transformers' names. Raises `ModelLoadError` if two tensors get
    the same name.
    """
    if names is None:
        family = _FAMILIES[config.architecture]
        names = family.rules + (family.head if config.num_labels else ())
    named: dict[str, mx.array] = {}
    for source, tensor in tensors.items():
        target = _renamed(source, names)
        if target is None:
            continue
        for name, part in _parts(target, tensor):
            if name in named:
                raise ModelLoadError(f"the weights contain {name} twice, once as {source!r}")
            named[name] = part
    return named


def _renamed(source: str, rules: _Rules) -> str | None:
    """Return the encoder's name for a tensor, or None if the encoder does not use it."""
    bare = _PREFIX.sub("", source, count=1)
    for pattern, target in rules:
        match = re.match(pattern, bare)
        if match is not None:
            rest = {"gamma": "weight", "beta": "bias"}.get(bare[match.end() :], bare[match.end() :])
            return match.expand(target) + rest
    return None if _UNUSED.fullmatch(bare) else source


def _parts(name: str, tensor: mx.array) -> list[tuple[str, mx.array]]:
    """Split a tensor that is fused along its rows; return the names and the parts."""
    path, _, kind = name.rpartition(".")
    stem, dot, fused = path.rpartition(".")
    names = fused.split("+")
    if len(names) == 1:
        return [(name, tensor)]
    if tensor.shape[0] % len(names):
        raise ModelLoadError(
            f"{stem}.{names[0]}: cannot split {tensor.shape[0]} rows into {len(names)} parts"
        )
    parts = mx.split(tensor, len(names), axis=0)
    return [(f"{stem}{dot}{own}.{kind}", part) for own, part in zip(names, parts, strict=True)]


_FLOATS = ("F32", "F16", "BF16")
#: Buffers that older versions of transformers saved with the weights.
_BUFFERS = ("position_ids", "token_type_ids", "inv_freq")


def load_encoder(files: ModelFiles, config: Mapping[str, Any], dtype: mx.Dtype | None) -> Encoder:
    """Return the encoder, not evaluated, its weights as `dtype` (None: as in the files).

    Raises `ModelLoadError` for an architecture that is not supported, and for tensors that are
    missing, unknown or of another shape; `WeightFormatError` for a damaged file.
    """
    bounds, _ = read_headers(files)
    bounds.check(config)
    parsed = parse_encoder_config(config)
    with bounds.building("config.json"):
        encoder = Encoder(parsed)
    tensors = rename_tensors(parsed, read_tensors(files.weights))
    if dtype is not None:
        tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    load_tensors(encoder, tensors, parsed.architecture)
    return encoder


def load_tensors(encoder: Encoder, tensors: Mapping[str, mx.array], what: str) -> None:
    """Give an encoder its weights; `what` names them in a `ModelLoadError`, if they do not fit."""
    check_parameters(what, shapes_of(encoder), array_shapes(tensors))
    encoder.load_weights(list(tensors.items()))
    encoder.eval()


def read_tensors(paths: Iterable[Path]) -> dict[str, mx.array]:
    """Return the tensors of safetensors files by name; MLX reads their bytes at first use.

    Raises `ModelLoadError` for a tensor that is not floating-point.
    """
    found: dict[str, mx.array] = {}
    for path in paths:
        for tensor in read_safetensors_header(path).tensors:
            if tensor.dtype not in _FLOATS and not tensor.name.endswith(_BUFFERS):
                raise ModelLoadError(
                    f"{path}: {tensor.name!r} is {tensor.dtype}, expected {' or '.join(_FLOATS)}"
                )
        try:
            loaded = mx.load(str(path), format="safetensors")
        except (RuntimeError, ValueError) as error:
            raise ModelLoadError(f"{path}: cannot be read: {error}") from error
        assert isinstance(loaded, dict)
        found |= loaded
    return found
