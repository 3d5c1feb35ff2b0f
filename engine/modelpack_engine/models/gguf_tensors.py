"""Parameters of a model made from the tensors of a GGUF file: renamed, cut, joined, reordered.

`gguf_architectures` has a table of `Target` for each architecture. Rows are moved as they are
stored, so quantised weights stay bit for bit what they are. Columns are moved by decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from modelpack_engine.models import gguf_blocks
from modelpack_engine.models.gguf_blocks import GROUP_SIZE, AffineBlocks, Floats
from modelpack_engine.models.gguf_file import Bytes, GGUFTensor

Config = Mapping[str, Any]
Shape = tuple[int, ...]
#: Selects or reorders rows, given the model's config: [..., bytes of a row] to the same.
RowOrder = Callable[[Config, Bytes], Bytes]
#: Returns the order of equal parts of rows, given the model's config (`GGUFTensor.columns`).
ColumnOrder = Callable[[Config], tuple[int, ...]]
#: Changes decoded values and their shape.
Values = Callable[[Floats], Floats]
#: What tensors have for their rows: bytes, codes or scales.
Rows = npt.NDArray[Any]
#: Joins the rows of several tensors, given the model's config: [..., columns] to the same.
Join = Callable[[Config, Sequence[Rows]], Rows]


@dataclass(frozen=True, slots=True)
class Target:
    """What a tensor of the file becomes.

    `path` is the path of a module, or of a parameter if `is_parameter`. Tensors with the same path
    are joined along the first dimension, or by `join`, ordered by `place`: as they are stored if
    all have one type or one that holds all, else as float32.
    """

    path: str
    rows: RowOrder | None = None
    values: Values | None = None
    place: int = 0
    is_parameter: bool = False
    columns: ColumnOrder | None = None
    join: Join | None = None

    def resolved(self, prefix: str, suffix: str) -> tuple[str, str]:
        """Return the path of the module and the name of the parameter."""
        if not self.is_parameter:
            return prefix + self.path, suffix
        path, _, name = (prefix + self.path).rpartition(".")
        return path, name


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor, or a part of it, for a parameter."""

    tensor: GGUFTensor
    target: Target
    config: Config

    @property
    def dtype(self) -> str:
        """The type after `read`: values that are changed are float32."""
        return "F32" if self.target.values else self.tensor.dtype

    @property
    def columns(self) -> tuple[int, ...] | None:
        """The order of parts of each row; None if they stay in their places."""
        order = self.target.columns and self.target.columns(self.config)
        return order if order != tuple(range(len(order or ()))) else None

    @property
    def shape(self) -> Shape:
        """The shape after `read`. Raises `ValueError` if the tensor does not fit the model."""
        shape = self._shape_of_rows()
        if self.target.values is not None:
            shape = self.target.values(np.broadcast_to(np.float32(-1), shape)).shape
        return shape

    def read(self) -> GGUFTensor:
        """Return the rows and values of the target."""
        tensor = self.tensor
        if self.target.rows is not None:
            stored = tensor.raw.reshape(*self._leading(), -1)
            raw = np.ascontiguousarray(self.target.rows(self.config, stored)).reshape(-1)
            tensor = GGUFTensor(tensor.name, tensor.dtype, self._shape_of_rows(), raw)
        tensor = replace(tensor, columns=self.columns)
        if self.target.values is not None:
            changed = self.target.values(gguf_blocks.dense(tensor))
            raw = np.ascontiguousarray(changed, np.float32).reshape(-1).view(np.uint8)
            tensor = GGUFTensor(tensor.name, "F32", changed.shape, raw)
        return tensor

    def _leading(self) -> Shape:
        """Return the dimensions of rows; each number of a vector is a row."""
        shape = self.tensor.shape
        return shape[:-1] if len(shape) > 1 else shape

    def _shape_of_rows(self) -> Shape:
        shape = self.tensor.shape
        if self.target.rows is None:
            return shape
        leading = self.target.rows(self.config, np.zeros((*self._leading(), 1), np.uint8)).shape
        return (*leading[:-1], shape[-1]) if len(shape) > 1 else leading[:-1]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the model: its module's `path`, its `name` there, and what it is made of."""

    path: str
    name: str
    sources: tuple[Source, ...]

    @classmethod
    def of(cls, tensor: GGUFTensor, path: str, name: str) -> Parameter:
        """Return a parameter that is one tensor, unchanged."""
        return cls(path, name, (Source(tensor, Target(path), {}),))

    @property
    def stored_bytes(self) -> int:
        """The bytes of the tensors in the file."""
        return sum(source.tensor.raw.size for source in self.sources)

    @property
    def elements(self) -> int:
        """The number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def columns(self) -> tuple[int, ...] | None:
        """The order of parts of each row. Tensors that are joined have none."""
        return self.sources[0].columns

    @property
    def part(self) -> int:
        """The columns that stay together: those of a row, or of a part if parts are reordered."""
        return self.shape[-1] // (len(self.columns) if self.columns else 1)

    @property
    def dtype(self) -> str:
        """The type of the joined tensors; if they differ, one that holds all, or float32."""
        types = {source.dtype for source in self.sources}
        if types == {"Q4_K", "Q5_K"}:  # llama.cpp's Q4_K_M
            return "Q5_K"
        return types.pop() if len(types) == 1 else "F32"

    @property
    def is_quantised(self) -> bool:
        """Whether all tensors are quantised and keep their values."""
        return not any(gguf_blocks.is_float(source.dtype) for source in self.sources)

    @property
    def mixed_bits(self) -> int | None:
        """The bits of codes for tensors of several affine types; None for others."""
        if self.dtype != "F32":
            return None
        bits = {gguf_blocks.affine_bits(source.dtype) for source in self.sources}
        if None in bits:
            return None
        return 4 if bits == {4} else 8  # there are no kernels of ours for 5

    @property
    def shape(self) -> Shape:
        """The shape. Raises `ValueError` for tensors that cannot be joined."""
        first, *others = (source.shape for source in self.sources)
        if (join := self._join) is not None:
            rows = [np.zeros((*shape[:-1], 1), np.uint8) for shape in (first, *others)]
            return (*join(self.sources[0].config, rows).shape[:-1], first[-1])
        if any(shape[1:] != first[1:] for shape in others):
            raise ValueError(f"{list(first)} and {list(others[0])} cannot be joined")
        return (first[0] + sum(shape[0] for shape in others), *first[1:]) if others else first

    def read(self) -> GGUFTensor:
        """Return the joined tensors."""
        parts = [source.read() for source in self.sources]
        name, dtype = parts[0].name, self.dtype
        if len(parts) == 1 and self._join is None:
            return parts[0]
        if dtype == "Q5_K":
            parts = [gguf_blocks.widened(p) if p.dtype == "Q4_K" else p for p in parts]
        raws = [part.raw for part in parts]
        if any(part.dtype != dtype for part in parts):
            raws = [gguf_blocks.dense(part).reshape(-1).view(np.uint8) for part in parts]
        return GGUFTensor(name, dtype, self.shape, self._joined(raws))

    def mixed_blocks(self) -> AffineBlocks:
        """Return tensors of several affine types as blocks of `mixed_bits`, with their scales."""
        found = (gguf_blocks.affine_blocks(source.read()) for source in self.sources)
        parts, bits = [part for part in found if part is not None], self.mixed_bits
        assert bits is not None, "not all types are affine"
        codes = self._joined([part.codes for part in parts]).reshape(-1, GROUP_SIZE)
        scales = self._joined([part.scales for part in parts])
        return AffineBlocks(bits, codes, scales, self._joined([part.biases for part in parts]))

    def _joined(self, parts: Sequence[Rows]) -> Rows:
        """Return what each source has for its rows as that of the joined rows, as a vector."""
        sources, join = self.sources, self._join
        if join is None:
            return np.concatenate([part.reshape(-1) for part in parts])
        shapes = [(*source.shape[:-1], -1) for source in sources]
        rows = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        return join(sources[0].config, rows).reshape(-1)

    @property
    def _join(self) -> Join | None:
        return self.sources[0].target.join


# Orders of rows


def halves(heads: str) -> RowOrder:
    """Undo llama.cpp's permutation of queries or keys: pairs of a rotation to its two halves.

    `heads` is the field of the config with the number of heads.
    """

    def order(config: Config, rows: Bytes) -> Bytes:
        pairs = rows.reshape(config[heads], -1, 2, rows.shape[-1])
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    return order


def halves_by_size(config: Config, rows: Bytes) -> Bytes:
    """Undo the permutation like `halves`, in layers with any number of heads of `head_dim`."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def heads_of(index: int) -> RowOrder:
    """Select the queries (0), keys (1) or values (2) of a joined projection."""

    def select(config: Config, rows: Bytes) -> Bytes:
        queries, keys = config["num_attention_heads"], config["num_key_value_heads"]
        heads = rows.reshape(queries + 2 * keys, -1, rows.shape[-1])
        parts = np.split(heads, [queries, queries + keys])
        return parts[index].reshape(-1, rows.shape[-1])

    return select


