"""TensorBounds: the largest sizes in a configuration that the tensors of a checkpoint justify.

Checked before a class of mlx-lm is instantiated: its constructor builds as many layers, experts and
tables as the configuration says, whatever the files hold.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.load_budget import checkpoint, count_modules

#: The longest context: positions are 32-bit integers.
MAX_POSITIONS = 2**31 - 1
# One word of 32 bits holds so many packed weights at most.
_PACKED = 32
# Modules that one tensor accounts for: its own, and containers, rotations and activations.
_MODULES_PER_TENSOR = 8
_MODULES = 1024
_SMALL = 4096  # numbers that need no justification: kernels, groups, chunks
_MAX_DEPTH = 16

_LAYERS = re.compile(r"(num_|n_)(hidden_|transformer_|decoder_|encoder_)?layers?|block_count|depth")
_POSITIONS = re.compile(r".*(position|context|ctx|seq_?len|seq_length|max_length|window).*")
# Numbers that size nothing: ids, bases of rotations, scales, and what training was done with.
_NOT_SIZES = re.compile(
    r".*(token|_ids?$|^id2|theta|base|freq|scal|factor|seed|coef|loss|version|param|flops|global_step"
    r"|limit|budget|pixels|timeout|checkpoint|epoch|memory|transformers).*"
)
# Parts that are not loaded: encoders of images and sound.
_LEFT_OUT = re.compile(r".*(vision|audio|image|video|speech|visual|projector|talker|code2wav).*")
_INDEX = re.compile(r"(?<![^._])\d+(?![^._])")


@dataclass(frozen=True, slots=True)
class TensorBounds:
    """Counts over all tensors: of layers, of tensors, and the largest dimension."""

    layers: int
    tensors: int
    largest: int

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, Iterable[int]]]) -> TensorBounds:
        """Return the bounds of tensors with these names and shapes."""
        indices: dict[str, set[str]] = defaultdict(set)
        count, largest = 0, 1
        for name, shape in shapes:
            count += 1
            largest = max(largest, *shape, 1)
            if found := _INDEX.search(name):
                indices[name[: found.start()]].add(found.group())
        return cls(max(map(len, indices.values()), default=0), count, largest)

    def check(self, config: Mapping[str, Any], what: str = "config.json") -> None:
        """Raise `ModelLoadError`, naming the field, for a size that no tensor justifies."""
        for name, value in _integers(config, 0):
            key = name.rpartition(".")[2]
            if value < -_SMALL:
                raise ModelLoadError(f"{what}: {name} is {_shown(value)}, which is negative")
            if _NOT_SIZES.fullmatch(key):
                continue
            if _POSITIONS.fullmatch(key):
                limit, why = MAX_POSITIONS, "positions are 32-bit integers"
            elif _LAYERS.fullmatch(key):
                limit, why = 2 * self.layers, f"the tensors are of {self.layers} layers"
            else:
                limit = max(_SMALL, _PACKED * self.largest)
                why = f"the largest dimension of a tensor is {self.largest}"
            if value > limit:
                raise ModelLoadError(
                    f"{what}: {name} is {_shown(value)}, but {why}",
                    hint="the configuration is damaged or belongs to another model",
                )

    @contextmanager
    def building(self, what: str) -> Iterator[None]:
        """Bound the modules that are created within, by the number of tensors."""
        checkpoint()
        with count_modules(_MODULES + _MODULES_PER_TENSOR * self.tensors, what):
            yield


def _integers(config: Mapping[str, Any], depth: int, prefix: str = "") -> Iterator[tuple[str, int]]:
    if depth > _MAX_DEPTH:
        raise ModelLoadError(f"config.json: {prefix[:100]} is nested too deeply")
    for key, value in config.items():
        if _LEFT_OUT.fullmatch(key):
            continue
        values = value if isinstance(value, list) else [value]
        for item in values:
            if isinstance(item, dict):
                yield from _integers(item, depth + 1, f"{prefix}{key}.")
            elif isinstance(item, int) and not isinstance(item, bool):
                yield f"{prefix}{key}", item
            elif isinstance(item, float) and item.is_integer() and abs(item) < 1e300:
                yield f"{prefix}{key}", int(item)


def _shown(value: int) -> str:
    return str(value) if abs(value) < 10**30 else "a number of more than 30 digits"
