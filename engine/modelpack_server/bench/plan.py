"""Plan: which loads a benchmark puts on each server, in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from modelpack.errors import UsageError
from modelpack_server.bench.workloads import WORKLOADS, Workload, poisson, single_turns

#: What is measured where nothing else is asked for: about a minute on a laptop.
CONCURRENCY = (1, 2, 4, 8)
PROMPT, ANSWER = 128, 64
SECONDS = 40.0
# More than a server is likely to answer within the seconds of one step, and what making the prompts
# of a step may cost.
_EACH, _MOST_TOKENS = 250, 2**18
_FEWEST = 4


@dataclass(frozen=True, slots=True)
class Step:
    """One load, for `seconds` or (None) to its end; `level` is its place on the plan's axis."""

    name: str
    workload: Workload
    level: float
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Loads in order; `axis` says what their levels are: concurrency, requests/s or workload."""

    axis: str
    steps: tuple[Step, ...]
    description: str

    @property
    def most_at_once(self) -> int:
        """How many requests the heaviest step has under way, where that is known."""
        return max((step.workload.concurrency for step in self.steps), default=1) or 1


def sweep(
    levels: Sequence[int] = CONCURRENCY,
    *,
    prompt: int = PROMPT,
    answer: int = ANSWER,
    requests: int | None = None,
    seconds: float = SECONDS,
) -> Plan:
    """Return a step for each number of clients, each of which asks again once it is answered.

    A step takes its share of `seconds`, or `requests` requests.
    """
    steps = []
    for number, level in enumerate(levels):
        count = requests or max(_FEWEST, level, min(level * _EACH, _MOST_TOKENS // prompt))
        workload = single_turns(f"concurrency-{level}", [(prompt, answer)] * count)
        steps.append(
            Step(
                f"{level} at once",
                workload.limited(level).in_other_words(1 + 101 * number),
                level,
                None if requests else seconds / len(levels),
            )
        )
    return Plan("concurrency", tuple(steps), _sizes(prompt, answer))


def rates(
    levels: Sequence[float],
    *,
    prompt: int = PROMPT,
    answer: int = ANSWER,
    requests: int | None = None,
    seconds: float = SECONDS,
) -> Plan:
    """Return a step for each rate, in requests a second that arrive as a Poisson process.

    Requests come when they come, however slow the server is: what waits is part of its latency.
    """
    steps = []
    for number, level in enumerate(levels):
        count = requests or max(_FEWEST, math.ceil(level * seconds / len(levels)))
        workload = poisson(level, count, prompt, answer).in_other_words(1 + 101 * number)
        steps.append(Step(f"{level:g} a second", workload, level))
    return Plan("requests/s", tuple(steps), _sizes(prompt, answer))


def named(names: Sequence[str], *, requests: int | None = None) -> Plan:
    """Return a step for each workload of `WORKLOADS`; raises `UsageError` for another name."""
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown:
        raise UsageError(
            f"there is no workload {unknown[0]!r}", hint=f"there are {', '.join(WORKLOADS)}"
        )
    steps = []
    for number, name in enumerate(names):
        workload = WORKLOADS[name]()
        workload = workload.first(requests) if requests else workload
        steps.append(Step(name, workload, number))
    return Plan("workload", tuple(steps), "lengths and arrivals are those of each workload")


def _sizes(prompt: int, answer: int) -> str:
    return f"prompts of about {prompt} tokens, answers of {answer}"
