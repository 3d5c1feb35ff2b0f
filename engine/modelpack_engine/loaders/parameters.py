"""Names and shapes of parameters: what a model wants against what its files hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from modelpack_engine.errors import ModelLoadError

Shape = tuple[int, ...]

_NAMED_IN_ERRORS = 5


def parameters_of(model: Any) -> list[tuple[str, mx.array]]:
    """Return all parameters with their names."""
    return cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))


def shapes_of(model: Module) -> dict[str, Shape]:
    """Return the shapes of all parameters, by name."""
    return {name: tuple(array.shape) for name, array in parameters_of(model)}


def check_parameters(what: str, expected: Mapping[str, Shape], got: Mapping[str, Shape]) -> None:
    """Raise `ModelLoadError`, naming the parameters, unless names and shapes are the same."""
    problems = []
    if missing := expected.keys() - got.keys():
        problems.append(f"missing {named(missing)}")
    if extra := got.keys() - expected.keys():
        problems.append(f"not known to the model: {named(extra)}")
    if problems:
        raise ModelLoadError(
            f"{what}: the tensors are not those of the model: {'; '.join(problems)}",
            hint="the file is incomplete or of a variant of the architecture that is not supported",
        )
    for name in sorted(expected):
        if expected[name] != got[name]:
            raise ModelLoadError(
                f"{what}: {name} has the shape {list(got[name])}, expected {list(expected[name])}"
            )


def named(names: Iterable[str]) -> str:
    """Return a few of the names, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - _NAMED_IN_ERRORS
    return ", ".join(ordered[:_NAMED_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")