def by_head(config: Config, rows: Bytes) -> Bytes:
    """Order queries, keys and values of a joined projection by their heads."""
    parts = rows.reshape(3, config["num_attention_heads"], -1, rows.shape[-1])
    return parts.swapaxes(0, 1).reshape(rows.shape)


def half(index: int) -> RowOrder:
    """Select the first (0) or second (1) half of the rows of each matrix."""
    return lambda config, rows: np.split(rows, 2, axis=-2)[index]


def matrix(index: int) -> RowOrder:
    """Select one of several matrices."""
    return lambda config, rows: rows[index]


def keys_by_head(config: Config, rows: Bytes) -> Bytes:
    """Select the rows of keys in an up-projection of MLA (`kv_b`), as [heads, rows, ...]."""
    return _latent_heads(config, rows)[:, : config["qk_nope_head_dim"]]


def values_by_head(config: Config, rows: Bytes) -> Bytes:
    """Select the rows of values in an up-projection of MLA (`kv_b`), as [heads, rows, ...]."""
    return _latent_heads(config, rows)[:, config["qk_nope_head_dim"] :]


def _latent_heads(config: Config, rows: Bytes) -> Bytes:
    size = config["qk_nope_head_dim"] + config["v_head_dim"]
    return rows.reshape(config["num_attention_heads"], size, rows.shape[-1])


