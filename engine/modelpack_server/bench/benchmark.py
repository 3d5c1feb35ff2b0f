"""Benchmark: every step of a plan, on one server after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from modelpack_server.bench.load import run_load
from modelpack_server.bench.machine import Machine
from modelpack_server.bench.plan import Plan, Step
from modelpack_server.bench.report import Report
from modelpack_server.bench.server import OpenAIServer, Served
from modelpack_server.bench.workloads import single_turns

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
