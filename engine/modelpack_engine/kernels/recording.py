"""Recordings: the kernels of a step, and which arrays each of them reads and writes.

MLX takes the host 7 to 14 µs for each kernel of a step, since it visits every operation, allocates
its outputs and adds it to a CUDA graph. A step whose operations are all our kernels, on arrays that
stay where they are, is recorded instead, and the driver runs it again as one graph.

While a `Recorder` is active, kernels run one by one. Two recordings of a step show what is
constant: what no kernel of the step writes is an input, and must have the same address in both. If
MLX computes an array in between, its addresses differ, and the step is refused.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import mlx.core as mx

from modelpack_engine.errors import EngineError
from modelpack_engine.kernels.cuda import Template
from modelpack_engine.kernels.sources import Body, KernelSource

#: Inputs that only order kernels: their contents are not read.
_ORDER = frozenset({"previous", "written"})
#: Kernels that write into their inputs' memory, or the host's, so that no output says so. Those of
#: recurrent layers write states there, but a step also needs their outputs.
_WRITE_ELSEWHERE: frozenset[str] = frozenset(
    {"write", "quantise", "rotate", "rotate_decode", "deliver"}
)
_ALIGNMENT = 256
#: The address of an array that is not kept in memory.
_NOWHERE = 0
#: Operations of MLX of which there is no kernel of ours: x [rows, in] times weight [out, in], the
#: same plus a bias [out], and arrays after each other.
MATMUL = KernelSource("matmul", "", "", ("x", "weight"), ("out",))
MATMUL_AND_BIAS = KernelSource("matmul", "", "", ("x", "weight", "bias"), ("out",))
JOIN = KernelSource("join", "", "", ("first", "second"), ("out",))


class AddressesOf(Protocol):
    """Tells where evaluated arrays are."""

    def __call__(self, arrays: Sequence[mx.array], *, starts: bool = False) -> list[int]:
        """Return the address at which a kernel reads each array; 0 for empty ones.

        With `starts`, it is where the array itself starts, of which MLX may give a kernel a copy.
        """


@dataclass(frozen=True, slots=True)
class Transient:
    """An array that one kernel writes and the next one reads; it is not kept in memory."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    nbytes: int


class NotRecordedError(EngineError):
    """A step has operations other than our kernels."""


