"""Replays: steps as CUDA graphs that the driver launches, without MLX.

MLX takes the host 7 to 14 µs for each kernel of a step. A recorded step (`kernels.recording`) takes
it one call. The inputs of a step are integers in one piece of GPU memory, `_Memory`: first the
tokens of the step before, which its graph wrote there, then the numbers of this step. Rows of
pictures also have embeddings, which are copied to where the graph reads them.

Graphs run on a stream of their own, and MLX does not know what they write. So a step by MLX and one
by a graph are never in flight at the same time: `Engine` reads the tokens of the one before it
launches the other.

Recording a shape takes as long as many steps, so if the engine has idle time, a shape that should
be recorded waits for it. An example of its numbers is kept, with no slots to write keys, values and
snapshots to, and with random embeddings. Its states go to rows that no sequence has, as none runs
then. A shape that comes very often does not wait: the engine may never be idle. Nor does one with a
draft, whose memory changes when its sequences end.
"""

from __future__ import annotations

import ctypes
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.core.batch import StepBatch
from modelpack_engine.errors import EngineError
from modelpack_engine.kernels import launch
from modelpack_engine.kernels.cuda import Compiled, GeneratedKernel, compiled_kernel
from modelpack_engine.kernels.recording import (
    Note,
    NotRecordedError,
    Output,
    Recording,
    Trace,
    Transient,
    compare,
    recorded,
)
from modelpack_engine.layers.kernels import take
from modelpack_engine.platform import device
from modelpack_engine.platform.cublas import WORKSPACE_BYTES, CublasError, find_cublas
from modelpack_engine.platform.cublas import Shape as MatmulShape
from modelpack_engine.platform.cublas import Type as MatmulType
from modelpack_engine.platform.driver import (
    Driver,
    DriverError,
    KernelCall,
    find_driver,
    pointer_bytes,
    shape_bytes,
)
from modelpack_engine.runner.continued import Continued, next_layout, write_rows
from modelpack_engine.runner.kv_cache_size import MOST_RECORDED_ROWS
from modelpack_engine.runner.paged import Layout, PackedStep, PagedRunner
from modelpack_engine.sampling import sampler
from modelpack_engine.sampling.delivery import address_halves, deliver

if TYPE_CHECKING:
    from modelpack_engine.sampling.sampler import Sampled

logger = logging.getLogger(__name__)

#: The most tokens of a step and of a draft, and the numbers that the memory holds at first.
_MOST_TOKENS, _MOST_DRAFTED, _FEWEST_NUMBERS = 1024, 1024, 1 << 16
#: At most two steps are in flight, one after the other.
_PLACES = 4
#: A shape is recorded when it comes for this time, without and with prompts, which have many more
#: shapes: recording takes longer than a few steps.
_FREQUENT, _FREQUENT_PROMPTS = 3, 4
#: A shape that comes for this time does not wait for idle time any longer: MLX has then taken the
#: host about as much longer than a graph as recording takes.
_OVERDUE = 32
#: If the first shapes are refused, so many of few rows, no other one is tried: with more rows, MLX
#: computes more. Nor is one with prompts, once so many of them in a row are refused.
_MOST_REFUSED, _FEW_ROWS = 3, 32
#: Steps with the same adapters before one is recorded, at first and at most; graphs that run for
#: as many steps, times the factor, have been worth it.
_SETTLED_STEPS, _MOST_SETTLED, _LASTING = 128, 1 << 16, 16
#: The most rows of a step with embeddings that is a graph: with more, the GPU takes longer than MLX
#: to launch it, and the parts of new pictures have many shapes.
_MOST_EMBEDDED_ROWS = 256
#: What stays free on the GPU while a step is recorded for which no memory is planned.
_SPARE_BYTES = 1 << 30
#: The most graphs, each of some hundred kernels.
_MOST_GRAPHS = 512
#: In place of tokens that a graph has not written yet; no token is equal.
_UNWRITTEN = -3
#: Graphs run in rows of at least so many steps: after the last one, MLX builds the next step while
#: the GPU waits. So many are expected at first; each such row has a weight in that.
_FEWEST_STEPS, _STEPS_AT_FIRST, _NEWEST = 3, 16, 1 / 4
_TYPES: dict[mx.Dtype, MatmulType] = {mx.float16: "float16", mx.bfloat16: "bfloat16"}
#: The arrays that one kernel takes the addresses of.
_AT_ONCE = 8
#: Kernels that may start while the one before runs: they wait for its end themselves. The first
#: five read weights until then, and `rotate_decode` numbers, and keys and values of earlier steps.
EARLY: frozenset[str] = frozenset(
    (
        "packed_strips", "packed_wide", "block_tiles", "block_strips", "digit_strips", "arrange",
        "rotate", "decode", "rotate_decode", "merge", "add_norm", "add_norm_arranged",
    )
)  # fmt: skip
#: Kernels that may start while this one before runs, and read all but what it writes before they
#: wait for its end. It is never launched early itself: all before it has ended when it starts.
EARLY_AFTER = {"adapters": "product", "adapters_norm": "product", "expand_wide": "shrink_wide"}
#: What `rotate_decode` reads after it has waited, and what only orders it.
_READ_LATER = frozenset({"joint", "values", "previous"})
#: The last numbers of a step: the addresses of its tokens and of its draft.
_NUM_HALVES = 8


