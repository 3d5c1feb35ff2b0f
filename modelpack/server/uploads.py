"""Blob uploads (distribution-spec 1.1, "Pushing blobs")."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from modelpack.digest import Digest
from modelpack.errors import NotFoundError
from modelpack.http_connection import PIECE, REUSE
from modelpack.server.content import Content
from modelpack.server.errors import ApiError, Code
from modelpack.server.limits import Limits
from modelpack.server.names import Repository
from modelpack.server.ranges import ByteRange, chunk_range
from modelpack.server.sessions import (
    OutOfOrder,
    Superseded,
    TooMany,
    UploadSession,
    UploadSessions,
    Writer,
)
from modelpack.stores.disk_space import check_room

# Seconds after which an upload that receives nothing makes room for others, where room is short.
_IDLE = 3600.0
# Bytes after which a stream that does not say how long it is has the disk looked at again.
_LOOK = 16 * PIECE


class Uploads:
    """Endpoints of upload sessions."""

    def __init__(self, content: Content, limits: Limits) -> None:
        self._content = content
        self._limits = limits
        self._sessions = UploadSessions(content.uploads_directory)

    def count(self) -> int:
        """Return how many uploads have begun here and are not finished."""
        return len(self._sessions)

    async def start(self, request: Request) -> Response:
        """POST: begin a session, or mount a blob, or take a whole blob at once."""
        repository = Repository.parse(request.path_params["name"])
        mount = request.query_params.get("mount")
        digest = request.query_params.get("digest")
        if mount is not None:
            # All repositories share the blobs, so it does not matter from where.
            wanted = Digest.parse(mount)
            if await run_in_threadpool(self._content.touch_blob, wanted):
                return self._created(request, wanted)
        if digest is not None and mount is None:
            return await self._whole(request, repository, Digest.parse(digest))
        algorithm = request.query_params.get("digest-algorithm", "sha256")
        if algorithm not in ("sha256", "sha512"):
            raise ApiError(400, Code.DIGEST_INVALID, f"unsupported algorithm {algorithm[:80]!r}")
        session = await self._create(repository, algorithm)
        return Response(status_code=202, headers=self._state(request, session))

    async def status(self, request: Request) -> Response:
        """GET: how much arrived."""
        session = await self._session(request)
        return Response(status_code=204, headers=self._state(request, session))

    async def append(self, request: Request) -> Response:
        """PATCH: a chunk in its place, or a stream from where we are."""
        session = await self._session(request)
        claimed = _claimed_range(request)
        async with self._writing(request, session, claimed) as writer:
            await self._receive(request, session, writer, claimed)
        return Response(status_code=202, headers=self._state(request, session))

    async def finish(self, request: Request) -> Response:
        """PUT: perhaps the last chunk, then the digest of the whole."""
        digest = Digest.parse(request.query_params.get("digest", ""))
        session = await self._session(request)
        claimed = _claimed_range(request)
        async with self._writing(request, session, claimed, digest.algorithm) as writer:
            await self._receive(request, session, writer, claimed)
            await run_in_threadpool(writer.finish, digest, self._content.publish_blob)
        self._sessions.forget(session)
        return self._created(request, digest)

    async def cancel(self, request: Request) -> Response:
        """DELETE: forget the session."""
        session = await self._session(request)
        await run_in_threadpool(session.cancel)
        self._sessions.forget(session)
        return Response(status_code=204)

    async def _whole(self, request: Request, repository: Repository, digest: Digest) -> Response:
        session = await self._create(repository, digest.algorithm)
        try:
            async with self._writing(request, session, None, digest.algorithm) as writer:
                await self._receive(request, session, writer, None)
                await run_in_threadpool(writer.finish, digest, self._content.publish_blob)
        finally:  # the client never learned where the session is
            await run_in_threadpool(session.cancel)
            self._sessions.forget(session)
        return self._created(request, digest)

    async def _create(self, repository: Repository, algorithm: str) -> UploadSession:
        limit = self._limits.sessions
        wanted = (str(repository), algorithm, limit)
        with suppress(TooMany):
            return await run_in_threadpool(self._sessions.create, *wanted)
        await run_in_threadpool(self._sessions.drop_idle, _IDLE)
        try:
            return await run_in_threadpool(self._sessions.create, *wanted)
        except TooMany:
            message = f"{limit} uploads are under way, no more are taken"
            headers = {"Retry-After": "10"}
            raise ApiError(429, Code.TOOMANYREQUESTS, message, headers=headers) from None

    def _check_size(self, size: int) -> None:
        if self._limits.upload is not None and size > self._limits.upload:
            message = f"the blob is larger than the {self._limits.upload} bytes that are taken"
            raise ApiError(413, Code.SIZE_INVALID, message)

    async def _session(self, request: Request) -> UploadSession:
        repository = Repository.parse(request.path_params["name"])
        name = request.path_params["session"]
        try:
            return await run_in_threadpool(self._sessions.get, str(repository), name)
        except NotFoundError as error:
            raise _unknown(error) from None

    @asynccontextmanager
    async def _writing(
        self,
        request: Request,
        session: UploadSession,
        claimed: ByteRange | None,
        algorithm: str | None = None,
    ) -> AsyncIterator[Writer]:
        """Lend a writer; what goes wrong with the session becomes the protocol's answer."""
        start = claimed.start if claimed else None
        try:
            writer = await run_in_threadpool(session.writer, start, algorithm)
            try:
                length = int(request.headers.get("content-length", "0"))
                self._check_size(session.size + length)
                await run_in_threadpool(self._check_room, length)
                yield writer
            finally:
                writer.close()
        except NotFoundError as error:
            raise _unknown(error) from None
        except OutOfOrder:
            message = f"the chunk starts at {start}, expected {session.size}"
            headers = self._state(request, session)
            raise ApiError(416, Code.BLOB_UPLOAD_INVALID, message, headers=headers) from None
        except Superseded:
            message = "a later request continues this upload"
            raise ApiError(409, Code.BLOB_UPLOAD_INVALID, message) from None

    def _check_room(self, length: int) -> None:
        kept = self._limits.keep_free
        check_room(self._content.uploads_directory, length + kept, "the upload")

    async def _receive(
        self, request: Request, session: UploadSession, writer: Writer, claimed: ByteRange | None
    ) -> None:
        """Append the body to the session; what arrived before a cut is kept."""
        reuse = request.scope.get("extensions", {}).get(REUSE)
        pieces = _Pieces(writer, reuse["give_back"] if reuse else lambda piece: None)
        received, before = 0, session.size
        looked = None if "content-length" in request.headers else 0
        try:
            async for chunk in request.stream():
                received += len(chunk)
                if claimed and received > claimed.length:
                    raise _wrong_size(claimed, "more")
                self._check_size(before + received)
                if looked is not None and received - looked >= _LOOK:
                    looked = received
                    await run_in_threadpool(self._check_room, 0)
                await pieces.add(chunk)
        finally:
            await pieces.flush()
        if claimed and received < claimed.length:
            raise _wrong_size(claimed, str(received))

    def _state(self, request: Request, session: UploadSession) -> dict[str, str]:
        name = request.path_params["name"]
        return {
            "Location": f"/v2/{name}/blobs/uploads/{session.id}",
            "Range": f"0-{max(session.size - 1, 0)}",
            "Docker-Upload-UUID": session.id,
        }

    def _created(self, request: Request, digest: Digest) -> Response:
        name = request.path_params["name"]
        headers = {
            "Location": f"/v2/{name}/blobs/{digest}",
            "Docker-Content-Digest": str(digest),
        }
        return Response(status_code=201, headers=headers)


