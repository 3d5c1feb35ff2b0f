"""Blob downloads and deletion (distribution-spec 1.1, "Pulling blobs")."""

from __future__ import annotations

import asyncio
import os

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from modelpack.digest import Digest
from modelpack.server.content import Content
from modelpack.server.errors import ApiError, Code
from modelpack.server.names import Repository
from modelpack.server.ranges import ByteRange, UnsatisfiableRange, requested_range

#: Bytes that are read and sent at once; less costs more processor time for each byte.
PIECE = 1024 * 1024


class Blobs:
    """Endpoints of blobs. All repositories share them, so each of them has every blob."""

    def __init__(self, content: Content) -> None:
        self._content = content

    async def get(self, request: Request) -> Response:
        """GET and HEAD: the blob, or a range of it."""
        Repository.parse(request.path_params["name"])
        digest = Digest.parse(request.path_params["digest"])
        if request.method == "HEAD":  # who is told that it is here will not upload it
            await run_in_threadpool(self._content.touch_blob, digest)
        descriptor = await run_in_threadpool(self._content.open_blob, digest)
        if descriptor is None:
            raise unknown_blob(digest)
        try:
            return _answer(request, digest, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    async def delete(self, request: Request) -> Response:
        """DELETE: remove a blob that no manifest needs."""
        Repository.parse(request.path_params["name"])
        digest = Digest.parse(request.path_params["digest"])
        if not await run_in_threadpool(self._content.delete_blob, digest):
            raise unknown_blob(digest)
        return Response(status_code=202)


def unknown_blob(digest: Digest) -> ApiError:
    """Return the answer for a blob that is not there."""
    return ApiError(404, Code.BLOB_UNKNOWN, f"no blob {digest}", detail={"digest": str(digest)})


def _answer(request: Request, digest: Digest, descriptor: int) -> Response:
    size = os.fstat(descriptor).st_size
    etag = f'"{digest}"'
    headers = {
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
        "Docker-Content-Digest": str(digest),
        "ETag": etag,
    }
    if request.method == "HEAD":
        os.close(descriptor)
        return Response(headers={**headers, "Content-Length": str(size)})
    asked = request.headers.get("range")
    if request.headers.get("if-range", etag) != etag:
        asked = None
    try:
        part = requested_range(asked, size)
    except UnsatisfiableRange:
        os.close(descriptor)
        # An empty body: a client must not take it for bytes of the blob.
        return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
    if part is None:
        return FileResponse(descriptor, ByteRange(0, size), 200, headers)
    headers["Content-Range"] = f"bytes {part.start}-{part.last}/{size}"
    return FileResponse(descriptor, part, 206, headers)


class FileResponse(Response):
    """Part of an open file, read piece by piece in worker threads; closes the file."""

    def __init__(
        self, descriptor: int, part: ByteRange, status: int, headers: dict[str, str]
    ) -> None:
        headers["Content-Length"] = str(part.length)
        super().__init__(status_code=status, headers=headers)
        self._descriptor = descriptor
        self._part = part

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await self._send_body(send, gone)
        finally:
            gone.cancel()
            os.close(self._descriptor)

    async def _send_body(self, send: Send, gone: asyncio.Task[None]) -> None:
        position, end = self._part.start, self._part.start + self._part.length
        while position < end:
            size = min(PIECE, end - position)
            content = await run_in_threadpool(os.pread, self._descriptor, size, position)
            if not content or gone.done():
                return  # truncated meanwhile: the connection closes, the client sees it is short
            position += len(content)
            await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