def addresses(arrays: Sequence[mx.array], *, starts: bool = False) -> list[int]:
    """Return where evaluated arrays are on the GPU, as `recording.AddressesOf` does."""
    unique = {id(array): array for array in arrays if array.size}
    parts = [array[:1] if starts else array.reshape(-1) for array in unique.values()]
    as_bytes = [part.view(mx.uint8) for part in parts]
    found = []
    for first in range(0, len(as_bytes), _AT_ONCE):
        some = as_bytes[first : first + _AT_ONCE]
        some += some[:1] * (_AT_ONCE - len(some))
        found += launch.run(
            "address", some, [], [], threads=_AT_ONCE, group=32, shapes=[(2 * _AT_ONCE,)],
            dtypes=[mx.int32],
        )  # fmt: skip
    mx.eval(found)
    halves = np.array(mx.concatenate(found) if found else mx.zeros((0,), mx.int32))
    known = dict(zip(unique, halves.view(np.uint64).tolist(), strict=False))
    return [known[id(array)] if array.size else 0 for array in arrays]


def may_read_early(note: Note, reads: Sequence[int | Output]) -> bool:
    """Return whether no kernel of the step writes the numbers that this one reads before it waits.

    The keys and values that it reads then are those of earlier steps: a step has each layer once.
    """
    if note.body != "rotate_decode":
        return True
    inputs = zip(note.source.inputs, reads, strict=True)
    return all(isinstance(read, int) or name in _READ_LATER for name, read in inputs)


def launched_early(
    bodies: Sequence[str], calls: Sequence[KernelCall | Callable[[int], None]]
) -> list[KernelCall | Callable[[int], None]]:
    """Return calls of kernels, those launched early that can be: right after another kernel."""
    found = list(calls)
    for index in range(1, len(found)):
        call, before = found[index], found[index - 1]
        may = bodies[index] in EARLY or EARLY_AFTER.get(bodies[index]) == bodies[index - 1]
        if may and isinstance(call, KernelCall) and isinstance(before, KernelCall):
            found[index] = replace(call, early=True)
    return found


class DraftBehind(Protocol):
    """A draft in the graph of the step whose rows it reads."""

    @property
    def key(self) -> Hashable:
        """What the kernels of the draft depend on, beside the generation."""

    @property
    def generation(self) -> int:
        """Counts how often the memory has moved that the draft reads and writes, from 1 on."""

    @property
    def numbers(self) -> NDArray[np.int32]:
        """The integers that the draft reads."""

    @property
    def num_drafted(self) -> int:
        """How many tokens are drafted for each sequence; 0 if rows are only read."""

    @property
    def num_found(self) -> int:
        """How many integers the host reads."""

    def after(self, sequences: Sequence[Continued], num_rows: int) -> DraftBehind | None:
        """Return the draft behind the next step of all its sequences, which has so many rows.

        `propose` adds the proposed tokens. None if there is no room yet.
        """

    def propose(self, numbers: NDArray[np.int32], token_ids: Sequence[list[int]]) -> None:
        """Add the tokens in the rows of each sequence: all but the first ones are proposed."""

    def trace(self, ids: mx.array, numbers: mx.array, hidden: mx.array) -> mx.array | None:
        """Compute the draft; return int32 [num_found], or None if that is 0.

        `ids` int32 [rows] are the tokens of the step, and `hidden` [rows, width] its hidden states.
        """


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Page-locked memory for a step: its numbers, its tokens, its draft, and an event behind it.

    `addresses` are those of the tokens and of the draft, as int32 [2, 4].
    """

    numbers: NDArray[np.int32]
    start: int
    tokens: NDArray[np.int32]
    drafted: NDArray[np.int32]
    addresses: NDArray[np.int32]
    event: int


class _Memory:
    """The integers of steps on the GPU: `_MOST_TOKENS` tokens, then `size` numbers."""

    def __init__(self, driver: Driver, size: int) -> None:
        self.size = size
        self.array = mx.zeros((_MOST_TOKENS + size,), mx.int32)
        mx.eval(self.array)
        (self.address,) = addresses([self.array])
        self.places = [self._place(driver) for _ in range(_PLACES)]

    def free(self, driver: Driver) -> None:
        """Free what is not MLX's."""
        for place in self.places:
            driver.free_host(place.start)
            driver.free_event(place.event)

    def _place(self, driver: Driver) -> _Place:
        start = driver.allocate_host((self.size + _MOST_TOKENS + _MOST_DRAFTED) * 4)
        of_tokens = start + self.size * 4
        of_draft = of_tokens + _MOST_TOKENS * 4
        return _Place(
            _host_array(start, self.size), start, _host_array(of_tokens, _MOST_TOKENS),
            _host_array(of_draft, _MOST_DRAFTED),
            np.stack([address_halves(of_tokens), address_halves(of_draft)]), driver.new_event(),
        )  # fmt: skip


def _host_array(address: int, size: int) -> NDArray[np.int32]:
    return np.ctypeslib.as_array((ctypes.c_int32 * size).from_address(address))


@dataclass(slots=True, eq=False)
class _Graph:
    """A step as a graph of the driver; `kept` is the memory that it reads and writes.

    `embedded` is where it reads embeddings, if it does.
    """

    handle: int
    kept: list[mx.array]
    embedded: int


