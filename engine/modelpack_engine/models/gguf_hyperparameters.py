"""Hyperparameters: the metadata of a GGUF model by their names, and its rope scaling for mlx-lm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models.gguf_file import GGUFFile, Metadata

Config = dict[str, Any]

#: llama.cpp's numbers of the functions that score experts.
SOFTMAX, SIGMOID = 1, 2


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """The hyperparameters of a model, by their names without the prefix of the architecture."""

    architecture: str
    metadata: Metadata
    file: GGUFFile

    def __contains__(self, name: str) -> bool:
        return self._key(name) in self.metadata

    def integer(self, name: str, default: int | None = None) -> int:
        return self.metadata.integer(self._key(name), default)

    def number(self, name: str, default: float | None = None) -> float:
        return self.metadata.number(self._key(name), default)

    def text(self, name: str, default: str | None = None) -> str:
        return self.metadata.text(self._key(name), default)

    def flag(self, name: str, default: bool | None = None) -> bool:
        return self.metadata.flag(self._key(name), default)

    def largest(self, name: str) -> int:
        """Return a whole number, or the largest one if there is one for each layer."""
        key = self._key(name)
        if not self.metadata.is_array(key):
            return self.integer(name)
        return max(self._whole(key), default=0)

    def each_layer(self, name: str) -> list[int]:
        """Return a whole number for each layer. Raises `ModelLoadError` if there are too few."""
        key = self._key(name)
        if not self.metadata.is_array(key):
            return [self.integer(name)] * self.layers
        found = self._whole(key)
        if len(found) < self.layers:
            raise self.metadata.error(f"{key!r} has {len(found)} values for {self.layers} layers")
        return found[: self.layers]

    def numbers(self, name: str) -> list[float]:
        """Return one number for each layer. Raises `ModelLoadError` unless there are as many."""
        return self.numbers_at(self._key(name))

    def numbers_at(self, key: str) -> list[float]:
        """Do what `numbers` does for a whole key."""
        found: list[float] = self.metadata.numbers(key).tolist()
        if len(found) != self.layers:
            raise self.metadata.error(f"{key!r} has {len(found)} values for {self.layers} layers")
        return found

    def _whole(self, key: str) -> list[int]:
        """Return an array of whole numbers. Raises `ModelLoadError` for others."""
        numbers = self.metadata.numbers(key)
        if not (np.isfinite(numbers) & (numbers == np.floor(numbers))).all():
            raise self.metadata.error(f"{key!r} has values that are no whole numbers")
        return [int(number) for number in numbers.tolist()]

    def flags(self, name: str) -> list[bool] | None:
        """Return a flag for each layer, or None if the value is not an array."""
        key = self._key(name)
        if not self.metadata.is_array(key):
            return None
        return list(map(bool, self.metadata.numbers(key).tolist()))

    def integers(self, name: str) -> list[int]:
        """Return an array of whole numbers."""
        return self._whole(self._key(name))

    def positive(self, name: str) -> int:
        """Return a whole number. Raises `ModelLoadError` unless it is positive."""
        number = self.integer(name)
        if number <= 0:
            raise self.metadata.error(f"{self._key(name)!r} is {number}, expected 1 or more")
        return number

    def experts(self) -> tuple[int, int]:
        """Return how many experts there are, and how many a token uses.

        Raises `ModelLoadError` if a token uses none, or more than there are.
        """
        count, used = self.integer("expert_count"), self.positive("expert_used_count")
        if used > count:
            key = self._key("expert_used_count")
            raise self.metadata.error(f"{key!r} is {used}, but there are {count} experts")
        return count, used

    def unsupported(self, what: str) -> ModelLoadError:
        """Return the error for a supported architecture with an unsupported feature, `what`."""
        return self.metadata.error(f"{self.architecture} with {what} is not supported")

    def has(self, tensor: str) -> bool:
        """Return whether the first layer has a tensor, named without `blk.0.`."""
        return f"blk.0.{tensor}" in self.file

    @property
    def predicting_layers(self) -> int:
        """The number of layers at the end that predict further tokens, which are not loaded."""
        return self.integer("nextn_predict_layers", 0)

    @property
    def layers(self) -> int:
        return self.integer("block_count") - self.predicting_layers

    @property
    def heads(self) -> int:
        return self.largest("attention.head_count")

    @property
    def head_dim(self) -> int:
        return self.integer("attention.key_length", self.integer("embedding_length") // self.heads)

    @property
    def key_heads(self) -> int:
        """The number of heads of keys, in the layers that have attention."""
        if "attention.head_count_kv" not in self:
            return self.heads
        return self.largest("attention.head_count_kv")

    def _key(self, name: str) -> str:
        return f"{self.architecture}.{name}"


def check_sigmoid(values: Hyperparameters) -> None:
    """Raise `ModelLoadError` unless a sigmoid scores the experts."""
    if values.integer("expert_gating_func", SIGMOID) != SIGMOID:
        raise values.unsupported("experts that are not scored by a sigmoid")


def rope_scaling(values: Hyperparameters) -> Config | None:
    kind = values.text("rope.scaling.type", "none")
    factor = values.number("rope.scaling.factor", values.number("rope.scale_linear", 1.0))
    if kind == "none" and factor == 1.0:
        return None
    if kind in ("none", "linear"):
        return {"rope_type": "linear", "type": "linear", "factor": factor} if factor != 1 else None
    if kind == "yarn":
        attention = values.number("rope.scaling.yarn_attn_factor", 1.0)
        attention *= values.number("rope.scaling.attn_factor", 1.0)
        extrapolation = values.number("rope.scaling.yarn_ext_factor", 1.0)
        if attention != 1.0 or extrapolation != 1.0:
            raise values.unsupported("a yarn rope that scales attention")
        return {
            "rope_type": "yarn",
            "type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": values.integer(
                "rope.scaling.original_context_length", values.integer("context_length")
            ),
            "beta_fast": values.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": values.number("rope.scaling.yarn_beta_slow", 1.0),
        }
    if kind == "longrope":  # its factors are tensors, which `GGUFLoader` adds
        return None
    raise values.unsupported(f"rope scaling {kind!r}")
