"""Parameters of a model: compare names and shapes with the files, set dtypes, unpack, evaluate."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear
from mlx.utils import tree_flatten, tree_unflatten

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.layers.blocks import (
    BLOCK_LAYERS,
    BlockEmbedding,
    BlockLinear,
    BlockSwitchLinear,
    layer_values,
)
from modelpack_engine.models import load_progress
from modelpack_engine.models.load_budget import checkpoint
from modelpack_engine.platform.device import available_memory

Shape = tuple[int, ...]

_NAMED_IN_ERRORS = 5
# Names in mlx-lm's classes of a table of positions, and of a second table of tokens.
_POSITIONS, _PER_LAYER = "wpe", "embed_tokens_per_layer"


def parameters_of(model: Any) -> dict[str, mx.array]:
    """Return all parameters by name."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))


def array_shapes(arrays: Mapping[str, mx.array]) -> dict[str, Shape]:
    """Return the shapes of arrays, by name."""
    return {name: tuple(array.shape) for name, array in arrays.items()}


def shapes_of(model: Module) -> dict[str, Shape]:
    """Return the shapes of all parameters, by name."""
    return array_shapes(parameters_of(model))


def check_parameters(what: str, expected: Mapping[str, Shape], got: Mapping[str, Shape]) -> None:
    """Raise `ModelLoadError`, naming the parameters, unless names and shapes are the same."""
    problems = []
    if missing := expected.keys() - got.keys():
        problems.append(f"missing {named(missing)}")
    if extra := got.keys() - expected.keys():
        problems.append(f"not known to the model: {named(extra)}")
    if problems:
        raise ModelLoadError(
            f"{what}: the tensors do not match the model: {'; '.join(problems)}",
            hint="check that all files belong to one model, of a supported architecture",
        )
    for name in sorted(expected):
        if expected[name] != got[name]:
            raise ModelLoadError(
                f"{what}: {name} has the shape {list(got[name])}, expected {list(expected[name])}"
            )


