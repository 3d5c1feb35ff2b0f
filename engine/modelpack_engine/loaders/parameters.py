"""Names and shapes of parameters: what a model wants against what its files hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.quantized import QuantizedEmbedding
from mlx.utils import tree_flatten

from modelpack_engine.errors import ModelLoadError

Shape = tuple[int, ...]

_NAMED_IN_ERRORS = 5
# What classes of mlx-lm call a table of positions, and a second table of tokens.
_POSITIONS, _PER_LAYER = "wpe", "embed_tokens_per_layer"


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


def position_rows(model: Any) -> int | None:
    """Return the rows of the table of learnt positions (GPT-2's); None for a model without one."""
    rows = [rows for name, rows in _tables(model) if name == _POSITIONS]
    return min(rows, default=None)


def token_rows(model: Any) -> int | None:
    """Return the rows of the smallest table that tokens are looked up in; None without any.

    MLX reads memory outside a table for an id past its end, without an error.
    """
    others = [_POSITIONS, "position_embedding_table"]
    if type(model).__module__.endswith(".gemma3n"):
        others.append(_PER_LAYER)  # its class looks up only what this table has
    return min((rows for name, rows in _tables(model) if name not in others), default=None)


def check_token_rows(model: Any, vocab_size: int) -> None:
    """Raise `ModelLoadError` for a model with logits for tokens that some table does not have."""
    rows = token_rows(model)
    if rows is not None and rows < vocab_size:
        raise ModelLoadError(
            f"the model has {vocab_size} tokens, but a table of embeddings has {rows} rows",
            hint="the configuration is damaged or belongs to another model",
        )


def _tables(model: Any) -> Iterator[tuple[str, int]]:
    for path, module in model.named_modules():
        if isinstance(module, (Embedding, QuantizedEmbedding)):
            yield path.rpartition(".")[2], module.weight.shape[0]
