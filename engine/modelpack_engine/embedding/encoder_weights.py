"""Rename tensors of BERT-family checkpoints to the names of `Encoder`, and load them.

A checkpoint may have a prefix (`bert.`), heads that an encoder does not use, fused projections, and
BERT's first names of a norm's weights (`gamma`, `beta`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from modelpack.formats.safetensors import read_safetensors_header
from modelpack_engine.embedding.encoder import Encoder
from modelpack_engine.embedding.encoder_config import EncoderConfig, parse_encoder_config
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.models.load_budget import TensorBounds
from modelpack_engine.models.precision import check_parameters, shapes_of

_Rules = tuple[tuple[str, str], ...]

_PREFIX = re.compile(r"(?:bert|roberta|distilbert|mpnet|model)\.")
#: Buffers, and heads for training: nothing that an embedding is made of.
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
    (
        r"(?:encoder\.)?layers\.(\d+)\.(?:attn\.out_proj|self_attn\.o_proj)\.",
        r"layers.\1.attention.output.",
    ),
    (r"(?:encoder\.)?layers\.(\d+)\.mlp\.(?:fc12|gate_proj)\.", r"layers.\1.mlp.gate."),
    (r"(?:encoder\.)?layers\.(\d+)\.mlp\.(?:fc11|up_proj)\.", r"layers.\1.mlp.up."),
    (r"(?:encoder\.)?layers\.(\d+)\.mlp\.(?:fc2|down_proj)\.", r"layers.\1.mlp.down."),
    (
        r"(?:encoder\.)?layers\.(\d+)\.(?:norm1|post_attention_layernorm)\.",
        r"layers.\1.attention_norm.",
    ),
    (r"(?:encoder\.)?layers\.(\d+)\.(?:norm2|post_mlp_layernorm)\.", r"layers.\1.mlp_norm."),
)
_RULES: Mapping[str, _Rules] = {
    "bert": _BERT,
    "camembert": _BERT,
    "distilbert": _DISTILBERT,
    "modernbert": _MODERNBERT,
    "mpnet": _MPNET,
    "nomic_bert": _NOMIC,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
}
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
_HEADS: Mapping[str, _Rules] = {
    "bert": ((r"pooler\.dense\.", "head.dense."), (r"classifier\.", "head.out.")),
    "camembert": _ROBERTA_HEAD,
    "distilbert": ((r"pre_classifier\.", "head.dense."), (r"classifier\.", "head.out.")),
    "modernbert": (
        (r"head\.dense\.", "head.dense."),
        (r"head\.norm\.", "head.norm."),
        (r"classifier\.", "head.out."),
    ),
    "mpnet": _ROBERTA_HEAD,
    "roberta": _ROBERTA_HEAD,
    "xlm-roberta": _ROBERTA_HEAD,
}


def rename_tensors(
    config: EncoderConfig, tensors: Mapping[str, mx.array], names: _Rules | None = None
) -> dict[str, mx.array]:
    """Return the encoder's tensors under its own names; an unknown name stays as it is.

    `names` are what the file calls them, in place of transformers' names. Raises
    `ModelLoadError` if two tensors are the same one.
    """
    rules = list(_RULES[config.architecture] if names is None else names)
    if config.num_labels and names is None:
        rules += _HEADS[config.architecture]
    named: dict[str, mx.array] = {}
    for source, tensor in tensors.items():
        target = _renamed(source, rules)
        if target is None:
            continue
        for name, part in _parts(target, tensor):
            if name in named:
                raise ModelLoadError(f"the weights hold {name} twice, once as {source!r}")
            named[name] = part
    return named


def _renamed(source: str, rules: list[tuple[str, str]]) -> str | None:
    """Return the name that the encoder has for a tensor, None if it has no use for it."""
    bare = _PREFIX.sub("", source, count=1) if _PREFIX.match(source) else source
    for pattern, target in rules:
        match = re.match(pattern, bare)
        if match is not None:
            rest = {"gamma": "weight", "beta": "bias"}.get(bare[match.end() :], bare[match.end() :])
            return match.expand(target) + rest
    return None if _UNUSED.fullmatch(bare) else source


def _parts(name: str, tensor: mx.array) -> list[tuple[str, mx.array]]:
    """Take apart what is fused along the rows."""
    head, plus, _ = name.partition("+")
    if not plus:
        return [(name, tensor)]
    stem, dot, fused = name.rpartition(".")[0].rpartition(".")
    kind = name.rpartition(".")[2]
    names = fused.split("+")
    if tensor.shape[0] % len(names):
        raise ModelLoadError(f"{head}: {tensor.shape[0]} rows do not make {len(names)} parts")
    parts = mx.split(tensor, len(names), axis=0)
    return [(f"{stem}{dot}{own}.{kind}", part) for own, part in zip(names, parts, strict=True)]


_FLOATS = ("F32", "F16", "BF16")
#: Buffers that older versions of transformers saved beside the weights.
_BUFFERS = ("position_ids", "token_type_ids", "inv_freq")


def load_encoder(files: ModelFiles, config: Mapping[str, Any], dtype: mx.Dtype | None) -> Encoder:
    """Return the encoder, not evaluated, its weights as `dtype` (None: as in the files).

    Raises `ModelLoadError` for an architecture that is not known, by its name, and for tensors
    that are missing, unknown or of another shape; `WeightFormatError` for a damaged file.
    """
    bounds = TensorBounds.of(
        (tensor.name, tensor.shape)
        for path in files.weights
        for tensor in read_safetensors_header(path).tensors
    )
    bounds.check(config)
    parsed = parse_encoder_config(config)
    with bounds.building("config.json"):
        encoder = Encoder(parsed)
    tensors = rename_tensors(parsed, read_tensors(files.weights))
    got = {name: tuple(array.shape) for name, array in tensors.items()}
    check_parameters(parsed.architecture, shapes_of(encoder), got)
    if dtype is not None:
        tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    encoder.load_weights(list(tensors.items()))
    encoder.eval()
    return encoder


def read_tensors(paths: Iterable[Path]) -> dict[str, mx.array]:
    """Return the tensors of safetensors files by name; their bytes are read when they are used.

    Raises `ModelLoadError` for one that is in two files, or of no floating-point type.
    """
    found: dict[str, mx.array] = {}
    for path in paths:
        for tensor in read_safetensors_header(path).tensors:
            if tensor.name in found:
                raise ModelLoadError(f"{path}: {tensor.name!r} is in another file too")
            if tensor.dtype not in _FLOATS and not tensor.name.endswith(_BUFFERS):
                raise ModelLoadError(
                    f"{path}: {tensor.name!r} is {tensor.dtype}, expected one of {_FLOATS}"
                )
        try:
            loaded = mx.load(str(path), format="safetensors")
        except (RuntimeError, ValueError) as error:
            raise ModelLoadError(f"{path}: cannot be read: {error}") from error
        assert isinstance(loaded, dict)
        found |= loaded
    return found
