"""Rotary embeddings of a step's rows: once for all layers on CPUs, some at a time on CUDA.

`mx.fast.rope` computes sines and cosines anew for queries and keys of every layer, which on a CPU
takes longer than attention itself. Rotating a row is a product with a matrix that depends on its
position only: what `mx.fast.rope` makes of the unit vectors.

On CUDA it cannot be launched for many rows of which few elements are rotated (MLX 0.32.4): a block
of its threads would be deeper than CUDA's 64 (`get_block_dims` in mlx/backend/common/utils.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

#: With more rows, the matrices take more time to read than they save.
FEW_ROWS = 16
#: From so many pairs of elements on, CUDA rotates any number of rows at once. Four heads of a row
#: share a thread, and with fewer pairs, so many of these are too many.
_ENOUGH_PAIRS, _HEADS_OF_A_THREAD, _TOO_MANY = 16, 4, 128
#: A model has one or two kinds of rotation. One with more makes a new one at every call.
MOST_KINDS = 8

#: MLX's own function, whatever is installed over it.
native_rope: Callable[..., mx.array] = mx.fast.rope


#: Matrices [rows, dim, dim] by all arguments but rows and offset. Arrays among these go by identity
#: and are kept beside the matrix: another one might else come to have the same.
Rotations = dict[tuple[object, ...], tuple[mx.array, list[object]]]


class Positions(mx.array):
    """Positions of a step's rows, int32 [rows], with the rotations that were made for them.

    `rotations` is None where rows are rotated by MLX's own function.
    """

    rotations: Rotations | None


def as_positions(positions: mx.array) -> Positions:
    """Return positions that are on the device already, for MLX's own function."""
    made = Positions(positions)
    made.rotations = None
    return made


def make_positions(positions: list[int], *, rotate: bool) -> Positions:
    """Return `positions` on the device; `rotate` says whether to rotate by matrices."""
    made = Positions(mx.array(positions, mx.int32))
    made.rotations = {} if rotate and len(positions) <= FEW_ROWS else None
    return made


def _rope(x: mx.array, dims: int, **how: Any) -> mx.array:
    """Rotate x [rows, heads, 1, dim] by matrices if the offset's rotations are kept."""
    offset = how.get("offset")
    rotations = offset.rotations if isinstance(offset, Positions) else None
    if x.ndim == 4 and x.shape[2] == 1 and dims < 2 * _ENOUGH_PAIRS and _on_cuda():
        return _some_at_a_time(x, dims, how)
    if rotations is None or x.dtype != mx.float32 or x.ndim != 4 or x.shape[2] != 1:
        return native_rope(x, dims, **how)
    rows, heads, _, dim = x.shape
    rest = {name: value for name, value in how.items() if name != "offset"}
    key = (dim, dims, *((name, _identity(value)) for name, value in rest.items()))
    if key not in rotations:
        if len(rotations) == MOST_KINDS:
            return native_rope(x, dims, **how)
        unit = mx.broadcast_to(mx.eye(dim)[None, :, None, :], (rows, dim, 1, dim))
        matrix = native_rope(unit, dims, offset=offset, **rest)[:, :, 0]
        rotations[key] = matrix, list(rest.values())
    return (x.reshape(rows, heads, dim) @ rotations[key][0])[:, :, None]


def _on_cuda() -> bool:
    return mx.cuda.is_available() and mx.default_device() != mx.Device(mx.cpu)


def _some_at_a_time(x: mx.array, dims: int, how: dict[str, Any]) -> mx.array:
    """Rotate x [rows, heads, 1, dim] in as few calls as CUDA can launch."""
    most = max((_TOO_MANY - 1) // -(-x.shape[1] // _HEADS_OF_A_THREAD), 1)
    if x.shape[0] <= most:
        return native_rope(x, dims, **how)
    parts = []
    for start in range(0, x.shape[0], most):
        part = slice(start, start + most)
        offset = how.get("offset", 0)
        if isinstance(offset, mx.array) and offset.ndim > 0:
            offset = offset[part]
        parts.append(native_rope(x[part], dims, **{**how, "offset": offset}))
    return mx.concatenate(parts)


def _identity(value: object) -> object:
    """Return what tells arguments apart: arrays (frequencies of a layer) by identity."""
    return id(value) if isinstance(value, mx.array) else value


def install() -> None:
    """Wrap `mx.fast.rope`, once for the process; calls with other offsets behave as before."""
    mx.fast.rope = _rope  # type: ignore[assignment]
