"""Pooling and the steps after it, as the files of sentence-transformers configure them.

    modules.json                        the steps in order, each with a directory
    1_Pooling/config.json               how the vectors of tokens become one
    2_Dense/config.json, …              a projection of that vector, with weights of its own
    sentence_bert_config.json           the maximum input length, and whether text is lowercased
    config_sentence_transformers.json   prompts by name

Source: sentence-transformers' documentation, "Creating custom models", and its module classes
(modules/pooling.py for the modes and their names).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.embedding.encoder_checkpoint import read_tensors
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models.files import MODULES, ModelFiles, decode_json
from modelpack_engine.models.precision import array_shapes, check_parameters


class PoolingMode(StrEnum):
    """How the vectors of a text's tokens become one vector."""

    CLS = "cls"  # the first token
    MAX = "max"
    MEAN = "mean"
    #: The sum, divided by the square root of the number of tokens.
    MEAN_SQRT_LEN = "mean_sqrt_len_tokens"
    WEIGHTED_MEAN = "weightedmean"  # later tokens weigh more
    LAST = "lasttoken"


#: The modes in older N_Pooling/config.json files, in the order of their vectors.
_FLAGS: Mapping[str, PoolingMode] = {
    "pooling_mode_cls_token": PoolingMode.CLS,
    "pooling_mode_max_tokens": PoolingMode.MAX,
    "pooling_mode_mean_tokens": PoolingMode.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": PoolingMode.MEAN_SQRT_LEN,
    "pooling_mode_weightedmean_tokens": PoolingMode.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": PoolingMode.LAST,
}


def parse_pooling(config: Mapping[str, Any], what: str) -> tuple[PoolingMode, ...]:
    """Return the modes that N_Pooling/config.json asks for; `what` names it in errors."""
    named = config.get("pooling_mode")
    if named is not None:
        names = [named] if isinstance(named, str) else named
        try:
            modes = tuple(PoolingMode(name) for name in names)
        except (TypeError, ValueError):
            raise ModelLoadError(
                f"{what}: pooling_mode {str(named)[:100]!r} is not known"
            ) from None
        if not modes:
            raise ModelLoadError(f"{what}: pooling_mode is empty")
        return modes
    for key, value in config.items():
        if key.startswith("pooling_mode_") and key not in _FLAGS and value:
            raise ModelLoadError(f"{what}: {key[:100]} is not known")
    return tuple(mode for key, mode in _FLAGS.items() if config.get(key)) or (PoolingMode.MEAN,)


def pool(
    hidden: mx.array, lengths: mx.array, modes: Sequence[PoolingMode], skipped: mx.array
) -> mx.array:
    """Return one vector per text, float32 [texts, modes * size].

    `hidden` [texts, tokens, size] is padded on the right; `lengths` int32 [texts] counts the real
    tokens. The first `skipped` int32 [texts] of these, a prompt, are left out.
    """
    hidden = hidden.astype(mx.float32)
    vectors = [_pooled(hidden, lengths, mode, skipped) for mode in modes]
    return vectors[0] if len(vectors) == 1 else mx.concatenate(vectors, axis=-1)


def _pooled(hidden: mx.array, lengths: mx.array, mode: PoolingMode, skipped: mx.array) -> mx.array:
    last = lengths - 1
    if mode in (PoolingMode.CLS, PoolingMode.LAST):
        places = last if mode is PoolingMode.LAST else mx.minimum(skipped, last)
        return mx.take_along_axis(hidden, places[:, None, None], axis=1)[:, 0]
    places = mx.arange(hidden.shape[1])[None, :]
    real = ((places >= skipped[:, None]) & (places < lengths[:, None]))[..., None]
    if mode is PoolingMode.MAX:
        return mx.where(real, hidden, -mx.inf).max(axis=1)
    # Hidden states of padding may be infinite, and infinity times a weight of 0 is NaN.
    known = mx.where(real, hidden, 0)
    if mode is PoolingMode.WEIGHTED_MEAN:
        weights = mx.where(real, (places + 1).astype(mx.float32)[..., None], 0)
        return (known * weights).sum(axis=1) / weights.sum(axis=1)
    count = (lengths - skipped)[:, None].astype(mx.float32)
    return known.sum(axis=1) / (count if mode is PoolingMode.MEAN else mx.sqrt(count))