class _Pieces:
    """Hashes and writes one piece in a worker thread while the next one arrives.

    Whole pieces are taken as they are, less is gathered. `give_back` gets what was written.
    """

    def __init__(self, writer: Writer, give_back: Callable[[bytes | bytearray], None]) -> None:
        self._writer = writer
        self._give_back = give_back
        self._buffer = bytearray()
        self._pending: asyncio.Task[None] | None = None

    async def add(self, chunk: bytes | bytearray) -> None:
        if len(chunk) >= PIECE and self._buffer:
            await self._begin(self._buffer)
        if len(chunk) < PIECE:
            self._buffer += chunk
            chunk = self._buffer
        if len(chunk) >= PIECE:
            await self._begin(chunk)

    async def _begin(self, piece: bytes | bytearray) -> None:
        await self._settle()
        self._pending = asyncio.create_task(self._append(piece))
        self._buffer = bytearray()

    async def _append(self, piece: bytes | bytearray) -> None:
        await run_in_threadpool(self._writer.append, piece)
        self._give_back(piece)

    async def flush(self) -> None:
        await self._settle()
        if self._buffer:
            await run_in_threadpool(self._writer.append, self._buffer)

    async def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending:
            try:
                await pending
            except BaseException:
                self._buffer = bytearray()  # its place is after bytes that are not there
                raise


def _claimed_range(request: Request) -> ByteRange | None:
    header = request.headers.get("content-range")
    if header is None:
        return None
    claimed = chunk_range(header)
    if claimed is None:
        message = f"Content-Range is {header[:80]!r}, expected <first>-<last>"
        raise ApiError(400, Code.BLOB_UPLOAD_INVALID, message)
    length = request.headers.get("content-length")
    if length is not None and int(length) != claimed.length:
        raise _wrong_size(claimed, length)
    return claimed


def _wrong_size(claimed: ByteRange, got: str) -> ApiError:
    message = f"the chunk claims {claimed.length} bytes in Content-Range, got {got}"
    return ApiError(400, Code.SIZE_INVALID, message)


def _unknown(error: NotFoundError) -> ApiError:
    return ApiError(404, Code.BLOB_UPLOAD_UNKNOWN, str(error))
