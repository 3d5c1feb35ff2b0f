"""The routes POST /api/pull and /api/push: transfers that several clients may share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import Reference
from modelpack.operations.pull import pull
from modelpack.operations.push import push
from modelpack.operations.remote import RemoteOptions
from modelpack.progress import Action, Progress, ProgressCallback, Stop
from modelpack_server.api.model_use import unless_gone
from modelpack_server.api.ollama import ndjson
from modelpack_server.api.ollama.bodies import TransferBody
from modelpack_server.api.ollama.ndjson import JsonRoute, find
from modelpack_server.api.sse import LiveStream
from modelpack_server.pool.pool import ModelPool

_log = logging.getLogger(__name__)

#: The work of a job, for a thread: it reports progress and checks `Stop` regularly.
Work = Callable[[ProgressCallback, Stop], None]

# Threads of their own, since a download may take hours. Further jobs wait.
_THREADS = ThreadPoolExecutor(8, thread_name_prefix="modelpack-job")


class Job:
    """A running job. Use it only on the event loop on which it was created."""

    def __init__(self, work: Work, on_end: Callable[[Job], None]) -> None:
        self._blobs: dict[Digest, Progress] = {}
        self._changed = asyncio.Event()
        self._stop = Stop()
        self._watchers = 0
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.run_in_executor(_THREADS, work, self._report, self._stop)
        self._task.add_done_callback(lambda _: self._end(on_end))

    @property
    def is_stopping(self) -> bool:
        """Whether the job is being stopped because no client waits for it."""
        return self._stop.is_requested()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count a waiting client in the block; the job stops when the last client leaves."""
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._stop.request()

    async def finished(self) -> None:
        """Wait for the end of the job; raise what it raised."""
        await asyncio.shield(self._task)

    async def news(self) -> AsyncIterator[Progress]:
        """Yield the progress of each blob, now and at each change, until the job ends.

        A slow reader gets only the latest progress. Raises what the job raised.
        """
        told: dict[Digest, int] = {}
        while True:
            ended = self._task.done()
            changed = self._changed
            for digest, blob in list(self._blobs.items()):
                if told.get(digest) != blob.completed:
                    told[digest] = blob.completed
                    yield blob
            if ended:
                self._task.result()
                return
            await changed.wait()

    def _report(self, progress: Progress) -> None:
        """Pass a progress report from the job's thread to the event loop."""
        if progress.action is Action.NOTE:
            _log.warning("%s", progress.message)
        if progress.digest is not None:
            with suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(self._take, progress)

    def _take(self, progress: Progress) -> None:
        assert progress.digest is not None
        self._blobs[progress.digest] = progress
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _end(self, on_end: Callable[[Job], None]) -> None:
        if not self._task.cancelled():
            self._task.exception()  # mark it as retrieved: maybe no client waits
        on_end(self)
        self._wake()


class Jobs:
    """The running jobs, by key."""

    def __init__(self) -> None:
        self._jobs: dict[Hashable, Job] = {}

    def get(self, key: Hashable, work: Work) -> Job:
        """Return the running job for `key`, or start one that does `work`."""
        job = self._jobs.get(key)
        if job is None or job.is_stopping:
            job = self._jobs[key] = Job(work, lambda ended: self._forget(key, ended))
        return job

    def _forget(self, key: Hashable, job: Job) -> None:
        if self._jobs.get(key) is job:
            del self._jobs[key]


_SUCCESS = {"status": "success"}


@dataclass(frozen=True, slots=True)
class Steps:
    """The names of a job's steps: the first, the verb for blobs, and the last."""

    first: str
    verb: str
    last: tuple[str, ...]


async def tell(request: Request, job: Job, steps: Steps, *, stream: bool) -> Response:
    """Respond with the progress of a job, or only with its end; raises what it raised.

    The job stops when no client waits for it.
    """
    if not stream:
        with job.watching():
            await unless_gone(request, job.finished())
        return JSONResponse(_SUCCESS)
    opened = AsyncExitStack()
    opened.enter_context(job.watching())
    return LiveStream(
        _lines(job, steps), opened, media_type=ndjson.MEDIA_TYPE, failure=ndjson.error_line
    )


async def _lines(job: Job, steps: Steps) -> AsyncGenerator[str, None]:
    yield ndjson.line({"status": steps.first})
    async for blob in job.news():
        yield ndjson.line(_blob(blob, steps.verb))
    for status in steps.last:
        yield ndjson.line({"status": status})
    yield ndjson.line(_SUCCESS)


def _blob(blob: Progress, verb: str) -> dict[str, Any]:
    digest = str(blob.digest)
    name = digest.partition(":")[2][:12]
    body: dict[str, Any] = {"status": f"{verb} {name}", "digest": digest, "total": blob.total or 0}
    return body | ({"completed": blob.completed} if blob.completed else {})


_PULL = Steps("pulling manifest", "pulling", ("verifying sha256 digest", "writing manifest"))
_PUSH = Steps("retrieving manifest", "pushing", ("pushing manifest",))


def router(pool: ModelPool) -> APIRouter:
    routes = APIRouter(tags=["Ollama"], route_class=JsonRoute)
    jobs = Jobs()

    @routes.post("/api/pull", response_model=None)
    async def pull_model(body: TransferBody, request: Request) -> Response:
        """Pull a model; several requests for the same model share one pull."""
        where, remote = Reference.parse(body.model), _remote(pool, body)
        store = pool.catalogue.store

        def work(report: ProgressCallback, stop: Stop) -> None:
            pull(
                where, drafter=pool.uses_drafters(), store=store, remote=remote,
                progress=report, stop=stop,
            )  # fmt: skip

        job = jobs.get(("pull", str(where), body.insecure), work)
        return await tell(request, job, _PULL, stream=body.stream)

    @routes.post("/api/push", response_model=None)
    async def push_model(body: TransferBody, request: Request) -> Response:
        """Push a model to the registry in its name."""
        found = await find(pool, body.model)
        where, remote = Reference.parse(body.model), _remote(pool, body)
        store = pool.catalogue.store

        def work(report: ProgressCallback, stop: Stop) -> None:
            push(found.key, to=where, store=store, remote=remote, progress=report, stop=stop)

        job = jobs.get(("push", str(where), body.insecure), work)
        return await tell(request, job, _PUSH, stream=body.stream)

    return routes


def _remote(pool: ModelPool, body: TransferBody) -> RemoteOptions:
    """Return the options for the registry, with plain HTTP if the request asks for it."""
    remote = pool.catalogue.remote
    return replace(remote, plain_http=True) if body.insecure else remote
