"""A model's defaults for requests: from its files, and from Ollama's parameters in its package.

Its chat template is one of them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ollama_defaults
from modelpack.artifacts.model import CHAT_TEMPLATE, Model
from modelpack.formats.gguf import GGUFHeader, read_gguf_header
from modelpack.storage import read_blob
from modelpack.store.layout import LayoutStore
from modelpack_engine.errors import RequestError
from modelpack_server.conversation.served_model import Preface
from modelpack_server.pool.settings import DEFAULT_TEMPERATURE

if TYPE_CHECKING:
    from modelpack_engine.models.files import ModelFiles

#: The key of the chat template in a GGUF's metadata.
TEMPLATE_KEY: Final = "tokenizer.chat_template"
# The name of a field in the file and in SamplingParams, and the range of valid values.
_FIELDS = (
    ("temperature", 0, 2), ("top_p", 0, 1), ("top_k", -1, 1 << 30), ("min_p", 0, 1),
    ("repetition_penalty", 0.01, 100),
)  # fmt: skip


def sampling_defaults(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the fields of SamplingParams for which the file has valid values."""
    config = config or {}
    found: dict[str, Any] = {}
    for name, low, high in _FIELDS:
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if low <= value <= high and not (name == "top_p" and value == 0):
            found[name] = int(value) if name == "top_k" else value
    if config.get("do_sample") is False:
        found["temperature"] = 0.0
    return found


# llama.cpp's keys of GGUF metadata (gguf-py/gguf/constants.py), and the fields of SamplingParams.
_GGUF_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def sampling_of_files(files: ModelFiles, header: GGUFHeader | None = None) -> dict[str, Any]:
    """Return the fields of SamplingParams for requests that do not set them.

    They come from generation_config.json, else from the metadata of a GGUF file (its `header`, read
    unless it is given). The temperature is `DEFAULT_TEMPERATURE` if neither sets it.
    """
    if header is None and files.format == "gguf":
        header = read_gguf_header(files.weights[0])
    metadata = {} if header is None else header.metadata
    # Floats of 32 bits: 0.6 would be 0.6000000238.
    given = {
        name: _rounded(metadata[key].value) for key, name in _GGUF_KEYS.items() if key in metadata
    }
    own = sampling_defaults(files.json("generation_config.json"))
    return {"temperature": DEFAULT_TEMPERATURE, **sampling_defaults(given), **own}


def template_of_files(files: ModelFiles, header: GGUFHeader | None = None) -> str:
    """Return the chat template: that of its own file, else that of the weights' metadata, or "".

    `header` is that of a GGUF file, read unless it is given.
    """
    from modelpack_engine.models.json_tokenizer import chat_template_of

    if files.format != "gguf":
        found = chat_template_of(files)
        return found.source if found else ""
    own: str | None = files.text(CHAT_TEMPLATE)
    if own is not None:
        return own
    header = header or read_gguf_header(files.weights[0])
    entry = header.metadata.get(TEMPLATE_KEY)
    return entry.value if entry is not None and isinstance(entry.value, str) else ""


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


_IGNORED = frozenset((
    "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "numa", "low_vram", "f16_kv",
    "logits_all", "vocab_only", "use_mmap", "use_mlock", "embedding_only", "penalize_newline",
    "mirostat", "mirostat_tau", "mirostat_eta", "tfs_z", "draft_num_predict",
))  # fmt: skip
_FLOATS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_NAMES = {field: name for name, field in _FLOATS.items()}
_INTEGERS = ("top_k", "seed", "num_predict", "num_ctx", "repeat_last_n")
# The engine computes in float32 and squares some values.
_MOST = 10**9
#: All names of options that Ollama knows.
KNOWN = _IGNORED | {*_FLOATS, *_INTEGERS, "stop", "typical_p"}


