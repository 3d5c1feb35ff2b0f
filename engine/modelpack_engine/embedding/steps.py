"""The steps after pooling: projections, norms and length 1, as one function over vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.embedding.encoder_loading import read_tensors
from modelpack_engine.embedding.sentence_files import (
    DenseStep,
    LayerNormStep,
    NormalizeStep,
    Step,
)
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.loaders.files import ModelFiles
from modelpack_engine.loaders.parameters import check_parameters

Apply = Callable[[mx.array], mx.array]

_WEIGHTS = "model.safetensors"
#: torch divides by no less than this (torch.nn.functional.normalize).
_SHORTEST = 1e-12
_NORM_EPS = 1e-5  # torch.nn.LayerNorm's

_ACTIVATIONS: Mapping[str, Apply] = {
    "Identity": lambda vectors: vectors,
    "Tanh": mx.tanh,
    "ReLU": nn.relu,
    "GELU": nn.gelu,
    "SiLU": nn.silu,
    "Sigmoid": mx.sigmoid,
}


class Steps:
    """Applies steps in their order; `dimension` is that of the vectors that come out."""

    def __init__(self, files: ModelFiles, steps: Sequence[Step], dimension: int) -> None:
        """Load what the steps need; `dimension` is that of the vectors that go in.

        Raises `ModelLoadError` for weights that are missing or do not fit.
        """
        self._applied: list[Apply] = []
        self.normalizes = bool(steps) and isinstance(steps[-1], NormalizeStep)
        for step in steps:
            match step:
                case DenseStep():
                    _check_width(step.directory, step.in_features, dimension)
                    self._applied.append(_dense(files, step))
                    dimension = step.out_features
                case LayerNormStep():
                    _check_width(step.directory, step.dimension, dimension)
                    self._applied.append(_layer_norm(files, step))
                case NormalizeStep():
                    self._applied.append(normalize)
        self.dimension = dimension

    def __call__(self, vectors: mx.array) -> mx.array:
        """Return what becomes of float32 vectors [texts, size]."""
        for apply in self._applied:
            vectors = apply(vectors)
        return vectors


def normalize(vectors: mx.array) -> mx.array:
    """Return the vectors with length 1; zero stays zero."""
    return vectors / mx.maximum(mx.linalg.norm(vectors, axis=-1, keepdims=True), _SHORTEST)


def _dense(files: ModelFiles, step: DenseStep) -> Apply:
    activation = _ACTIVATIONS.get(step.activation)
    if activation is None:
        raise ModelLoadError(
            f"{step.directory}/config.json: the activation {step.activation[:50]!r} is not known"
        )
    shape = (step.out_features, step.in_features)
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": shape}
    if step.bias:
        shapes["linear.bias"] = (step.out_features,)
    if step.residual and step.in_features != step.out_features:
        shapes["residual.weight"] = shape
    tensors = _tensors(files, step.directory, shapes)

    def apply(vectors: mx.array) -> mx.array:
        projected = vectors @ tensors["linear.weight"].T
        if "linear.bias" in tensors:
            projected = projected + tensors["linear.bias"]
        projected = activation(projected)
        if step.residual:
            beside = tensors.get("residual.weight")
            projected = projected + (vectors if beside is None else vectors @ beside.T)
        return projected

    return apply


def _layer_norm(files: ModelFiles, step: LayerNormStep) -> Apply:
    shape = (step.dimension,)
    tensors = _tensors(files, step.directory, {"norm.weight": shape, "norm.bias": shape})
    return lambda vectors: mx.fast.layer_norm(
        vectors, tensors["norm.weight"], tensors["norm.bias"], _NORM_EPS
    )


def _tensors(
    files: ModelFiles, directory: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, mx.array]:
    path: Path | None = files.names.get(f"{directory}/{_WEIGHTS}")
    if path is None:
        raise ModelLoadError(
            f"{directory}/{_WEIGHTS} is missing",
            hint="weights in pytorch_model.bin are not read: they can run code."
            " sentence-transformers saves safetensors",
        )
    tensors = read_tensors([path])
    got = {name: tuple(array.shape) for name, array in tensors.items()}
    check_parameters(f"{directory}/{_WEIGHTS}", shapes, got)
    loaded = {name: array.astype(mx.float32) for name, array in tensors.items()}
    mx.eval(loaded)
    return loaded


def _check_width(directory: str, wanted: int, got: int) -> None:
    if wanted != got:
        raise ModelLoadError(f"{directory}: takes vectors of {wanted}, but gets {got}")
