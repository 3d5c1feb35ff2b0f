"""tower_class: towers of Qwen's vision models, which compute positions once for each size.

mlx-vlm's towers compute the positions and windows of each picture on the GPU and read them there,
so that the host waits several times for all that it has launched before. Pictures of the same size
have the same positions: here they are kept, and the host waits only for those of a new size.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.models.activations import swiglu
from numpy.typing import NDArray

from modelpack_engine.patches.corrections import override
from modelpack_engine.vision import windows

#: The sizes whose positions a tower keeps.
_MAX_GRIDS = 4

#: The frames, rows and columns of patches of each picture of a call.
Grids = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Layout:
    """What all pictures of some sizes have in common.

    `angles` [patches, width] rotate queries and keys. `frames` are the first patches of all frames,
    and their number. In towers with windows, `order` are the patches in the order of the windows,
    `back` the tokens in that of the picture, and `windows` the first patches of all windows.
    `added` [patches, width] is added to patches, in towers that learn positions.
    """

    angles: mx.array
    frames: NDArray[np.int64]
    order: mx.array | None = None
    back: mx.array | None = None
    windows: NDArray[np.int64] | None = None
    added: mx.array | None = None


class _Layouts:
    """The layouts of a tower, of which it keeps those that were used last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Grids, _Layout] = OrderedDict()

    def find(self, tower: Any, grids: Grids) -> _Layout:
        """Return the layout of a call."""
        found = self._kept.pop(grids, None)
        if found is None:
            found = _layout(tower, grids)
            while len(self._kept) >= _MAX_GRIDS:
                self._kept.popitem(last=False)
        self._kept[grids] = found
        return found


def tower_class(base: Any) -> Any:
    """Return a tower that keeps positions, for mlx-vlm's classes of Qwen's; others as they are.

    It attends in all windows at once (Qwen2.5-VL), and then also computes SwiGLU in one kernel.
    """
    if not hasattr(base, "rot_pos_emb"):
        return base

    def initialise(self: Any, config: Any) -> None:
        base.__init__(self, config)
        self._layouts = _Layouts()
        if hasattr(self, "get_window_index"):
            for block in self.blocks:
                override(block.attn, windows.attend)
                override(block.mlp, _feed_forward)

    body = {"__init__": initialise, "__call__": _encode, "__module__": base.__module__}
    return type("VisionModel", (base,), body)


def _encode(self: Any, patches: mx.array, grid_thw: mx.array) -> Any:
    """Return the rows of tokens; with DeepStack also a list of what is added to each layer."""
    rows = cast(list[tuple[int, int, int]], grid_thw.tolist())
    layout = self._layouts.find(self, tuple(map(tuple, rows)))
    hidden = self.patch_embed(patches)
    if layout.added is not None:
        hidden = hidden + layout.added.astype(hidden.dtype)
    if layout.order is not None:
        hidden = hidden[layout.order]
    deep_blocks = getattr(self, "deepstack_visual_indexes", None)
    deep: list[mx.array] = []
    for number, block in enumerate(self.blocks):
        is_whole = layout.windows is None or number in self.fullatt_block_indexes
        edges = layout.frames if is_whole else layout.windows
        hidden = block(hidden, cu_seqlens=edges, rotary_pos_emb=layout.angles)
        if deep_blocks is not None and number in deep_blocks:
            deep.append(self.deepstack_merger_list[deep_blocks.index(number)](hidden))
    tokens = self.merger(hidden)
    if layout.back is not None:
        tokens = tokens[layout.back]
    return tokens if deep_blocks is None else (tokens, deep)


def _layout(tower: Any, grids: Grids) -> _Layout:
    """Return a new layout, by mlx-vlm's functions; they run on the CPU, without the GPU's steps."""
    sizes = [repeat(height * width, frames) for frames, height, width in grids]
    frames = np.array([0, *accumulate(chain.from_iterable(sizes))])
    added = None
    if hasattr(tower, "fast_pos_embed_interpolate"):
        added = tower.fast_pos_embed_interpolate(mx.array(grids))
    with mx.stream(mx.cpu):
        angles = tower.rot_pos_emb(mx.array(grids))
        if not hasattr(tower, "get_window_index"):
            made = _Layout(angles, frames, added=added)
        else:
            units, edges = tower.get_window_index(mx.array(grids))
            merged = tower.spatial_merge_unit
            order = (units[:, None] * merged + mx.arange(merged)).flatten()
            angles = angles[order]
            made = _Layout(
                mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1), frames,
                order.astype(mx.int32), mx.argsort(units),
                # Where windows fill a picture, mlx-vlm's adds empty ones. Attention over no rows
                # ends the process on a GPU (SIGFPE, MLX 0.32.4).
                np.unique(np.array(edges)),
            )  # fmt: skip
    mx.eval([each for each in (made.angles, made.order, made.back, added) if each is not None])
    return made


def _feed_forward(self: Any, x: mx.array) -> mx.array:
    made: mx.array = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
    return made