def named(names: Iterable[str]) -> str:
    """Return the first few names, and the number of the others, as text."""
    ordered = sorted(names)
    more = len(ordered) - _NAMED_IN_ERRORS
    return ", ".join(ordered[:_NAMED_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")


def position_rows(model: Any) -> int | None:
    """Return the rows of the table of learnt positions (GPT-2's); None for a model without one."""
    return min((rows for name, rows in _tables(model) if name == _POSITIONS), default=None)


def token_rows(model: Any) -> int | None:
    """Return the rows of the smallest table of token embeddings, or None without any.

    MLX reads memory outside a table for an id past its end, without an error.
    """
    others = [_POSITIONS, "position_embedding_table"]
    if type(model).__module__.endswith(".gemma3n"):
        others.append(_PER_LAYER)  # its class looks up only ids that this table has
    return min((rows for name, rows in _tables(model) if name not in others), default=None)


def check_token_rows(model: Any, vocab_size: int) -> None:
    """Raise `ModelLoadError` if the model has more logits than a table of embeddings has rows."""
    rows = token_rows(model)
    if rows is not None and rows < vocab_size:
        raise ModelLoadError(
            f"the model has {vocab_size} tokens, but a table of embeddings has {rows} rows",
            hint="check that the configuration belongs to these weights",
        )


def _tables(model: Any) -> Iterator[tuple[str, int]]:
    for path, module in model.named_modules():
        if isinstance(module, (Embedding, QuantizedEmbedding, BlockEmbedding)):
            yield path.rpartition(".")[2], module.weight.shape[0]


_MEBIBYTE = 1 << 20
# The part of free memory that a dense model may take; the KV cache needs memory too.
_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Precision:
    """The precision of a model's weights in memory.

    `dtype` is the type of unpacked weights and of scales. `dense` unpacks quantised weights.
    `blocks` are the block types of GGUF that linear layers and embeddings keep as they are stored.
    `requantize` holds others that MLX cannot pack without loss (IQ3_S…) in 8 bits, not in 16.
    """

    dtype: mx.Dtype
    dense: bool
    requantize: bool = True
    blocks: Collection[str] = ()


def fits(num_bytes: int) -> bool:
    """Return whether weights of this size leave enough of the free memory for the KV cache."""
    return num_bytes <= _SHARE * available_memory()


def evaluate(model: Module) -> int:
    """Evaluate all weights in batches, so that few are in memory twice; return their bytes.

    Raises `ModelLoadError` for a file that MLX, which reads some files only now, cannot read.
    """
    arrays = list(parameters_of(model).values())
    batch: list[mx.array] = []
    total, done, pending = sum(array.nbytes for array in arrays), 0, 0
    try:
        for array in arrays:
            batch.append(array)
            pending += array.nbytes
            if pending > 256 * _MEBIBYTE:
                checkpoint()
                mx.eval(batch)
                done, batch, pending = done + pending, [], 0
                load_progress.read(done / total)
        mx.eval(batch)
        load_progress.read(1)
    except (RuntimeError, ValueError) as error:
        raise ModelLoadError(f"the weights cannot be read: {error}") from error
    return total


def dense_bytes(model: Any, itemsize: int) -> int:
    """Return how many bytes the weights would take with every module unpacked."""
    total = 0
    for _, module in model.named_modules():
        own = {name: value for name, value in module.items() if isinstance(value, mx.array)}
        if _is_packed(module):
            total += own.pop("weight").size * 32 // module.bits
            own = {name: own[name] for name in own if name == "bias"}
        total += sum(array.size for array in own.values())
    return total * itemsize


def unpack(
    model: Any, dtype: mx.Dtype | None, *, only: Collection[str] | None = None
) -> Sequence[str]:
    """Replace quantised modules by dense ones; return the paths of those left as they are.

    Weights are computed in `dtype`, or in the dtype of their scales if it is None. With `only`,
    modules at other paths are not replaced.
    """
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kinds: dict[type, Any] = {
        QuantizedLinear: Linear,
        QuantizedEmbedding: Embedding,
        QuantizedSwitchLinear: SwitchLinear,
        BlockLinear: Linear,
        BlockEmbedding: Embedding,
        BlockSwitchLinear: SwitchLinear,
    }
    replaced: list[tuple[str, Module]] = []
    left: list[str] = []
    for path, module in model.named_modules():
        packed = _is_packed(module) or isinstance(module, BLOCK_LAYERS)
        if not packed or (only is not None and path not in only):
            continue
        kind = kinds.get(type(module))
        if kind is None:
            left.append(path)
        else:
            replaced.append((path, _unpacked(module, kind, dtype)))
    model.update_modules(tree_unflatten(replaced))
    return left


def _is_packed(module: Module) -> bool:
    return "scales" in module and hasattr(module, "bits") and hasattr(module, "group_size")


def _full_weight(module: Any, dtype: mx.Dtype | None) -> mx.array:
    if isinstance(module, BLOCK_LAYERS):
        return layer_values(module, dtype or module.dtype)
    scales, biases = module["scales"], module.get("biases")
    if biases is not None and dtype is not None:
        scales, biases = scales.astype(dtype), biases.astype(dtype)
    return mx.dequantize(
        module["weight"],
        scales,
        biases,
        module.group_size,
        module.bits,
        mode=getattr(module, "mode", "affine"),
        global_scale=module.get("global_scale"),
    )


def _unpacked(module: Any, kind: Any, dtype: mx.Dtype | None) -> Any:
    weight = _full_weight(module, dtype)
    # Construct a tiny module, whose other attributes the class sets, then replace its weight.
    dense = kind(*(1,) * weight.ndim, **({} if kind is Embedding else {"bias": False}))
    dense.weight = weight if dtype is None else weight.astype(dtype)
    if "bias" in module:
        dense.bias = module["bias"]
    return dense
