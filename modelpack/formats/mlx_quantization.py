"""Quantised weights as mlx-lm writes them, in safetensors: which bits, and how many parameters.

`config.json` has `"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}`, and under the
names of modules what differs there. A quantised `X.weight` packs its values into 32-bit words, and
`X.scales` and, for affine modes, `X.biases` lie beside it. Source: mlx_lm.utils.quantize_model and
mlx.nn.quantize; the models of mlx-community are made so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from modelpack.config import ModelConfig
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
