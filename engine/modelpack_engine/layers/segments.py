"""LayerStates: the states of a recurrent layer that computes all segments of a step in one call.

Kernels compute the segments, of any lengths: a row of a sequence that generates, or a part of a
prompt. They write the states after the segments to rows of the arrays that they read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx

from modelpack_engine.attention.metadata import Segments, States
from modelpack_engine.errors import EngineError
from modelpack_engine.kernels import launch
from modelpack_engine.layers import kernels

#: The rows of a state that the lanes of a simdgroup share, if each lane has one.
_ROWS_OF_LANES = 8
#: The states before the segments of `example`.
_STATES = 2


def of_batch(
    batch: int,
    tokens: int,
    state: mx.array | None,
    shape: Sequence[int],
    compute: Callable[[States, Segments], mx.array],
) -> tuple[mx.array, mx.array]:
    """Compute segments of flattened arrays [batch, tokens, …]; return outputs and states after it.

    `state` has the states before, float32 [batch, *shape]; None for zeros. It is not changed.
    """
    after = mx.zeros((batch, *shape), mx.float32)
    rows = after if state is None else mx.concatenate([state.astype(mx.float32), after])
    outputs = compute(States(rows, rows), _of_batch(batch, tokens, started=state is not None))
    # What reads the states may be in the same graph, where MLX does not know who writes them.
    rows = kernels.copied_after(rows.reshape(len(rows), -1), outputs)
    return outputs, rows[-batch:].reshape(batch, *shape)


@lru_cache(maxsize=64)
def _of_batch(batch: int, tokens: int, *, started: bool) -> Segments:
    first = batch if started else 0
    runs = [[i if started else -1, i * tokens, tokens, -1, -1, first + i] for i in range(batch)]
    owners = [i for i in range(batch) for _ in range(tokens)]
    return Segments(mx.array(runs, mx.int32), mx.array(owners, mx.int32))


def with_proposal(segments: Segments, count: int) -> Segments:
    """Return segments after which a sequence has `count` more rows, and a segment up to each."""
    runs: Any = segments.runs.tolist()
    owners: Any = segments.owners.tolist()
    first = len(owners)
    for length in range(1, count + 1):
        owners.append(len(runs))
        runs.append([0, first, length, -1, -1, _STATES + len(runs)])
    return Segments(mx.array(runs, mx.int32), mx.array(owners, mx.int32))


#: What a layer computes from arrays [1, tokens, …] of one sequence, and its state [1, …].
Rule = Callable[..., tuple[mx.array, mx.array]]


def example(*prompts: tuple[int, int, int, int]) -> Segments:
    """Return segments of every kind for 9 rows, 2 states and 4 slots, to test a kernel.

    Each of `prompts` adds a segment with rows of its own: its source, the number of its rows, and
    the rows after which its state is kept, in which slot.
    """
    runs = [
        [1, 0, 1, 1, 2], [-1, 3, 4, 2, 0], [-3, 1, 2, -1, -1], [0, 0, 0, -1, -1],
        [-1, 0, -1, -1, -1], [-3, 1, 1, 1, 3],
    ]  # fmt: skip
    owners = [0, 2, 2, 1, 1, 1, 1, -1, -1]
    for source, count, marked, slot in prompts:
        runs.append([source, len(owners), count, marked, slot])
        owners += [len(runs) - 1] * count
    for index, run in enumerate(runs):
        run.append(_STATES + index)
    return Segments(mx.array(runs, mx.int32), mx.array(owners, mx.int32))


def segment_by_segment(
    segments: Segments, states: States, rule: Rule, *rows: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Return outputs, all states and snapshots of `rule` in float32; nothing is written in place.

    All states have to exist.
    """
    outputs: list[mx.array | None] = [None] * rows[0].shape[0]
    after, kept = list(states.rows), list(states.slots)
    runs: Any = segments.runs.tolist()

    def compute(state: mx.array, first: int, count: int) -> mx.array:
        some = slice(first, first + count)
        found, state = rule(*(array[some][None].astype(mx.float32) for array in rows), state)
        outputs[some] = list(found[0])
        return state

    for source, first, count, marked, slot, to in runs:
        state = mx.zeros_like(states.rows[:1])
        if source != -1:
            state = states.rows[source][None] if source >= 0 else states.slots[-2 - source][None]
        if marked > 0:
            kept[slot] = compute(state, first, marked)[0]
        if count >= 0:
            after[to] = (compute(state, first, count) if count > 0 else state)[0]
    made = next(output for output in outputs if output is not None)
    every = mx.stack([mx.zeros_like(made) if o is None else o for o in outputs])
    return every, mx.stack(after), mx.stack(kept)


