"""What `config.json` of transformers says about a model: its architecture and context size.

Only a few keys are looked at, in the order in which llama.cpp's converter does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from modelpack.errors import ModelpackError, NotFoundError
from modelpack.formats.reading import WeightFile

CONFIG_JSON = "config.json"
#: Configurations with the names of 20,000 classes are about 1 MB.
MAX_CONFIG_JSON_BYTES = 16 * 1024 * 1024
#: Context sizes are signed 32-bit integers in configs.
MAX_CONTEXT_SIZE = 2**31 - 1

_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_ctx",
    "n_positions",
    "max_length",
    "max_sequence_length",
    "model_max_length",
)
#: Where models of text and images keep the configuration of their language model.
_TEXT_KEYS = ("text_config", "llm_config", "language_config")


def read_config_json(path: Path, *, strict: bool) -> Mapping[str, Any]:
    """Return the object in `path`; raise `ValueError`, saying why, if it holds none.

    Python's writer puts `Infinity` into some models' files, which is no JSON: `strict` refuses it.
    Raises `NotFoundError` if there is no such file.
    """
    try:
        with WeightFile.open(path) as file:
            if file.size > MAX_CONFIG_JSON_BYTES:
                raise ValueError(f"more than {MAX_CONFIG_JSON_BYTES} bytes")
            raw = file.read(0, file.size)
    except NotFoundError:
        raise
    except ModelpackError as error:
        raise ValueError(error.message) from None
    constants = _refuse if strict else None
    try:
        value = json.loads(raw.decode("utf-8", "replace"), parse_constant=constants)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def context_size(config: Mapping[str, Any], *, nested: bool) -> int | None:
    """Return the context size in tokens, or None.

    With `nested`, each key is also looked for in the configuration of the language model.
    """
    places = [config, *_text_configs(config)] if nested else [config]
    for key in _CONTEXT_KEYS:
        for place in places:
            value = place.get(key)
            if type(value) is int and 1 <= value <= MAX_CONTEXT_SIZE:
                return value
    return None


def architecture(config: Mapping[str, Any]) -> str:
    """Return the model's architecture, or an empty string.

    `model_type` ("llama", "qwen2") is what GGUF files say, too; `architectures` names a class.
    """
    for place in (config, *_text_configs(config)):
        kind = place.get("model_type")
        if isinstance(kind, str) and kind.strip():
            return kind.strip()
    classes = config.get("architectures")
    if isinstance(classes, list) and classes and isinstance(classes[0], str):
        return classes[0].strip()
    return ""


def first_config_json(directories: Iterable[Path]) -> Path | None:
    """Return the first `config.json` that exists in `directories`."""
    for directory in dict.fromkeys(directories):
        path = directory / CONFIG_JSON
        if path.exists():
            return path
    return None


def _text_configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key in _TEXT_KEYS:
        value = config.get(key)
        if isinstance(value, dict):
            yield value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
