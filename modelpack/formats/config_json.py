"""Quantised weights as mlx-lm writes them, in safetensors: which bits, and how many parameters.

`config.json` has `"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}`, and under the
names of modules what differs there. A quantised `X.weight` packs its values into 32-bit words, and
`X.scales` and, for affine modes, `X.biases` lie beside it. Source: mlx_lm.utils.quantize_model and
mlx.nn.quantize; the models of mlx-community are made so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from modelpack.artifacts.config import ModelConfig
from modelpack.errors import ModelpackError, NotFoundError
from modelpack.formats.reader import WeightFile
from modelpack.formats.tensors import TensorInfo

_WORD_BITS: Final = 32
_AFFINE: Final = "affine"
_BITS: Final = range(1, 17)
_BITS_KEY: Final = "quantization.bits"
_GROUP_KEY: Final = "quantization.group_size"
_MODE_KEY: Final = "quantization.mode"


@dataclass(frozen=True, slots=True)
class MLXQuantization:
    """Bits a weight, and weights a group; `modules` are the bits of those that differ."""

    bits: int
    group_size: int
    mode: str = _AFFINE
    modules: Mapping[str, int] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> MLXQuantization | None:
        """Return what a `config.json` says; None if it is not quantised by mlx-lm.

        Other tools write `quantization_config` with a `quant_method`: AWQ, GPTQ and the like.
        """
        value = config.get("quantization")
        if not isinstance(value, dict):
            return None
        bits, group_size = value.get("bits"), value.get("group_size")
        if type(bits) is not int or type(group_size) is not int:
            return None
        if bits not in _BITS or group_size < 1:
            return None
        mode = value.get("mode", _AFFINE)
        modules = {
            name: own["bits"]
            for name, own in value.items()
            if isinstance(own, dict) and _is_bits(own.get("bits"))
        }
        return cls(bits, group_size, mode if isinstance(mode, str) else _AFFINE, modules)

    @property
    def label(self) -> str:
        """How the models of mlx-community are named: `4bit`, `mxfp4`."""
        return f"{self.bits}bit" if self.mode == _AFFINE else self.mode

    def facts(self) -> dict[str, str]:
        """Return what goes into the map of a model's config."""
        return {
            _BITS_KEY: str(self.bits),
            _GROUP_KEY: str(self.group_size),
            _MODE_KEY: self.mode,
        }

    def parameters(self, tensors: Sequence[TensorInfo]) -> int:
        """Return how many weights the tensors are: packed ones count, scales do not."""
        packed = {
            tensor.name.removesuffix(".scales")
            for tensor in tensors
            if tensor.name.endswith(".scales")
        }
        return sum(self._count(tensor, packed) for tensor in tensors)

    def _count(self, tensor: TensorInfo, packed: set[str]) -> int:
        module, _, kind = tensor.name.rpartition(".")
        if module not in packed:
            return tensor.elements
        if kind in ("scales", "biases"):
            return 0
        if kind != "weight" or tensor.dtype != "U32":
            return tensor.elements
        return tensor.elements * _WORD_BITS // self.modules.get(module, self.bits)


def mlx_bits(config: ModelConfig) -> int | None:
    """Return the bits a weight of a packaged model that mlx-lm quantised; None for any other.

    Only MLX runs those: to vLLM and llama.cpp their tensors are nothing they know.
    """
    text = (config.safetensors or {}).get(_BITS_KEY, "")
    return int(text) if text.isdecimal() and len(text) < 4 else None


def _is_bits(value: Any) -> bool:
    return type(value) is int and value in _BITS


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
