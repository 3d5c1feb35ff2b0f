"""Run a workload against a server, from one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from modelpack_server.bench.report import Record, Report, make_report
from modelpack_server.bench.server import AnswerError, OpenAIServer
from modelpack_server.bench.words import text_of
from modelpack_server.bench.workloads import Session, Workload


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
