"""SentenceFiles: what sentence-transformers' files say is done around a model.

    modules.json                        the steps in their order, each with a directory
    1_Pooling/config.json               how tokens become one vector
    2_Dense/config.json, …              a projection of it, with weights of its own
    sentence_bert_config.json           the longest input, and whether text is lowered
    config_sentence_transformers.json   prompts by name

Source: sentence-transformers' documentation, "Creating custom models", and its module classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelpack_engine.embedding.pooling import PoolingMode, parse_pooling
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.loaders.documents import decode_json
from modelpack_engine.loaders.files import MODULES, ModelFiles

#: Where the longest input may stand; all but the first are names of the past.
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
    """The vector gets length 1."""


Step = DenseStep | LayerNormStep | NormalizeStep


@dataclass(frozen=True, slots=True)
class SentenceFiles:
    """`pooling` is None where the files do not say; then nothing else is known of steps either.

    `max_length` counts tokens with the special ones. Without `pools_prompt`, a prompt's tokens
    are read but left out of the pooling.
    """

    pooling: tuple[PoolingMode, ...] | None
    steps: tuple[Step, ...] = ()
    max_length: int | None = None
    lowers_text: bool = False
    pools_prompt: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)


def read_sentence_files(files: ModelFiles) -> SentenceFiles:
    """Read them. Raises `ModelLoadError`, naming the file, for what is wrong or not supported."""
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
                " expected a Transformer, a Pooling, and what follows them"
            )
        match kind:
            case "Transformer":
                if directory:
                    raise ModelLoadError(
                        f"{MODULES}: the model is in {directory[:100]!r}, expected beside it",
                        hint="save the model again with a newer sentence-transformers",
                    )
            case "Pooling":
                config = _config(files, what)
                pooling = parse_pooling(config, what)
                pools_prompt = config.get("include_prompt", True) is not False
            case "Dense":
                steps.append(_dense(_config(files, what), directory, what))
            case "LayerNorm":
                steps.append(
                    LayerNormStep(directory, _count(_config(files, what), "dimension", what))
                )
            case "Normalize":
                steps.append(NormalizeStep())
            case "Dropout":
                pass  # for training
            case _:
                raise ModelLoadError(f"{MODULES}: the step {kind[:100]!r} is not supported")
    if pooling is None:
        raise ModelLoadError(f"{MODULES}: there is no Pooling")
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
        raise ModelLoadError(f"{MODULES}: is no list of modules: {error}") from None
    if not found or not all(isinstance(path, str) for _, path in found):
        raise ModelLoadError(f"{MODULES}: is no list of modules")
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
        raise ModelLoadError(f"{what}: {name} is {str(value)[:50]!r}, expected a number")
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
        raise ModelLoadError(f"{_CONFIG}: prompts are no object")
    return {str(name): text for name, text in prompts.items() if isinstance(text, str)}
