"""How a job goes on, told as lines of JSON, or its end alone."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from modelpack.progress import Progress
from modelpack_server.api.answering import unless_gone
from modelpack_server.api.ollama import ndjson
from modelpack_server.api.ollama.jobs import Job
from modelpack_server.api.sse import LiveStream

_SUCCESS = {"status": "success"}


@dataclass(frozen=True, slots=True)
class Steps:
    """What the steps of a job are called: its first, what it does with blobs, and its last."""

    first: str
    verb: str
    last: tuple[str, ...]


async def tell(request: Request, job: Job, steps: Steps, *, stream: bool) -> Response:
    """Answer with how a job goes on, or with its end alone; raises what it raised.

    The job ends when nobody waits for it any more.
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
