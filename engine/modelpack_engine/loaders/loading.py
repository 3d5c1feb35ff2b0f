"""load: from the files of a model to a model and a tokenizer that are ready to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
from mlx.nn.layers.base import Module

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.loaders import gguf_tokenizer, json_tokenizer
from modelpack_engine.loaders.files import CHAT_TEMPLATE, ModelFiles
from modelpack_engine.loaders.gguf import GGUFLoader
from modelpack_engine.loaders.gguf_file import GGUFFile
from modelpack_engine.loaders.precision import (
    Precision,
    dense_bytes,
    evaluate,
    fits,
    set_dtype,
    unpack,
)
from modelpack_engine.loaders.safetensors import load_safetensors, read_config
from modelpack_engine.loaders.tokenizer import Tokenizer

Device = Literal["cpu", "gpu"]

_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "model_max_length",
)
_DEFAULT_CONTEXT = 2048
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run.

    `config` is what mlx-lm's class was made from, `architecture` the name that the files give
    (`general.architecture`, or `model_type`), `context_length` in tokens. `notes` tell the user
    what differs from the files. All weights are in memory: `weight_bytes` of them.
    """

    model: Module
    config: Mapping[str, Any]
    tokenizer: Tokenizer
    architecture: str
    context_length: int
    notes: tuple[str, ...]
    weight_bytes: int


def load(
    files: ModelFiles,
    *,
    device: Device,
    dtype: mx.Dtype | None = None,
    dense: bool | None = None,
    requantize: bool = True,
) -> LoadedModel:
    """Load the model in `files`; nothing is written to disk.

    On a CPU the default is dense float32, or quantised weights with float32 scales where memory
    is short. On a GPU weights stay packed, and the default dtype is that of the files (bfloat16
    for GGUF). `dense` decides whether quantised weights are unpacked; `requantize` whether GGUF
    types that MLX cannot pack without loss (Q6_K, Q3_K, Q2_K, IQ…) are held in 8 bits rather
    than in `dtype`.

    Raises `ModelLoadError` for whatever is wrong with the files, naming it, and
    `WeightFormatError` where one is damaged.
    """
    with mx.stream(mx.cpu if device == "cpu" else mx.gpu):
        if files.format == "gguf":
            return _load_gguf(files, device, dtype, dense, requantize)
        return _load_safetensors(files, device, dtype, dense)


def _load_gguf(
    files: ModelFiles, device: Device, dtype: mx.Dtype | None, dense: bool | None, requantize: bool
) -> LoadedModel:
    loader = GGUFLoader(GGUFFile.open(files.weights))
    notes = [*files.notes, *loader.architecture.notes]
    tokenizer = _gguf_tokenizer(files, loader)  # the quicker part first, where much can be wrong
    if dtype is None:
        dtype = mx.float32 if device == "cpu" else mx.bfloat16
    if dense is None:
        dense = device == "cpu" and fits(loader.dense_elements * dtype.size)
        _note_density(notes, device, dense)
    model = loader.load(Precision(dtype, dense, requantize))
    return _loaded(
        model,
        loader.config,
        tokenizer,
        loader.name,
        loader.config["max_position_embeddings"],
        notes,
    )


def _gguf_tokenizer(files: ModelFiles, loader: GGUFLoader) -> Tokenizer:
    metadata = loader.file.metadata
    # A template that was packaged on its own was chosen by somebody.
    template = files.text(CHAT_TEMPLATE)
    try:
        return gguf_tokenizer.tokenizer_of(metadata, template)
    except ModelLoadError:
        if files.text("tokenizer.json") is None:
            raise
    return json_tokenizer.tokenizer_of(files, {})


def _load_safetensors(
    files: ModelFiles, device: Device, dtype: mx.Dtype | None, dense: bool | None
) -> LoadedModel:
    config = read_config(files)
    tokenizer = json_tokenizer.tokenizer_of(files, config)
    notes = list(files.notes)
    model, config = load_safetensors(files, config)
    if dtype is None and device == "cpu":
        dtype = mx.float32
    if dense is None:
        dense = device == "cpu" and fits(dense_bytes(model, _FLOAT32_BYTES))
        if config.get("quantization"):
            _note_density(notes, device, dense)
    if dtype is not None:
        set_dtype(model, dtype)
    if dense:
        left = unpack(model, dtype)
        if left:
            notes.append(f"{len(left)} modules stay quantised, {left[0]} for one")
    context, known = context_length_of(config)
    if not known:
        notes.append(f"the config names no context length; {context} tokens are assumed")
    return _loaded(model, config, tokenizer, config["model_type"], context, notes)


def _loaded(
    model: Module,
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    architecture: str,
    context_length: int,
    notes: list[str],
) -> LoadedModel:
    model.eval()
    try:
        weight_bytes = evaluate(model)
    except (RuntimeError, ValueError) as error:  # MLX reads some files only now
        raise ModelLoadError(f"the weights cannot be read: {error}") from error
    return LoadedModel(
        model, config, tokenizer, architecture, context_length, tuple(notes), weight_bytes
    )


def _note_density(notes: list[str], device: Device, dense: bool) -> None:
    if device == "cpu" and not dense:
        notes.append("weights stay quantised, since memory is short: several times slower")


def context_length_of(config: Mapping[str, Any]) -> tuple[int, bool]:
    """Return the context in tokens, and whether the config names it or it is assumed."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        for key in _CONTEXT_KEYS:
            value = part.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value, True
    return _DEFAULT_CONTEXT, False
