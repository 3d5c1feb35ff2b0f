"""Progress of pulls and pushes as lines of text, in Docker Model Runner's format.

A line is `{"type", "message", "total", "layer": {"id", "size", "current"}, "mode"}`; its types are
progress, warning, error and success, which is the last. Source: pkg/distribution/oci/progress.go
and pkg/distribution/internal/progress/reporter.go.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from fastapi import Request, Response
from pydantic import ConfigDict, Field

from modelpack.artifacts.model import Model
from modelpack.artifacts.reference import Reference, is_model_id
from modelpack.errors import UsageError
from modelpack.operations.lookup import inspect, stored_model
from modelpack.operations.pull import pull
from modelpack.operations.push import push
from modelpack.operations.remote import RemoteOptions
from modelpack.progress import Action, Progress, ProgressCallback, Stop
from modelpack.registry import Credential
from modelpack_server.api.bodies import Body
from modelpack_server.api.model_runner.answers import described
from modelpack_server.api.model_runner.names import find_stored
from modelpack_server.api.model_use import unless_gone
from modelpack_server.api.sse import LiveStream
from modelpack_server.pool.pool import ModelPool

_log = logging.getLogger(__name__)

Mode = Literal["pull", "push"]

T = TypeVar("T")

# The bytes between two reports of a layer.
_STEP = 1024 * 1024
# The escapes of Go's html.EscapeString, which Docker Model Runner uses for text clients.
_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&#34;", "'": "&#39;"})
_NONE = {"size": 0, "current": 0}
_VERBS = {"pull": "Downloaded", "push": "Uploaded"}


@dataclass(slots=True)
class Lines:
    """The lines of one transfer; `total` is the size of all its layers, in bytes, once known."""

    mode: Mode
    total: int
    escaped: bool
    _told: dict[str, int] = field(default_factory=dict)

    @classmethod
    def asked_by(cls, request: Request, mode: Mode) -> Lines:
        """Return the writer for a client: JSON lines if it accepts JSON, else escaped text."""
        return cls(mode, 0, escaped=request.headers.get("accept") != "application/json")

    @property
    def media_type(self) -> str:
        return "text/plain" if self.escaped else "application/json"

    def progress(self, report: Progress) -> str:
        """Return the line for a report, or "" if there is nothing new to report."""
        if report.action is Action.RETRY:
            return self._line("warning", report.message)
        if report.digest is None or report.total is None:
            return ""
        layer, current = str(report.digest), report.completed
        told = self._told.get(layer)
        if told is not None and not report.finished and current - told < _STEP:
            return ""
        if told == current:
            return ""
        self._told[layer] = current
        message = f"{_VERBS[self.mode]}: {current / 2**20:.2f} MB"
        shown = {"id": layer, "size": report.total, "current": current}
        return self._line("progress", message, self.total, shown)

    def success(self, message: str) -> str:
        return self._line("success", message)

    def error(self, error: Exception) -> str:
        return self._line("error", described(error).message)

    def _line(
        self, kind: str, message: str, total: int = 0, layer: dict[str, Any] | None = None
    ) -> str:
        value = {
            "type": kind, "message": message, "total": total, "layer": layer or _NONE,
            "mode": self.mode,
        }  # fmt: skip
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return (text.translate(_ESCAPES) if self.escaped else text) + "\n"


#: Work for a thread: it sets the total size, reports progress, ends early on request, and returns
#: the message for the last line.
Work = Callable[[Lines, ProgressCallback, Stop], str]


async def stoppable(request: Request, work: Callable[[Stop], T]) -> T:
    """Run `work` in a thread; stop it if the client disconnects."""
    stop = Stop()
    try:
        return await unless_gone(request, asyncio.to_thread(work, stop))
    finally:
        stop.request()


async def stream_progress(
    request: Request, work: Work, limit: asyncio.Semaphore, *, mode: Mode
) -> Response:
    """Run `work` in a thread within `limit` and stream its progress; stop it if the client
    disconnects.

    An exception of `work` before the first line is raised; a later one becomes the last line.
    """
    lines = Lines.asked_by(request, mode)
    reports: asyncio.Queue[Progress | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    stop = Stop()

    def report(progress: Progress) -> None:
        if progress.action is Action.NOTE:
            _log.warning("%s", progress.message)
        loop.call_soon_threadsafe(reports.put_nowait, progress)

    async with AsyncExitStack() as opened:
        await unless_gone(request, opened.enter_async_context(limit))
        worker = asyncio.ensure_future(asyncio.to_thread(work, lines, report, stop))
        worker.add_done_callback(lambda _: reports.put_nowait(None))

        async def end() -> None:
            stop.request()
            await asyncio.gather(worker, return_exceptions=True)

        opened.push_async_callback(end)
        told = _tell(reports, worker, lines)
        first = await unless_gone(request, anext(told))
        return LiveStream(
            _continued(first, told), opened.pop_all(),
            media_type=lines.media_type, failure=lines.error,
        )  # fmt: skip
    raise AssertionError("unreachable: the exit stack suppresses no exception")


async def _tell(
    reports: asyncio.Queue[Progress | None], worker: asyncio.Future[str], lines: Lines
) -> AsyncGenerator[str, None]:
    """Yield the progress lines of `worker`; raise what it raises."""
    while (report := await reports.get()) is not None:
        if line := lines.progress(report):
            yield line
    yield lines.success(worker.result())


async def _continued(first: str, rest: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    yield first
    async for line in rest:
        yield line


# The number of concurrent transfers, as in Docker Model Runner.
_AT_A_TIME = 2


class TransferRequest(Body):
    """The body of POST /models/create, and of a push, where `from` is not used."""

    model_config = ConfigDict(populate_by_name=True)
    source: str = Field("", alias="from")
    bearer_token: str = Field("", alias="bearer-token")


@dataclass(frozen=True, slots=True)
class BearerToken:
    """A bearer token for one registry, sent unchanged."""

    host: str
    token: str

    def credential(self, host: str) -> Credential | None:
        """Return the token for its own host, or None for another host."""
        if host != self.host:
            return None
        return Credential(registry_token=self.token, source="the request")


class Transfers:
    """Pulls to and pushes from the store of a pool."""

    def __init__(self, pool: ModelPool) -> None:
        self._pool = pool
        self._limit = asyncio.Semaphore(_AT_A_TIME)

    async def pull(self, request: Request, body: TransferRequest) -> Response:
        """Pull a model; raises what `modelpack.pull` raises before the first progress line."""
        if not body.source:
            raise UsageError("from is required: the name of the model to pull")
        reference = Reference.parse(body.source)
        remote = _remote(self._pool, reference, body.bearer_token)
        store = self._pool.catalogue.store

        def work(lines: Lines, report: ProgressCallback, stop: Stop) -> str:
            found = inspect(str(reference), remote=remote, from_registry=True, stop=stop)
            lines.total = _total(found)
            pull(
                reference, drafter=self._pool.uses_drafters(), store=store, remote=remote,
                progress=report, stop=stop,
            )  # fmt: skip
            return "Model pulled successfully"

        return await stream_progress(request, work, self._limit, mode="pull")

    async def push(self, request: Request, ref: str, body: TransferRequest) -> Response:
        """Push a model; raises what `modelpack.push` raises before the first progress line."""
        if is_model_id(ref):
            raise UsageError(f"cannot push {ref}: an id names no registry; tag the model first")
        reference = Reference.parse(ref)
        remote = _remote(self._pool, reference, body.bearer_token)
        store = self._pool.catalogue.store
        name, stored = await asyncio.to_thread(find_stored, store, ref)
        where = reference if name == ref else Reference.parse(name)

        def work(lines: Lines, report: ProgressCallback, stop: Stop) -> str:
            lines.total = _total(stored_model(store, str(stored.digest)))
            push(name, to=where, store=store, remote=remote, progress=report, stop=stop)
            return "Model pushed successfully"

        return await stream_progress(request, work, self._limit, mode="push")


def _remote(pool: ModelPool, reference: Reference, token: str) -> RemoteOptions:
    """Return the server's options for the registry, with the token of the request."""
    remote = pool.catalogue.remote
    if not token:
        return remote
    return replace(remote, credentials=BearerToken(reference.registry, token))


def _total(model: Model) -> int:
    return sum(blob.size for blob in model.manifest.unique_blobs)