@dataclass(frozen=True, slots=True, eq=False)
class _Embeddings:
    """Embeddings of rows, [rows, width], and where they are."""

    rows: mx.array
    address: int


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a graph is made for: a layout, whether its tokens are drawn, a draft's key, and whether
    it reads embeddings.
    """

    layout: Layout
    draws: bool
    draft: Hashable = None
    embedded: bool = False

    @property
    def num_rows(self) -> int:
        return self.layout.rows

    @property
    def num_sampled(self) -> int:
        """The number of tokens that the graph returns."""
        return self.layout.rows if self.layout.sampled is None else self.layout.sampled


@dataclass(frozen=True, slots=True, eq=False)
class _Example:
    """The numbers of a step that is recorded later, and the matrices of its adapters.

    `embedded` is the width and the type of its embeddings, if it has any.
    """

    numbers: NDArray[np.int32]
    of_adapters: list[mx.array]
    embedded: tuple[int, mx.Dtype] | None = None


@dataclass(slots=True, eq=False)
class ReplayedTokens:
    """The tokens of a step that runs as a graph; like `Sampled`, which MLX computes."""

    replays: Replays
    shape: _Shape
    graph: _Graph
    draft: DraftBehind | None
    place: _Place
    num_numbers: int
    embeddings: _Embeddings | None = None  # kept until they are copied
    is_launched: bool = False
    logprobs: None = None

    @property
    def num_rows(self) -> int:
        return self.shape.num_sampled

    @property
    def numbers(self) -> NDArray[np.int32]:
        """What the graph reads, without the addresses to which it writes."""
        return self.place.numbers[: self.num_numbers - _NUM_HALVES]

    def launch(self) -> None:
        """Launch the step, unless it ran when it was recorded. Raises `DriverError`."""
        if not self.is_launched:
            self.replays.launch(self)

    def arrays(self) -> tuple[mx.array, ...]:
        return ()  # MLX has nothing to evaluate

    def read(self) -> list[int]:
        """Wait for the token ids of all rows. Raises `DriverError`."""
        self.replays.wait(self.place)
        self.embeddings = None
        found: list[int] = self.place.tokens[: self.num_rows].tolist()
        return found

    def drafted(self) -> list[int]:
        """Wait for what the draft behind the step returns. Raises `DriverError`."""
        assert self.draft is not None, "the step has no draft"
        self.replays.wait(self.place)
        found: list[int] = self.place.drafted[: self.draft.num_found].tolist()
        return found

    @property
    def next_ids(self) -> mx.array:
        """The ids that a step by MLX continues with; waits for them."""
        return mx.array(np.maximum(np.array(self.read(), np.int32), 0))


@dataclass(frozen=True, slots=True, eq=False)
class NextStep:
    """A step that is laid out before the scheduler schedules it, without its tokens."""

    shape: _Shape
    graph: _Graph
    draft: DraftBehind
    numbers: NDArray[np.int32]


@dataclass(slots=True)
class _Adapters:
    """Whether steps with adapters should be recorded: their graphs last until an adapter changes.

    Where adapters come and go, recording would take longer than graphs save. So matrices must have
    been the same for `settled` steps, twice as many after each time that graphs did not last.
    """

    settled: int
    version: int = 0
    num_steps: int = 0  # with these matrices
    num_recorded: int = 0
    num_refused: int = 0  # shapes since the last that was recorded

    def count(self) -> bool:
        """Count a step with adapters; return whether it may be a graph."""
        self.num_steps += 1
        return self.num_steps > self.settled

    def recorded(self) -> None:
        """Count a graph."""
        self.num_recorded += 1
        self.num_refused = 0

    def change(self, version: int) -> bool:
        """Take the matrices of this version; return whether others were there before."""
        if version == self.version:
            return False
        if self.num_recorded and self.num_steps < _LASTING * self.settled:
            self.settled = min(2 * self.settled, _MOST_SETTLED)
        self.version, self.num_steps, self.num_recorded, self.num_refused = version, 0, 0, 0
        return True


class Replays:
    """The steps of a runner that run as graphs.

    A graph must give the tokens of the recorded step when it first runs. After a failure of the
    driver, or a graph with other tokens, MLX runs all steps. While a step is recorded, all that its
    kernels write is in memory: there is room for `planned_rows` rows in any case, beside a weight
    of `weight_bytes` that is computed in full. More rows are recorded if the GPU has `row_bytes`
    free for each.
    """

    def __init__(
        self,
        runner: PagedRunner,
        driver: Driver,
        planned_rows: int = MOST_RECORDED_ROWS,
        row_bytes: int = 0,
        weight_bytes: int | None = None,
    ) -> None:
        assert runner.compiled is not None
        self.driver, self._planned_rows, self._row_bytes = driver, planned_rows, row_bytes
        self._weight_bytes = weight_bytes
        self._runner, self._compiled = runner, runner.compiled
        self._stream = driver.new_stream()
        self._memories: list[_Memory] = []  # steps in flight may have an earlier one than the last
        self._graphs: dict[_Shape, _Graph | None] = {}
        self._seen: Counter[_Shape] = Counter()
        self._noted: dict[_Shape, _Example] = {}  # shapes that wait for idle time
        self._has_idle_time = False
        self._codes: dict[str, Compiled] = {}  # by the source
        self._next = 0
        self._generation = 0  # of the last draft
        self._states = 0  # the generation of the states' arrays
        self._refused = 0  # shapes of few rows, before the first that was recorded
        self._refused_prompts = 0  # shapes with prompts, since the last that was recorded
        self._adapters = _Adapters(_SETTLED_STEPS)
        #: Whether MLX runs all steps from now on.
        self.gave_up = False
        self._arena: mx.array | None = None
        self._embeddings: mx.array | None = None  # where graphs read them, [most rows, width]
        self._workspace: tuple[mx.array, int] | None = None  # of cuBLAS, with its address
        #: Whether MLX has launched steps since the last one of these.
        self.follow_mlx = True
        self._steps = 0  # that can be graphs, since the last one that cannot
        self._usual_steps: float = _STEPS_AT_FIRST
        self._ahead: ReplayedTokens | None = None  # launched before it is scheduled
        #: The number of steps launched ahead, and of those that were dropped.
        self.num_ahead = self.num_missed = 0

    def end_run(self) -> None:
        """Count a step that cannot be a graph."""
        if self._steps:
            self._usual_steps += _NEWEST * (self._steps - self._usual_steps)
        self._steps = 0

    def _has_room(self, num_rows: int) -> bool:
        """Return whether a step of so many rows can be recorded now."""
        if num_rows <= self._planned_rows:
            return True
        free = device.total_memory() - device.used_memory() + mx.get_cache_memory()
        return num_rows * self._row_bytes + _SPARE_BYTES <= free

    def _pays(self) -> bool:
        """Count a step that can be a graph; return whether it should be one."""
        self._steps += 1
        return max(self._steps, self._usual_steps) >= _FEWEST_STEPS

    def takes(self, batch: StepBatch) -> bool:
        """Return whether a step may be a graph, as far as its rows say."""
        most = _MOST_EMBEDDED_ROWS if batch.media_rows else MOST_RECORDED_ROWS
        return not (
            self.gave_up or batch.prompt_logprob_rows
            or not 0 < len(batch.sample_rows) <= _MOST_TOKENS or not self._compiled.takes(batch)
            or self._compiled.num_rows(batch)[1] > most
            or (batch.adapter_slots and not self._fuses_adapters())
        )  # fmt: skip

    def takes_draft(self, batch: StepBatch) -> bool:
        """Return whether the graph of a step that `takes` accepts may have a draft."""
        return not (batch.adapter_slots or self._runner.adapted.states)

    def _fuses_adapters(self) -> bool:
        """Return whether kernels add all that adapters change."""
        matrices = self._runner.adapter_rows.matrices
        return matrices is None or (matrices.fuses and matrices.changes_only_fused)

    def step(
        self,
        batch: StepBatch,
        previous: Sampled | ReplayedTokens | None,
        settings: NDArray[np.int32],
        draft: DraftBehind | None = None,
        embed: Callable[[], mx.array] | None = None,
    ) -> ReplayedTokens | None:
        """Return a step that `takes` accepts, to be launched; None if MLX has to run it.

        `settings` are those of `Sampler.settings`, and `previous` the tokens of the step in flight.
        If steps run by MLX, this waits for them. With a `draft`, hidden states are recorded. For
        rows of pictures, `embed` returns the embeddings of all rows, [rows, width].
        """
        adapted = self._runner.adapted
        if draft is not None and draft.num_found > _MOST_DRAFTED:
            self.end_run()
            return None
        if draft is not None and draft.generation != self._generation:
            self.forget()  # graphs have the old memory
            self._generation = draft.generation
        self.drop_adapted()
        if batch.adapter_slots and not self._adapters.count():
            self.end_run()
            return None
        adapted.begin(batch, by_segments=adapted.by_segments)
        packed = self._compiled.pack(batch, list(batch.sample_rows))
        if adapted.rows.generation != self._states:
            self.forget()  # graphs have the arrays of states before
            self._states = adapted.rows.generation
        key = None if draft is None else draft.key
        shape = _Shape(packed.layout, settings.size > 0, key, embed is not None)
        graph = self._graphs.get(shape)
        if graph is None:
            self._seen[shape] += 1
            is_due = self._seen[shape] == (_FREQUENT_PROMPTS if batch.chunks else _FREQUENT)
            if self._has_idle_time and draft is None:
                if is_due and self._may_record(shape):
                    self._noted[shape] = _example(batch, packed, settings, embed)
                is_due = self._seen[shape] == _OVERDUE
                if is_due:
                    self._noted.pop(shape, None)
            if not (is_due and self._may_record(shape)):
                self.end_run()
                return None
        if not self._pays() and graph is not None:
            return None
        embeddings = None
        if embed is not None:
            self.drop_ahead()  # it has no pictures
            embeddings = self._embedded(packed, embed())
        if self.follow_mlx:
            mx.synchronize()
            self.follow_mlx = False
        assert settings.size in (0, 6 * shape.num_sampled), "the layout has other sampled rows"
        columns = [*packed.columns, settings.ravel()]
        if draft is not None:
            columns.append(draft.numbers)
        try:
            place, count = self._write(batch, packed, columns, previous)
        except DriverError as error:
            self._give_up(error)
            return None
        is_new = graph is None
        if graph is None:
            self.drop_ahead()
            graph = self._graphs[shape] = self._record(
                shape, place, count, draft, embeddings, packed.of_adapters
            )
            if graph is None:
                return None
        adapted.finish(batch)
        found = ReplayedTokens(
            self, shape, graph, draft, place, count, embeddings, is_launched=is_new
        )
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return found
        if ahead.graph is graph and np.array_equal(ahead.numbers, found.numbers):
            return ahead
        self.num_missed += 1  # `found` runs behind it
        return found

    def _may_record(self, shape: _Shape) -> bool:
        """Return whether a shape that came often enough can be recorded now."""
        return not (
            shape in self._graphs
            or len(self._graphs) + len(self._noted) >= _MOST_GRAPHS
            or (shape.layout.tiles and self._refused_prompts >= _MOST_REFUSED)
            or (shape.layout.adapted and self._adapters.num_refused >= _MOST_REFUSED)
        ) and self._has_room(shape.num_rows)

    def use_idle_time(self) -> bool:
        """Record one of the shapes that wait for idle time; return whether others still wait.

        No sequence may be unfinished, and no step in flight. Shapes wait from the first call on.
        """
        self._has_idle_time = True
        self.drop_adapted()
        if self._runner.adapted.rows.generation != self._states:
            self.forget()  # the examples have rows of the arrays of states before
        if self.gave_up or not self._noted:
            return False
        shape = max(self._noted, key=lambda shape: self._seen[shape])
        example = self._noted.pop(shape)
        if self._may_record(shape):
            try:
                self._record_example(shape, example)
            except Exception as error:  # noqa: BLE001 - as in `_record`
                self._give_up(error)
        return bool(self._noted) and not self.gave_up

    def _record_example(self, shape: _Shape, example: _Example) -> None:
        self.drop_ahead()
        mx.synchronize()
        self.follow_mlx = False
        count = len(example.numbers)
        self._memory_of(count)
        place = self._next_place()
        place.numbers[:count] = example.numbers
        place.numbers[count - _NUM_HALVES : count] = place.addresses.ravel()
        embeddings = None
        if example.embedded is not None:
            width, dtype = example.embedded
            rows = mx.random.normal((shape.num_rows, width), dtype, key=mx.random.key(0))
            embeddings = _placed(rows)
        of_adapters = example.of_adapters
        self._graphs[shape] = self._record(shape, place, count, None, embeddings, of_adapters)

    def expected(
        self,
        last: ReplayedTokens,
        sequences: Sequence[Continued],
        settings_of: Callable[[int], NDArray[np.int32] | None],
    ) -> NextStep | None:
        """Return the step expected after `last`, which has a draft, for `launch_ahead`.

        `sequences` are all sequences of `last`, and `settings_of` returns those of
        `Sampler.settings` for so many rows. None if the step is not a graph yet, or cannot be one.
        """
        of_last, draft = last.shape.layout, last.draft
        if (
            self.gave_up or self.follow_mlx or self._graphs.get(last.shape) is not last.graph
            or draft is None
            or of_last.groups != 1 or of_last.segments or of_last.axes != 1 or of_last.adapted
        ):  # fmt: skip
            return None
        compiled = self._compiled
        layout, num_columns = next_layout(
            sequences, compiled.buckets, compiled.block_size, proposes=compiled.proposes
        )
        settings = settings_of(layout.rows)
        draft = draft.after(sequences, layout.rows)
        if settings is None or draft is None or draft.generation != self._generation:
            return None
        shape = _Shape(layout, settings.size > 0, draft.key)
        graph = self._graphs.get(shape)
        if graph is None:
            return None
        parts = [settings.ravel(), draft.numbers]
        length = num_columns + sum(map(len, parts))
        numbers = np.zeros(length + 2 * layout.rows + _NUM_HALVES, np.int32)
        write_rows(numbers[:num_columns], layout, compiled.block_size, sequences)
        np.concatenate(parts, out=numbers[num_columns:length])
        of_index = numbers[length + layout.rows : -_NUM_HALVES]
        of_index[:] = np.arange(layout.rows) + (_MOST_TOKENS + length)
        return NextStep(shape, graph, draft, numbers)

    def launch_ahead(self, step: NextStep, token_ids: Sequence[list[int]]) -> None:
        """Launch a step of `expected`, before the scheduler schedules it.

        The host has read the tokens of the step before. `token_ids` are those in the rows of each
        sequence. The method `step` returns this step if the scheduled one has the same numbers.
        Otherwise, call `drop_ahead` before MLX runs anything. A step that is dropped has written
        keys and values behind the tokens of its sequences, where nothing reads them.
        """
        numbers = step.numbers
        if self.gave_up or self._graphs.get(step.shape) is not step.graph:
            return
        _, of_draws, of_draft = _ends(step.shape, len(numbers), step.draft)
        step.draft.propose(numbers[of_draws:of_draft], token_ids)
        ids = [token_id for of_sequence in token_ids for token_id in of_sequence]
        numbers[of_draft : of_draft + len(ids)] = ids
        place = self._next_place()
        numbers[-_NUM_HALVES:] = place.addresses.ravel()
        place.numbers[: len(numbers)] = numbers
        ahead = ReplayedTokens(self, step.shape, step.graph, step.draft, place, len(numbers))
        try:
            ahead.launch()
        except DriverError:
            return  # MLX runs all steps from now on
        ahead.is_launched = True
        self._ahead = ahead
        self.num_ahead += 1

    def drop_ahead(self) -> None:
        """Wait for the step that was launched ahead, if there is one. Raises `DriverError`."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self.num_missed += 1
            self.wait(ahead.place)

    def launch(self, step: ReplayedTokens) -> None:
        """Launch a step behind the one before. Raises `DriverError`."""
        try:
            self._send(step.place, step.num_numbers)
            if step.embeddings is not None:
                self._copy(step.embeddings, step.graph.embedded)
            self._run(step.graph, step.place)
        except DriverError as error:
            self._give_up(error)
            raise

    def wait(self, place: _Place) -> None:
        """Wait for the step of a place. Raises `DriverError`."""
        try:
            self.driver.wait(place.event)
        except DriverError as error:
            self._give_up(error)
            raise

    def _run(self, graph: _Graph, place: _Place) -> None:
        self.driver.run_graph(graph.handle, self._stream)
        self.driver.record(place.event, self._stream)

    def _give_up(self, why: object) -> None:
        logger.warning("MLX launches all steps from now on: %s", why)
        self.gave_up = True

    def forget(self) -> None:
        """Wait for all steps, and drop all graphs and examples: the pools or states may move."""
        self._noted.clear()
        self._drop_graphs()

    def _drop_graphs(self) -> None:
        self.num_missed += self._ahead is not None
        self._ahead = None
        graphs = [graph for graph in self._graphs.values() if graph is not None]
        self._graphs = {shape: None for shape, graph in self._graphs.items() if graph is None}
        self._seen.clear()
        self._free(graphs)

    def drop_adapted(self) -> None:
        """Drop the graphs that read adapters' matrices, if these have changed."""
        matrices = self._runner.adapter_rows.matrices
        if not self._adapters.change(0 if matrices is None else matrices.version):
            return
        for shape in [shape for shape in (*self._seen, *self._noted) if shape.layout.adapted]:
            self._seen.pop(shape, None)
            self._noted.pop(shape, None)
        stale = [shape for shape in self._graphs if shape.layout.adapted]
        self._free([graph for shape in stale if (graph := self._graphs.pop(shape)) is not None])

    def _free(self, graphs: list[_Graph]) -> None:
        """Wait for all steps, and free graphs."""
        if not graphs:
            return
        try:
            self.driver.synchronise(self._stream)
            for graph in graphs:
                self.driver.free_graph(graph.handle)
        except DriverError as error:
            self._give_up(error)

    def close(self) -> None:
        """Free everything; nothing can run afterwards."""
        self.forget()
        try:
            for memory in self._memories:
                memory.free(self.driver)
            self.driver.free_stream(self._stream)
        except DriverError as error:
            logger.warning("CUDA's memory is not freed: %s", error)
        self._memories, self._arena, self._workspace, self._embeddings = [], None, None, None

    # Numbers

    def _write(
        self,
        batch: StepBatch,
        packed: PackedStep,
        columns: list[NDArray[np.int32]],
        previous: Sampled | ReplayedTokens | None,
    ) -> tuple[_Place, int]:
        """Write the numbers of a step to the host's memory; return the place, and how many.

        They are the columns, with the settings of draws and a draft's numbers behind them, the
        known ids of the rows, the index in the memory of each row's id, and the place's addresses.
        """
        length, rows = sum(map(len, columns)), packed.layout.rows
        count = length + 2 * rows + _NUM_HALVES
        memory = self._memory_of(count)
        ids = np.array(batch.token_ids, np.int32)
        if packed.order is not None:
            ids = ids[packed.order]
        elif packed.padding:
            ids = np.pad(ids, (0, packed.padding))
        index = np.arange(rows, dtype=np.int32) + (_MOST_TOKENS + length)
        pairs = np.array(batch.from_previous, np.int32).reshape(-1, 2)
        places = pairs[:, 0] if packed.places is None else packed.places[pairs[:, 0]]
        if isinstance(previous, ReplayedTokens) and previous.place in memory.places:
            index[places] = pairs[:, 1]
        elif previous is not None:
            tokens = np.maximum(np.array(previous.read(), np.int32), 0)
            ids[places] = tokens[pairs[:, 1]]
        place = self._next_place()
        parts = [*columns, ids, index, place.addresses.ravel()]
        np.concatenate(parts, out=place.numbers[:count])
        return place, count

    def _next_place(self) -> _Place:
        self._next = (self._next + 1) % _PLACES
        return self._memories[-1].places[self._next]

    def _memory_of(self, count: int) -> _Memory:
        """Return the memory, which has room for `count` numbers."""
        if not self._memories or self._memories[-1].size < count:
            self._drop_graphs()  # examples have no addresses
            size = max(_FEWEST_NUMBERS, 1 << (count - 1).bit_length())
            self._memories.append(_Memory(self.driver, size))
        return self._memories[-1]

    def _send(self, place: _Place, count: int) -> None:
        to = self._memories[-1].address + 4 * _MOST_TOKENS
        self.driver.copy(to, place.start, 4 * count, self._stream)

    def _embedded(self, packed: PackedStep, embeddings: mx.array) -> _Embeddings:
        """Compute the embeddings of a batch's rows, in the order of the graph."""
        order = None if packed.order is None else mx.array(packed.order)
        return _placed(mx.contiguous(packed.in_order(embeddings, order)))

    def _copy(self, embeddings: _Embeddings, to: int) -> None:
        """Copy embeddings to where a graph reads them, in the order of the stream."""
        self.driver.copy_within(to, embeddings.address, embeddings.rows.nbytes, self._stream)

    def _room_for(self, embeddings: mx.array) -> mx.array:
        """Return memory of the same shape, from which a graph can read embeddings."""
        rows, width = embeddings.shape
        if self._embeddings is None or len(self._embeddings) < rows:
            # Earlier graphs keep the smaller one.
            size = 1 << (rows - 1).bit_length()
            self._embeddings = mx.zeros((size, width), embeddings.dtype)
            mx.eval(self._embeddings)
        return self._embeddings[:rows]

    # Recording

    def _record(
        self,
        shape: _Shape,
        place: _Place,
        count: int,
        draft: DraftBehind | None,
        embeddings: _Embeddings | None,
        of_adapters: list[mx.array],
    ) -> _Graph | None:
        """Record the step whose numbers are in `place`, and run its graph; return it.

        The step runs three times, and writes the same keys, values and states each time. Returns
        None, and says why in the log, if it cannot be recorded.
        """
        try:
            self._send(place, count)
            given, embedded = None, 0
            if embeddings is not None:
                given = self._room_for(embeddings.rows)
                (embedded,) = addresses([given])
                self._copy(embeddings, embedded)
            self.driver.synchronise(self._stream)
            first = self._traced(shape, count, draft, given, of_adapters)
            first.release()
            second = self._traced(shape, count, draft, given, of_adapters)
            num_found = 0 if draft is None else draft.num_found
            written = place.tokens[: shape.num_sampled], place.drafted[:num_found]
            expected = np.concatenate(written)
            for numbers in written:
                numbers[:] = _UNWRITTEN
            recording = compare(first, second, addresses)
            graph = self._made(recording, embedded)
            self._run(graph, place)
            self.driver.wait(place.event)
        except (NotRecordedError, CublasError) as error:
            logger.info("steps of %s rows are not recorded: %s", shape.num_rows, error)
            self._refuse(shape, draft)
            return None
        except Exception as error:  # noqa: BLE001 - MLX, the compiler and the driver have many
            self._give_up(error)
            return None
        if (np.concatenate(written) != expected).any():
            problem = f"the graph of {shape.num_rows} rows gives other tokens"
            self.driver.free_graph(graph.handle)
            if any(note.body == "matmul" for note in recording.notes):
                # cuBLAS may have added in another order than for MLX, so that tokens differ.
                logger.warning("MLX launches such steps: %s", problem)
                self._refuse(shape, draft)
            else:
                self._give_up(problem)
            return None
        if shape.layout.adapted:
            self._adapters.recorded()
        else:
            self._refused = -1
            if shape.layout.tiles:
                self._refused_prompts = 0
        if shape.num_rows > self._planned_rows:
            mx.clear_cache()  # others may need it
        return graph

    def _refuse(self, shape: _Shape, draft: DraftBehind | None) -> None:
        """Count a shape that cannot be recorded."""
        if shape.layout.adapted:
            self._adapters.num_refused += 1
        elif shape.layout.tiles:
            self._refused_prompts += 1
        elif draft is None and shape.num_rows <= _FEW_ROWS and 0 <= self._refused < _MOST_REFUSED:
            self._refused += 1
            if self._refused == _MOST_REFUSED:
                self._give_up("no shape of few rows can be recorded")

    def _traced(
        self,
        shape: _Shape,
        count: int,
        draft: DraftBehind | None,
        embeddings: mx.array | None,
        of_adapters: list[mx.array],
    ) -> Trace:
        """Run a step by single kernels; it returns the next ids."""
        memory, rows = self._memories[-1].array, shape.num_rows
        numbers = memory[_MOST_TOKENS : _MOST_TOKENS + count]
        mx.eval(numbers)
        columns, of_draws, of_draft = _ends(shape, count, draft)
        index = numbers[of_draft + rows : count - _NUM_HALVES]
        middle = count - _NUM_HALVES // 2  # the address of the tokens is before that of the draft
        with recorded(self._weight_bytes) as recorder:
            token_ids = take(memory, index)
            logits = self._compiled.trace(
                shape.layout, token_ids, numbers[:columns], embeddings, of_adapters
            )
            verdict = sampler.verdict if shape.draws else sampler.greedy_verdict
            if (problem := verdict(logits.dtype, logits.shape[-1])) is not None:
                raise NotRecordedError(problem)
            if shape.draws:
                tokens, next_ids = sampler.by_kernel(logits, numbers[columns:of_draws])
            else:
                tokens, next_ids = sampler.greedy(logits)
            deliver(tokens, numbers[count - _NUM_HALVES : middle])
            if draft is not None:
                hidden = self._runner.adapted.hidden
                assert hidden is not None, "a model with a head records hidden states"
                found = draft.trace(next_ids, numbers[of_draws:of_draft], hidden)
                if found is not None:
                    deliver(found, numbers[middle:count])
        return Trace(recorder.notes, [next_ids], addresses)

    def _made(self, recording: Recording, embedded: int) -> _Graph:
        """Make a graph of a recording; the next ids go to the beginning of the memory.

        It reads embeddings at `embedded`.
        """
        memory = self._memories[-1]
        offsets, size = recording.layout()
        if self._arena is None or self._arena.nbytes < size:
            # Earlier graphs keep the smaller one: the sum of all is at most twice the largest.
            self._arena = mx.zeros((1 << (size - 1).bit_length(),), mx.uint8)
            mx.eval(self._arena)
        (start,) = addresses([self._arena])
        fixed = {(o.note, o.number): memory.address for o in recording.outputs}

        def address_of(output: Output) -> int:
            known = fixed.get((output.note, output.number))
            if known is None:
                known = start + offsets[output.note][output.number]
            return known + output.offset

        calls: list[KernelCall | Callable[[int], None]] = []
        kept = {id(array): array for array in (memory.array, self._arena)}
        for index, note in enumerate(recording.notes):
            reads = []
            for read, array in zip(recording.reads[index], note.inputs, strict=True):
                reads.append(read if isinstance(read, int) else address_of(read))
                if isinstance(read, int) and not isinstance(array, Transient):
                    kept[id(array)] = array
            writes = [address_of(Output(index, number)) for number in range(len(note.outputs))]
            calls.append(self._call(note, reads, writes))
        capability = int(mx.device_info().get("compute_capability_major", 0))
        if capability >= 9:  # kernels of others cannot wait
            bodies = [
                note.body if may_read_early(note, reads) else ""
                for note, reads in zip(recording.notes, recording.reads, strict=True)
            ]
            calls = launched_early(bodies, calls)
        handle = self.driver.make_graph(calls, self._stream)
        return _Graph(handle, list(kept.values()), embedded)

    def _call(
        self, note: Note, reads: list[int], writes: list[int]
    ) -> KernelCall | Callable[[int], None]:
        """Return a call of `Driver.make_graph`."""
        if note.body == "matmul":
            return self._matmul(note, reads, writes)
        if note.body == "join":
            return partial(self._join, [array.nbytes for array in note.inputs], reads, writes[0])
        return self._kernel_call(note, reads, writes)

    def _kernel_call(self, note: Note, reads: list[int], writes: list[int]) -> KernelCall:
        inputs = [array for array in note.inputs if not isinstance(array, Transient)]
        assert len(inputs) == len(note.inputs), "only matmuls read weights that are not kept"
        kernel = GeneratedKernel(
            note.source, inputs, note.template, [array.dtype for array in note.outputs]
        )
        if kernel.text not in self._codes:
            self._codes[kernel.text] = compiled_kernel(kernel)
        code = self._codes[kernel.text]
        arguments = []
        for address, array, takes_shape in zip(reads, inputs, kernel.takes_shape, strict=True):
            arguments.append(pointer_bytes(address))
            if takes_shape:
                arguments.append(shape_bytes(array.shape))
        arguments += map(pointer_bytes, writes)
        return KernelCall(
            self.driver.function(code.code, code.symbol, note.shared_bytes),
            note.threadgroups,
            note.threads,
            note.shared_bytes,
            tuple(arguments),
        )

    def _matmul(self, note: Note, reads: list[int], writes: list[int]) -> Callable[[int], None]:
        """Return a matmul by the library that MLX uses. Raises `CublasError`."""
        (x, weight, *more), (out,) = reads, writes
        (rows, inputs), (outputs, _) = (array.shape for array in note.inputs[:2])
        of_type, bias = _TYPES[note.outputs[0].dtype], more[0] if more else None
        shape = MatmulShape(rows, outputs, inputs, of_type, bias is not None)
        cublas = find_cublas()
        cublas.prepare(shape)
        if self._workspace is None:
            array = mx.zeros((WORKSPACE_BYTES,), mx.uint8)
            mx.eval(array)
            self._workspace = array, addresses([array])[0]
        _, workspace = self._workspace
        return partial(cublas.multiply, shape, x, weight, bias, out, workspace)

    def _join(self, sizes: list[int], reads: list[int], to: int, stream: int) -> None:
        for size, address in zip(sizes, reads, strict=True):
            self.driver.copy_within(to, address, size, stream)
            to += size


