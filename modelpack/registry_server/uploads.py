"""Blob uploads of the embedded registry: sessions, chunks, mounts, and the limits of one client."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from modelpack.artifacts.digest import ALGORITHMS, Digest, new_hasher
from modelpack.artifacts.json_document import MAX_DOCUMENT_BYTES
from modelpack.errors import DigestMismatchError, NotFoundError, UsageError
from modelpack.http import REUSE
from modelpack.http.connection import PIECE
from modelpack.registry_server.blob_fetch import ByteRange, chunk_range
from modelpack.registry_server.content import Content, Repository
from modelpack.registry_server.errors import ApiError, Code
from modelpack.store.deletion import abandoned_uploads, idle_seconds
from modelpack.store.file_copy import WriteBehind
from modelpack.store.filesystem import check_room, delete_tree, map_os_errors

if TYPE_CHECKING:
    from hashlib import _Hash


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits in bytes, and a number of upload sessions; None means no limit.

    `manifest` and `upload` limit each manifest and each blob, `sessions` limits all unfinished
    uploads together. `keep_free` bytes stay free on the disk, whatever is uploaded or fetched from
    an upstream.
    """

    manifest: int = MAX_DOCUMENT_BYTES
    upload: int | None = None
    sessions: int | None = 1000
    keep_free: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.manifest <= MAX_DOCUMENT_BYTES:
            raise UsageError(
                f"the limit for manifests must be from 1 to {MAX_DOCUMENT_BYTES} bytes"
            )
        for name, value in (("upload", self.upload), ("sessions", self.sessions)):
            if value is not None and value < 1:
                raise UsageError(f"the limit {name!r} is {value}, expected at least 1")
        if self.keep_free < 0:
            raise UsageError("the bytes to keep free must not be negative")


_SWEEP_INTERVAL = 600.0
_READ_SIZE = 1024 * 1024
# Threads that hash pieces while these are written, one for each processor.
_HASHERS: Final = ThreadPoolExecutor(os.cpu_count() or 1, "modelpack-hash")

#: Publishes a complete file, whose bytes have this digest, as a blob.
Publish = Callable[[Path, Digest], None]


class OutOfOrder(Exception):
    """A chunk does not start where the last one ended."""


class TooMany(Exception):
    """The limit on upload sessions is reached."""


class Superseded(Exception):
    """A later request took the session over."""