#: Files that may name the longest input; all but the first are older names.
_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_CONFIG = "config_sentence_transformers.json"


@dataclass(frozen=True, slots=True)
class DenseStep:
    """A linear projection; its weights are in `directory`."""

    directory: str
    in_features: int
    out_features: int
    bias: bool
    activation: str  # the name of torch's class
    residual: bool


@dataclass(frozen=True, slots=True)
class LayerNormStep:
    """A norm over the vector; its weights are in `directory`."""

    directory: str
    dimension: int


@dataclass(frozen=True, slots=True)
class NormalizeStep:
    """Scales the vector to length 1."""


Step = DenseStep | LayerNormStep | NormalizeStep


@dataclass(frozen=True, slots=True)
class SentenceFiles:
    """The settings in the files; without modules.json, `pooling` is None and `steps` is empty.

    `max_length` counts tokens, special ones included. Without `pools_prompt`, a prompt's tokens
    are read but left out of the pooling.
    """

    pooling: tuple[PoolingMode, ...] | None
    steps: tuple[Step, ...] = ()
    max_length: int | None = None
    lowers_text: bool = False
    pools_prompt: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)


def read_sentence_files(files: ModelFiles) -> SentenceFiles:
    """Read the settings. Raises `ModelLoadError`, naming the file, for unsupported ones."""
    max_length, lowers = _transformer_settings(files)
    prompts = _prompts(files)
    modules = _modules(files)
    if modules is None:
        return SentenceFiles(None, max_length=max_length, lowers_text=lowers, prompts=prompts)
    pooling: tuple[PoolingMode, ...] | None = None
    pools_prompt = True
    steps: list[Step] = []
    for number, (kind, directory) in enumerate(modules):
        what = f"{directory}/config.json"
        if (number == 0) != (kind == "Transformer") or (number == 1) != (kind == "Pooling"):
            raise ModelLoadError(
                f"{MODULES}: step {number + 1} is a {kind[:50]};"
                " expected a Transformer, then a Pooling, then other steps"
            )
        match kind:
            case "Transformer":
                if directory:
                    raise ModelLoadError(
                        f"{MODULES}: the Transformer is in {directory[:100]!r}, expected it beside"
                        f" {MODULES}",
                        hint="save the model again with a newer sentence-transformers",
                    )
            case "Pooling":
                config = _config(files, what)
                pooling = parse_pooling(config, what)
                pools_prompt = config.get("include_prompt", True) is not False
            case "Dense":
                steps.append(_dense(_config(files, what), directory, what))
            case "LayerNorm":
                dimension = _count(_config(files, what), "dimension", what)
                steps.append(LayerNormStep(directory, dimension))
            case "Normalize":
                steps.append(NormalizeStep())
            case "Dropout":
                pass  # for training
            case _:
                raise ModelLoadError(f"{MODULES}: the step {kind[:100]!r} is not supported")
    if pooling is None:
        raise ModelLoadError(f"{MODULES}: there is no Pooling step")
    return SentenceFiles(pooling, tuple(steps), max_length, lowers, pools_prompt, prompts)