@dataclass(frozen=True, slots=True)
class Note:
    """A kernel, or an operation of MLX, that ran, with its arrays; `grid` counts threads.

    `flat` are the inputs as rows of numbers: the same memory, or a copy of what is not contiguous,
    which MLX copies as well. A strided row or column of numbers stays strided: its address is that
    of a copy which MLX makes for a moment.
    """

    body: Body | Literal["matmul", "join"]
    source: KernelSource
    template: Template
    inputs: Sequence[mx.array | Transient]
    flat: Sequence[mx.array | Transient]
    outputs: Sequence[mx.array | Transient]
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
    """Runs kernels one by one, and keeps what they read and write in memory.

    `weight_bytes` are the most bytes of a weight that is computed for one matmul.
    """

    notes: list[Note] = field(default_factory=list)
    weight_bytes: int | None = None

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

    def multiply(self, x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
        """Return x [rows, in] times weight [out, in], transposed, plus a bias [out], by MLX.

        Raises `NotRecordedError` for types and shapes that cuBLAS is not called for.
        """
        given = [x, weight] if bias is None else [x, weight, bias]
        types = {array.dtype for array in given}
        if x.ndim != 2 or len(types) > 1 or x.dtype not in (mx.float16, mx.bfloat16):
            raise NotRecordedError(f"MLX multiplies {x.shape} by {weight.shape} in {x.dtype}")
        source = MATMUL if bias is None else MATMUL_AND_BIAS
        return self._by_mlx(source, "matmul", given, lambda: _product(x, weight.T, bias))

    def multiply_dequantised(
        self, x: mx.array, compute: Callable[[], mx.array], bias: mx.array | None = None
    ) -> mx.array:
        """Return `multiply` by the weight that one kernel computes, which is not kept in memory.

        The weights of all layers together would not fit.
        """
        with recorded() as computed:
            weight = compute()
        if self.weight_bytes is not None and weight.nbytes > self.weight_bytes:
            raise NotRecordedError(f"a weight of {weight.nbytes} bytes is computed in full")
        if len(computed.notes) != 1 or computed.notes[0].outputs[0] is not weight:
            raise NotRecordedError(f"MLX computes weights {weight.shape}")
        out = self.multiply(x, weight, bias)
        transient = Transient(weight.shape, weight.dtype, weight.nbytes)
        product = self.notes.pop()
        inputs, flat = [*product.inputs], [*product.flat]
        inputs[1] = flat[1] = transient
        self.notes.append(replace(computed.notes[0], outputs=[transient]))
        self.notes.append(replace(product, inputs=inputs, flat=flat))
        return out

    def join(self, first: mx.array, second: mx.array) -> mx.array:
        """Return the rows of two arrays, by MLX."""
        given = [first, second]
        return self._by_mlx(JOIN, "join", given, lambda: mx.concatenate(given))

    def _by_mlx(
        self,
        source: KernelSource,
        body: Literal["matmul", "join"],
        given: list[mx.array],
        operation: Callable[[], mx.array],
    ) -> mx.array:
        mx.eval(given)
        flat, out = [array.reshape(-1) for array in given], operation()
        mx.eval(flat, out)
        self.notes.append(Note(body, source, [], given, flat, [out], (1, 1, 1), (1, 1, 1), 0))
        return out


_active: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def active() -> Recorder | None:
    """Return the recorder of this thread's kernels, if there is one."""
    return _active.get()


def join(first: mx.array, second: mx.array) -> mx.array:
    """Return the rows of two arrays."""
    recorder = active()
    return mx.concatenate([first, second]) if recorder is None else recorder.join(first, second)


def multiply(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    transposed: mx.array | None = None,
) -> mx.array:
    """Return x [rows, in] times weight [out, in], which may be there `transposed`, plus a bias."""
    recorder = active()
    if recorder is not None:
        return recorder.multiply(x, weight, bias)
    return _product(x, weight.T if transposed is None else transposed, bias)


def multiply_dequantised(
    x: mx.array, compute: Callable[[], mx.array], bias: mx.array | None = None
) -> mx.array:
    """Return x [rows, in] times a weight [out, in], which one kernel computes, plus a bias."""
    recorder = active()
    if recorder is not None:
        return recorder.multiply_dequantised(x, compute, bias)
    return _product(x, compute().T, bias)


def _product(x: mx.array, transposed: mx.array, bias: mx.array | None) -> mx.array:
    return x @ transposed if bias is None else mx.addmm(bias, x, transposed)


def refuse(what: str) -> None:
    """Raise `NotRecordedError` if this thread's kernels are recorded: MLX computes `what`.

    Such a step would be refused after it ran twice, with all that its kernels write in memory.
    """
    if active() is not None:
        raise NotRecordedError(f"MLX {what}")


@contextmanager
def recorded(weight_bytes: int | None = None) -> Iterator[Recorder]:
    """Record this thread's kernels within the block, and no larger weights that are computed."""
    recorder = Recorder(weight_bytes=weight_bytes)
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


class Trace:
    """The kernels of a step that ran once, and the addresses of what they read and write."""

    def __init__(
        self, notes: list[Note], returned: Sequence[mx.array], addresses: AddressesOf
    ) -> None:
        self.notes = notes
        self.names = [note.source.name for note in notes]
        arrays = [array for note in notes for array in (*note.flat, *note.outputs)]
        kept = [array for array in arrays if not isinstance(array, Transient)]
        found = iter(addresses([*kept, *returned]))
        self.inputs: list[list[int]] = []
        written: list[tuple[int, int, Output]] = []
        for index, note in enumerate(notes):
            self.inputs.append(
                [_NOWHERE if isinstance(array, Transient) else next(found) for array in note.flat]
            )
            for number, array in enumerate(note.outputs):
                if isinstance(array, Transient):
                    continue
                start = next(found)
                written.append((start, start + array.nbytes, Output(index, number)))
        self.returned = list(found)
        self._written = sorted(written, key=lambda piece: piece[0])
        self._starts = [start for start, _, _ in self._written]
        self._kept: list[mx.array] = []

    def release(self) -> None:
        """Free what the kernels wrote, so that the step can run again in as much memory.

        What no kernel wrote is kept: another run cannot have another array at the same address.
        """
        self._kept = [
            array
            for index, note in enumerate(self.notes)
            for array, address in zip(note.flat, self.inputs[index], strict=True)
            if not isinstance(array, Transient) and self.output(address, index) is None
        ]
        self.notes = []

    def strided(self, addresses: AddressesOf) -> set[tuple[int, int]]:
        """Return the inputs that MLX copies for a kernel, each with the number of its kernel."""
        flat = {
            (index, number): array
            for index, note in enumerate(self.notes)
            for number, array in enumerate(note.flat)
            if not isinstance(array, Transient)
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


def compare(first: Trace, second: Trace, addresses: AddressesOf) -> Recording:
    """Return the recording of a step that ran twice: its kernels, and the arrays that it returns.

    The first trace may be released. Raises `NotRecordedError` if the step has other operations.
    """
    if first.names != second.names:
        raise NotRecordedError("the step runs other kernels each time")
    both, notes, strided = (first, second), second.notes, second.strided(addresses)
    reads: list[list[int | Output]] = []
    for index, note in enumerate(notes):
        found: list[int | Output] = []
        for number, name in enumerate(note.source.inputs):
            at = [trace.inputs[index][number] for trace in both]
            if name in _ORDER:
                found.append(at[1])
                continue
            if isinstance(note.inputs[number], Transient):
                found.append(Output(index - 1, 0))
                continue
            if (index, number) in strided:
                raise NotRecordedError(f"{note.body} reads a copy of {name}")
            one, other = (trace.output(there, index) for trace, there in zip(both, at, strict=True))
            if one != other or (one is None and at[0] != at[1]):
                raise NotRecordedError(f"{note.body} reads {name}, which no kernel writes")
            found.append(at[1] if one is None else one)
        reads.append(found)
    returned = []
    for pair in zip(first.returned, second.returned, strict=True):
        one, other = (
            trace.output(there, len(notes)) for trace, there in zip(both, pair, strict=True)
        )
        if one is None or one != other:
            raise NotRecordedError("it returns what no kernel writes")
        returned.append(one)
    return _needed(notes, reads, returned)


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
