"""Recordings: the kernels of a step, and which arrays each of them reads and writes.

MLX takes the host 7 to 14 µs for each kernel of a step, since it visits every operation, allocates
its outputs and adds it to a CUDA graph. A step whose operations are all our kernels, on arrays that
stay where they are, is recorded instead, and the driver runs it again as one graph.

While a `Recorder` is active, kernels run one by one. Two recordings of a step show what is
constant: arrays that have the same address in both are inputs, and all others must be what an
earlier kernel of the step writes. If MLX computes an array in between, its addresses differ, and
the step is refused.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import mlx.core as mx

from modelpack_engine.errors import EngineError
from modelpack_engine.kernels.cuda import Template
from modelpack_engine.kernels.sources import Body, KernelSource

#: Inputs that only order kernels: their contents are not read.
_ORDER = frozenset({"previous", "written"})
#: Kernels that write into their inputs' memory, or the host's, so that no output says so.
_WRITE_ELSEWHERE: frozenset[str] = frozenset({"write", "quantise", "rotate", "deliver"})
_ALIGNMENT = 256
#: A matmul by MLX, of which there is no kernel of ours: x [rows, in] times weight [out, in].
MATMUL = KernelSource("matmul", "", "", ("x", "weight"), ("out",))


class AddressesOf(Protocol):
    """Tells where evaluated arrays are."""

    def __call__(self, arrays: Sequence[mx.array], *, starts: bool = False) -> list[int]:
        """Return the address at which a kernel reads each array; 0 for empty ones.

        With `starts`, it is where the array itself starts, of which MLX may give a kernel a copy.
        """


class NotRecordedError(EngineError):
    """A step has operations other than our kernels."""


@dataclass(frozen=True, slots=True)
class Note:
    """A kernel or a matmul by MLX that ran, with its arrays; `grid` counts threads.

    `flat` are the inputs as rows of numbers: the same memory, or a copy of what is not contiguous,
    which MLX copies as well. A strided row or column of numbers stays strided: its address is that
    of a copy which MLX makes for a moment.
    """

    body: Body | Literal["matmul"]
    source: KernelSource
    template: Template
    inputs: list[mx.array]
    flat: list[mx.array]
    outputs: list[mx.array]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    shared_bytes: int

    @property
    def threadgroups(self) -> tuple[int, int, int]:
        """The numbers of threadgroups."""
        x, y, z = (-(-n // per) for n, per in zip(self.grid, self.threadgroup, strict=True))
        return x, y, z

    @property
    def threads(self) -> tuple[int, int, int]:
        """The threads of a threadgroup."""
        x, y, z = map(min, self.grid, self.threadgroup)
        return x, y, z


@dataclass(frozen=True, slots=True)
class Output:
    """An output of a kernel of the recording, from a byte on."""

    note: int
    number: int
    offset: int = 0


@dataclass(slots=True)
class Recorder:
    """Runs kernels one by one, and keeps what they read and write."""

    notes: list[Note] = field(default_factory=list)

    def run(
        self,
        kernel: Callable[..., list[mx.array]],
        body: Body,
        source: KernelSource,
        shared_bytes: int,
        *,
        inputs: Sequence[mx.array],
        template: Template,
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        **more: Any,
    ) -> list[mx.array]:
        """Run `kernel`, which MLX made of `source`; the other arguments are its own."""
        given = list(inputs)
        mx.eval(given)
        flat = [array.reshape(-1) for array in given]
        outputs = kernel(
            inputs=given, template=template, grid=grid, threadgroup=threadgroup, **more
        )
        mx.eval(flat, outputs)
        self.notes.append(
            Note(body, source, template, given, flat, outputs, grid, threadgroup, shared_bytes)
        )
        return outputs

    def multiply(self, x: mx.array, weight: mx.array) -> mx.array:
        """Return x [rows, in] times weight [out, in], transposed, by MLX."""
        given = [x, weight]
        mx.eval(given)
        flat, out = [array.reshape(-1) for array in given], x @ weight.T
        mx.eval(flat, out)
        self.notes.append(Note("matmul", MATMUL, [], given, flat, [out], (1, 1, 1), (1, 1, 1), 0))
        return out


_active: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def active() -> Recorder | None:
    """Return the recorder of this thread's kernels, if there is one."""
    return _active.get()


@contextmanager
def recorded() -> Iterator[Recorder]:
    """Record this thread's kernels within the block."""
    recorder = Recorder()
    with _active_within(recorder):
        yield recorder


def unrecorded() -> AbstractContextManager[None]:
    """Record no kernels within the block, which belong to no step."""
    return _active_within(None)


@contextmanager
def _active_within(recorder: Recorder | None) -> Iterator[None]:
    token = _active.set(recorder)
    try:
        yield
    finally:
        _active.reset(token)