def as_options(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of SamplingParams under Ollama's names."""
    return {_NAMES.get(name, name): value for name, value in sampling.items()}


@dataclass(frozen=True, slots=True)
class ParsedOptions:
    """Parsed options: `sampling` has fields of SamplingParams, `context_size` is in tokens."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    context_size: int | None = None


def parse_options(options: Mapping[str, Any]) -> ParsedOptions:
    """Parse options of Ollama's API; a null option counts as missing.

    A token limit of 0 or less means no limit. A `repeat_last_n` of 0 switches the penalty off; any
    other value means the whole text. Raises `RequestError` with the option's name for a value of
    the wrong type, and for `typical_p`, which the engine does not support.
    """
    found: dict[str, Any] = {}
    numbers: dict[str, int] = {}
    for name, value in options.items():
        if value is None or name in _IGNORED:
            continue
        if name in _FLOATS:
            found[_FLOATS[name]] = _number(name, value)
        elif name in _INTEGERS:
            numbers[name] = _integer(name, value)
        elif name == "stop":
            found["stop"] = _texts(name, value)
        elif name == "typical_p" and _number(name, value) not in (0, 1):
            raise RequestError("typical_p is not supported here", param="options.typical_p")
    if found.get("top_p") == 0:  # only the most likely token
        found["top_p"], numbers["top_k"] = 1.0, 1
    if "top_k" in numbers:
        found["top_k"] = max(0, numbers["top_k"])
    if numbers.get("seed", -1) >= 0:
        found["seed"] = numbers["seed"]
    if numbers.get("num_predict", 0) > 0:
        found["max_tokens"] = numbers["num_predict"]
    if numbers.get("repeat_last_n") == 0:
        found["repetition_penalty"] = 1.0
    context_size = numbers.get("num_ctx", 0)
    return ParsedOptions(found, context_size if context_size > 0 else None)


def _number(name: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not -_MOST <= value <= _MOST:
        raise _wrong(name, value, f"a number within {_MOST}")
    return float(value)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JavaScript clients may send 1e3
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(name, value, "a whole number")
    return int(value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _wrong(name, value, "a string or a list of strings")
    return tuple(text for text in texts if text)


def _wrong(name: str, value: Any, expected: str) -> RequestError:
    return RequestError(
        f"option {name} is {str(value)[:100]!r}, expected {expected}", param=f"options.{name}"
    )


_log = logging.getLogger(__name__)

#: The key of the manifest annotation with a model's defaults.
ANNOTATION = media_types.DEFAULTS


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """The defaults in a manifest: Ollama's `parameters`, a system prompt and `messages`."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    messages: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, annotations: Mapping[str, str]) -> ModelDefaults:
        """Return the defaults in a manifest's annotations, ignoring invalid values."""
        try:
            value = json.loads(annotations.get(ANNOTATION, "{}"))
        except (ValueError, RecursionError):
            return cls()
        if not isinstance(value, dict):
            return cls()
        parameters, system = value.get("parameters"), value.get("system")
        messages = value.get("messages")
        return cls(
            parameters if isinstance(parameters, dict) else {},
            system if isinstance(system, str) else "",
            tuple(m for m in messages if _is_message(m)) if isinstance(messages, list) else (),
        )

    @classmethod
    def of_model(cls, model: Model, store: LayoutStore) -> ModelDefaults:
        """Return a stored model's defaults, from the annotation or from Ollama's layers."""
        if not model.manifest.is_ollama:
            return cls.of(model.manifest.annotations)
        said = ollama_defaults(model.manifest.layers, lambda layer: read_blob(store, layer))
        return cls.of({ANNOTATION: said} if said else {})

    def annotation(self) -> dict[str, str]:
        """Return the annotation for these defaults."""
        value: dict[str, Any] = {}
        if self.parameters:
            value["parameters"] = dict(self.parameters)
        if self.system:
            value["system"] = self.system
        if self.messages:
            value["messages"] = list(self.messages)
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        return {ANNOTATION: text} if value else {}

    def sampling(self) -> Mapping[str, Any]:
        """Return the parameters as fields of SamplingParams, or {} if they are invalid."""
        try:
            return parse_options(self.parameters).sampling
        except RequestError as error:  # the model is usable without them
            _log.warning("ignored invalid parameters of a model: %s", error)
            return {}

    @property
    def preface(self) -> Preface:
        """The messages before every conversation."""
        return Preface(self.system, self.messages)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )
