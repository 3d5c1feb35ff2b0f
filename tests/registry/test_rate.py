"""The rate limit, with a clock of the test."""

from __future__ import annotations

import random

import pytest

from modelpack.errors import InterruptedTransferError
from modelpack.progress import Stop
from modelpack.registry import BlobOptions, RateLimit
from tests.registry.faulty import FaultyRegistry
from tests.registry.sources import Connect, read_all

CONTENT = random.Random(3).randbytes(200_000)


class Clock(Stop):
    """A clock that advances only by waits; `waited` is in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.check()
        self.now += seconds

    @property
    def waited(self) -> float:
        return self.now - 100.0


@pytest.mark.parametrize("step", [1, 100, 1000, 7777])
def test_a_thousand_bytes_a_second(step: int) -> None:
    clock = Clock()
    limit = RateLimit(1000, clock)
    for _ in range(50_000 // step):
        limit.wait(step, clock)
    moved = 50_000 // step * step
    assert moved / 1000 - 0.5 <= clock.waited <= moved / 1000 + 1e-6


def test_a_pause_saves_up_no_more_than_a_burst() -> None:
    clock = Clock()
    limit = RateLimit(1000, clock)
    clock.now += 3600
    limit.wait(1000, clock)
    assert clock.waited - 3600 >= 0.5


def test_a_stop_ends_the_wait() -> None:
    stop = Stop()
    stop.request()
    with pytest.raises(InterruptedTransferError):
        RateLimit(1).wait(10_000, stop)


def test_a_rate_that_moves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        RateLimit(0)


class Counted(RateLimit):
    """A limit that never waits and counts the bytes."""

    def __init__(self) -> None:
        super().__init__(80_000)
        self.counts: list[int] = []

    def wait(self, count: int, stop: Stop) -> None:
        self.counts.append(count)


def test_both_ways_go_by_it_in_small_steps(registry: FaultyRegistry, connect: Connect) -> None:
    limit = Counted()
    client = connect(registry.host, blobs=BlobOptions(rate=limit))
    blob = registry.put_blob(CONTENT)
    assert read_all(client.repository, blob) == CONTENT
    assert sum(limit.counts) == len(CONTENT)
    assert max(limit.counts) <= limit.step <= 80_000
    limit.counts.clear()
    client.write(CONTENT[1:])
    assert sum(limit.counts) == len(CONTENT) - 1
    assert max(limit.counts) <= limit.step
