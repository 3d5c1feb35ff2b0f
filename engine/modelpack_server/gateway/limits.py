"""Rate limits of a key and of its callers: token buckets and a count of running requests.

A bucket holds a minute's worth when full and fills at a steady rate, so any span of t seconds takes
at most `limit * (1 + t/60)`, and over a long time `limit` a minute. Tokens are reserved before a
request runs, from its size and its `max_tokens`, and corrected when it has told what it used: a
bucket may end below zero, and whoever emptied it waits until it is filled again.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

Limit = Literal["requests_per_minute", "tokens_per_minute", "concurrency"]
#: Of whom the limits are: a key's name, and a caller within it (None: the key as a whole).
Subject = tuple[str, str | None]
_NOTHING = 1e-6  # what adding up fractions may leave


@dataclass(frozen=True, slots=True)
class Limits:
    """What one subject may use; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Exceeded:
    """Which limit is in the way, whose it is, and after how many seconds to try again."""

    limit: Limit
    allowed: int
    subject: Subject
    retry_after: float


@dataclass(slots=True)
class _Bucket:
    level: float = math.inf  # full, however much that is
    at: float = 0.0

    def fill(self, now: float, per_minute: int) -> None:
        self.level = min(per_minute, self.level + max(0.0, now - self.at) * per_minute / 60)
        self.at = max(now, self.at)

    def wait(self, amount: float, per_minute: int) -> float:
        """Return the seconds until `amount` is there; 0 where it is."""
        missing = amount - self.level
        return missing * 60 / per_minute if missing > _NOTHING else 0.0


@dataclass(slots=True)
class _Account:
    requests: _Bucket = field(default_factory=_Bucket)
    tokens: _Bucket = field(default_factory=_Bucket)
    running: int = 0


class Grant:
    """Leave for one request to run; it ends once, by `finish`, `refuse` or `cancel`."""

    def __init__(self, limiter: Limiter, taken: list[tuple[Subject, Limits, float]]) -> None:
        self._limiter = limiter
        self._taken = taken

    def reserve(self, tokens: int) -> Exceeded | None:
        """Reserve tokens once it is known how many; return the limit that is in the way."""
        exceeded = self._limiter.reserve(self._taken, tokens)
        if isinstance(exceeded, Exceeded):
            return exceeded
        self._taken = exceeded
        return None

    def refuse(self, tokens: int) -> None:
        """Give the place back and charge `tokens` for a request that was read and then refused.

        No more than a minute's worth: one mistake does not lock a key out for hours.
        """
        taken, self._taken = self._taken, []
        for subject, limits, reserved in taken:
            most = limits.tokens_per_minute or 0
            self._limiter.settle(subject, limits, reserved, min(tokens, most))

    def cancel(self) -> None:
        """Give everything back: the limits themselves refused the request."""
        taken, self._taken = self._taken, []
        for subject, limits, reserved in taken:
            self._limiter.settle(subject, limits, reserved, 0, requests=0)

    def finish(self, tokens: int | None) -> None:
        """Give the place back and charge `tokens`; None: what was reserved, as nobody knows."""
        taken, self._taken = self._taken, []
        for subject, limits, reserved in taken:
            self._limiter.settle(subject, limits, reserved, tokens)


class Limiter:
    """Keeps the accounts of all subjects. All calls come from one thread.

    At most `most_callers` accounts of idle callers are kept, the latest used; a key's own account
    is never dropped, so inventing callers gains nothing beyond the key's limits.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, most_callers: int = 10_000
    ) -> None:
        self._clock = clock
        self._most_callers = most_callers
        self._keys: dict[str, _Account] = {}
        self._callers: OrderedDict[Subject, _Account] = OrderedDict()

    def __len__(self) -> int:
        """Return how many accounts are kept."""
        return len(self._keys) + len(self._callers)

    def admit(self, subjects: Iterable[tuple[Subject, Limits]], tokens: int) -> Grant | Exceeded:
        """Return leave for a request of about `tokens` tokens, or what is in the way.

        All limits of all subjects hold, or nothing is taken. A reservation larger than a minute's
        worth counts as a minute's worth: such a request runs alone rather than never.
        """
        now = self._clock()
        wanted = [(subject, limits, self._account(subject)) for subject, limits in subjects]
        refusals = [
            refusal
            for subject, limits, account in wanted
            for refusal in _refusals(subject, limits, account, tokens, now)
        ]
        if refusals:
            return max(refusals, key=lambda refusal: refusal.retry_after)
        taken = []
        for subject, limits, account in wanted:
            account.running += 1
            reserved = 0.0
            if limits.requests_per_minute is not None:
                account.requests.level -= 1
            if limits.tokens_per_minute is not None:
                reserved = min(tokens, limits.tokens_per_minute)
                account.tokens.level -= reserved
            taken.append((subject, limits, reserved))
        return Grant(self, taken)

    def reserve(
        self, taken: list[tuple[Subject, Limits, float]], tokens: int
    ) -> list[tuple[Subject, Limits, float]] | Exceeded:
        """Reserve `tokens` for a request that was admitted without; all or nothing."""
        now = self._clock()
        refusals = [
            refusal
            for subject, limits, _ in taken
            for refusal in _token_refusals(subject, limits, self._account(subject), tokens, now)
        ]
        if refusals:
            return max(refusals, key=lambda refusal: refusal.retry_after)
        reserved = []
        for subject, limits, before in taken:
            most = limits.tokens_per_minute
            more = 0 if most is None else min(tokens, most)
            self._account(subject).tokens.level -= more
            reserved.append((subject, limits, before + more))
        return reserved

    def settle(
        self,
        subject: Subject,
        limits: Limits,
        reserved: float,
        tokens: int | None,
        *,
        requests: int = 1,
    ) -> None:
        """End a request: charge what it used beyond its reservation, or give back the rest."""
        account = self._account(subject)
        account.running = max(0, account.running - 1)
        if not requests and (rate := limits.requests_per_minute) is not None:
            account.requests.level = min(rate, account.requests.level + 1)
        per_minute = limits.tokens_per_minute
        if per_minute is not None and tokens is not None:
            account.tokens.fill(self._clock(), per_minute)
            account.tokens.level = min(per_minute, account.tokens.level + reserved - tokens)

    def _account(self, subject: Subject) -> _Account:
        key, caller = subject
        if caller is None:
            return self._keys.setdefault(key, _Account())
        account = self._callers.setdefault(subject, _Account())
        self._callers.move_to_end(subject)
        while len(self._callers) > self._most_callers:
            idle = next((s for s, a in self._callers.items() if not a.running), subject)
            if idle == subject:
                break
            del self._callers[idle]
        return account


def _refusals(
    subject: Subject, limits: Limits, account: _Account, tokens: int, now: float
) -> Iterator[Exceeded]:
    if limits.concurrency is not None and account.running >= limits.concurrency:
        yield Exceeded("concurrency", limits.concurrency, subject, 1.0)
    if (rate := limits.requests_per_minute) is not None:
        account.requests.fill(now, rate)
        if wait := account.requests.wait(1, rate):
            yield Exceeded("requests_per_minute", rate, subject, wait)
    yield from _token_refusals(subject, limits, account, tokens, now)


def _token_refusals(
    subject: Subject, limits: Limits, account: _Account, tokens: int, now: float
) -> Iterator[Exceeded]:
    if (rate := limits.tokens_per_minute) is not None:
        account.tokens.fill(now, rate)
        if wait := account.tokens.wait(min(tokens, rate), rate):
            yield Exceeded("tokens_per_minute", rate, subject, wait)
