"""load_embedder: from the files of a model to an `Embedder` or a `CrossEncoder`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import mlx.core as mx
from mlx.nn.layers.base import Module

from modelpack_engine.embedding.batching import BatchLimits
from modelpack_engine.embedding.cross_encoder import CrossEncoder, CrossEncoderConfig
from modelpack_engine.embedding.decoder import Decoder, load_decoder
from modelpack_engine.embedding.embedder import Backbone, Embedder, EmbedderConfig
from modelpack_engine.embedding.encoder import Encoder
from modelpack_engine.embedding.encoder_config import is_cross_encoder, is_encoder
from modelpack_engine.embedding.encoder_loading import load_encoder
from modelpack_engine.embedding.inputs import InputReader
from modelpack_engine.embedding.pooling import PoolingMode
from modelpack_engine.embedding.sentence_files import (
    NormalizeStep,
    SentenceFiles,
    read_sentence_files,
)
from modelpack_engine.embedding.steps import Steps
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.loaders import json_tokenizer
from modelpack_engine.loaders.files import MODULES, ModelFiles
from modelpack_engine.loaders.loading import Device, context_length_of
from modelpack_engine.loaders.precision import evaluate, set_dtype, unpack
from modelpack_engine.loaders.safetensors import read_config
from modelpack_engine.loaders.tokenizer import Tokenizer

#: What a model is for, as far as its files say.
Purpose = Literal["embedding", "ranking", "generation"]

_CPU_LIMITS = BatchLimits(max_texts=32, max_tokens=4096)
_GPU_LIMITS = BatchLimits(max_texts=256, max_tokens=32768)
_UNLIMITED = 10**9  # transformers writes 10**30 for "no limit"


def purpose_of(files: ModelFiles) -> Purpose:
    """Return what a model is for: an encoder, or one with modules.json, does not generate."""
    if files.format != "safetensors":
        return "generation"
    config = files.json("config.json") or {}
    if is_encoder(config):
        return "ranking" if is_cross_encoder(config) else "embedding"
    return "embedding" if files.read(MODULES) is not None else "generation"


def load_embedder(
    files: ModelFiles, *, device: Device, dtype: mx.Dtype | None = None
) -> Embedder | CrossEncoder:
    """Load an embedding model, or a cross-encoder where the files describe one.

    On a CPU all is float32, on a GPU as in the files, unless `dtype` says otherwise. Raises
    `ModelLoadError` for whatever is wrong with the files or not supported, naming it.
    """
    if dtype is None and device == "cpu":
        dtype = mx.float32
    with mx.stream(mx.cpu if device == "cpu" else mx.gpu):
        config = read_config(files)
        sentence = read_sentence_files(files)
        tokenizer = json_tokenizer.tokenizer_of(files, config)
        limits = _CPU_LIMITS if device == "cpu" else _GPU_LIMITS
        if not is_encoder(config):
            return _decoder(files, config, sentence, tokenizer, limits, dtype)
        encoder = load_encoder(files, config, dtype)
        weight_bytes = _evaluated(encoder)
        parsed = encoder.config
        reader = InputReader(
            tokenizer,
            parsed.vocab_size,
            _max_length(files, sentence, parsed.max_tokens),
            sentence.lowers_text,
        )
        if parsed.num_labels:
            return _cross_encoder(files, encoder, reader, limits, weight_bytes)
        return _embedder(
            files,
            sentence,
            reader,
            encoder,
            parsed.hidden_size,
            (PoolingMode.MEAN,),
            parsed.architecture,
            limits,
            weight_bytes,
        )


def _decoder(
    files: ModelFiles,
    config: Mapping[str, Any],
    sentence: SentenceFiles,
    tokenizer: Tokenizer,
    limits: BatchLimits,
    dtype: mx.Dtype | None,
) -> Embedder:
    if is_cross_encoder(config):
        raise ModelLoadError(
            f"a cross-encoder of the architecture {config['model_type']!r} is not supported"
        )
    model, completed = load_decoder(files, config)
    if dtype is not None:
        set_dtype(model, dtype)
    if dtype == mx.float32:
        unpack(model, dtype)
    model.eval()
    weight_bytes = _evaluated(model)
    decoder = Decoder(model, completed)
    positions, _ = context_length_of(completed)
    reader = InputReader(
        tokenizer,
        decoder.vocab_size,
        _max_length(files, sentence, positions),
        sentence.lowers_text,
    )
    return _embedder(
        files,
        sentence,
        reader,
        decoder,
        decoder.hidden_size,
        (PoolingMode.LAST,),
        str(completed["model_type"]),
        limits,
        weight_bytes,
    )


def _embedder(
    files: ModelFiles,
    sentence: SentenceFiles,
    reader: InputReader,
    backbone: Backbone,
    hidden_size: int,
    usual: tuple[PoolingMode, ...],
    architecture: str,
    limits: BatchLimits,
    weight_bytes: int,
) -> Embedder:
    notes = list(files.notes)
    pooling, listed = sentence.pooling, sentence.steps
    if pooling is None:
        pooling, listed = usual, (NormalizeStep(),)
        notes.append(f"no {MODULES}: {usual[0]} pooling and vectors of length 1 are assumed")
    steps = Steps(files, listed, hidden_size * len(pooling))
    config = EmbedderConfig(
        architecture,
        steps.dimension,
        reader.max_length,
        pooling,
        steps.normalizes,
        sentence.pools_prompt,
        sentence.prompts,
    )
    return Embedder(
        config,
        reader,
        backbone,
        steps,
        limits=limits,
        notes=tuple(notes),
        weight_bytes=weight_bytes,
    )


def _cross_encoder(
    files: ModelFiles,
    encoder: Encoder,
    reader: InputReader,
    limits: BatchLimits,
    weight_bytes: int,
) -> CrossEncoder:
    if encoder.config.num_labels != 1:
        raise ModelLoadError(
            f"the classifier has {encoder.config.num_labels} labels;"
            " a model that ranks documents has one"
        )
    return CrossEncoder(
        CrossEncoderConfig(encoder.config.architecture, reader.max_length),
        reader,
        encoder,
        limits=limits,
        notes=files.notes,
        weight_bytes=weight_bytes,
    )


def _max_length(files: ModelFiles, sentence: SentenceFiles, positions: int) -> int:
    """Return the longest input: what the files say, within what the model has positions for."""
    said = sentence.max_length
    if said is None:
        said = (files.json("tokenizer_config.json") or {}).get("model_max_length")
    if not isinstance(said, int) or isinstance(said, bool) or not 0 < said < _UNLIMITED:
        said = positions
    return min(said, positions)


def _evaluated(model: Module) -> int:
    try:
        return evaluate(model)
    except (RuntimeError, ValueError) as error:  # MLX reads some files only now
        raise ModelLoadError(f"the weights cannot be read: {error}") from error
