"""TowerCall: one call of a vision or audio tower, which may be evaluated in slices.

MLX evaluates lazily: the call only builds a graph. `BlockOutputs` records what the tower's blocks
return in it, and a slice evaluates some of these arrays. So a step of the engine waits for a slice,
not for the whole tower. The embeddings are bit for bit those of one evaluation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from modelpack_engine.patches.modules import Call, ClassSwaps
from modelpack_engine.request import Media
from modelpack_engine.vision.models import VisionModel
from modelpack_engine.vision.transfers import joined


class BlockOutputs:
    """Records the arrays that the blocks of a tower return.

    Blocks are modules in lists. Those of the language model, and those inside of other blocks, do
    not count.
    """

    def __init__(self, model: VisionModel) -> None:
        self._recorded: deque[list[mx.array]] | None = None
        modules = model.named_modules() if isinstance(model, Module) else []
        blocks = [
            module
            for name, module in modules
            if name.rpartition(".")[2].isdigit() and not name.startswith("language_model.")
        ]
        #: Whether the tower has blocks.
        self.found = bool(blocks)
        swaps = ClassSwaps()
        for block in blocks:
            swaps.override(block, self._call)

    @contextmanager
    def recorded(self) -> Iterator[deque[list[mx.array]]]:
        """Yield the arrays of each call of a block, in their order, which calls then add to."""
        recorded = self._recorded = deque[list[mx.array]]()
        try:
            yield recorded
        finally:
            self._recorded = None

    def _call(self, original: Call, block: Module, *args: Any, **kwargs: Any) -> Any:
        recorded, self._recorded = self._recorded, None
        try:
            made = original(block, *args, **kwargs)
        finally:
            self._recorded = recorded
        if recorded is not None:
            leaves = dict(tree_flatten(made)).values()
            recorded.append([each for each in leaves if isinstance(each, mx.array)])
        return made


class TowerCall:
    """One call of a tower for files whose inputs have the same shapes.

    `keys` name the files, and `kind` is what they are in messages. `send` returns inputs of files
    after each other on the device. All methods raise `ValueError` if rows are missing, and what the
    model raises.
    """

    def __init__(
        self,
        model: VisionModel,
        files: Sequence[Media],
        keys: Sequence[tuple[bytes, bytes]] = (),
        kind: str = "",
        outputs: BlockOutputs | None = None,
        send: Callable[[Sequence[NDArray[Any]]], mx.array] = joined,
    ) -> None:
        self.keys, self.kind = tuple(keys), kind
        self._model, self._outputs, self._send = model, outputs, send
        # A call has no reference to its files: it ends with the requests that wait for it.
        self._given = [file.inputs for file in files]
        self._token_ids = [file.token_ids for file in files]
        self._inputs: dict[str, mx.array] = {}
        self._states = deque[list[mx.array]]()
        self._parts: list[mx.array] = []

    @property
    def is_evaluated(self) -> bool:
        """Whether all blocks are evaluated, and only what follows them is left."""
        return bool(self._parts) and not self._states

    @property
    def num_tokens(self) -> int:
        """The tokens of all files."""
        return sum(map(len, self._token_ids))

    def advance(self, num_blocks: int) -> int:
        """Evaluate a slice of up to `num_blocks` blocks, and return how many it had.

        The first slice only copies the inputs, which takes the host as long as some blocks, and the
        second one only builds the graph: both return 0.
        """
        if self._given:
            self._copy()
            return 0
        if not self._parts:
            self._build()
            return 0
        some = [self._states.popleft() for _ in range(min(num_blocks, len(self._states)))]
        mx.eval(some)
        return len(some)

    def finish(self) -> list[mx.array]:
        """Return the embeddings of each file; the device is still evaluating them."""
        if self._given:
            self._copy()
        if not self._parts:
            self._build()
        self._states.clear()
        mx.async_eval(self._parts)  # while it runs, the host builds the step
        return self._parts

    def _copy(self) -> None:
        given, self._given = self._given, []
        self._inputs = {name: self._send([each[name] for each in given]) for name in given[0]}

    def _build(self) -> None:
        token_ids = [token_id for each in self._token_ids for token_id in each]
        inputs, self._inputs = self._inputs, {}
        if self._outputs is None:
            made = self._model.embed(mx.array(token_ids, mx.int32), inputs)
        else:
            with self._outputs.recorded() as self._states:
                made = self._model.embed(mx.array(token_ids, mx.int32), inputs)
        self._parts = [made]
        if self._token_ids[1:]:
            if made.shape[-2] != len(token_ids):
                raise ValueError(
                    f"{made.shape[-2]} embeddings for {len(token_ids)} tokens of files"
                )
            ends = np.cumsum([0, *map(len, self._token_ids)]).tolist()
            # They are copies: a view would keep the memory of the others after they are evicted.
            self._parts = [mx.take(made, mx.arange(*edges), axis=-2) for edges in pairwise(ends)]
