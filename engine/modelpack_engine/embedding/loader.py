"""Load an `Embedder` or a `CrossEncoder` from the files of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, cast

import mlx.core as mx
from mlx.nn.layers.base import Module

from modelpack.formats.config_json import speech_family
from modelpack_engine.embedding.embedder import (
    CrossEncoder,
    CrossEncoderConfig,
    Embedder,
    EmbedderConfig,
)
from modelpack_engine.embedding.encoder import Encoder, EncoderConfig
from modelpack_engine.embedding.encoder_checkpoint import (
    GGUF_NAMES,
    is_cross_encoder,
    is_encoder,
    load_encoder,
    load_tensors,
    rename_tensors,
)
from modelpack_engine.embedding.request import BatchLimits, InputReader
from modelpack_engine.embedding.sentence_transformers import (
    NormalizeStep,
    PoolingMode,
    SentenceFiles,
    Steps,
    read_sentence_files,
)
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import json_tokenizer
from modelpack_engine.models.files import MODULES, ModelFiles
from modelpack_engine.models.gguf import TensorPlan, arrays_of
from modelpack_engine.models.gguf_file import GGUFFile
from modelpack_engine.models.gguf_tensors import Parameter
from modelpack_engine.models.load_budget import TensorBounds
from modelpack_engine.models.loader import Device, context_length_of, gguf_tokenizer_of, load
from modelpack_engine.models.precision import (
    evaluate,
    position_rows,
    token_rows,
    unpack,
)
from modelpack_engine.models.safetensors import load_safetensors, read_config
from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_engine.patches.corrections import classes_of

_LIMITS: Mapping[Device, BatchLimits] = {
    "cpu": BatchLimits(max_texts=32, max_tokens=4096),
    "gpu": BatchLimits(max_texts=256, max_tokens=32768),
}


def _embedder(
    files: ModelFiles,
    sentence: SentenceFiles,
    reader: InputReader,
    backbone: Encoder | Decoder,
    architecture: str,
    device: Device,
    weight_bytes: int,
) -> Embedder:
    notes = list(files.notes)
    pooling, listed = sentence.pooling, sentence.steps
    if pooling is None:
        usual = PoolingMode.LAST if isinstance(backbone, Decoder) else PoolingMode.MEAN
        pooling, listed = (usual,), (NormalizeStep(),)
        notes.append(f"no {MODULES}: {usual} pooling and vectors of length 1 are assumed")
    steps = Steps(files, listed, backbone.hidden_size * len(pooling))
    config = EmbedderConfig(
        architecture,
        steps.dimension,
        reader.max_length,
        pooling,
        steps.normalizes,
        sentence.pools_prompt,
        sentence.prompts,
    )
    return Embedder(config, reader, _LIMITS[device], tuple(notes), weight_bytes, backbone, steps)


def _by_encoder(
    files: ModelFiles,
    sentence: SentenceFiles,
    tokenizer: Tokenizer,
    encoder: Encoder,
    max_length: int,
    device: Device,
) -> Embedder | CrossEncoder:
    """Evaluate an encoder; return its model, a cross-encoder if it has a classifier."""
    config, weight_bytes = encoder.config, evaluate(encoder)
    reader = InputReader(
        tokenizer, config.vocab_size, max_length, sentence.lowers_text, config.type_vocab_size
    )
    if not config.num_labels:
        return _embedder(
            files, sentence, reader, encoder, config.architecture, device, weight_bytes
        )
    if config.num_labels > 1:
        raise ModelLoadError(
            f"the classifier has {config.num_labels} labels; a model that ranks documents has one"
        )
    described = CrossEncoderConfig(config.architecture, max_length)
    return CrossEncoder(described, reader, _LIMITS[device], files.notes, weight_bytes, encoder)


#: Names in mlx-lm's classes of the model without its head.
_INNER = ("model", "transformer", "backbone")
_HEAD = "lm_head"


class Decoder:
    """A model of mlx-lm without its head."""

    def __init__(self, model: Module, config: Mapping[str, Any]) -> None:
        """Raises `ModelLoadError` if `model` has no such part, or needs bidirectional attention."""
        kind = str(config.get("model_type"))
        for key, value in (("use_bidirectional_attention", True), ("is_causal", False)):
            if config.get(key) is value:
                raise ModelLoadError(f"{kind} with {key} {str(value).lower()} is not supported")
        inner = next((model[name] for name in _INNER if name in model), None)
        if inner is None:
            raise ModelLoadError(f"mlx-lm's {kind} has no part that computes hidden states")
        self._inner = inner
        rows = token_rows(model)
        if rows is None:
            raise ModelLoadError(f"mlx-lm's {kind} has no table of token embeddings")
        self.vocab_size = rows
        # Nothing is computed: the shape is known from the graph.
        self.hidden_size = int(self(mx.zeros((1, 1), mx.int32), None, None).shape[-1])

    def __call__(
        self, token_ids: mx.array, lengths: mx.array | None, type_ids: mx.array | None
    ) -> mx.array:
        """Return hidden states [texts, tokens, hidden_size], as `Encoder` does."""
        return cast(mx.array, self._inner(token_ids))


def _headless(config: dict[str, Any]) -> tuple[type[Module], type]:
    """Return the model's class without its head, and the class of its arguments.

    Checkpoints of embedding models leave out the head, and the prefix `model.` too.
    """
    base, arguments = classes_of(config)

    class Headless(base):  # type: ignore[misc, valid-type]
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            self.pop(_HEAD, None)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            if "model" in self and not any(name.startswith("model.") for name in weights):
                weights = {f"model.{name}": array for name, array in weights.items()}
            if hasattr(base, "sanitize"):
                weights = super().sanitize(weights)
            return {
                name: array for name, array in weights.items() if not name.startswith(f"{_HEAD}.")
            }

    return Headless, arguments


#: The purpose of a model, according to its files.
Purpose = Literal["embedding", "ranking", "generation", "transcription"]

#: llama.cpp's architectures to ours. RoBERTa is a `bert` there: its positions start at 0.
_ENCODERS: Mapping[str, Literal["bert", "nomic_bert"]] = {
    "bert": "bert",
    "nomic-bert": "nomic_bert",
}
_NONE, _RANK = 0, 4
_POOLING: Mapping[int, PoolingMode] = {1: PoolingMode.MEAN, 2: PoolingMode.CLS, 3: PoolingMode.LAST}


def _load_gguf(
    files: ModelFiles, device: Device, dtype: mx.Dtype | None
) -> Embedder | CrossEncoder:
    file = GGUFFile.open(files.weights)
    if _architecture(file) in _ENCODERS:
        return _load_encoder(files, file, device, dtype or mx.float16)
    if _pooling_type(file) == _RANK:
        raise file.metadata.error(f"a cross-encoder of {_architecture(file)} is not supported")
    loaded = load(files, device=device, dtype=dtype)
    decoder = Decoder(loaded.model, loaded.config)
    reader = InputReader(loaded.tokenizer, decoder.vocab_size, loaded.context_length)
    sentence = _sentence(file, PoolingMode.LAST)
    return _embedder(
        files, sentence, reader, decoder, loaded.architecture, device, loaded.weight_bytes
    )


def _load_encoder(
    files: ModelFiles, file: GGUFFile, device: Device, dtype: mx.Dtype
) -> Embedder | CrossEncoder:
    bounds = TensorBounds.of((tensor.name, tensor.shape) for tensor in file)
    _check_sizes(file, bounds)
    config = _encoder_config(file)
    with bounds.building(str(file.metadata.path)):
        encoder = Encoder(config)
    plans = []
    for tensor in file:
        path, _, parameter = tensor.name.rpartition(".")
        plans.append(TensorPlan(Parameter.of(tensor, path, parameter)))
    load_tensors(
        encoder,
        rename_tensors(config, dict(arrays_of(plans, dtype)), GGUF_NAMES),
        file.metadata.path,
    )
    sentence, tokenizer = _sentence(file, PoolingMode.MEAN), gguf_tokenizer_of(files, file.metadata)
    return _by_encoder(files, sentence, tokenizer, encoder, config.max_tokens, device)


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
        raise metadata.error("the pooling type is rank, but cls.output.weight is missing")
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
        type_vocab_size=_rows(file, "token_types.weight"),
        rope_bases=(base,) * layers,
        windows=(None,) * layers,
        gated=rotary,
        attention_bias="blk.0.attn_output.bias" in file,
        mlp_bias="blk.0.ffn_up.bias" in file,
        num_labels=labels,
    )


def _sentence(file: GGUFFile, usual: PoolingMode) -> SentenceFiles:
    kind = _pooling_type(file)
    if kind not in (_NONE, _RANK, *_POOLING):
        raise file.metadata.error(f"the pooling type {kind} is not known")
    return SentenceFiles((_POOLING.get(kind, usual),), (NormalizeStep(),))


def _rows(file: GGUFFile, name: str) -> int:
    if name not in file:
        return 0
    shape = file[name].shape
    return shape[0] if len(shape) > 1 else 1


def _architecture(file: GGUFFile) -> str:
    return file.metadata.text("general.architecture")


def _pooling_type(file: GGUFFile) -> int:
    return file.metadata.integer(f"{_architecture(file)}.pooling_type", _NONE)


_UNLIMITED = 10**9  # transformers writes 10**30 for "no limit"


def purpose_of(files: ModelFiles) -> Purpose:
    """Return the purpose of a model; encoders and models with modules.json generate no text.

    In GGUF, a `pooling_type` makes a decoder an embedding model.
    """
    if files.format == "gguf":
        file = GGUFFile.open(files.weights)
        kind = _pooling_type(file)
        if kind == _RANK:
            return "ranking"
        return "embedding" if kind != _NONE or _architecture(file) in _ENCODERS else "generation"
    config = files.json("config.json") or {}
    if speech_family(config) is not None:
        return "transcription"
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

    The default `dtype` is float32 on a CPU, and that of the files on a GPU. Raises
    `ModelLoadError`, naming the cause, for invalid or unsupported files.
    """
    if dtype is None and device == "cpu":
        dtype = mx.float32
    with mx.stream(mx.cpu if device == "cpu" else mx.gpu):
        if files.format == "gguf":
            return _load_gguf(files, device, dtype)
        config = read_config(files)
        sentence = read_sentence_files(files)
        tokenizer = json_tokenizer.tokenizer_of(files, config)
        if not is_encoder(config):
            return _load_decoder(files, config, sentence, tokenizer, device, dtype, ignored_fields)
        encoder = load_encoder(files, config, dtype)
        max_length = _max_length(files, sentence, encoder.config.max_tokens)
        return _by_encoder(files, sentence, tokenizer, encoder, max_length, device)


