"""Workloads: arrival times and token ids, the same in every run.

Lengths and arrivals follow published benchmarks where there is one: vLLM's `sonnet` by its lengths,
nano-vllm's `bench.py`. Prompts are random tokens: what they say costs nothing, and prefixes are
shared only where a workload means them to be.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

#: Ids that every vocabulary of a text model has, past its special tokens.
LOWEST_ID, HIGHEST_ID = 1000, 30000


@dataclass(frozen=True, slots=True)
class Turn:
    """Tokens that a user adds to the conversation so far, and how many are answered."""

    token_ids: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Session:
    """One conversation; a turn comes when the answer to the one before is complete.

    `arrival` is in seconds since the start; `label` sets sessions apart in a report.
    """

    turns: tuple[Turn, ...]
    arrival: float = 0.0
    label: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    """Sessions by arrival; `concurrency` at most are served at once (0: no limit)."""

    name: str
    sessions: tuple[Session, ...]
    concurrency: int = 0

    def limited(self, concurrency: int) -> Workload:
        """Return the same sessions at another concurrency."""
        return replace(self, concurrency=concurrency)

    def first(self, count: int) -> Workload:
        """Return the first `count` sessions only, for slow machines."""
        return replace(self, sessions=self.sessions[:count])

    def in_other_words(self, shift: int) -> Workload:
        """Return the same lengths and arrivals with other tokens, which no cache has seen."""
        span = HIGHEST_ID - LOWEST_ID
        sessions = tuple(
            replace(
                session,
                turns=tuple(
                    replace(
                        turn,
                        token_ids=tuple(
                            LOWEST_ID + (i - LOWEST_ID + shift) % span for i in turn.token_ids
                        ),
                    )
                    for turn in session.turns
                ),
            )
            for session in self.sessions
        )
        return replace(self, sessions=sessions)

    @property
    def longest(self) -> int:
        """The most tokens that a session comes to, its answers included."""
        return max(
            sum(len(turn.token_ids) + turn.max_tokens for turn in session.turns)
            for session in self.sessions
        )


def _repeatable(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - repeatable is what it has to be


class _Source:
    """Random tokens and lengths from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = _repeatable(seed)

    def tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.random.randrange(LOWEST_ID, HIGHEST_ID) for _ in range(count))

    def turn(self, prompt: int, answer: int) -> Turn:
        return Turn(self.tokens(prompt), answer)


def single_turns(name: str, lengths: list[tuple[int, int]], seed: int = 7) -> Workload:
    """Return one request for each (prompt, answer) of `lengths`, all at once."""
    source = _Source(seed)
    return Workload(name, tuple(Session((source.turn(*pair),)) for pair in lengths))


def load_m(concurrency: int = 32) -> Workload:
    """Prompts of 64-1024 tokens, answers of 32-256; twice the concurrency, at least 64."""
    lengths = _repeatable(7)
    pairs = [
        (lengths.randint(64, 1024), lengths.randint(32, 256))
        for _ in range(max(64, 2 * concurrency))
    ]
    return single_turns("load-m", pairs).limited(concurrency)


def nano_vllm() -> Workload:
    """256 sequences, prompts and answers of 100-1024 tokens (nano-vllm's bench.py)."""
    lengths = _repeatable(0)
    pairs = [(lengths.randint(100, 1024), lengths.randint(100, 1024)) for _ in range(256)]
    return single_turns("nano-vllm", pairs, seed=0)


def sonnet() -> Workload:
    """100 prompts of 550 tokens, of which 200 are shared; answers of 150 (vLLM's sonnet)."""
    source = _Source(7)
    shared = source.tokens(200)
    turns = [Turn(shared + source.tokens(350), 150) for _ in range(100)]
    return Workload("sonnet", tuple(Session((turn,)) for turn in turns))


def rounds_of_five() -> Workload:
    """Five prompts of 32 tokens at once, 256 tokens each (vllm-mlx's batch of five)."""
    return single_turns("rounds-of-five", [(32, 256)] * 5)


def poisson_with_8k(rate: float = 8.0, count: int = 64) -> Workload:
    """Chat-sized requests at `rate` a second, and a prompt of 8k tokens in their midst."""
    source = _Source(7)
    now, sessions = 0.0, []
    for _ in range(count):
        now += source.random.expovariate(rate)
        turn = source.turn(source.random.randint(64, 256), 128)
        sessions.append(Session((turn,), now, "short"))
    sessions.append(Session((source.turn(8192, 16),), now / 2, "8k"))
    sessions.sort(key=lambda session: session.arrival)
    return Workload("poisson-8k", tuple(sessions))


def poisson(rate: float, count: int, prompt: int = 128, answer: int = 64) -> Workload:
    """`count` requests of one size at `rate` a second, as users who know nothing of each other."""
    source = _Source(7)
    now, sessions = 0.0, []
    for _ in range(count):
        now += source.random.expovariate(rate)
        sessions.append(Session((source.turn(prompt, answer),), now))
    return Workload(f"poisson-{rate:g}", tuple(sessions))


def multi_turn(conversations: int = 16, turns: int = 6) -> Workload:
    """Conversations that grow: every turn sends what was said before again."""
    source = _Source(7)
    sessions = [
        Session(tuple(source.turn(256 if i == 0 else 48, 64) for i in range(turns)))
        for _ in range(conversations)
    ]
    return Workload("multi-turn", tuple(sessions))


def shared_prefix(prompt: int = 1024, share: float = 0.9, count: int = 64) -> Workload:
    """Prompts with the same beginning, after one that fills the cache."""
    source = _Source(7)
    prefix = source.tokens(int(prompt * share))
    turns = [Turn(prefix + source.tokens(prompt - len(prefix)), 16) for _ in range(count)]
    first, *others = (Session((turn,), label="shared") for turn in turns)
    return Workload("shared-prefix", (replace(first, label="cold"), *others), concurrency=1)


def matrix(concurrency: int, prompt: int, answer: int = 128) -> Workload:
    """One cell of concurrency x prompt length; three rounds."""
    pairs = [(prompt, answer)] * (3 * concurrency)
    return single_turns(f"matrix-{concurrency}x{prompt}", pairs).limited(concurrency)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "load-m-32": load_m,
    "load-m-128": lambda: load_m(128),
    "nano-vllm": nano_vllm,
    "sonnet": sonnet,
    "rounds-of-five": rounds_of_five,
    "poisson-8k": poisson_with_8k,
    "multi-turn": multi_turn,
    "shared-prefix": shared_prefix,
    **{
        f"matrix-{concurrency}x{prompt}": lambda c=concurrency, p=prompt: matrix(c, p)  # type: ignore[misc]
        for concurrency in (1, 2, 4, 8, 16, 32)
        for prompt in (128, 1024, 4096, 8192)
    },
}
