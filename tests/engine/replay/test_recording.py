"""Recordings: which arrays kernels read, which kernels are needed, and where outputs go."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from random import Random
from typing import Any

import mlx.core as mx
import pytest

from modelpack_engine.kernels import recording
from modelpack_engine.kernels.recording import (
    Note,
    NotRecordedError,
    Output,
    Recording,
    Trace,
    compare,
    recorded,
    unrecorded,
)
from modelpack_engine.kernels.sources import Body, KernelSource

ROWS = 8


class Addresses:
    """Gives each array an address of its own; `view` gives a view an address in another array."""

    def __init__(self) -> None:
        self._next = count(1 << 20, 1 << 12)
        self.known: dict[int, int] = {}
        self._kept: list[mx.array] = []
        self.copied: set[int] = set()  # the ids of arrays of which kernels get a copy

    def view(self, array: mx.array, of: mx.array, offset: int = 0) -> mx.array:
        self._kept.append(array)
        self.known[id(array)] = self([of])[0] + offset
        return array

    def __call__(self, arrays: Sequence[mx.array], *, starts: bool = False) -> list[int]:
        for array in arrays:
            if id(array) not in self.known:
                self._kept.append(array)
                self.known[id(array)] = next(self._next)
        return [self.known[id(array)] + (starts and id(array) in self.copied) for array in arrays]


def array(size: int = ROWS) -> mx.array:
    made = mx.zeros((size,), mx.float32)
    mx.eval(made)
    return made


def note(body: Body, inputs: dict[str, mx.array], *outputs: mx.array) -> Note:
    source = KernelSource(f"paged_{body}", "", "", tuple(inputs), tuple("abc"[: len(outputs)]))
    arrays = list(inputs.values())
    return Note(body, source, [], arrays, arrays, list(outputs), (64, 1, 1), (32, 1, 1), 0)


WEIGHT, NUMBERS = array(), array()
Step = tuple[list[Note], list[mx.array]]


def compared(first: Step, second: Step, at: Addresses) -> Recording:
    before = Trace(*first, at)
    before.release()
    return compare(before, Trace(*second, at), at)


def step(at: Addresses, *, between: bool = False) -> Step:
    """A step of four kernels, of which nothing needs the third."""
    first, second, unused, last = array(), array(), array(), array()
    read = at.view(array(4), first, 16)
    notes = [
        note("rows", {"table": NUMBERS}, first),
        note("dots", {"x": array() if between else read, "weight": WEIGHT}, second),
        note("swiglu", {"joint": second}, unused),
        note("greedy", {"logits": second}, last),
    ]
    return notes, [last]


def test_inputs_are_constants_or_outputs() -> None:
    at = Addresses()
    found = compared(step(at), step(at), at)
    assert [each.body for each in found.notes] == ["rows", "dots", "greedy"]
    assert found.reads == [at([NUMBERS]), [Output(0, 0, 16), *at([WEIGHT])], [Output(1, 0)]]
    assert found.outputs == [Output(2, 0)]


def test_an_array_that_mlx_computes_is_refused() -> None:
    at = Addresses()
    with pytest.raises(NotRecordedError, match="dots reads x, which no kernel writes"):
        compared(step(at, between=True), step(at, between=True), at)


def test_both_runs_may_have_the_same_memory() -> None:
    """The first run frees what its kernels wrote."""
    at = Addresses()
    first = step(at)
    second = step(at)
    for one, other in zip(first[0], second[0], strict=True):
        for array_of_one, array_of_other in zip(
            (*one.flat, *one.outputs), (*other.flat, *other.outputs), strict=True
        ):
            at.known[id(array_of_other)] = at([array_of_one])[0]
    assert compared(first, second, at).reads[1:] == [
        [Output(0, 0, 16), *at([WEIGHT])], [Output(1, 0)]
    ]  # fmt: skip


def test_what_no_kernel_writes_stays_in_memory() -> None:
    at = Addresses()
    trace = Trace(*step(at, between=True), at)
    between = trace.notes[1].inputs[0]
    trace.release()
    assert not trace.notes
    assert any(kept is between for kept in trace._kept)
    assert len(trace._kept) == 3  # it, the table and the weight


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_a_copy_of_a_strided_row_is_refused(shape: tuple[int, ...]) -> None:
    """Its memory is free after the kernel, and both times it may be at the same address."""
    strided, at = mx.arange(12).reshape(4, 3)[:, 1].reshape(shape), Addresses()
    at.copied.add(id(strided))
    both = []
    for _ in range(2):
        out = array()
        both.append(([note("rows", {"table": NUMBERS, "index": strided}, out)], [out]))
    with pytest.raises(NotRecordedError, match="rows reads a copy of index"):
        compared(both[0], both[1], at)


def test_an_output_must_be_the_same_each_time() -> None:
    at = Addresses()

    def crossed(which: int) -> Step:
        both = array(), array()
        last = array()
        notes = [
            note("route", {"logits": NUMBERS}, *both),
            note("greedy", {"logits": both[which]}, last),
        ]
        return notes, [last]

    assert compared(crossed(1), crossed(1), at).reads[1] == [Output(0, 1)]
    with pytest.raises(NotRecordedError):
        compared(crossed(0), crossed(1), at)


def test_other_kernels_are_refused() -> None:
    at = Addresses()
    notes, returned = step(at)
    with pytest.raises(NotRecordedError, match="other kernels"):
        compared((notes, returned), (notes[:-1], returned), at)


def test_what_is_returned_must_be_written() -> None:
    at = Addresses()
    notes, _ = step(at)
    with pytest.raises(NotRecordedError, match="it returns"):
        compared((notes, [array()]), (notes, [array()]), at)


def test_an_input_that_only_orders_may_be_anything() -> None:
    at = Addresses()

    def ordered() -> Step:
        last = array()
        return [note("greedy", {"logits": NUMBERS, "written": array()}, last)], [last]

    assert len(compared(ordered(), ordered(), at).notes) == 1


def test_kernels_that_write_elsewhere_are_kept() -> None:
    at = Addresses()

    def writing() -> Step:
        first, token, last = array(), array(), array()
        notes = [
            note("rows", {"table": NUMBERS}, first),
            note("write", {"k": first, "k_pool": WEIGHT}, token),
            note("greedy", {"logits": NUMBERS}, last),
        ]
        return notes, [last]

    found = compared(writing(), writing(), at)
    assert [each.body for each in found.notes] == ["rows", "write", "greedy"]


def chain(*sizes: int) -> Recording:
    """Kernels that each read what the one before writes."""
    notes = [note("swiglu", {"joint": NUMBERS}, array(size)) for size in sizes]
    reads: list[list[int | Output]] = [[7]]
    reads += [[Output(index, 0)] for index in range(len(sizes) - 1)]
    return Recording(notes, reads, [Output(len(sizes) - 1, 0)])


def test_outputs_share_memory_when_they_are_not_read_any_more() -> None:
    offsets, size = chain(64, 64, 64, 64).layout()
    assert offsets == [[0], [256], [0], [256]]
    assert size == 512
    found = chain(64, 64, 64)
    found.reads[2].append(Output(0, 0))
    assert found.layout() == ([[0], [256], [512]], 768)


def test_an_output_fits_between_others() -> None:
    found = chain(64, 128, 64, 8)
    found.reads[3].append(Output(1, 0))
    assert found.layout()[0] == [[0], [256], [0], [768]]


@pytest.mark.parametrize("seed", range(20))
def test_no_output_is_overwritten_before_it_is_read(seed: int) -> None:
    rng = Random(seed)
    notes = [
        note(
            "swiglu",
            {"joint": NUMBERS},
            *[array(rng.randrange(1, 300)) for _ in range(rng.randrange(1, 4))],
        )
        for _ in range(30)
    ]
    reads: list[list[int | Output]] = [[]]
    for index in range(1, 30):
        found: list[int | Output] = []
        for _ in range(rng.randrange(4)):
            before = rng.randrange(index)
            found.append(Output(before, rng.randrange(len(notes[before].outputs))))
        reads.append(found)
    made = Recording(notes, reads, [Output(29, 0)])
    offsets, size = made.layout()
    owner: list[Any] = [None] * size
    for index, each in enumerate(notes):
        for read in reads[index]:
            assert isinstance(read, Output)
            start = offsets[read.note][read.number]
            length = notes[read.note].outputs[read.number].nbytes
            assert set(owner[start : start + length]) == {(read.note, read.number)}
        for number, output in enumerate(each.outputs):
            start = offsets[index][number]
            assert start % 256 == 0
            owner[start : start + output.nbytes] = [(index, number)] * output.nbytes


def test_only_what_runs_within_is_recorded() -> None:
    assert recording.active() is None
    with recorded() as outer:
        assert recording.active() is outer
        with unrecorded():
            assert recording.active() is None
        assert recording.active() is outer
    assert recording.active() is None
