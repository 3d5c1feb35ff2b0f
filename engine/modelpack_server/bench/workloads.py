"""Workloads: arrival times and token ids, the same in every run.

Lengths and arrivals follow published benchmarks if there is one, such as vLLM's `sonnet` and
nano-vllm's `bench.py`. Prompts are random tokens, so that they share prefixes only where a workload
intends it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

#: The default load of `modelpack bench`, which takes about a minute on a laptop: clients, tokens of
#: a prompt and of a response, and the seconds for all steps.
CONCURRENCY = (1, 2, 4, 8)
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
SECONDS = 40.0
#: The range of token ids to use: every text model has them, and none is a special token.
LOWEST_ID, HIGHEST_ID = 1000, 30000


@dataclass(frozen=True, slots=True)
class Turn:
    """The tokens of a user's message, and the number of tokens of the response."""

    token_ids: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Session:
    """One conversation; each turn is sent when the previous response is complete.

    `arrival` is in seconds since the start. Sessions with a `label` get separate latencies in a
    report.
    """

    turns: tuple[Turn, ...]
    arrival: float = 0.0
    label: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    """Sessions in order of arrival; at most `concurrency` run at a time (0: no limit)."""

    name: str
    sessions: tuple[Session, ...]
    concurrency: int = 0

    def limited(self, concurrency: int) -> Workload:
        """Return the same sessions with another concurrency."""
        return replace(self, concurrency=concurrency)

    def first(self, count: int) -> Workload:
        """Return the first `count` sessions, for slow machines."""
        return replace(self, sessions=self.sessions[:count])

    def in_other_words(self, shift: int) -> Workload:
        """Return the same lengths and arrivals with other tokens, which no cache contains."""
        span = HIGHEST_ID - LOWEST_ID

        def shifted(turn: Turn) -> Turn:
            ids = tuple(LOWEST_ID + (i - LOWEST_ID + shift) % span for i in turn.token_ids)
            return replace(turn, token_ids=ids)

        sessions = (replace(s, turns=tuple(map(shifted, s.turns))) for s in self.sessions)
        return replace(self, sessions=tuple(sessions))

    @property
    def longest(self) -> int:
        """The largest number of tokens in a session, including its responses."""
        return max(
            sum(len(turn.token_ids) + turn.max_tokens for turn in session.turns)
            for session in self.sessions
        )


def _repeatable(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - workloads must be repeatable


class _Source:
    """A source of random tokens and lengths, from one seed."""

    def __init__(self, seed: int = 7) -> None:
        self.random = _repeatable(seed)

    def tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.random.randrange(LOWEST_ID, HIGHEST_ID) for _ in range(count))

    def turn(self, prompt: int, answer: int) -> Turn:
        return Turn(self.tokens(prompt), answer)


def single_turns(name: str, lengths: list[tuple[int, int]], seed: int = 7) -> Workload:
    """Return one request for each pair of `lengths`, (prompt, response), all arriving at once."""
    source = _Source(seed)
    return Workload(name, tuple(Session((source.turn(*pair),)) for pair in lengths))


def load_m(concurrency: int = 32) -> Workload:
    """Prompts of 64-1024 tokens, responses of 32-256; max(64, 2 * concurrency) requests."""
    lengths, count = _repeatable(7), max(64, 2 * concurrency)
    pairs = [(lengths.randint(64, 1024), lengths.randint(32, 256)) for _ in range(count)]
    return single_turns("load-m", pairs).limited(concurrency)


def nano_vllm() -> Workload:
    """256 requests with prompts and responses of 100-1024 tokens (nano-vllm's bench.py)."""
    lengths = _repeatable(0)
    pairs = [(lengths.randint(100, 1024), lengths.randint(100, 1024)) for _ in range(256)]
    return single_turns("nano-vllm", pairs, seed=0)


def sonnet() -> Workload:
    """100 prompts of 550 tokens, 200 of them shared; responses of 150 (vLLM's sonnet)."""
    source = _Source()
    shared = source.tokens(200)
    turns = [Turn(shared + source.tokens(350), 150) for _ in range(100)]
    return Workload("sonnet", tuple(Session((turn,)) for turn in turns))


def rounds_of_five() -> Workload:
    """Five prompts of 32 tokens at once, responses of 256 (vllm-mlx's batch of five)."""
    return single_turns("rounds-of-five", [(32, 256)] * 5)


def poisson_with_8k(rate: float = 8.0, count: int = 64) -> Workload:
    """Short requests at `rate` per second, and one prompt of 8k tokens halfway through."""
    source = _Source()
    now, sessions = 0.0, []
    for _ in range(count):
        now += source.random.expovariate(rate)
        turn = source.turn(source.random.randint(64, 256), 128)
        sessions.append(Session((turn,), now, "short"))
    sessions.append(Session((source.turn(8192, 16),), now / 2, "8k"))
    sessions.sort(key=lambda session: session.arrival)
    return Workload("poisson-8k", tuple(sessions))


def poisson(
    rate: float, count: int, prompt: int = PROMPT_TOKENS, answer: int = OUTPUT_TOKENS
) -> Workload:
    """`count` requests of one size at `rate` per second, as a Poisson process."""
    source = _Source()
    now, sessions = 0.0, []
    for _ in range(count):
        now += source.random.expovariate(rate)
        sessions.append(Session((source.turn(prompt, answer),), now))
    return Workload(f"poisson-{rate:g}", tuple(sessions))


def multi_turn(conversations: int = 16, turns: int = 6) -> Workload:
    """Conversations whose every turn sends all previous messages again."""
    source = _Source()
    sessions = [
        Session(tuple(source.turn(256 if i == 0 else 48, 64) for i in range(turns)))
        for _ in range(conversations)
    ]
    return Workload("multi-turn", tuple(sessions))


def shared_prefix(prompt: int = 1024, share: float = 0.9, count: int = 64) -> Workload:
    """Prompts with a shared prefix, one at a time; the first one fills the cache."""
    source = _Source()
    prefix = source.tokens(int(prompt * share))
    turns = [Turn(prefix + source.tokens(prompt - len(prefix)), 16) for _ in range(count)]
    first, *others = (Session((turn,), label="shared") for turn in turns)
    return Workload("shared-prefix", (replace(first, label="cold"), *others), concurrency=1)


def matrix(concurrency: int, prompt: int, answer: int = 128) -> Workload:
    """Three rounds of requests for one pair of concurrency and prompt length."""
    pairs = [(prompt, answer)] * (3 * concurrency)
    return single_turns(f"matrix-{concurrency}x{prompt}", pairs).limited(concurrency)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "load-m-8": lambda: load_m(8),
    "load-m-32": load_m,
    "load-m-64": lambda: load_m(64),
    "load-m-128": lambda: load_m(128),
    "load-m-256": lambda: load_m(256),
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
