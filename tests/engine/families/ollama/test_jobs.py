"""Jobs: clients share them and see their progress; the last client's leaving stops them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from modelpack.artifacts.digest import Digest
from modelpack.errors import InterruptedTransferError, NotFoundError
from modelpack.progress import Action, Progress, ProgressCallback, Stop
from modelpack_server.api.ollama.jobs import Jobs

BLOB = Digest.of(b"blob")


class Steps:
    """Work that continues on a signal, and stops on request."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.runs = 0

    def __call__(self, report: ProgressCallback, stop: Stop) -> None:
        self.runs += 1
        report(Progress(Action.FETCH, "blob", BLOB, 1, 2))
        while not self.go_on.wait(0.005):
            stop.check()
        report(Progress(Action.FETCH, "blob", BLOB, 2, 2))


def running(test: Callable[[Jobs, Steps], object]) -> None:
    async def run() -> None:
        await asyncio.wait_for(test(Jobs(), Steps()), 30)  # type: ignore[arg-type]

    asyncio.run(run())


def test_two_share_one_job_and_each_is_told() -> None:
    async def both(jobs: Jobs, steps: Steps) -> None:
        one = jobs.get("key", steps)
        with one.watching():
            seen = one.news()
            assert (await anext(seen)).completed == 1
            two = jobs.get("key", steps)
            assert two is one
            with two.watching():
                late = two.news()
                assert (await anext(late)).completed == 1
                steps.go_on.set()
                assert [blob.completed async for blob in seen] == [2]
                assert [blob.completed async for blob in late] == [2]
        assert steps.runs == 1
        assert jobs.get("key", steps) is not one

    running(both)


def test_one_that_leaves_does_not_end_it_the_last_does() -> None:
    async def leave(jobs: Jobs, steps: Steps) -> None:
        job = jobs.get("key", steps)
        with job.watching():
            with job.watching():
                assert (await anext(job.news())).completed == 1
            assert not job.is_stopping
        assert job.is_stopping
        other = jobs.get("key", steps)
        assert other is not job
        with pytest.raises(InterruptedTransferError):
            await job.finished()
        with other.watching():
            steps.go_on.set()
            await other.finished()

    running(leave)


def test_all_hear_of_a_failure() -> None:
    def fail(report: ProgressCallback, stop: Stop) -> None:
        raise NotFoundError("nothing there")

    async def hear(jobs: Jobs, steps: Steps) -> None:
        job = jobs.get("key", fail)
        with job.watching():
            for wait in (job.finished(), anext(job.news())):
                with pytest.raises(NotFoundError):
                    await wait

    running(hear)