def by_key_head(config: Config, rows: Bytes) -> Bytes:
    """Order heads of values by the head of keys that they share; files repeat the heads of keys."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    heads = rows.reshape(values // keys, keys, -1, rows.shape[-1])
    return heads.swapaxes(0, 1).reshape(rows.shape)


def values_by_key_head(config: Config, rows: Bytes) -> Bytes:
    """Order the heads of values in rows of queries, keys and values, as `by_key_head` does."""
    start = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    return np.concatenate([rows[:start], by_key_head(config, rows[start:])])


# Orders of columns


def columns_by_key_head(config: Config) -> tuple[int, ...]:
    """Order the columns of a projection of heads of values, as `by_key_head` does."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    return tuple(at for key in range(keys) for at in range(key, values, keys))


# Changes of values


def transposed(values: Floats) -> Floats:
    """Return each matrix transposed."""
    return values.swapaxes(-1, -2)


def minus_one(values: Floats) -> Floats:
    """Return w of norms that are stored as 1 + w."""
    return values - np.float32(1)


def one_row(values: Floats) -> Floats:
    """Return the values as a matrix with one row."""
    return values.reshape(1, -1)


def one_channel(values: Floats) -> Floats:
    """Return the kernels [channels, size] of a depthwise convolution as [channels, size, 1].

    Those of Kimi are [channels, 1, size]. A bias [channels] stays as it is.
    """
    return values.reshape(-1, values.shape[-1], 1) if values.ndim > 1 else values


def per_head(values: Floats) -> Floats:
    """Return A_log [1, 1, heads, 1], which is stored as -exp(A_log)."""
    return np.log(-values).reshape(1, 1, -1, 1)


def flat(values: Floats) -> Floats:
    """Return the values as a vector."""
    return values.reshape(-1)


def log_of_decay(values: Floats) -> Floats:
    """Return A_log of a state-space layer, which is stored as -exp(A_log).

    Mamba 1 has a matrix; the one column of Mamba 2 becomes a vector.
    """
    logs = np.log(-values)
    return logs.reshape(-1) if logs.ndim > 1 and logs.shape[-1] == 1 else logs


# Ways to join


def heads_joined(config: Config, parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts, [heads, rows, columns], head by head, as one matrix."""
    return np.concatenate(parts, axis=1).reshape(-1, parts[0].shape[-1])


def key_heads_joined(config: Config, parts: Sequence[Rows]) -> Rows:
    """Return queries, keys and values, and gates, of each head of keys after each other.

    The parts are a projection of queries, keys and values, each for all heads, and one of gates.
    """
    projected, gates = parts
    heads, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
    split = [*np.split(projected, [heads * size, 2 * heads * size]), gates]
    columns = gates.shape[-1]
    by_head = [part.reshape(heads, -1, columns) for part in split]
    return np.concatenate(by_head, axis=1).reshape(-1, columns)
