"""The matrices of a GGUF LoRA file, for the layers of mlx-lm's class.

llama.cpp's convert_lora_to_gguf.py changes A and B as its converter changes the weight. So the
table of `gguf_architectures` that turns tensors into parameters also says what a layer is called
here, and how the rows of B and the columns of A are ordered. The file names an architecture, but
has no hyperparameters: those of the base decide. Sources: llama.cpp convert_lora_to_gguf.py and
src/llama-adapter.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from modelpack.formats.adapter import Adapter, AdapterError, Target
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import gguf_blocks
from modelpack_engine.models.gguf_architectures import ARCHITECTURES, VARIANTS, Architecture
from modelpack_engine.models.gguf_blocks import Floats
from modelpack_engine.models.gguf_file import GGUFFile
from modelpack_engine.models.gguf_tensors import ColumnOrder, halves, one_row

#: The heads of the tensors whose rows llama.cpp's converter permutes.
_PERMUTED: Final = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def gguf_pairs(
    adapter: Adapter, model: nn.Module, config: Mapping[str, Any]
) -> Iterator[tuple[Target, mx.array, mx.array]]:
    """Yield the targets of a GGUF adapter, by the paths of mlx-lm's class, with A and B.

    A is [..., inputs, rank] and B [..., rank, outputs], float32 and with the scale. `config` is
    that of the model. Raises `AdapterError` for another architecture than the model's, and for a
    tensor that has no layer of its own there.
    """
    path = str(adapter.weights)
    try:
        file = GGUFFile.open([adapter.weights])
        name = file.metadata.text("general.architecture")
        architecture = _architecture(name, model, path)
        for target in adapter.targets:
            a, b = gguf_blocks.dense(file[target.a]), gguf_blocks.dense(file[target.b])
            for found, new_a, new_b in _layers(target, a, b, name, architecture, config, path):
                yield found, mx.array(new_a), mx.array(new_b) * target.scale
    except ModelLoadError as error:
        raise AdapterError(error.message, path=path, hint=error.hint) from error


def _architecture(name: str, model: nn.Module, path: str) -> Architecture:
    """Return the row of the table for the adapter's architecture and the class of the model."""
    rows = [ARCHITECTURES[name]] if name in ARCHITECTURES else []
    rows += [row for (variant, _, _), row in VARIANTS.items() if variant == name]
    if not rows:
        raise AdapterError(
            f"the architecture {name[:100]!r} is not supported in GGUF", path=path,
            hint="use the adapter as PEFT wrote it",
        )  # fmt: skip
    classes = {
        kind.__module__.rpartition(".")[2]
        for module in model.modules()
        if type(module).__name__.endswith("Model")
        for kind in type(module).__mro__
    }
    for row in rows:
        if row.model_type in classes:
            return row
    known = " or ".join(dict.fromkeys(row.model_type for row in rows))
    own = type(model).__module__.rpartition(".")[2]
    raise AdapterError(
        f"the adapter is for the architecture {name} (mlx-lm's {known}), but the model is {own}",
        path=path,
    )


def _layers(
    target: Target,
    a: Floats,
    b: Floats,
    name: str,
    architecture: Architecture,
    config: Mapping[str, Any],
    path: str,
) -> Iterator[tuple[Target, Floats, Floats]]:
    """Yield the layers that a tensor becomes, with A [..., inputs, rank], B [..., rank, outputs].

    As stored, they are A [..., rank, inputs] and B [..., outputs, rank]; the A of an embedding is
    [tokens, rank].
    """
    text = {**config, **(config.get("text_config") or {})}
    found = architecture.targets(f"{target.module}.weight")
    if not found:
        raise AdapterError(f"{target.module}: {name} has no such tensor", path=path)
    for module, parameter, change in found:
        # A tensor of one row is a vector in the file, but its B is a matrix.
        changes = change.values not in (None, one_row) or change.join is not None
        if parameter != "weight" or changes:
            raise AdapterError(
                f"{target.module}: the tensor is no layer of its own in mlx-lm's class", path=path,
                hint="use the adapter as PEFT wrote it",
            )  # fmt: skip
        rows, columns = b, a
        stem = target.module.rpartition(".")[2]
        if architecture.rotates_pairs and stem in _PERMUTED and not text.get("rope_traditional"):
            rows = _ordered(halves(_PERMUTED[stem]), text, rows, target, path)
        if change.rows is not None:
            rows = _ordered(change.rows, text, rows, target, path)
        if change.columns is not None:
            columns = _ordered(_by_columns(change.columns), text, columns, target, path)
        if not target.embedding:
            columns = columns.swapaxes(-1, -2)
        layer = replace(target, module=module, outputs=rows.shape[-2])
        yield layer, np.ascontiguousarray(columns), np.ascontiguousarray(rows.swapaxes(-1, -2))


def _by_columns(order: ColumnOrder) -> Callable[[Mapping[str, Any], Floats], Floats]:
    return lambda config, values: gguf_blocks.reordered(values, len(values), order(config))


def _ordered(
    order: Any, config: Mapping[str, Any], values: Floats, target: Target, path: str
) -> Floats:
    """Apply an order of rows or columns; the shape may not fit the model's heads."""
    try:
        found: Floats = order(config, values)
    except (ValueError, KeyError, IndexError) as error:
        raise AdapterError(
            f"{target.module}: the shape {list(values.shape)} does not fit the model: {error}",
            path=path,
        ) from error
    return found