class UploadSession:
    """One upload; its methods block and are called from worker threads."""

    def __init__(self, directory: Path, repository: str, algorithm: str) -> None:
        self.id = directory.name
        self.repository = repository
        self.size = 0
        self._directory = directory
        self._data = directory / "data"
        self._algorithm = algorithm
        self._hasher: _Hash | None = None
        self._turn = 0
        self._closed = False
        self._lock = threading.Lock()

    @classmethod
    def create(cls, directory: Path, repository: str, algorithm: str) -> UploadSession:
        """Return a new, empty session."""
        session = cls(directory, repository, algorithm)
        session._hasher = new_hasher(algorithm)  # raises: before anything is on the disk
        state = {"repository": repository, "algorithm": algorithm}
        with map_os_errors("make an upload session in", directory):
            directory.mkdir(parents=True)
            (directory / "session.json").write_text(json.dumps(state))
            session._data.touch()
        return session

    @classmethod
    def load(cls, directory: Path) -> UploadSession:
        """Return the session that an earlier server left; raise `NotFoundError`."""
        try:
            state = json.loads((directory / "session.json").read_text())
            session = cls(directory, state["repository"], state["algorithm"])
            session.size = session._data.stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            raise NotFoundError(f"no upload session {directory.name}") from None
        return session

    def writer(self, start: int | None, algorithm: str | None = None) -> Writer:
        """Take the session over from any earlier request and return its writer.

        `start` is the offset that the client expects (None: the current size), `algorithm` that of
        the final digest, if it is known. Raises `OutOfOrder`.
        """
        with self._lock:
            self._check_open()
            if start == 0 and self.size == 1:
                # The status `0-0` means both nothing and one byte, so the client may start again.
                os.truncate(self._data, 0)
                self.size, self._hasher = 0, None
            if start is not None and start != self.size:
                raise OutOfOrder
            if algorithm is not None and algorithm != self._algorithm:
                self._algorithm, self._hasher = algorithm, None
            descriptor = self._open()
            try:
                if self._hasher is None or os.fstat(descriptor).st_size != self.size:
                    self._rebuild(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            self._turn += 1
            return Writer(self, descriptor, self._turn)

    def cancel(self) -> None:
        """Delete the session and its bytes."""
        with self._lock:
            self._close()

    def idle_seconds(self) -> float:
        """Return the seconds since the last bytes arrived."""
        try:
            return idle_seconds(self._directory)
        except FileNotFoundError:
            return float("inf")

    def is_over(self) -> bool:
        """Return whether the session ended, or a garbage collection removed it."""
        return self._closed or not self._data.exists()

    def _open(self) -> int:
        try:
            return os.open(self._data, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFoundError(f"no upload session {self.id}") from None

    def _append(self, turn: int, descriptor: int, content: bytes | bytearray) -> None:
        with self._lock:
            self._check_turn(turn)
            assert self._hasher is not None
            hasher = self._hasher.copy()
            hashing = _HASHERS.submit(hasher.update, content)
            try:
                with map_os_errors("receive a blob in", self._directory):
                    _write_at(descriptor, content, self.size)
            finally:
                hashing.result()
            self._hasher = hasher
            self.size += len(content)

    def _finish(self, turn: int, digest: Digest, publish: Publish) -> None:
        with self._lock:
            self._check_turn(turn)
            assert self._hasher is not None
            try:
                digest.check_equal(Digest.of_hasher(self._hasher), "the upload")
            except DigestMismatchError:
                self._close()  # no later request can correct these bytes
                raise
            publish(self._data, digest)
            self._close()

    def _rebuild(self, descriptor: int) -> None:
        hasher, offset = new_hasher(self._algorithm), 0
        while chunk := os.pread(descriptor, _READ_SIZE, offset):
            hasher.update(chunk)
            offset += len(chunk)
        self._hasher, self.size = hasher, offset

    def _check_turn(self, turn: int) -> None:
        self._check_open()
        if turn != self._turn:
            raise Superseded

    def _check_open(self) -> None:
        if self._closed:
            raise NotFoundError(f"no upload session {self.id}")

    def _close(self) -> None:
        self._closed = True
        delete_tree(self._directory)


def _write_at(descriptor: int, content: bytes | bytearray, offset: int) -> None:
    """Write all of `content`; after a failure, cut the file back to `offset`."""
    try:
        position = offset
        with memoryview(content) as view:
            while position < offset + len(view):
                position += os.pwrite(descriptor, view[position - offset :], position)
    except OSError:
        os.ftruncate(descriptor, offset)
        raise


class Writer:
    """One request's right to append to a session, until a later request takes it."""

    def __init__(self, session: UploadSession, descriptor: int, turn: int) -> None:
        self._session = session
        self._descriptor = descriptor
        self._turn = turn
        self._behind = WriteBehind(descriptor, session.size)

    def append(self, content: bytes | bytearray) -> None:
        """Write and hash `content`. Raises `Superseded`, `NotFoundError` once it is closed."""
        self._session._append(self._turn, self._descriptor, content)
        self._behind.written(self._session.size)

    def finish(self, digest: Digest, publish: Publish) -> None:
        """Verify and publish all bytes; the session ends, also after `DigestMismatchError`."""
        self._session._finish(self._turn, digest, publish)

    def close(self) -> None:
        """Close the file; what was appended stays in the session."""
        os.close(self._descriptor)


class UploadSessions:
    """All sessions of a store."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sessions: dict[str, UploadSession] = {}
        self._lock = threading.Lock()
        self._swept = -_SWEEP_INTERVAL

    def __len__(self) -> int:
        """Return the number of unfinished sessions that this server started or continued."""
        return len(self._sessions)

    def create(self, repository: str, algorithm: str, most: int | None = None) -> UploadSession:
        """Return a new session, whose id cannot be guessed; raise `TooMany` if there are `most`."""
        self._sweep()
        name = str(uuid.uuid4())
        with self._lock:  # so that concurrent requests count each other's sessions
            if most is not None and len(self._sessions) >= most:
                raise TooMany
            session = UploadSession.create(self._directory / name, repository, algorithm)
            self._sessions[name] = session
        return session

    def get(self, repository: str, name: str) -> UploadSession:
        """Return the session `name` of `repository`; raise `NotFoundError`."""
        try:
            known = str(uuid.UUID(name)) == name
        except ValueError:
            known = False
        if not known:
            raise NotFoundError(f"no upload session {name[:80]!r}")
        with self._lock:
            session = self._sessions.get(name)
            if session is None or session.is_over():
                session = self._sessions[name] = UploadSession.load(self._directory / name)
        if session.repository != repository:
            raise NotFoundError(f"no upload session {name} in {repository}")
        return session

    def drop_idle(self, seconds: float) -> None:
        """Cancel the sessions that have received nothing for `seconds`."""
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            if session.idle_seconds() > seconds:
                session.cancel()
                self.forget(session)

    def forget(self, session: UploadSession) -> None:
        """Drop a session that ended."""
        with self._lock:
            self._sessions.pop(session.id, None)

    def _sweep(self) -> None:
        """Cancel abandoned sessions, every ten minutes at most."""
        now = time.monotonic()
        with self._lock:
            if now - self._swept < _SWEEP_INTERVAL:
                return
            self._swept = now
        for path in abandoned_uploads(self._directory):
            with self._lock:
                session = self._sessions.get(path.name)
            if session is None:
                delete_tree(path)
            else:
                session.cancel()
                self.forget(session)


# Seconds after which an idle upload is cancelled if the limit on sessions is reached.
_IDLE = 3600.0
# Bytes after which the free space is checked again, for a stream of unknown length.
_LOOK = 16 * PIECE


class Uploads:
    """Endpoints of upload sessions."""

    def __init__(self, content: Content, limits: Limits) -> None:
        self._content = content
        self._limits = limits
        self._sessions = UploadSessions(content.uploads_directory)

    def count(self) -> int:
        """Return the number of unfinished uploads."""
        return len(self._sessions)

    async def start(self, request: Request) -> Response:
        """POST: start a session, mount a blob, or receive a whole blob."""
        repository = Repository.parse(request.path_params["name"])
        mount = request.query_params.get("mount")
        digest = request.query_params.get("digest")
        if mount is not None:
            # All repositories share the blobs, so `from` does not matter.
            wanted = Digest.parse(mount)
            if await run_in_threadpool(self._content.touch_blob, wanted):
                return self._created(request, wanted)
        if digest is not None and mount is None:
            return await self._whole(request, repository, Digest.parse(digest))
        algorithm = request.query_params.get("digest-algorithm", "sha256")
        if algorithm not in ALGORITHMS:
            raise ApiError(400, Code.DIGEST_INVALID, f"unsupported algorithm {algorithm[:80]!r}")
        session = await self._create(repository, algorithm)
        return Response(status_code=202, headers=self._state(request, session))

    async def status(self, request: Request) -> Response:
        """GET: report how many bytes have arrived."""
        session = await self._session(request)
        return Response(status_code=204, headers=self._state(request, session))

    async def append(self, request: Request) -> Response:
        """PATCH: append a chunk at its offset, or a stream at the end."""
        session = await self._session(request)
        claimed = _claimed_range(request)
        async with self._writing(request, session, claimed) as writer:
            await self._receive(request, session, writer, claimed)
        return Response(status_code=202, headers=self._state(request, session))

    async def finish(self, request: Request) -> Response:
        """PUT: append the last chunk, if any, and publish the blob under its digest."""
        digest = Digest.parse(request.query_params.get("digest", ""))
        session = await self._session(request)
        claimed = _claimed_range(request)
        async with self._writing(request, session, claimed, digest.algorithm) as writer:
            await self._receive(request, session, writer, claimed)
            await run_in_threadpool(writer.finish, digest, self._content.publish_blob)
        self._sessions.forget(session)
        return self._created(request, digest)

    async def cancel(self, request: Request) -> Response:
        """DELETE: cancel the session."""
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
        finally:  # the client does not know the session's URL
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
            message = f"{limit} uploads are in progress, which is the limit"
            headers = {"Retry-After": "10"}
            raise ApiError(429, Code.TOOMANYREQUESTS, message, headers=headers) from None

    def _check_size(self, size: int) -> None:
        if self._limits.upload is not None and size > self._limits.upload:
            message = f"the blob is larger than the limit of {self._limits.upload} bytes"
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
        """Yield a writer; errors of the session become errors of the protocol."""
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
        """Append the body to the session; after a failure, keep the bytes that arrived."""
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
        headers = {"Location": f"/v2/{name}/blobs/{digest}", "Docker-Content-Digest": str(digest)}
        return Response(status_code=201, headers=headers)


class _Pieces:
    """Hashes and writes one piece in a worker thread while the next one arrives.

    Whole pieces are written as they are, shorter ones are collected first. `give_back` gets each
    piece after it is written.
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
                self._buffer = bytearray()  # it belongs after bytes that were not written
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