def _load_decoder(
    files: ModelFiles,
    config: Mapping[str, Any],
    sentence: SentenceFiles,
    tokenizer: Tokenizer,
    device: Device,
    dtype: mx.Dtype | None,
    ignored_fields: Collection[str],
) -> Embedder:
    if is_cross_encoder(config):
        raise ModelLoadError(
            f"a cross-encoder of the architecture {config['model_type']!r} is not supported"
        )
    model, completed, valid = load_safetensors(
        files, config, classes=_headless, ignored_fields=ignored_fields
    )
    if dtype is not None:
        model.set_dtype(dtype)
    if dtype == mx.float32:
        unpack(model, dtype)
    model.eval()
    weight_bytes = evaluate(model)
    decoder = Decoder(model, completed)
    positions, _ = context_length_of(completed)
    rows = position_rows(model) or positions
    positions = min(positions, valid.max_length or positions, rows)
    max_length = _max_length(files, sentence, positions)
    reader = InputReader(tokenizer, decoder.vocab_size, max_length, sentence.lowers_text)
    architecture = str(completed["model_type"])
    return _embedder(files, sentence, reader, decoder, architecture, device, weight_bytes)


def _max_length(files: ModelFiles, sentence: SentenceFiles, positions: int) -> int:
    """Return the longest input in tokens: the files' limit, or fewer if the model has fewer."""
    said = sentence.max_length
    if said is None:
        said = (files.json("tokenizer_config.json") or {}).get("model_max_length")
    if not isinstance(said, int) or isinstance(said, bool) or not 0 < said < _UNLIMITED:
        said = positions
    return min(said, positions)