def _modules(files: ModelFiles) -> list[tuple[str, str]] | None:
    """Return the class and the directory of each step; None without modules.json."""
    raw = files.read(MODULES)
    if raw is None:
        return None
    listed = decode_json(raw, MODULES)
    try:
        found = [(entry["type"].rpartition(".")[2], entry["path"]) for entry in listed]
    except (AttributeError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{MODULES}: is not a list of modules: {error}") from None
    if not found or not all(isinstance(path, str) for _, path in found):
        raise ModelLoadError(f"{MODULES}: is not a list of modules")
    return [(kind, path.rstrip("/")) for kind, path in found]


def _config(files: ModelFiles, what: str) -> dict[str, Any]:
    config = files.json(what)
    if config is None:
        raise ModelLoadError(
            f"{what} is missing, which {MODULES} names",
            hint="package the whole directory, its sub-directories too",
        )
    return config


def _count(config: Mapping[str, Any], name: str, what: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelLoadError(f"{what}: {name} is {str(value)[:50]!r}, expected a positive integer")
    return value


def _dense(config: Mapping[str, Any], directory: str, what: str) -> DenseStep:
    for name in ("module_input_name", "module_output_name"):
        if config.get(name, "sentence_embedding") not in (None, "sentence_embedding"):
            raise ModelLoadError(f"{what}: {name} {str(config[name])[:50]!r} is not supported")
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    return DenseStep(
        directory,
        _count(config, "in_features", what),
        _count(config, "out_features", what),
        bool(config.get("bias", True)),
        "Identity" if activation is None else str(activation).rpartition(".")[2],
        bool(config.get("use_residual", False)),
    )


def _transformer_settings(files: ModelFiles) -> tuple[int | None, bool]:
    for name in _TRANSFORMER_CONFIGS:
        config = files.json(name)
        if config is None:
            continue
        length = config.get("max_seq_length")
        if length is not None:
            length = _count(config, "max_seq_length", name)
        return length, config.get("do_lower_case") is True
    return None, False


def _prompts(files: ModelFiles) -> dict[str, str]:
    prompts = (files.json(_CONFIG) or {}).get("prompts") or {}
    if not isinstance(prompts, dict):
        raise ModelLoadError(f"{_CONFIG}: prompts is not an object")
    return {str(name): text for name, text in prompts.items() if isinstance(text, str)}


Apply = Callable[[mx.array], mx.array]

_WEIGHTS = "model.safetensors"
#: The smallest divisor in torch.nn.functional.normalize.
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
    """Applies steps in order; `dimension` is the size of the resulting vectors."""

    def __init__(self, files: ModelFiles, steps: Sequence[Step], dimension: int) -> None:
        """Load the weights of the steps; `dimension` is the size of the vectors before them.

        Raises `ModelLoadError` for weights that are missing or do not fit.
        """
        self._applied: list[Apply] = []
        self.normalizes = bool(steps) and isinstance(steps[-1], NormalizeStep)
        for step in steps:
            match step:
                case DenseStep():
                    _check_width(step.directory, step.in_features, dimension)
                    self._applied.append(_dense_step(files, step))
                    dimension = step.out_features
                case LayerNormStep():
                    _check_width(step.directory, step.dimension, dimension)
                    self._applied.append(_layer_norm(files, step))
                case NormalizeStep():
                    self._applied.append(normalize)
        self.dimension = dimension

    def __call__(self, vectors: mx.array) -> mx.array:
        """Apply the steps to float32 vectors [texts, size]."""
        for apply in self._applied:
            vectors = apply(vectors)
        return vectors


def normalize(vectors: mx.array) -> mx.array:
    """Return the vectors with length 1; zero stays zero."""
    return vectors / mx.maximum(mx.linalg.norm(vectors, axis=-1, keepdims=True), _SHORTEST)


def _dense_step(files: ModelFiles, step: DenseStep) -> Apply:
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
            residual = tensors.get("residual.weight")
            projected = projected + (vectors if residual is None else vectors @ residual.T)
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
            hint="save the model again with sentence-transformers, as safetensors:"
            " pytorch_model.bin is never read, because it can run code",
        )
    tensors = read_tensors([path])
    check_parameters(f"{directory}/{_WEIGHTS}", shapes, array_shapes(tensors))
    loaded = {name: array.astype(mx.float32) for name, array in tensors.items()}
    mx.eval(loaded)
    return loaded


def _check_width(directory: str, wanted: int, got: int) -> None:
    if wanted != got:
        raise ModelLoadError(f"{directory}: expected vectors of {wanted} numbers, got {got}")
