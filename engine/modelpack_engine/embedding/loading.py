"""load_embedder: from the files of a model to an `Embedder` or a `CrossEncoder`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import mlx.core as mx

from modelpack_engine.embedding.assembly import (
    assemble_cross_encoder,
    assemble_embedder,
    evaluated,
    limits_of,
)
from modelpack_engine.embedding.batching import BatchLimits
from modelpack_engine.embedding.cross_encoder import CrossEncoder
from modelpack_engine.embedding.decoder import Decoder, load_decoder
from modelpack_engine.embedding.embedder import Embedder
from modelpack_engine.embedding.encoder_config import is_cross_encoder, is_encoder
from modelpack_engine.embedding.encoder_loading import load_encoder
from modelpack_engine.embedding.gguf_loading import Purpose, gguf_purpose, load_gguf_embedder
from modelpack_engine.embedding.inputs import InputReader
from modelpack_engine.embedding.pooling import PoolingMode
from modelpack_engine.embedding.sentence_files import SentenceFiles, read_sentence_files
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.loaders import json_tokenizer
from modelpack_engine.loaders.files import MODULES, ModelFiles
from modelpack_engine.loaders.loading import Device, context_length_of
from modelpack_engine.loaders.parameters import position_rows
from modelpack_engine.loaders.precision import set_dtype, unpack
from modelpack_engine.loaders.safetensors import read_config
from modelpack_engine.loaders.tokenizer import Tokenizer

_UNLIMITED = 10**9  # transformers writes 10**30 for "no limit"


def purpose_of(files: ModelFiles) -> Purpose:
    """Return what a model is for: an encoder, or one with modules.json, does not generate."""
    if files.format == "gguf":
        return gguf_purpose(files)
    config = files.json("config.json") or {}
    if is_encoder(config):
        return "ranking" if is_cross_encoder(config) else "embedding"
    return "embedding" if files.read(MODULES) is not None else "generation"


def load_embedder(
    files: ModelFiles,
    *,
    device: Device,
    dtype: mx.Dtype | None = None,
    ignored_fields: Collection[str] = (),
) -> Embedder | CrossEncoder:
    """Load an embedding model, or a cross-encoder where the files describe one.

    On a CPU all is float32, on a GPU as in the files, unless `dtype` says otherwise. Raises
    `ModelLoadError` for whatever is wrong with the files or not supported, naming it.
    """
    if dtype is None and device == "cpu":
        dtype = mx.float32
    with mx.stream(mx.cpu if device == "cpu" else mx.gpu):
        if files.format == "gguf":
            return load_gguf_embedder(files, device, dtype)
        config = read_config(files)
        sentence = read_sentence_files(files)
        tokenizer = json_tokenizer.tokenizer_of(files, config)
        limits = limits_of(device)
        if not is_encoder(config):
            return _decoder(files, config, sentence, tokenizer, limits, dtype, ignored_fields)
        encoder = load_encoder(files, config, dtype)
        weight_bytes = evaluated(encoder)
        parsed = encoder.config
        reader = InputReader(
            tokenizer,
            parsed.vocab_size,
            _max_length(files, sentence, parsed.max_tokens),
            sentence.lowers_text,
            parsed.type_vocab_size,
        )
        if parsed.num_labels:
            return assemble_cross_encoder(files, encoder, reader, limits, weight_bytes)
        return assemble_embedder(
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
    ignored_fields: Collection[str],
) -> Embedder:
    if is_cross_encoder(config):
        raise ModelLoadError(
            f"a cross-encoder of the architecture {config['model_type']!r} is not supported"
        )
    model, completed, valid = load_decoder(files, config, ignored_fields)
    if dtype is not None:
        set_dtype(model, dtype)
    if dtype == mx.float32:
        unpack(model, dtype)
    model.eval()
    weight_bytes = evaluated(model)
    decoder = Decoder(model, completed)
    positions, _ = context_length_of(completed)
    rows = position_rows(model) or positions
    positions = min(positions, valid.max_length or positions, rows)
    reader = InputReader(
        tokenizer,
        decoder.vocab_size,
        _max_length(files, sentence, positions),
        sentence.lowers_text,
    )
    return assemble_embedder(
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


def _max_length(files: ModelFiles, sentence: SentenceFiles, positions: int) -> int:
    """Return the longest input: what the files say, within what the model has positions for."""
    said = sentence.max_length
    if said is None:
        said = (files.json("tokenizer_config.json") or {}).get("model_max_length")
    if not isinstance(said, int) or isinstance(said, bool) or not 0 < said < _UNLIMITED:
        said = positions
    return min(said, positions)
