"""Blob downloads and deletion (distribution-spec 1.1, "Pulling blobs")."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from modelpack.artifacts.digest import Digest
from modelpack.http.connection import ZERO_COPY_SEND
from modelpack.registry_server.blob_fetch import (
    PIECE,
    ByteRange,
    FollowingResponse,
    UnsatisfiableRange,
    requested_range,
    wait_for_disconnect,
)
from modelpack.registry_server.cache import CachedContent
from modelpack.registry_server.content import Content, Repository
from modelpack.registry_server.errors import ApiError, Code

# Bytes of a file in one message: a download that is cut off is counted in such steps.
_SENT_AT_ONCE: Final = 8 * 1024 * 1024


class Blobs:
    """Endpoints of blobs, which all repositories share."""

    def __init__(self, content: Content) -> None:
        self._content = content

    async def get(self, request: Request) -> Response:
        """GET and HEAD: the blob, or a range of it."""
        repository = Repository.parse(request.path_params["name"])
        digest = Digest.parse(request.path_params["digest"])
        if request.method == "HEAD":  # a client that sees it will not upload it
            await run_in_threadpool(self._content.touch_blob, digest)
        descriptor = await run_in_threadpool(self._content.open_blob, digest)
        if descriptor is None:
            return await self._fetched(request, repository, digest)
        try:
            answer = _answer(request, digest, os.fstat(descriptor).st_size)
            if answer.part is not None:
                return FileResponse(descriptor, answer.part, answer.status, answer.headers)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return Response(status_code=answer.status, headers=answer.headers)

    async def _fetched(self, request: Request, repository: Repository, digest: Digest) -> Response:
        """Answer with a blob of the upstream, if there is one, while it is being downloaded."""
        content = self._content
        if not isinstance(content, CachedContent):
            raise unknown_blob(digest)
        needed = await run_in_threadpool(content.needed, repository, digest)
        if needed is None:
            raise unknown_blob(digest)
        answer = _answer(request, digest, needed.size)
        if answer.part is None:
            return Response(status_code=answer.status, headers=answer.headers)
        fetch = await content.fetch(repository, needed, request)
        return FollowingResponse(fetch, answer.part, answer.status, answer.headers)

    async def delete(self, request: Request) -> Response:
        """DELETE: remove a blob that no manifest needs."""
        Repository.parse(request.path_params["name"])
        digest = Digest.parse(request.path_params["digest"])
        if not await run_in_threadpool(self._content.delete_blob, digest):
            raise unknown_blob(digest)
        return Response(status_code=202)


def unknown_blob(digest: Digest) -> ApiError:
    """Return the error for a blob that does not exist."""
    return ApiError(404, Code.BLOB_UNKNOWN, f"no blob {digest}", detail={"digest": str(digest)})


@dataclass(frozen=True, slots=True)
class _Answer:
    """The status and headers of a response, and the `part` of the blob to send as its body."""

    status: int
    headers: dict[str, str]
    part: ByteRange | None = None


def _answer(request: Request, digest: Digest, size: int) -> _Answer:
    etag = f'"{digest}"'
    headers = {
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
        "Docker-Content-Digest": str(digest),
        "ETag": etag,
    }
    if request.method == "HEAD":
        return _Answer(200, {**headers, "Content-Length": str(size)})
    asked = request.headers.get("range")
    if request.headers.get("if-range", etag) != etag:
        asked = None
    try:
        part = requested_range(asked, size)
    except UnsatisfiableRange:
        # An empty body: a client must not take it for bytes of the blob.
        return _Answer(416, {"Content-Range": f"bytes */{size}"})
    if part is None:
        return _Answer(200, headers, ByteRange(0, size))
    headers["Content-Range"] = f"bytes {part.start}-{part.last}/{size}"
    return _Answer(206, headers, part)


class FileResponse(Response):
    """A response of part of an open file, which it closes; the kernel or worker threads read it."""

    def __init__(
        self, descriptor: int, part: ByteRange, status: int, headers: dict[str, str]
    ) -> None:
        headers["Content-Length"] = str(part.length)
        super().__init__(status_code=status, headers=headers)
        self._descriptor = descriptor
        self._part = part

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(wait_for_disconnect(receive))
        try:
            start = {"type": "http.response.start", "status": self.status_code}
            await send({**start, "headers": self.raw_headers})
            if ZERO_COPY_SEND in scope.get("extensions", {}):
                await self._send_by_kernel(send)
            else:
                await self._send_body(send, gone)
        finally:
            gone.cancel()
            os.close(self._descriptor)

    async def _send_by_kernel(self, send: Send) -> None:
        position, end = self._part.start, self._part.start + self._part.length
        with suppress(ConnectionError):  # also if the file was truncated meanwhile
            while position < end:
                count = min(_SENT_AT_ONCE, end - position)
                part = {"file": self._descriptor, "offset": position, "count": count}
                await send({"type": ZERO_COPY_SEND, **part, "more_body": True})
                position += count
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_body(self, send: Send, gone: asyncio.Task[None]) -> None:
        position, end = self._part.start, self._part.start + self._part.length
        while position < end:
            size = min(PIECE, end - position)
            content = await run_in_threadpool(os.pread, self._descriptor, size, position)
            if not content or gone.done():
                return  # truncated meanwhile: the connection closes, and the client detects it
            position += len(content)
            await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
