"""Limits, with a clock that only the test changes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack_server.gateway.limits import Exceeded, Grant, Limiter, Limits


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Asker:
    """Requests of one key to a limiter."""

    limits: Limits
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.limiter = Limiter(self.clock)

    def ask(self, tokens: int = 0) -> Grant | Exceeded:
        return self.limiter.admit([(("alice", None), self.limits)], tokens)

    def granted(self, tokens: int = 0) -> Grant:
        grant = self.ask(tokens)
        assert isinstance(grant, Grant)
        return grant

    def refused(self, tokens: int = 0) -> Exceeded:
        refusal = self.ask(tokens)
        assert isinstance(refusal, Exceeded)
        return refusal


def test_requests_per_minute() -> None:
    asker = Asker(Limits(requests_per_minute=2))
    asker.granted().finish(0)
    asker.granted().finish(0)
    refusal = asker.refused()
    assert (refusal.limit, refusal.allowed) == ("requests_per_minute", 2)
    assert refusal.retry_after == pytest.approx(30)
    asker.clock.now += 29
    assert asker.refused().retry_after == pytest.approx(1)
    asker.clock.now += 1
    asker.granted()
    asker.refused()


def test_a_clock_that_goes_back_gives_nothing() -> None:
    asker = Asker(Limits(requests_per_minute=1))
    asker.granted()
    asker.clock.now -= 500
    assert asker.refused().retry_after == pytest.approx(60)


def test_concurrency() -> None:
    asker = Asker(Limits(concurrency=2))
    first = asker.granted()
    asker.granted()
    assert asker.refused().limit == "concurrency"
    first.finish(0)
    first.finish(0)  # a second call has no effect
    asker.granted()
    asker.refused()


def test_tokens_are_reserved_and_corrected() -> None:
    asker = Asker(Limits(tokens_per_minute=600))
    grant = asker.granted(500)
    refusal = asker.refused(200)
    assert refusal.limit == "tokens_per_minute"
    assert refusal.retry_after == pytest.approx(10)
    grant.finish(100)  # less than reserved
    grant = asker.granted(200)
    grant.finish(1100)  # more: 600 below zero
    assert asker.refused(1).retry_after == pytest.approx(60.1)


def test_what_nobody_knows_costs_the_reservation() -> None:
    asker = Asker(Limits(tokens_per_minute=600))
    asker.granted(400).finish(None)
    assert isinstance(asker.ask(200), Grant)
    asker.refused(1)


def test_a_request_beyond_a_minutes_worth_runs_alone() -> None:
    asker = Asker(Limits(tokens_per_minute=60))
    grant = asker.granted(1000)
    assert asker.refused(1).retry_after == pytest.approx(1)
    grant.finish(120)
    assert asker.refused(1).retry_after == pytest.approx(61)


def test_limits_changed_on_the_way() -> None:
    asker = Asker(Limits(requests_per_minute=100))
    asker.granted()
    asker.limits = Limits(requests_per_minute=1)
    asker.granted()
    asker.refused()
    asker.limits = Limits()
    asker.granted()


def test_a_caller_has_its_own_limits_within_its_keys() -> None:
    clock = Clock()
    limiter = Limiter(clock)
    key, each = Limits(requests_per_minute=3), Limits(requests_per_minute=2)

    def ask(caller: str) -> Grant | Exceeded:
        return limiter.admit([(("k", None), key), (("k", caller), each)], 0)

    assert isinstance(ask("a"), Grant)
    assert isinstance(ask("a"), Grant)
    refusal = ask("a")
    assert isinstance(refusal, Exceeded)
    assert refusal.subject == ("k", "a")
    assert isinstance(ask("b"), Grant)  # the refused request charged nothing to the key
    refusal = ask("c")
    assert isinstance(refusal, Exceeded)
    assert refusal.subject == ("k", None)


def test_inventing_callers_fills_no_memory_and_loses_no_running_request() -> None:
    limiter = Limiter(Clock(), most_callers=10)
    each = Limits(concurrency=1)
    running = limiter.admit([(("k", "first"), each)], 0)
    for number in range(1000):
        grant = limiter.admit([(("k", str(number)), each)], 0)
        assert isinstance(grant, Grant)
        grant.finish(0)
    assert len(limiter) <= 11
    assert isinstance(limiter.admit([(("k", "first"), each)], 0), Exceeded)
    assert isinstance(running, Grant)


STEPS = st.lists(
    st.tuples(
        st.floats(0, 90),  # elapsed seconds
        st.integers(0, 50),  # tokens reserved
        st.floats(0, 1),  # the used share of them
    ),
    min_size=1,
    max_size=60,
)


@given(STEPS, st.integers(1, 5), st.integers(1, 120))
def test_no_span_of_time_takes_more_than_allowed(
    steps: list[tuple[float, int, float]], rate: int, tokens: int
) -> None:
    asker = Asker(Limits(requests_per_minute=rate, tokens_per_minute=tokens))
    taken: list[tuple[float, int]] = []
    for passed, wanted, share in steps:
        asker.clock.now += passed
        grant = asker.ask(wanted)
        if isinstance(grant, Exceeded):
            at = asker.clock.now
            asker.clock.now += grant.retry_after
            retried = asker.ask(wanted)
            assert isinstance(retried, Grant), f"promised at {at}, still {retried}"
            grant = retried
        used = int(min(wanted, tokens) * share)
        grant.finish(used)
        taken.append((asker.clock.now, used))
    for first in range(len(taken)):
        spent = 0
        for last in range(first, len(taken)):
            spent += taken[last][1]
            minutes = (taken[last][0] - taken[first][0]) / 60
            assert last - first + 1 <= rate * (1 + minutes) + 1e-3
            assert spent <= tokens * (1 + minutes) + 1e-3


@given(st.lists(st.booleans(), max_size=80), st.integers(1, 4))
def test_never_more_at_a_time_than_allowed(starts: list[bool], most: int) -> None:
    asker = Asker(Limits(concurrency=most))
    running: list[Grant] = []
    for start in starts:
        if not start and running:
            running.pop(0).finish(0)
        elif start:
            grant = asker.ask()
            assert isinstance(grant, Grant) == (len(running) < most)
            if isinstance(grant, Grant):
                running.append(grant)
