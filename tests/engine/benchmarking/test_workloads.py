"""Workloads arrive as they say, and reports add up."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.request import EngineRequest
from modelpack_server.bench.engine_load import run_workload
from modelpack_server.bench.report import Record, make_report, percentile, summary
from modelpack_server.bench.workloads import (
    HIGHEST_ID,
    LOWEST_ID,
    WORKLOADS,
    Session,
    Turn,
    Workload,
    matrix,
    multi_turn,
    poisson_with_8k,
    shared_prefix,
)
from tests.engine.serving.tiny import tiny_loaded


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_the_same_every_time(name: str) -> None:
    workload = WORKLOADS[name]()
    assert workload == WORKLOADS[name]()
    assert workload.sessions
    arrivals = [session.arrival for session in workload.sessions]
    assert arrivals == sorted(arrivals)
    ids = {i for s in workload.sessions for turn in s.turns for i in turn.token_ids}
    assert min(ids) >= LOWEST_ID
    assert max(ids) < HIGHEST_ID


def test_other_words() -> None:
    """Lengths, arrivals and shared prefixes stay; no token does."""
    workload = shared_prefix(100, 0.9, 4)
    other = workload.in_other_words(5)
    assert other.longest == workload.longest
    for one, two in zip(workload.sessions, other.sessions, strict=True):
        pairs = zip(one.turns[0].token_ids, two.turns[0].token_ids, strict=True)
        assert all(a != b and LOWEST_ID <= b < HIGHEST_ID for a, b in pairs)
    assert len({s.turns[0].token_ids[:90] for s in other.sessions}) == 1


def test_one_long_prompt_among_short_ones() -> None:
    sessions = poisson_with_8k().sessions
    (long,) = [session for session in sessions if session.label == "8k"]
    assert len(long.turns[0].token_ids) == 8192
    assert 0 < sessions.index(long) < len(sessions) - 1
    assert poisson_with_8k().longest == 8192 + 16


def test_shared_prefix() -> None:
    cold, *others = shared_prefix(100, 0.9, 4).sessions
    assert (cold.label, {s.label for s in others}) == ("cold", {"shared"})
    assert len({s.turns[0].token_ids[:90] for s in (cold, *others)}) == 1
    assert len({s.turns[0].token_ids[90:] for s in (cold, *others)}) == 4


def test_matrix() -> None:
    workload = matrix(4, 128)
    assert (len(workload.sessions), workload.concurrency, workload.longest) == (12, 4, 256)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([1.0], 99, 1.0), ([3.0, 1.0, 2.0], 50, 2.0), (list(range(1, 101)), 90, 90), ([1, 2], 50, 1)],
)
def test_percentile(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_report() -> None:
    records = [
        Record("a", 0.0, 10, [1.0, 1.5, 2.5], cached_tokens=5),
        Record("b", 1.0, 30, [1.25]),
    ]
    report = make_report("w", records, 4.0, {"steps": 3})
    body = report.to_json()
    assert body["output_tokens_per_s"] == 1.0
    assert body["total_tokens_per_s"] == 11.0
    assert body["cached_share"] == 0.125
    assert body["ttft_s"]["p50"] == 0.25
    assert body["ttft_s"]["p99"] == 1.0
    assert body["tpot_s"] == {"mean": 0.75, "p50": 0.75, "p90": 0.75, "p99": 0.75}
    assert body["itl_s"]["p50"] == 0.5
    assert body["e2el_s"]["p99"] == 2.5
    assert body["steps"] == 3
    assert body["labels"]["b"]["tpot_s"] == {}
    assert summary([]) == {}


def ticking() -> Iterator[float]:
    """Seconds that pass by one at each look."""
    return itertools.count(0.0, 1.0)


def test_run() -> None:
    """Turns follow each other with all that was said, arrivals wait, and nothing is lost."""
    loaded = tiny_loaded()
    engine = Engine(loaded, EngineConfig(max_num_seqs=4, max_model_len=256))
    turns = tuple(Turn(tuple((7 * i + j) % 256 for j in range(20)), 5) for i in range(3))
    late = Session((Turn((1, 2, 3), 4),), arrival=30.0, label="late")
    workload = Workload("w", (Session(turns), late))
    clock = ticking()
    report = run_workload(engine, workload, clock=lambda: next(clock))
    assert report.requests == 4
    assert report.output_tokens == 3 * 5 + 4
    assert report.prompt_tokens == 20 + 45 + 70 + 3
    assert report.cached_tokens == 16 + 48, "whole blocks of what was said before"
    assert report.extra["labels"]["late"]["ttft_s"]["p50"] > 0
    assert 0 < report.extra["kv_waste"] < 1
    assert engine.stats().blocks_used == 0


def test_requests_name_the_adapters_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_loaded(), EngineConfig(max_num_seqs=4, max_model_len=256))
    add, named = engine.add_request, list[str | None]()

    def add_without(request_id: str, request: EngineRequest) -> None:
        named.append(request.adapter)
        add(request_id, replace(request, adapter=None))

    monkeypatch.setattr(engine, "add_request", add_without)
    workload = Workload("w", (Session((Turn((1, 2, 3), 2),)),) * 4)
    run_workload(engine, workload, adapters=["a", "b"])
    assert sorted(map(str, named)) == ["a", "a", "b", "b"]
    run_workload(engine, workload)
    assert named[4:] == [None] * 4


def test_multi_turn_runs_side_by_side() -> None:
    workload = multi_turn(3, 2)
    assert [len(session.turns) for session in workload.sessions] == [2, 2, 2]
    assert {len(s.turns[0].token_ids) for s in workload.sessions} == {256}
