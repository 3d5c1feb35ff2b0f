"""attend: attention in windows for vision towers (Qwen2.5-VL), all windows in one call.

On a GPU, one kernel rotates queries and keys and gathers them and the values by window. MLX takes
14 kernels for that, a third of the tower's time on an H200.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.kernels import launch
from modelpack_engine.kernels.plan import vector_width
from modelpack_engine.layers.kernels import take_rows

_log = logging.getLogger(__name__)
#: The most by which the kernel may differ from MLX, in float32 and in 16 bits.
_TOLERANCES = {mx.float32: 1e-5, mx.float16: 1e-2, mx.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class Windows:
    """Groups of rows that attend to each other.

    `places` are the rows of each window [windows, rows of the largest]. Where windows have fewer
    rows, `mask` [windows, 1, 1, n] is what is added to scores, and `kept` are the places of rows.
    """

    places: mx.array
    mask: mx.array | None
    kept: mx.array

    def for_heads(self, count: int) -> Windows:
        """Return windows with a mask for `count` heads, [windows, heads, n, n], on CUDA.

        All layers of a call share it. If MLX gets bools there, it writes such a mask in each layer,
        and it does not say whether cuDNN takes one that is repeated without being written.
        """
        if self.mask is None or launch.backend() != "cuda":
            return self
        windows, *_, size = self.mask.shape
        whole = mx.broadcast_to(self.mask, (windows, count, size, size))
        return replace(self, mask=mx.contiguous(whole))


def windows_between(edges: Sequence[int], dtype: mx.Dtype) -> Windows:
    """Return the windows between successive `edges`, whose rows are in `dtype`.

    Rows of padding are the window's first row, and masked: NaN stays in its picture where several
    are encoded together. All arrays are evaluated, without the GPU's steps.
    """
    starts, sizes = np.array(edges[:-1]), np.diff(edges)
    offsets = np.arange(sizes.max())
    within = offsets < sizes[:, None]
    places = mx.array((starts[:, None] + np.where(within, offsets, 0)).astype(np.int32))
    kept, mask = mx.array(np.flatnonzero(within).astype(np.int32)), None
    if not within.all():
        mask = evaluated(np.where(within, 0, -np.inf)[:, None, None], dtype)
    return Windows(places, mask, kept)


def evaluated(values: NDArray[np.float64], dtype: mx.Dtype) -> mx.array:
    """Return values as an array that is evaluated, without the GPU's steps."""
    made = mx.array(values.astype(np.float32)).astype(dtype, stream=mx.cpu)
    mx.eval(made)
    return made


def attend(self: Any, x: mx.array, cu_seqlens: Windows, rotary_pos_emb: mx.array) -> mx.array:
    """Return what an attention layer of Qwen2.5-VL's tower returns for rows `x` [rows, width].

    `rotary_pos_emb` [rows, width of a head] has the cosines and sines of angles. The names are
    those of mlx-vlm's blocks, which pass on both.
    """
    joint = self.qkv(x).reshape(len(x), 3, self.num_heads, -1)
    places, mask = cu_seqlens.places, cu_seqlens.mask
    on_gpu = _has_kernel(joint.dtype, *joint.shape[2:])
    queries, keys, values = (by_kernel if on_gpu else by_mlx)(joint, rotary_pos_emb, places)
    found = mx.fast.scaled_dot_product_attention(
        *(each.swapaxes(1, 2) for each in (queries, keys, values)), scale=self.scale, mask=mask
    )
    found = found.swapaxes(1, 2).reshape(places.size, -1)
    if mask is not None:
        found = take_rows(found, cu_seqlens.kept) if on_gpu else found[cu_seqlens.kept]
    made: mx.array = self.proj(found)
    return made


def by_mlx(joint: mx.array, angles: mx.array, places: mx.array) -> tuple[mx.array, ...]:
    """Return rotated queries and keys, and values, of the rows `places` [windows, n].

    `joint` [rows, 3, heads, width] has queries, keys and values, and `angles` [rows, width] their
    cosines and sines. The results are [windows, n, heads, width] each.
    """
    rotated = _rotated(joint[:, :2], angles)
    return tuple(each[places] for each in (rotated[:, 0], rotated[:, 1], joint[:, 2]))


def by_kernel(joint: mx.array, angles: mx.array, places: mx.array) -> tuple[mx.array, ...]:
    """Return what `by_mlx` returns, by one kernel; `places` are int32."""
    heads, width = joint.shape[2:]
    vector = vector_width(joint.dtype.size, width // 2)
    (out,) = launch.run(
        "windows", [joint, angles.astype(mx.float32), places.reshape(-1)], [("T", joint.dtype)],
        [("H", heads), ("D", width), ("VEC", vector)],
        threads=3 * places.size * heads * (width // 2 // vector), group=256,
        shapes=[(3, *places.shape, heads, width)], dtypes=[joint.dtype],
    )  # fmt: skip
    return tuple(out)


def _has_kernel(dtype: mx.Dtype, heads: int, width: int) -> bool:
    problem = verdict(dtype, heads, width)
    if problem is not None and launch.backend() != "none":
        _warn(problem)
    return problem is None


@cache
def _warn(problem: str) -> None:
    _log.warning("MLX rotates the patches of pictures: %s", problem)


def _compare(dtype: mx.Dtype, heads: int, width: int) -> str | None:
    """Return why the kernel does not take such heads, or what it computes wrong; None if right."""
    if width % 2 or dtype not in _TOLERANCES:
        return f"the heads have {width} elements of {dtype}"
    keys = launch.random_keys(40, 2)
    joint = mx.random.normal((7, 3, heads, width), key=keys[0]).astype(dtype)
    angles = mx.random.normal((7, width), key=keys[1])
    places = mx.array([[0, 1, 5], [3, 3, 6]], mx.int32)
    names, kept = ("queries", "keys", "values"), mx.array([1, 4], mx.int32)
    pairs = zip(by_kernel(joint, angles, places), by_mlx(joint, angles, places), strict=True)
    found = dict(zip(names, pairs, strict=True))
    rows = found["queries"][1].reshape(places.size, -1)
    found["rows"] = take_rows(rows, kept), rows[kept]
    return launch.difference(found, _TOLERANCES[dtype])


#: Whether patches are rotated and gathered by kernels on this device: None, or why not.
verdict = launch.Verdict(_compare)


@mx.compile  # otherwise each operation writes all heads to memory, in float32
def _rotated(rows: mx.array, cos_sin: mx.array) -> mx.array:
    """Rotate heads [rows, ..., heads, width] by the cosines and sines [rows, width] of angles."""
    cos, sin = mx.split(mx.expand_dims(cos_sin, (1, 2)), 2, axis=-1)
    first, second = mx.split(rows, 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    return mx.concatenate(parts, axis=-1).astype(rows.dtype)