def example_states(states: mx.array, segments: Segments | None = None) -> States:
    """Return states [6 or more, …] as those of `example`: two, room for others, and slots.

    `segments` are those of the example, if it has prompts.
    """
    count = (segments or example()).runs.shape[0]
    rows = mx.concatenate([states[:_STATES], mx.zeros((count, *states.shape[1:]), states.dtype)])
    slots = mx.contiguous(states[_STATES:])
    mx.eval(rows, slots)
    return States(rows, slots)


def compared(
    found: mx.array, states: States, wanted: tuple[mx.array, mx.array, mx.array]
) -> dict[str, tuple[mx.array, mx.array]]:
    """Return pairs to compare of what `example` computes, as shares of the largest."""
    mx.eval(found)  # before the states and snapshots are read, which it writes
    pairs = {
        "output": (found, wanted[0]),
        "state": (states.rows, wanted[1]),
        "snapshots": (states.slots, wanted[2]),
    }
    scaled = {}
    for name, (ours, theirs) in pairs.items():
        most = mx.max(mx.abs(theirs))
        scaled[name] = ours.astype(mx.float32) / most, theirs / most
    return scaled


def supports(
    shapes: Sequence[tuple[int, ...] | None],
    dtypes: Sequence[mx.Dtype | None],
    *,
    only_float32: bool = True,
) -> bool:
    """Return whether kernels can compute a layer with these states, with batch size 1.

    A state of a convolution is [1, tokens, channels], and any other [1, heads, dim, size]. The
    latter may have another type than float32 if kernels support it, whose sizes may be turned.
    """

    def fit(shape: tuple[int, ...] | None, dtype: mx.Dtype | None) -> bool:
        if shape is None or len(shape) not in (3, 4):
            return False
        if len(shape) == 3:
            return True
        return fits(shape[3]) and (dtype == mx.float32 if only_float32 else fits(shape[2]))

    return launch.backend() != "none" and all(map(fit, shapes, dtypes))


def fits(size: int) -> bool:
    """Return whether kernels support rows of a state of this size: four lanes share a row."""
    return size % 16 == 0 and size <= 256


def lanes_of(size: int, dim: int) -> tuple[int, int]:
    """Return how many rows of `size` elements a lane holds, and the simdgroups for `dim` rows.

    They stay in registers: more rows for each lane mean fewer conversions, and fewer simdgroups.
    """
    rows = 2 if size <= 128 and dim > _ROWS_OF_LANES else 1
    return rows, -(-dim // (rows * _ROWS_OF_LANES))


class LayerStates:
    """The states of one layer that computes all segments of a step, in place of mlx-lm's cache.

    To the layer, every sequence seems to start: it reads None, and what it stores is dropped. The
    functions that compute from a state take the next one of its shape by `replace`.
    """

    lengths: mx.array | None = None

    def __init__(self, states: Sequence[States], segments: Segments, name: str) -> None:
        self.states, self.segments, self.name = states, segments, name
        self._is_computed = [False] * len(states)

    def __getitem__(self, index: int) -> None:
        if index >= len(self.states):
            raise IndexError(index)

    def __setitem__(self, index: int, value: object) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def replace(
        self, shape: tuple[int, ...], compute: Callable[[States, Segments], mx.array]
    ) -> mx.array:
        """Compute from the layer's next state of `shape`; return the outputs.

        `compute` writes the states after the segments, too.
        """
        for index, states in enumerate(self.states):
            if not self._is_computed[index] and states.rows.shape[1:] == shape:
                self._is_computed[index] = True
                return compute(states, self.segments)
        raise EngineError(f"{self.name} has no state of the shape {shape} left")

    def check(self) -> None:
        """Raise `EngineError` unless all states were computed."""
        if not all(self._is_computed):
            raise EngineError(f"{self.name} does not compute all of its states by known functions")