def _placed(rows: mx.array) -> _Embeddings:
    """Evaluate embeddings and find where they are."""
    mx.eval(rows)
    return _Embeddings(rows, *addresses([rows]))


def _example(
    batch: StepBatch,
    packed: PackedStep,
    settings: NDArray[np.int32],
    embed: Callable[[], mx.array] | None,
) -> _Example:
    """Return an example of a step, with any tokens and no addresses, as `Replays._write` has it."""
    columns, rows = np.concatenate(packed.columns), packed.layout.rows
    packed.layout.clear_writes(columns)
    length = len(columns) + settings.size
    ids = np.resize(np.array(batch.token_ids, np.int32), rows)
    index = np.arange(rows, dtype=np.int32) + (_MOST_TOKENS + length)
    parts = [columns, settings.ravel(), ids, index, np.zeros(_NUM_HALVES, np.int32)]
    embeddings = None if embed is None else embed()
    embedded = None if embeddings is None else (embeddings.shape[1], embeddings.dtype)
    return _Example(np.concatenate(parts), packed.of_adapters, embedded)


def _ends(shape: _Shape, count: int, draft: DraftBehind | None) -> tuple[int, int, int]:
    """Return where the columns, the settings of draws and a draft's numbers end, of `count`."""
    of_draft = count - 2 * shape.num_rows - _NUM_HALVES
    of_draws = of_draft - (0 if draft is None else len(draft.numbers))
    return of_draws - (6 * shape.num_sampled if shape.draws else 0), of_draws, of_draft


def make_replays(
    runner: object, planned_rows: int, row_bytes: int, weight_bytes: int | None = None
) -> Replays | None:
    """Return the `Replays` of a runner whose steps may run as graphs; None for others."""
    if not (
        launch.backend() == "cuda"
        and isinstance(runner, PagedRunner)
        and runner.compiled is not None
        and runner.writes_in_place
        and (runner.adapted.by_segments or not runner.adapted.states)
    ):
        return None
    try:
        return Replays(runner, find_driver(), planned_rows, row_bytes, weight_bytes)
    except EngineError as error:
        logger.info("MLX launches all steps: %s", error)
        return None
