"""Benchmark plans: which loads to put on each server, in order, and how to run them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from modelpack.errors import UsageError
from modelpack_server.bench.machine import Machine
from modelpack_server.bench.report import Record, Report, make_report
from modelpack_server.bench.server import AnswerError, OpenAIServer, Served, text_of
from modelpack_server.bench.workloads import WORKLOADS, Session, Workload, poisson, single_turns

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


async def run_load(
    server: OpenAIServer,
    workload: Workload,
    *,
    seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Report:
    """Serve `workload` to its end; after `seconds` no session is started any more.

    A request counts from when it was due, even if `workload.concurrency` kept it waiting. `clock`
    has to be the server's. The report's `client_cpu_share` is what this process took of one core.
    """
    return await _Load(server, workload, seconds, clock).report()


class _Load:
    def __init__(
        self,
        server: OpenAIServer,
        workload: Workload,
        seconds: float | None,
        clock: Callable[[], float],
    ) -> None:
        self._server, self._workload = server, workload
        self._seconds, self._clock = seconds, clock
        self._records: list[Record] = []
        self._start = 0.0

    async def report(self) -> Report:
        limit = asyncio.Semaphore(self._workload.concurrency or len(self._workload.sessions))
        processor = time.process_time()
        self._start = self._clock()
        async with asyncio.TaskGroup() as tasks:
            for session in self._workload.sessions:
                await asyncio.sleep(max(0.0, session.arrival - self._now()))
                await limit.acquire()
                if self._seconds is not None and self._now() >= self._seconds:
                    break
                task = tasks.create_task(self._talk(session))
                task.add_done_callback(lambda _: limit.release())
        duration = self._now()
        share = (time.process_time() - processor) / duration
        extra = {"client_cpu_share": round(share, 3)}
        return make_report(self._workload.name, self._records, duration, extra)

    def _now(self) -> float:
        return self._clock() - self._start

    async def _talk(self, session: Session) -> None:
        """Have a conversation; one that fails ends there."""
        messages: list[dict[str, str]] = []
        due = session.arrival or self._now()
        for turn in session.turns:
            messages.append({"role": "user", "content": text_of(turn.token_ids)})
            record = Record(session.label, due, len(turn.token_ids))
            self._records.append(record)
            try:
                answer = await self._server.ask(messages, turn.max_tokens)
            except AnswerError as error:
                record.error = str(error)
                return
            record.token_times = [at - self._start for at in answer.times]
            record.num_tokens = answer.completion_tokens
            record.prompt_tokens = answer.prompt_tokens or record.prompt_tokens
            record.cached_tokens = answer.cached_tokens
            messages.append({"role": "assistant", "content": "".join(answer.text)})
            due = self._now()


#: Grows when a field of the JSON changes its meaning or goes away.
SCHEMA_VERSION = 1
# A client that takes this much of a core may be what is measured.
BUSY_CLIENT = 0.8
_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Run:
    """One step on one server."""

    step: Step
    report: Report

    def to_json(self) -> dict[str, Any]:
        """Return what was asked for, and all figures."""
        return {"load": self.step.name, "level": self.step.level, **self.report.to_json()}


@dataclass(frozen=True, slots=True)
class Measured:
    """What a server came to; `name` is what the user called it."""

    name: str
    served: Served
    runs: tuple[Run, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the server's part of the JSON report."""
        return {
            "target": self.name,
            "model": self.served.model,
            "versions": dict(self.served.versions),
            "exact_lengths": self.served.exact_lengths,
            "runs": [run.to_json() for run in self.runs],
        }


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A whole benchmark: `command` is how to repeat it, `when` in UTC."""

    plan: Plan
    machine: Machine
    targets: tuple[Measured, ...]
    command: str
    when: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know before believing the figures."""
        found = []
        for target in self.targets:
            if not target.served.exact_lengths:
                found.append(f"{target.name} ends answers as it likes: their lengths differ")
            for run in target.runs:
                for error, count in run.report.errors.items():
                    found.append(f"{target.name}, {run.step.name}: {count} × {error}")
                share = run.report.extra.get("client_cpu_share", 0)
                if share > BUSY_CLIENT:
                    found.append(
                        f"{target.name}, {run.step.name}: the client took {share:.0%} of a core, "
                        "and may be what was measured"
                    )
        return tuple(found)

    @property
    def succeeded(self) -> bool:
        """Whether each step had an answer on each server."""
        return all(
            run.report.failed < run.report.requests
            for target in self.targets
            for run in target.runs
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report for programs."""
        return {
            "schemaVersion": SCHEMA_VERSION,
            "when": self.when.isoformat(timespec="seconds"),
            "command": self.command,
            "machine": self.machine.to_json(),
            "axis": self.plan.axis,
            "sizes": self.plan.description,
            "notes": list(self.notes),
            "targets": [target.to_json() for target in self.targets],
        }


async def measure(
    server: OpenAIServer,
    name: str,
    plan: Plan,
    *,
    versions: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Run `plan` on one server, after warming it up; raises what `OpenAIServer.open` raises.

    `versions` are of programs that the server itself does not tell of.
    """
    progress(f"{name}: warming up")
    served = await server.open()
    served = replace(served, versions={**served.versions, **(versions or {})})
    prompt = min(len(step.workload.sessions[0].turns[0].token_ids) for step in plan.steps)
    lengths = [(prompt, _WARM_UP_TOKENS)] * plan.most_at_once
    await run_load(server, single_turns("warm-up", lengths, seed=1))
    runs = []
    for step in plan.steps:
        progress(f"{name}: {step.name}")
        report = await run_load(server, step.workload, seconds=step.seconds)
        runs.append(Run(step, report))
    return Measured(name, served, tuple(runs))
