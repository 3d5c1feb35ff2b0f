"""Run a workload through an engine in this process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from modelpack_engine.engine import Engine
from modelpack_engine.platform import device
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_server.bench.report import Record, Report, make_report
from modelpack_server.bench.workloads import Session, Workload

#: Steps between two measurements of KV block usage, since a measurement takes time.
_STEPS_PER_COUNT = 8


@dataclass(slots=True)
class _Running:
    """A running session, and the tokens of its conversation so far."""

    session: Session
    turn: int = 0
    token_ids: list[int] = field(default_factory=list)
    record: Record | None = None


def run_workload(
    engine: Engine,
    workload: Workload,
    *,
    temperature: float = 0.0,
    adapters: Sequence[str] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> Report:
    """Run all requests of `workload`; responses have exactly the requested lengths.

    Requests name the `adapters` in turn.
    """
    return _Run(engine, workload, temperature, adapters, clock).report()


class _Run:
    def __init__(
        self,
        engine: Engine,
        workload: Workload,
        temperature: float,
        adapters: Sequence[str],
        clock: Callable[[], float],
    ) -> None:
        self._engine, self._workload, self._clock = engine, workload, clock
        self._temperature, self._adapters = temperature, adapters
        self._waiting = deque(workload.sessions)
        self._running: dict[str, _Running] = {}
        self._records: list[Record] = []
        self._count = 0
        self._waste: list[float] = []
        self._steps = 0
        self._start = 0.0

    def report(self) -> Report:
        before = self._engine.stats()
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        self._start = self._clock()
        while self._waiting or self._running:
            self._admit()
            if self._engine.has_work:
                self._step()
        duration = self._now()
        after = self._engine.stats()
        steps = after.num_steps - before.num_steps
        spent = {
            name: getattr(after, f"{name}_seconds") - getattr(before, f"{name}_seconds")
            for name in ("build", "launch", "wait")
        }
        extra = {
            "steps": steps,
            **{f"host_{name}_ms_per_step": round(1e3 * seconds / max(1, steps), 3)
               for name, seconds in spent.items()},
            "preemptions": after.num_preemptions - before.num_preemptions,
            "kv_waste": round(sum(self._waste) / max(1, len(self._waste)), 4),
            "peak_memory_bytes": device.peak_memory(),
            "memory_before_bytes": held,
        }  # fmt: skip
        return make_report(self._workload.name, self._records, duration, extra)

    def _now(self) -> float:
        return self._clock() - self._start

    def _admit(self) -> None:
        limit = self._workload.concurrency or len(self._workload.sessions)
        while self._waiting and len(self._running) < limit:
            if self._waiting[0].arrival > self._now():
                break
            session = self._waiting.popleft()
            self._say(_Running(session), max(session.arrival, 0.0) or self._now())

    def _say(self, running: _Running, due: float) -> None:
        """Send a session's next turn."""
        turn = running.session.turns[running.turn]
        running.token_ids += turn.token_ids
        running.record = Record(running.session.label, due, len(running.token_ids))
        self._records.append(running.record)
        self._count += 1
        name = f"{self._workload.name}-{self._count}"
        self._running[name] = running
        params = SamplingParams(
            max_tokens=turn.max_tokens, temperature=self._temperature, ignore_eos=True
        )
        adapter = self._adapters[self._count % len(self._adapters)] if self._adapters else None
        self._engine.add_request(name, EngineRequest(running.token_ids, params, adapter=adapter))

    def _step(self) -> None:
        events = self._engine.step()
        now = self._now()
        if self._steps % _STEPS_PER_COUNT == 0:
            stats = self._engine.stats()
            slots = stats.blocks_used * self._engine.config.block_size
            if slots and stats.live_tokens:
                self._waste.append(max(0.0, 1 - stats.live_tokens / slots))
        self._steps += 1
        for event in events:
            running = self._running[event.request_id]
            assert running.record is not None
            running.record.token_times += [now] * len(event.token_ids)
            running.token_ids += event.token_ids
            if event.usage is not None:
                running.record.cached_tokens = event.usage.cached_tokens
            if event.finished:
                del self._running[event.request_id]
                running.turn += 1
                if running.turn < len(running.session.turns):
                    self._say(running, now)
