"""A benchmark: the loads of its plan, run in order on each server, and the machine it ran on.

`sweep`, `rates` and `named` make plans, `measure` runs a plan on one server, and `Benchmark` holds
all results; `tables` shows them.
"""

from __future__ import annotations

import asyncio
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import modelpack
from modelpack.errors import UsageError
from modelpack_server.bench.report import Record, Report, make_report
from modelpack_server.bench.server import AnswerError, OpenAIServer, Served, text_of
from modelpack_server.bench.workloads import (
    CONCURRENCY,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    SECONDS,
    WORKLOADS,
    Session,
    Workload,
    poisson,
    single_turns,
)

#: Distributions whose versions affect the speed of our servers.
_PACKAGES = ("mlx", "mlx-lm", "llama-cpp-python")
_PROGRAM_SECONDS = 10


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine: `memory` is in bytes; `power` is "AC" or "battery", on a Mac only."""

    processor: str
    cores: int
    memory: int
    system: str
    gpu: str = ""
    power: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return all known fields."""
        found = {"memory_bytes" if name == "memory" else name: value
                 for name, value in asdict(self).items()}  # fmt: skip
        return {name: value for name, value in found.items() if value}


def this_machine() -> Machine:
    """Return the description of this machine; unknown fields are empty."""
    mac = platform.system() == "Darwin"
    return Machine(
        processor=(_output("sysctl", "-n", "machdep.cpu.brand_string") if mac else _cpuinfo())
        or platform.machine(),
        cores=os.cpu_count() or 1,
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        system=f"macOS {platform.mac_ver()[0]}" if mac else platform.platform(),
        gpu=_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").replace("\n", ", "),
        power=_power(_output("pmset", "-g", "batt")) if mac else "",
        versions={"python": platform.python_version()},
    )


def our_versions() -> dict[str, str]:
    """Return the versions of modelpack and of the packages that its servers run on."""
    found = {"modelpack": modelpack.__version__}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _power(text: str) -> str:
    return "battery" if "Battery Power" in text else "AC" if "AC Power" in text else ""


def _cpuinfo() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "")


