"""Embedding models in GGUF: encoders of BERT's kind, and decoders that say how they are pooled.

Source of the keys and names: llama.cpp (gguf-py's constants, src/llama-model.cpp). Vectors get
length 1, as llama.cpp gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import mlx.core as mx

from modelpack_engine.embedding.assembly import (
    assemble_cross_encoder,
    assemble_embedder,
    evaluated,
    limits_of,
)
from modelpack_engine.embedding.cross_encoder import CrossEncoder
from modelpack_engine.embedding.decoder import Decoder
from modelpack_engine.embedding.embedder import Embedder
from modelpack_engine.embedding.encoder import Encoder
from modelpack_engine.embedding.encoder_config import EncoderConfig
from modelpack_engine.embedding.encoder_names import GGUF_NAMES, rename_tensors
from modelpack_engine.embedding.inputs import InputReader
from modelpack_engine.embedding.pooling import PoolingMode
from modelpack_engine.embedding.sentence_files import NormalizeStep, SentenceFiles
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.loaders import gguf_tokenizer, json_tokenizer
from modelpack_engine.loaders.files import ModelFiles
from modelpack_engine.loaders.gguf_arrays import Wanted, arrays_of
from modelpack_engine.loaders.gguf_file import GGUFFile
from modelpack_engine.loaders.loading import Device, load
from modelpack_engine.loaders.parameters import check_parameters, shapes_of
from modelpack_engine.loaders.tensor_bounds import TensorBounds
from modelpack_engine.loaders.tokenizer import Tokenizer

#: What a model is for, as far as its files say.
Purpose = Literal["embedding", "ranking", "generation"]

#: llama.cpp's architectures to ours. RoBERTa is a `bert` there: its positions start at 0.
_ENCODERS: Mapping[str, Literal["bert", "nomic_bert"]] = {
    "bert": "bert",
    "nomic-bert": "nomic_bert",
}
_NONE, _RANK = 0, 4
_POOLING: Mapping[int, PoolingMode] = {
    1: PoolingMode.MEAN,
    2: PoolingMode.CLS,
    3: PoolingMode.LAST,
}


def gguf_purpose(files: ModelFiles) -> Purpose:
    """Return what a model in GGUF is for: `pooling_type` makes a decoder an embedding model."""
    file = GGUFFile.open(files.weights)
    kind = _pooling_type(file)
    if kind == _RANK:
        return "ranking"
    return "embedding" if kind != _NONE or _architecture(file) in _ENCODERS else "generation"


def load_gguf_embedder(
    files: ModelFiles, device: Device, dtype: mx.Dtype | None
) -> Embedder | CrossEncoder:
    """Load an embedding model. Raises `ModelLoadError` for what is wrong or not supported."""
    file = GGUFFile.open(files.weights)
    if _architecture(file) in _ENCODERS:
        return _load_encoder(files, file, device, dtype or mx.float16)
    if _pooling_type(file) == _RANK:
        raise file.metadata.error(f"a cross-encoder of {_architecture(file)} is not supported")
    loaded = load(files, device=device, dtype=dtype)
    decoder = Decoder(loaded.model, loaded.config)
    reader = InputReader(loaded.tokenizer, decoder.vocab_size, loaded.context_length)
    return assemble_embedder(
        files,
        _sentence(file, PoolingMode.LAST),
        reader,
        decoder,
        decoder.hidden_size,
        (PoolingMode.LAST,),
        loaded.architecture,
        limits_of(device),
        loaded.weight_bytes,
    )


def _load_encoder(
    files: ModelFiles, file: GGUFFile, device: Device, dtype: mx.Dtype
) -> Embedder | CrossEncoder:
    bounds = TensorBounds.of((tensor.name, tensor.shape) for tensor in file)
    _check_sizes(file, bounds)
    config = _encoder_config(file)
    with bounds.building(str(file.metadata.path)):
        encoder = Encoder(config)
    wanted = []
    for tensor in file:
        path, _, parameter = tensor.name.rpartition(".")
        wanted.append(Wanted(tensor, path, parameter))
    tensors = rename_tensors(config, dict(arrays_of(wanted, dtype)), GGUF_NAMES)
    got = {name: tuple(array.shape) for name, array in tensors.items()}
    check_parameters(file.metadata.path, shapes_of(encoder), got)
    encoder.load_weights(list(tensors.items()))
    encoder.eval()
    weight_bytes = evaluated(encoder)
    reader = InputReader(
        _tokenizer(files, file),
        config.vocab_size,
        config.max_tokens,
        num_types=config.type_vocab_size,
    )
    if config.num_labels:
        return assemble_cross_encoder(files, encoder, reader, limits_of(device), weight_bytes)
    return assemble_embedder(
        files,
        _sentence(file, PoolingMode.MEAN),
        reader,
        encoder,
        config.hidden_size,
        (PoolingMode.MEAN,),
        config.architecture,
        limits_of(device),
        weight_bytes,
    )


def _check_sizes(file: GGUFFile, bounds: TensorBounds) -> None:
    metadata, name = file.metadata, _architecture(file)
    sizes = ("block_count", "context_length", "attention.head_count", "feed_forward_length")
    bounds.check({key: metadata.integer(f"{name}.{key}") for key in sizes}, str(metadata.path))


def _encoder_config(file: GGUFFile) -> EncoderConfig:
    metadata, name = file.metadata, _architecture(file)
    architecture = _ENCODERS[name]
    if metadata.flag(f"{name}.attention.causal", False):
        raise metadata.error(f"{name} with causal attention is not supported")
    for needed in ("token_embd.weight", "token_embd_norm.weight"):
        if needed not in file:
            raise metadata.error(f"has no {needed}")
    rotary = architecture == "nomic_bert"
    if not rotary and "position_embd.weight" not in file:
        raise metadata.error("has no position_embd.weight")
    if "blk.0.ffn_gate.weight" not in file and rotary:
        raise metadata.error("an MLP without a gate, or with experts, is not supported here")
    layers = metadata.integer(f"{name}.block_count")
    vocab_size, hidden_size = file["token_embd.weight"].shape
    context = metadata.integer(f"{name}.context_length")
    table = 0 if rotary else file["position_embd.weight"].shape[0]
    labels = file["cls.output.weight"].shape[0] if "cls.output.weight" in file else 0
    if _pooling_type(file) == _RANK and not labels:
        raise metadata.error("ranks, but has no cls.output.weight")
    base = metadata.number(f"{name}.rope.freq_base", 10_000.0) if rotary else None
    return EncoderConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=layers,
        num_heads=metadata.integer(f"{name}.attention.head_count"),
        intermediate_size=metadata.integer(f"{name}.feed_forward_length"),
        activation="silu" if rotary else "gelu",
        norm_eps=metadata.number(f"{name}.attention.layer_norm_epsilon"),
        max_tokens=min(context, table) if table else context,
        position_table=table,
        position_offset=0,
        pad_token_id=0,
        type_vocab_size=_rows(file, "token_types.weight"),
        rope_bases=(base,) * layers,
        windows=(None,) * layers,
        gated=rotary,
        attention_bias="blk.0.attn_output.bias" in file,
        mlp_bias="blk.0.ffn_up.bias" in file,
        num_labels=labels,
    )


def _tokenizer(files: ModelFiles, file: GGUFFile) -> Tokenizer:
    try:
        return gguf_tokenizer.tokenizer_of(file.metadata)
    except ModelLoadError:
        if files.text("tokenizer.json") is None:
            raise
    return json_tokenizer.tokenizer_of(files, {})


def _sentence(file: GGUFFile, usual: PoolingMode) -> SentenceFiles:
    kind = _pooling_type(file)
    if kind == _NONE:
        return SentenceFiles((usual,), (NormalizeStep(),))
    if kind not in _POOLING:
        raise file.metadata.error(f"the pooling type {kind} is not known")
    return SentenceFiles((_POOLING[kind],), (NormalizeStep(),))


def _rows(file: GGUFFile, name: str) -> int:
    if name not in file:
        return 0
    shape = file[name].shape
    return shape[0] if len(shape) > 1 else 1


def _architecture(file: GGUFFile) -> str:
    return file.metadata.text("general.architecture")


def _pooling_type(file: GGUFFile) -> int:
    return file.metadata.integer(f"{_architecture(file)}.pooling_type", _NONE)
