"""Bytes from strangers, made from a corpus: no crash, no hang, no escape, little memory."""

from __future__ import annotations

import signal
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.fuzz.corpus import FILES, HERE
from tests.faults.fuzz.targets import TARGETS, seeds

MIB = 1024 * 1024
CORPUS = {name: tuple(seeds(name)) for name in TARGETS}
EVERY = [pytest.param(n, raw, id=f"{n}-{file}") for n in CORPUS for file, raw in CORPUS[n]]
#: Examples where one takes a process, or files.
_FEW = {"tokenizer": 4, "document": 10, "sound": 10, "video": 10}
_FEWER = {
    "tar": 500,
    "archive": 500,
    "tokenizer": 100,
    "document": 500,
    "sound": 500,
    "video": 500,
    "projector": 500,
}
_HANG = 20.0  # seconds of processor time; the slowest input takes some milliseconds


@contextmanager
def no_hang() -> Iterator[None]:
    def hangs(number: int, frame: FrameType | None) -> NoReturn:
        raise AssertionError(f"it took more than {_HANG} s")

    before = signal.signal(signal.SIGVTALRM, hangs)
    signal.setitimer(signal.ITIMER_VIRTUAL, _HANG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_every_target_has_a_corpus() -> None:
    assert all(CORPUS.values()), [name for name, files in CORPUS.items() if not files]
    for target, files in FILES.items():
        for name, content in files.items():
            assert (HERE / target / name).read_bytes() == content


@pytest.mark.parametrize(("name", "raw"), EVERY)
def test_corpus(name: str, raw: bytes) -> None:
    tracemalloc.start()
    try:
        with no_hang():
            TARGETS[name](raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24 * MIB + 100 * len(raw)


@st.composite
def inputs(draw: st.DrawFn, name: str) -> bytes:
    """A file of the corpus, changed in a few places; now and then a piece of another."""
    files = CORPUS[name]
    raw = bytearray(draw(st.sampled_from(files))[1])
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(raw)))
        match draw(st.sampled_from(["set", "cut", "insert", "word", "double", "splice"])):
            case "set" if raw:
                raw[at % len(raw)] = draw(st.integers(0, 255))
            case "cut":
                del raw[at : at + draw(st.integers(1, 64))]
            case "insert":
                raw[at:at] = draw(st.binary(max_size=16))
            case "word" if TARGETS[name].words:
                raw[at:at] = draw(st.sampled_from(TARGETS[name].words)) * draw(st.integers(1, 3))
            case "double":
                raw[at:at] = raw[at : at + draw(st.integers(1, 512))]
            case "splice":
                other = draw(st.sampled_from(files))[1]
                raw[at:] = other[draw(st.integers(0, len(other))) :]
    return bytes(raw[: 64 * 1024])


def _fuzz(name: str, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(raw=inputs(name))
    def check(raw: bytes) -> None:
        with no_hang():
            TARGETS[name](raw)

    check()


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_fuzz(name: str) -> None:
    _fuzz(name, _FEW.get(name, 25))


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_fuzz_for_longer(name: str) -> None:
    _fuzz(name, _FEWER.get(name, 1000))