def _output(*command: str) -> str:
    """Return the output of a program; empty if it is missing or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_PROGRAM_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


# Requests to prepare for each client of a step that is limited by time: more than a server can
# complete. The number of prompt tokens is limited too, since generating them takes time.
_MAX_PER_CLIENT, _MAX_PROMPT_TOKENS = 250, 2**18
_MIN_REQUESTS = 4


@dataclass(frozen=True, slots=True)
class Step:
    """One load, run for `seconds` or (None) to its end; `level` is its value on the plan's axis."""

    name: str
    workload: Workload
    level: float
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Loads in order; `axis` is the unit of their levels: concurrency, requests/s or workload."""

    axis: str
    steps: tuple[Step, ...]
    description: str

    @property
    def most_at_once(self) -> int:
        """The largest concurrency of the steps; 1 if no step limits it."""
        return max((step.workload.concurrency for step in self.steps), default=1) or 1


def sweep(
    levels: Sequence[int] = CONCURRENCY,
    *,
    prompt: int = PROMPT_TOKENS,
    answer: int = OUTPUT_TOKENS,
    requests: int | None = None,
    seconds: float = SECONDS,
) -> Plan:
    """Return a plan with a step for each number of concurrent clients (closed loop).

    Each client sends its next request when it has the response to the previous one. A step takes
    an equal share of `seconds`, or `requests` requests.
    """
    steps = []
    for number, level in enumerate(levels):
        count = requests or max(
            _MIN_REQUESTS, level, min(level * _MAX_PER_CLIENT, _MAX_PROMPT_TOKENS // prompt)
        )
        workload = single_turns(f"concurrency-{level}", [(prompt, answer)] * count)
        workload = workload.limited(level).in_other_words(1 + 101 * number)
        limit = None if requests else seconds / len(levels)
        steps.append(Step(f"{level} at once", workload, level, limit))
    return Plan("concurrency", tuple(steps), _sizes(prompt, answer))


def rates(
    levels: Sequence[float],
    *,
    prompt: int = PROMPT_TOKENS,
    answer: int = OUTPUT_TOKENS,
    requests: int | None = None,
    seconds: float = SECONDS,
) -> Plan:
    """Return a plan with a step for each rate, in requests per second, as a Poisson process.

    Arrivals do not depend on the server's speed: the time that a request waits counts as latency.
    """
    steps = []
    for number, level in enumerate(levels):
        count = requests or max(_MIN_REQUESTS, math.ceil(level * seconds / len(levels)))
        workload = poisson(level, count, prompt, answer).in_other_words(1 + 101 * number)
        steps.append(Step(f"{level:g} a second", workload, level))
    return Plan("requests/s", tuple(steps), _sizes(prompt, answer))


def named(names: Sequence[str], *, requests: int | None = None) -> Plan:
    """Return a plan with a step for each named workload of `WORKLOADS`; raises `UsageError`."""
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown:
        raise UsageError(
            f"no such workload: {unknown[0]!r}", hint=f"choose one of {', '.join(WORKLOADS)}"
        )
    steps = []
    for number, name in enumerate(names):
        workload = WORKLOADS[name]()
        steps.append(Step(name, workload.first(requests) if requests else workload, number))
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
    """Send all requests of `workload`; start no session after `seconds`. Return the report.

    Latencies count from the time when a request was due, including a wait for
    `workload.concurrency`. `clock` must be the clock of `server`. The report's `client_cpu_share`
    is the share of one core that this process used.
    """
    records: list[Record] = []
    limit = asyncio.Semaphore(workload.concurrency or len(workload.sessions))
    processor, start = time.process_time(), clock()

    def now() -> float:
        return clock() - start

    async def talk(session: Session) -> None:
        """Send the turns of a session; stop at the first failure."""
        messages: list[dict[str, str]] = []
        due = session.arrival or now()
        for turn in session.turns:
            messages.append({"role": "user", "content": text_of(turn.token_ids)})
            record = Record(session.label, due, len(turn.token_ids))
            records.append(record)
            try:
                answer = await server.ask(messages, turn.max_tokens)
            except AnswerError as error:
                record.error = str(error)
                return
            record.token_times = [at - start for at in answer.times]
            record.num_tokens = answer.completion_tokens
            record.prompt_tokens = answer.prompt_tokens or record.prompt_tokens
            record.cached_tokens = answer.cached_tokens
            messages.append({"role": "assistant", "content": "".join(answer.text)})
            due = now()

    async with asyncio.TaskGroup() as tasks:
        for session in workload.sessions:
            await asyncio.sleep(max(0.0, session.arrival - now()))
            await limit.acquire()
            if seconds is not None and now() >= seconds:
                break
            task = tasks.create_task(talk(session))
            task.add_done_callback(lambda _: limit.release())
    duration = now()
    share = (time.process_time() - processor) / duration
    return make_report(workload.name, records, duration, {"client_cpu_share": round(share, 3)})


#: Incremented when a field of the JSON is removed or changes its meaning.
SCHEMA_VERSION = 1
# Above this share of a core, the client itself may limit the measured speed.
BUSY_CLIENT = 0.8
_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Run:
    """One step on one server."""

    step: Step
    report: Report

    def to_json(self) -> dict[str, Any]:
        """Return the step and all its figures."""
        return {"load": self.step.name, "level": self.step.level, **self.report.to_json()}


@dataclass(frozen=True, slots=True)
class Measured:
    """The results of one server; `name` is its name in the report."""

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
    """A complete benchmark: `command` repeats it, `when` is in UTC."""

    plan: Plan
    machine: Machine
    targets: tuple[Measured, ...]
    command: str
    when: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings about the figures: failed requests, uneven lengths, a busy client."""
        found = []
        for target in self.targets:
            if not target.served.exact_lengths:
                found.append(f"{target.name} does not support ignore_eos: response lengths differ")
            for run in target.runs:
                for error, count in run.report.errors.items():
                    found.append(f"{target.name}, {run.step.name}: {count} × {error}")
                share = run.report.extra.get("client_cpu_share", 0)
                if share > BUSY_CLIENT:
                    found.append(
                        f"{target.name}, {run.step.name}: the client used {share:.0%} of a core, "
                        "which may limit the figures"
                    )
        return tuple(found)

    @property
    def succeeded(self) -> bool:
        """Whether each step has a successful request on each server."""
        reports = [run.report for target in self.targets for run in target.runs]
        return all(report.failed < report.requests for report in reports)

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
    """Warm up one server, run `plan` on it and return the results.

    `versions` are added to those that the server reports. Raises the errors of `OpenAIServer.open`.
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
