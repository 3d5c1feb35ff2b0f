"""Rate limits of a key and of its callers: token buckets and a count of running requests.

A full bucket has the limit of one minute and fills at a steady rate, so the use in t seconds is at
most `limit * (1 + t/60)`, and in the long run `limit` per minute. Tokens are reserved before a
request runs, estimated from its size and `max_tokens`, and corrected at its end. A bucket may
become negative; the subject then waits until it is filled again.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

Limit = Literal["requests_per_minute", "tokens_per_minute", "concurrency"]
#: The subject of limits: a key's name, and one of its callers (None: the whole key).
Subject = tuple[str, str | None]
_NOTHING = 1e-6  # tolerance for rounding errors


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one subject; None means no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Exceeded:
    """The exceeded limit, its subject, and the seconds after which to retry."""

    limit: Limit
    allowed: int
    subject: Subject
    retry_after: float


@dataclass(slots=True)
class _Bucket:
    level: float = math.inf  # full, whatever the limit
    at: float = 0.0

    def fill(self, now: float, per_minute: int) -> None:
        self.level = min(per_minute, self.level + max(0.0, now - self.at) * per_minute / 60)
        self.at = max(now, self.at)

    def wait(self, amount: float, per_minute: int) -> float:
        """Return the seconds until the bucket has `amount`, or 0 if it has."""
        missing = amount - self.level
        return missing * 60 / per_minute if missing > _NOTHING else 0.0


@dataclass(slots=True)
class _Account:
    requests: _Bucket = field(default_factory=_Bucket)
    tokens: _Bucket = field(default_factory=_Bucket)
    running: int = 0


class Grant:
    """The permission for one request to run; end it once, with `finish`, `refuse` or `cancel`."""

    def __init__(self, limiter: Limiter, subjects: list[tuple[Subject, Limits]]) -> None:
        self._limiter = limiter
        self._subjects = subjects
        self._reserved = 0

    def reserve(self, tokens: int) -> Exceeded | None:
        """Reserve tokens once their number is known; return the exceeded limit, or None.

        A reservation larger than the limit of one minute counts as that limit, so that such a
        request can run at all.
        """
        exceeded = self._limiter.reserve(self._subjects, tokens)
        if exceeded is None:
            self._reserved += tokens
        return exceeded

    def refuse(self, tokens: int) -> None:
        """End the permission and charge `tokens` for a request that was refused after reading it.

        It charges at most the limit of one minute: one mistake must not block a key for hours.
        """
        self._end(lambda per_minute: min(tokens, per_minute))

    def cancel(self) -> None:
        """End the permission without a charge, for a request that a limit refused."""
        self._end(lambda _: 0, requests=0)

    def finish(self, tokens: int | None) -> None:
        """End the permission and charge `tokens`; None: unknown, so charge the reserved tokens."""
        self._end(lambda _: tokens)

    def _end(self, spent: Callable[[int], int | None], requests: int = 1) -> None:
        subjects, self._subjects = self._subjects, []
        for subject, limits in subjects:
            tokens = spent(limits.tokens_per_minute or 0)
            self._limiter.settle(subject, limits, self._reserved, tokens, requests)


class Limiter:
    """The accounts of all subjects; call it from one thread only.

    It keeps the accounts of the `most_callers` idle callers used most recently. It never drops a
    key's own account, so inventing callers does not exceed the key's limits.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, most_callers: int = 10_000
    ) -> None:
        self._clock = clock
        self._most_callers = most_callers
        self._keys: dict[str, _Account] = {}
        self._callers: OrderedDict[Subject, _Account] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of accounts."""
        return len(self._keys) + len(self._callers)

    def admit(self, subjects: list[tuple[Subject, Limits]], tokens: int) -> Grant | Exceeded:
        """Return the permission for a request of about `tokens` tokens, or the exceeded limit.

        It applies all limits of all subjects, or charges nothing.
        """
        wanted = [(subject, limits, self._account(subject)) for subject, limits in subjects]
        exceeded = _longest(
            refusal
            for subject, limits, account in wanted
            for refusal in _refusals(subject, limits, account, tokens, self._clock())
        )
        if exceeded is not None:
            return exceeded
        for _, limits, account in wanted:
            account.running += 1
            if limits.requests_per_minute is not None:
                account.requests.level -= 1
        grant = Grant(self, subjects)
        grant.reserve(tokens)
        return grant

    def reserve(self, subjects: list[tuple[Subject, Limits]], tokens: int) -> Exceeded | None:
        """Reserve `tokens` from all subjects of an admitted request, or from none."""
        exceeded = _longest(
            refusal
            for subject, limits in subjects
            for refusal in _token_refusals(
                subject, limits, self._account(subject), tokens, self._clock()
            )
        )
        if exceeded is None:
            for subject, limits in subjects:
                self._account(subject).tokens.level -= min(tokens, limits.tokens_per_minute or 0)
        return exceeded

    def settle(
        self, subject: Subject, limits: Limits, reserved: int, tokens: int | None, requests: int
    ) -> None:
        """End a request: charge its use beyond the reservation, or return the rest."""
        account = self._account(subject)
        account.running = max(0, account.running - 1)
        if not requests and (rate := limits.requests_per_minute) is not None:
            account.requests.level = min(rate, account.requests.level + 1)
        if (rate := limits.tokens_per_minute) is not None and tokens is not None:
            account.tokens.fill(self._clock(), rate)
            account.tokens.level = min(rate, account.tokens.level + min(reserved, rate) - tokens)

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


def _longest(refusals: Iterable[Exceeded]) -> Exceeded | None:
    return max(refusals, key=lambda refusal: refusal.retry_after, default=None)


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
