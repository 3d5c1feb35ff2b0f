"""tower_class: towers of Qwen's vision models, which compute positions once for each size.

mlx-vlm's towers compute the positions and windows of each picture on the GPU and read them there,
so that the host waits several times for all that it has launched before. Here the host computes
them, and keeps those of the last sizes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.models.activations import swiglu
from numpy.typing import NDArray

from modelpack_engine.patches.corrections import override
from modelpack_engine.vision.windows import Windows, attend, evaluated, windows_between

#: The sizes whose positions a tower keeps.
_MAX_GRIDS = 4

#: The frames, rows and columns of patches of each picture of a call.
Grids = tuple[tuple[int, int, int], ...]
_Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Layout:
    """What all pictures of some sizes have in common.

    `angles` [patches, width] rotate queries and keys. `frames` are the first patches of all frames,
    and their number. In towers that learn positions, a patch gets four of these, `places` [4,
    patches], by their `weights` [4, patches, 1].

    In towers with windows, `order` are the patches in the order of the windows, `back` the tokens
    in that of the picture. There, `angles` has their cosines and sines.
    """

    angles: mx.array
    frames: _Integers | Windows
    places: mx.array | None = None
    weights: mx.array | None = None
    windows: Windows | None = None
    order: mx.array | None = None
    back: mx.array | None = None


class _Layouts:
    """The layouts of a tower, of which it keeps those that were used last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Grids, mx.Dtype], _Layout] = OrderedDict()

    def find(self, tower: Any, grids: Grids, dtype: mx.Dtype) -> _Layout:
        """Return the layout of a call with patches in `dtype`."""
        key = grids, dtype
        found = self._kept.pop(key, None)
        if found is None:
            found = _layout(tower, grids, dtype)
            while len(self._kept) >= _MAX_GRIDS:
                self._kept.popitem(last=False)
        self._kept[key] = found
        return found


def tower_class(base: Any) -> Any:
    """Return a class of towers that keep positions, for one of Qwen's; others as they are.

    One with windows (Qwen2.5-VL) attends in all of them at once, and computes SwiGLU in one kernel.
    """
    if not hasattr(base, "rot_pos_emb"):
        return base

    def initialise(self: Any, config: Any) -> None:
        base.__init__(self, config)
        self._layouts = _Layouts()
        if hasattr(self, "get_window_index"):
            for block in self.blocks:
                override(block.attn, attend)
                override(block.mlp, _feed_forward)

    body = {"__init__": initialise, "__call__": _encode, "__module__": base.__module__}
    return type("VisionModel", (base,), body)


def _encode(self: Any, patches: mx.array, grid_thw: mx.array) -> Any:
    """Return the rows of tokens; with DeepStack also a list of what is added to each layer."""
    sizes = cast(list[tuple[int, int, int]], grid_thw.tolist())
    hidden = self.patch_embed(patches)
    layout = self._layouts.find(self, tuple(map(tuple, sizes)), hidden.dtype)
    if layout.places is not None:
        learned = self.pos_embed(layout.places) * layout.weights
        hidden = hidden + (learned[0] + learned[1] + learned[2] + learned[3])
    if layout.order is not None:
        hidden = hidden[layout.order]
    deep_blocks = getattr(self, "deepstack_visual_indexes", None)
    deep: list[mx.array] = []
    frames, windows = layout.frames, layout.windows
    if isinstance(frames, Windows) and windows is not None:
        heads = self.blocks[0].attn.num_heads
        frames, windows = frames.for_heads(heads), windows.for_heads(heads)
    for number, block in enumerate(self.blocks):
        is_whole = windows is None or number in self.fullatt_block_indexes
        edges = frames if is_whole else windows
        hidden = block(hidden, cu_seqlens=edges, rotary_pos_emb=layout.angles)
        if deep_blocks is not None and number in deep_blocks:
            deep.append(self.deepstack_merger_list[deep_blocks.index(number)](hidden))
    tokens = self.merger(hidden)
    if layout.back is not None:
        tokens = tokens[layout.back]
    return tokens if deep_blocks is None else (tokens, deep)


