"""Checks of the files with which a safetensors model reads pictures, sound and video.

A model without them still answers text, so most problems are notes. A configuration that no runtime
can build a model from is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from modelpack.builder.capabilities import LocalFile, json_of
from modelpack.errors import NotFoundError, PackagingError
from modelpack.formats.config_json import (
    CONFIG_JSON,
    PROCESSOR_CONFIGS,
    is_processor_config,
    read_config_json,
    without_speech,
)

_PARTS: Final = ("vision_config", "audio_config", "text_config")
_ENCODERS: Final = ("vision_config", "audio_config", "audio_processor")
_OTHER_PROCESSORS: Final = ("video_preprocessor_config.json", "image_processor_config.json")
_TOKENS: Final = tuple(
    f"{kind}_token_{ending}" for kind in ("image", "video", "audio") for ending in ("id", "index")
)


def media_notes(files: Sequence[LocalFile]) -> tuple[str, ...]:
    """Return notes on what a model's configuration promises and its files do not keep.

    Raises `PackagingError` if parts of config.json have another type than an object.
    """
    config = without_speech(json_of(files, CONFIG_JSON))
    for name in _PARTS:
        if config.get(name) is not None and not isinstance(config[name], dict):
            raise PackagingError(
                f"{CONFIG_JSON}: {name} is not an object, so the model cannot be loaded",
                hint="use the config.json that is published with the model",
            )
    encoders = [name for name in _ENCODERS if config.get(name) is not None]
    return (*_processor_notes(files, encoders), *_token_notes(files, config))


def _processor_notes(files: Sequence[LocalFile], encoders: Sequence[str]) -> Iterator[str]:
    paths = {file.filepath: file.path for file in files}
    has_settings = False
    for name in (*PROCESSOR_CONFIGS, *_OTHER_PROCESSORS):
        if name in paths:
            try:
                document = read_config_json(paths[name], strict=False)
                has_settings |= name in PROCESSOR_CONFIGS and is_processor_config(name, document)
            except (NotFoundError, ValueError) as error:
                has_settings |= name in PROCESSOR_CONFIGS  # one note is enough
                yield f"{name} is not usable, so the model reads text only: {error}"
    if encoders and not has_settings:
        yield (
            f"{CONFIG_JSON} has {' and '.join(encoders)}, but there is no {PROCESSOR_CONFIGS[0]},"
            " so the model reads text only: add that of the original model"
        )


def _token_notes(files: Sequence[LocalFile], config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the placeholder tokens that no prompt can have."""
    text = config.get("text_config") or {}
    size = text.get("vocab_size", config.get("vocab_size"))
    added = json_of(files, "tokenizer_config.json").get("added_tokens_decoder")
    known = added if isinstance(added, dict) else {}
    for key in _TOKENS:
        token = config.get(key)
        if token is None:
            continue
        kind = key.partition("_")[0]
        if type(token) is not int:
            yield f"{CONFIG_JSON}: {key} is not a whole number, so the model reads no {kind}"
        elif type(size) is int and not 0 <= token < size and str(token) not in known:
            yield (
                f"{CONFIG_JSON}: {key} {token} is outside the vocabulary of {size} tokens, so the "
                f"model reads no {kind}"
            )
