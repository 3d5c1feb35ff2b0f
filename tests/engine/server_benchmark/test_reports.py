"""Plans and reports of benchmarks."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from modelpack.errors import UsageError
from modelpack_server.bench import benchmark as plan
from modelpack_server.bench.benchmark import Benchmark, Machine, Measured, Run, this_machine
from modelpack_server.bench.report import Record, make_report
from modelpack_server.bench.server import Served
from modelpack_server.bench.tables import draw, markdown
from modelpack_server.bench.workloads import WORKLOADS

EXPECTED = Path(__file__).with_name("expected")


def measured(
    name: str, steps: plan.Plan, pace: float, *, errors: int = 0, cpu: float = 0.1
) -> Measured:
    runs = []
    for step in steps.steps:
        records = [
            Record("", 0.0, 100, [0.1 * pace * (1 + i), 0.1 * pace * (2 + i)], num_tokens=11)
            for i in range(4)
        ]
        records += [Record("", 0.0, 100, error="timed out")] * errors
        runs.append(Run(step, make_report(step.name, records, 2.0, {"client_cpu_share": cpu})))
    return Measured(name, Served("m", {"server": "1.2"}, exact_lengths=not errors), tuple(runs))


def benchmark(*targets: Measured, steps: plan.Plan) -> Benchmark:
    machine = Machine("M4 Max", 16, 64 * 2**30, "macOS 15.5", "", "battery", {"python": "3.13.1"})
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    return Benchmark(steps, machine, targets, "modelpack bench a b", when)


@pytest.fixture
def compared() -> Benchmark:
    steps = plan.sweep((1, 8))
    slow = measured("http://b", steps, 2.0, errors=1, cpu=0.95)
    return benchmark(measured("ai/a", steps, 1.0), slow, steps=steps)


def test_markdown(compared: Benchmark) -> None:
    assert markdown(compared) == (EXPECTED / "compared.md").read_text()


def test_json(compared: Benchmark) -> None:
    assert compared.to_json() == json.loads((EXPECTED / "compared.json").read_text())


def test_a_step_without_any_answer() -> None:
    steps = plan.sweep((1,))
    report = make_report("w", [Record("", 0.0, 1, error="HTTP 500")], 1.0, {})
    found = benchmark(Measured("a", Served("m"), (Run(steps.steps[0], report),)), steps=steps)
    assert not found.succeeded
    assert "1 × HTTP 500" in markdown(found)
    assert "– |" in markdown(found)


@pytest.mark.long
@pytest.mark.parametrize("workload", [False, True])
def test_picture(compared: Benchmark, tmp_path: Path, workload: bool) -> None:
    steps = plan.named(["load-m-32"]) if workload else compared.plan
    draw(benchmark(measured("a", steps, 1.0), steps=steps), tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[at : at + 4]) for at in (16, 20))
    assert (width, height) == (1620, 504)
    assert len(data) > 10_000, "there is something in it"


def test_sweep_shares_the_seconds() -> None:
    steps = plan.sweep((1, 4), prompt=10, answer=5, seconds=30).steps
    assert [(step.workload.concurrency, step.level, step.seconds) for step in steps] == [
        (1, 1, 15),
        (4, 4, 15),
    ]
    prompts = [s.turns[0].token_ids for step in steps for s in step.workload.sessions]
    assert len(set(prompts)) == len(prompts), "no cache has seen any"
    assert all(len(ids) == 10 for ids in prompts)
    assert len(plan.sweep((2,), prompt=100_000).steps[0].workload.sessions) == 4


def test_a_number_of_requests_takes_its_time() -> None:
    [step] = plan.sweep((4,), requests=7).steps
    assert (len(step.workload.sessions), step.seconds) == (7, None)


def test_rates() -> None:
    made = plan.rates((2.0, 8.0), seconds=40)
    assert [len(step.workload.sessions) for step in made.steps] == [40, 160]
    for step in made.steps:
        arrivals = [session.arrival for session in step.workload.sessions]
        assert arrivals == sorted(arrivals)
        assert 0.5 < len(arrivals) / arrivals[-1] / step.level < 2
        assert step.workload.concurrency == 0
    gaps = [b - a for a, b in itertools.pairwise(arrivals)]
    assert max(gaps) > 4 * min(gaps), "they do not come in step"


def test_named_workloads() -> None:
    made = plan.named(["multi-turn", "load-m-128"], requests=3)
    assert [len(step.workload.sessions) for step in made.steps] == [3, 3]
    assert made.most_at_once == 128
    with pytest.raises(UsageError, match="'nothing'") as raised:
        plan.named(["nothing"])
    assert raised.value.hint is not None
    assert all(name in raised.value.hint for name in WORKLOADS)


def test_this_machine() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory > 2**28
    assert {"processor", "system", "versions"} <= machine.to_json().keys()
