"""HiddenStates: record the inputs of some of a model's layers in each step, for a head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.core.batch import StepBatch
from modelpack_engine.core.scheduler import SchedulerOutput
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.errors import EngineError
from modelpack_engine.layers.add_norm import Sums
from modelpack_engine.layers.drafts import beside
from modelpack_engine.patches.modules import Call, ClassSwaps


class HiddenStates:
    """Records the inputs of `layers` (1 for the second layer) of a model without head, `inner`.

    The input of a layer is the output of the one before, which `swaps` makes a module record.
    `reduce` gets the recorded states [rows, width] side by side, inside of the step's graph.
    Raises `EngineError` for a model whose layers are not in a list.
    """

    def __init__(
        self,
        inner: nn.Module | None,
        layers: Iterable[int],
        reduce: Callable[[mx.array], mx.array],
        swaps: ClassSwaps,
    ) -> None:
        self._reduce = reduce
        self._found: dict[int, mx.array] = {}
        self._wanted = tuple(layer - 1 for layer in layers)
        modules = layers_of(inner)
        for index in sorted(set(self._wanted)):
            swaps.override(modules[index], self._recorder(index))

    def _recorder(self, index: int) -> Call:
        def call(original: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = original(module, *args, **kwargs)
            # Gemma 4's layers return more than their state.
            state = output[0] if isinstance(output, tuple) else output
            if isinstance(state, mx.array):
                self._found[index] = state
            return output

        return call

    def take(self, sums: Sums, num_rows: int) -> mx.array:
        """Return the reduced states [rows, …] of the step whose graph was just built."""
        found, self._found = self._found, {}
        if any(index not in found for index in self._wanted):
            raise EngineError("the model's layers return no hidden states")
        states = [sums.value(found[index]).reshape(num_rows, -1) for index in self._wanted]
        return self._reduce(beside(states))


def layers_of(inner: nn.Module | None) -> list[nn.Module]:
    """Return the layers of a model without head; raises `EngineError` if they are unknown."""
    layers = getattr(inner, "layers", None)
    if not isinstance(layers, list) or not layers:
        raise EngineError("the model's layers are not in a list")
    return layers


def embeddings_of(inner: nn.Module | None) -> nn.Module:
    """Return the embeddings of a model without head; raises `EngineError` if they are unknown."""
    found: nn.Module | None = getattr(inner, "embed_tokens", getattr(inner, "embeddings", None))
    if found is None:
        raise EngineError("the model's embeddings are not where a drafting head needs them")
    return found


@dataclass(frozen=True, slots=True)
class HiddenRows:
    """The reduced hidden states of a step's rows; `places` has the array's row for each of them."""

    array: mx.array
    places: NDArray[np.int32] | None = None

    def cut(self, row: int, count: int) -> mx.array:
        """Return the states of `count` rows of one sequence, which follow each other."""
        start = row if self.places is None else int(self.places[row])
        return self.array[start : start + count]


def recorded_rows(output: SchedulerOutput, batch: StepBatch) -> list[tuple[Sequence, int, int]]:
    """Return each sequence of a step with its first row and the number of its rows.

    Those that decode come first; a proposal's rows are those of its tokens and the one before.
    """
    parts = [(sequence, row, 1) for row, sequence in enumerate(output.decode)]
    row = len(output.decode)
    as_rows = len(batch.decode_seq_ids) > row
    for index, proposal in enumerate(output.proposals):
        count = 1 + len(proposal.token_ids)
        parts.append((proposal.sequence, row if as_rows else batch.chunks[index].row, count))
        row += count
    chunks = batch.chunks[len(batch.chunks) - len(output.prefill) :]
    for part, chunk in zip(output.prefill, chunks, strict=True):
        parts.append((part.sequence, chunk.row, chunk.length))
    return parts