@dataclass(frozen=True, slots=True)
class Recording:
    """The kernels of a step that are needed for what it returns.

    `reads` has for each input of each kernel an address, or the output that it is. `outputs` are
    those that the step returns.
    """

    notes: list[Note]
    reads: list[list[int | Output]]
    outputs: list[Output]

    def layout(self) -> tuple[list[list[int]], int]:
        """Return the offsets of all outputs in one piece of memory, and its size in bytes.

        Outputs share memory if none is read after the other is written.
        """
        last = [[index] * len(note.outputs) for index, note in enumerate(self.notes)]
        for index, arguments in enumerate(self.reads):
            for argument in arguments:
                if isinstance(argument, Output):
                    last[argument.note][argument.number] = index
        for output in self.outputs:
            last[output.note][output.number] = len(self.notes)
        offsets: list[list[int]] = []
        used: list[tuple[int, int, int]] = []  # start, end, and the last kernel that reads it
        size = 0
        for index, note in enumerate(self.notes):
            used = [piece for piece in used if piece[2] >= index]
            own = []
            for number, array in enumerate(note.outputs):
                start = 0
                for first, end, _ in sorted(used):
                    if start + array.nbytes <= first:
                        break
                    start = max(start, -(-end // _ALIGNMENT) * _ALIGNMENT)
                used.append((start, start + array.nbytes, last[index][number]))
                own.append(start)
                size = max(size, start + array.nbytes)
            offsets.append(own)
        return offsets, size


def compare(
    first: tuple[list[Note], Sequence[mx.array]],
    second: tuple[list[Note], Sequence[mx.array]],
    addresses: AddressesOf,
) -> Recording:
    """Return the recording of a step that ran twice: its kernels, and the arrays that it returns.

    Raises `NotRecordedError` if it has other operations.
    """
    both = [_Traced(notes, returned, addresses) for notes, returned in (first, second)]
    notes, others = both[1].notes, both[0].notes
    if [note.source.name for note in notes] != [note.source.name for note in others]:
        raise NotRecordedError("the step runs other kernels each time")
    strided = both[1].strided(addresses)
    reads: list[list[int | Output]] = []
    for index, note in enumerate(notes):
        found: list[int | Output] = []
        for number, name in enumerate(note.source.inputs):
            at = [traced.inputs[index][number] for traced in both]
            if name not in _ORDER and (index, number) in strided:
                raise NotRecordedError(f"{note.body} reads a copy of {name}")
            if name in _ORDER or at[0] == at[1]:
                found.append(at[1])
                continue
            found.append(_same_output(both, at, index, f"{note.body} reads {name}"))
        reads.append(found)
    returned = [
        _same_output(both, [traced.returned[number] for traced in both], len(notes), "it returns")
        for number in range(len(second[1]))
    ]
    return _needed(notes, reads, returned)


class _Traced:
    """The addresses of what a step's kernels read and write, and of what it returns."""

    def __init__(
        self,
        notes: list[Note],
        returned: Sequence[mx.array],
        addresses: AddressesOf,
    ) -> None:
        self.notes = notes
        arrays = [array for note in notes for array in (*note.flat, *note.outputs)]
        found = iter(addresses([*arrays, *returned]))
        self.inputs: list[list[int]] = []
        written: list[tuple[int, int, Output]] = []
        for index, note in enumerate(notes):
            self.inputs.append([next(found) for _ in note.inputs])
            for number, array in enumerate(note.outputs):
                start = next(found)
                written.append((start, start + array.nbytes, Output(index, number)))
        self.returned = list(found)
        self._written = sorted(written, key=lambda piece: piece[0])
        self._starts = [start for start, _, _ in self._written]

    def strided(self, addresses: AddressesOf) -> set[tuple[int, int]]:
        """Return the inputs that MLX copies for a kernel, each with the number of its kernel."""
        flat = {
            (index, number): array
            for index, note in enumerate(self.notes)
            for number, array in enumerate(note.flat)
        }
        starts = addresses(list(flat.values()), starts=True)
        return {
            (index, number)
            for (index, number), start in zip(flat, starts, strict=True)
            if start != self.inputs[index][number]
        }

    def output(self, address: int, before: int) -> Output | None:
        """Return the output that an address is in, of a kernel before number `before`."""
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        start, end, found = self._written[index]
        if address >= end or found.note >= before:
            return None
        return Output(found.note, found.number, address - start)


def _same_output(both: list[_Traced], at: list[int], before: int, what: str) -> Output:
    """Return the output at an address in both recordings."""
    one, other = (traced.output(there, before) for traced, there in zip(both, at, strict=True))
    if one is None or one != other:
        raise NotRecordedError(f"{what} what no kernel writes")
    return one


def _needed(
    notes: list[Note], reads: list[list[int | Output]], returned: list[Output]
) -> Recording:
    """Drop the kernels that nothing needs: MLX would not run them, either."""
    needed = {output.note for output in returned}
    for index in range(len(notes) - 1, -1, -1):
        if index in needed or notes[index].body in _WRITE_ELSEWHERE:
            needed.add(index)
            needed |= {read.note for read in reads[index] if isinstance(read, Output)}
    places = {old: new for new, old in enumerate(sorted(needed))}

    def moved(output: Output) -> Output:
        return Output(places[output.note], output.number, output.offset)

    return Recording(
        [notes[index] for index in places],
        [
            [moved(read) if isinstance(read, Output) else read for read in reads[index]]
            for index in places
        ],
        [moved(output) for output in returned],
    )