def _layout(tower: Any, grids: Grids, dtype: mx.Dtype) -> _Layout:
    """Compute the layout of a call with patches in `dtype`."""
    merged, rotary = tower.spatial_merge_size, tower.rotary_pos_emb
    positions = [_positions(grid, merged) for grid in grids]
    at = np.concatenate(positions)
    exponents = np.arange(0, rotary.dim, 2) / rotary.dim
    angles = (at[:, :, None] / rotary.theta**exponents).reshape(len(at), -1)
    frames = np.cumsum([0, *chain.from_iterable([y * x] * count for count, y, x in grids)])
    if hasattr(tower, "num_grid_per_side"):
        side = tower.num_grid_per_side
        learned = [_learned(side, *each) for each in zip(grids, positions, strict=True)]
        places, weights = (np.concatenate(each, axis=1) for each in zip(*learned, strict=True))
        return _Layout(
            evaluated(angles, mx.float32), frames, mx.array(places.astype(np.int32)),
            evaluated(weights[:, :, None], dtype),
        )  # fmt: skip
    if not hasattr(tower, "get_window_index"):
        return _Layout(evaluated(angles, mx.float32), frames)
    side, unit, first = tower.window_size // merged // tower.patch_size, merged * merged, 0
    units, edges = list[_Integers](), [0]
    for grid in grids:
        some, sizes = _in_windows(grid, merged, side)
        units.append(some + first)
        edges += (edges[-1] + np.cumsum(sizes) * unit).tolist()
        first += len(some)
    of_windows = np.concatenate(units)
    order = (of_windows[:, None] * unit + np.arange(unit)).ravel()
    angles = angles[order]
    return _Layout(
        evaluated(np.concatenate([np.cos(angles), np.sin(angles)], axis=1), mx.float32),
        windows_between(frames.tolist(), dtype),
        windows=windows_between(edges, dtype),
        order=mx.array(order.astype(np.int32)),
        back=mx.array(np.argsort(of_windows).astype(np.int32)),
    )


def _positions(grid: tuple[int, int, int], merged: int) -> _Integers:
    """Return the rows and columns of a picture's patches, [patches, 2].

    Patches are in the order of frames and tokens; those of a token, `merged` x `merged`, are
    together.
    """
    frames, rows, columns = grid
    at = np.indices((rows, columns)).transpose(1, 2, 0)
    at = at.reshape(rows // merged, merged, columns // merged, merged, 2).swapaxes(1, 2)
    return np.tile(at.reshape(-1, 2), (frames, 1))


def _learned(
    side: int, grid: tuple[int, int, int], at: _Integers
) -> tuple[_Integers, NDArray[np.float64]]:
    """Return four learned positions of each patch, and their weights, [4, patches] each.

    `at` [patches, 2] are the patches' rows and columns in the picture. It is spread over the `side`
    x `side` positions, and each patch gets those around it (bilinear interpolation, as in
    transformers' Qwen3-VL).
    """
    lines = [np.linspace(0, side - 1, count).astype(np.float32) for count in grid[1:]]
    (y, x) = (line[places] for line, places in zip(lines, at.T, strict=True))
    top, left = y.astype(np.int64), x.astype(np.int64)
    bottom, right = np.minimum(top + 1, side - 1), np.minimum(left + 1, side - 1)
    down, along = y - top, x - left
    places = np.stack([row * side + column for row in (top, bottom) for column in (left, right)])
    weights = np.stack([a * b for a in (1 - down, down) for b in (1 - along, along)])
    return places, weights.astype(np.float64)


def _in_windows(grid: tuple[int, int, int], merged: int, side: int) -> tuple[_Integers, _Integers]:
    """Return a picture's tokens in the order of windows of `side` x `side`, and the windows' sizes.

    Windows at the right and at the bottom may be smaller (transformers' `get_window_index`).
    """
    frames, rows, columns = grid[0], grid[1] // merged, grid[2] // merged
    tokens = np.arange(frames * rows * columns).reshape(frames, rows, columns)
    padded = np.pad(tokens, [(0, 0), (0, -rows % side), (0, -columns % side)], constant_values=-1)
    _, height, width = padded.shape
    windows = padded.reshape(frames, height // side, side, width // side, side).swapaxes(2, 3)
    windows = windows.reshape(-1, side * side)
    within = windows >= 0
    return windows[within], within.sum(axis=1)


def _feed_forward(self: Any, x: mx.array) -> mx.array:
    made: mx.array = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
    return made
