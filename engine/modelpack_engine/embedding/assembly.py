"""The parts of a model put together: an `Embedder`, or a `CrossEncoder`."""

from __future__ import annotations

from mlx.nn.layers.base import Module

from modelpack_engine.embedding.batching import BatchLimits
from modelpack_engine.embedding.cross_encoder import CrossEncoder, CrossEncoderConfig
from modelpack_engine.embedding.embedder import Backbone, Embedder, EmbedderConfig
from modelpack_engine.embedding.encoder import Encoder
from modelpack_engine.embedding.inputs import InputReader
from modelpack_engine.embedding.pooling import PoolingMode
from modelpack_engine.embedding.sentence_files import NormalizeStep, SentenceFiles
from modelpack_engine.embedding.steps import Steps
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.loaders.files import MODULES, ModelFiles
from modelpack_engine.loaders.loading import Device
from modelpack_engine.loaders.precision import evaluate

_CPU_LIMITS = BatchLimits(max_texts=32, max_tokens=4096)
_GPU_LIMITS = BatchLimits(max_texts=256, max_tokens=32768)


def limits_of(device: Device) -> BatchLimits:
    """Return how much runs at once."""
    return _CPU_LIMITS if device == "cpu" else _GPU_LIMITS


def assemble_embedder(
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
    """Return the embedder; `usual` is how tokens are pooled where the files do not say."""
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


def assemble_cross_encoder(
    files: ModelFiles,
    encoder: Encoder,
    reader: InputReader,
    limits: BatchLimits,
    weight_bytes: int,
) -> CrossEncoder:
    """Return the cross-encoder; raise `ModelLoadError` unless its classifier has one label."""
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


def evaluated(model: Module) -> int:
    """Read all weights; return their bytes."""
    try:
        return evaluate(model)
    except (RuntimeError, ValueError) as error:  # MLX reads some files only now
        raise ModelLoadError(f"the weights cannot be read: {error}") from error
