"""Blob downloads through the cache: byte ranges, and clients that read while a fetch is running.

`Range` of a download is RFC 9110, section 14; `Content-Range` of a chunk is distribution-spec.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.errors import (
    AuthError,
    IntegrityError,
    ModelpackError,
    NotFoundError,
    RegistryError,
    RemoteUnavailableError,
)
from modelpack.progress import Action, Progress, Stop
from modelpack.registry_server.errors import ApiError, Code
from modelpack.storage import BlobReader, BlobSource, Watch
from modelpack.store.filesystem import map_os_errors
from modelpack.store.layout import LayoutStore

#: Bytes read and sent at a time; fewer cost more processor time per byte.
PIECE = 1024 * 1024
_RANGE = re.compile(r"bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*\Z", re.IGNORECASE | re.ASCII)
# distribution-spec "Pushing a blob in chunks": no unit, no total.
_CHUNK_RANGE = re.compile(r"(\d+)-(\d+)\Z", re.ASCII)
_MAX_DIGITS = 19  # as in 2**63; with thousands of digits, `int` raises another error


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`length` bytes from `start` on."""

    start: int
    length: int

    @property
    def last(self) -> int:
        """The position of the last byte."""
        return self.start + self.length - 1


class UnsatisfiableRange(ValueError):
    """A well-formed range that no byte of the content falls into."""


def requested_range(header: str | None, size: int) -> ByteRange | None:
    """Return the requested range of `size` bytes; None means all of them.

    Several ranges, other units and malformed headers count as none, as RFC 9110 allows. Raises
    `UnsatisfiableRange`, also for a range that ends before it starts.
    """
    match = _RANGE.match(header) if header else None
    if match is None or max(map(len, match.groups())) > _MAX_DIGITS:
        return None
    first, last = match.groups()
    if first:
        start = int(first)
        end = min(int(last) if last else size - 1, size - 1)
        if start >= size or end < start:
            raise UnsatisfiableRange(header)
        return ByteRange(start, end - start + 1)
    if not last:
        return None
    length = min(int(last), size)
    if length == 0:
        raise UnsatisfiableRange(header)
    return ByteRange(size - length, length)


def chunk_range(header: str) -> ByteRange | None:
    """Return the range in the `Content-Range` of a chunk, None if the header is malformed."""
    match = _CHUNK_RANGE.match(header)
    if match is None or max(map(len, match.groups())) > _MAX_DIGITS:
        return None
    first, last = (int(group) for group in match.groups())
    return ByteRange(first, last - first + 1) if last >= first else None


_log = logging.getLogger(__name__)
#: Downloads at a time: each has a thread, a connection and open files.
MOST_AT_A_TIME: Final = 32
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1


class Fetch:
    """One download from the upstream.

    `ready` bytes have arrived, most of them are in the file, and `ended` is true once it is over.
    If the bytes are wrong, they are fetched again from the start, as another `attempt`.
    """

    def __init__(
        self, store: LayoutStore, descriptor: Descriptor, source: BlobSource, stop: Stop
    ) -> None:
        self.descriptor = descriptor
        self._stop = stop
        self.ready = 0
        self.attempt = 1
        self.ended = False
        self.error: ModelpackError | None = None
        self.followers = 0  # requests that wait for its first bytes
        self._store = store
        self._source = source

    def run(self) -> None:
        """Download the blob to the store; blocks. Raises what the upstream or the store raises."""
        watch = Watch(self._report, self._stop)
        self._store.write_blob(self.descriptor, _Counted(self._source, self), watch)

    def sendable(self) -> int:
        """Return the number of bytes that may be sent now: the last ones are verified first."""
        return self.ready if self.ended else max(0, min(self.ready, self.descriptor.size - PIECE))

    def open(self) -> int:
        """Return the open file, complete or partial; raises `NotFoundError` if there is none."""
        path = self._store.partial_path(self.descriptor.digest)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            path = self._store.blob_path(self.descriptor.digest)
            with map_os_errors("read", path):
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _report(self, progress: Progress) -> None:
        if progress.action is Action.RETRY:  # the bytes sent so far may be wrong
            self.attempt += 1
            self.ready = 0


class _Counted:
    """A source that records the bytes read in `ready`, after those are written."""

    def __init__(self, source: BlobSource, fetch: Fetch) -> None:
        self._source = source
        self._fetch = fetch

    @contextmanager
    def open(self, offset: int = 0) -> Iterator[BlobReader]:
        with self._source.open(offset) as reader:
            yield _CountedReader(reader, self._fetch, offset)


class _CountedReader:
    def __init__(self, reader: BlobReader, fetch: Fetch, position: int) -> None:
        self._reader = reader
        self._fetch = fetch
        self._position = position

    def readinto(self, buffer: memoryview, /) -> int:
        self._fetch.ready = self._position
        count = self._reader.readinto(buffer)
        self._position += count
        return count


class Fetches:
    """The running downloads: one for each blob and size, for any number of clients.

    `MOST_AT_A_TIME` run at a time; the others are queued as long as a client waits for them.
    """

    def __init__(self, store: LayoutStore, stop: Stop) -> None:
        self._store = store
        self._stop = stop
        self._lock = threading.Lock()
        self._running: dict[tuple[Digest, int], Fetch] = {}
        self._waiting: deque[Fetch] = deque()
        self._threads = 0

    def of(self, descriptor: Descriptor, source: Callable[[], BlobSource]) -> Fetch:
        """Return the download of the blob and count one more follower, which must call `begin`."""
        with self._lock:
            fetch = self._running.get(_wanted(descriptor))
            if fetch is None:
                fetch = Fetch(self._store, descriptor, source(), self._stop)
                self._running[_wanted(descriptor)] = fetch
                self._waiting.append(fetch)
                if self._threads < MOST_AT_A_TIME:
                    self._threads += 1
                    threading.Thread(target=self._work, name="upstream", daemon=True).start()
            fetch.followers += 1
            return fetch

    async def begin(self, fetch: Fetch, request: Request) -> None:
        """Return when there are bytes to send; raise `ApiError` if the download fails before.

        Raises `ClientDisconnect` if the client no longer waits for the response.
        """
        pause = _FIRST_PAUSE
        try:
            while not fetch.ended and not fetch.sendable():
                if await request.is_disconnected():
                    raise ClientDisconnect
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            with self._lock:
                fetch.followers -= 1
        if fetch.error is not None:
            raise failed(fetch.error) from fetch.error

    def _work(self) -> None:
        while (fetch := self._next()) is not None:
            error: ModelpackError | None = None
            try:
                fetch.run()
            except ModelpackError as failure:
                error = failure
            except Exception as failure:  # noqa: BLE001 - no caller could handle it
                _log.exception("the download of %s failed", fetch.descriptor.digest)
                error = RemoteUnavailableError(f"the upstream failed: {type(failure).__name__}")
            with self._lock:
                self._end(fetch, error)

    def _next(self) -> Fetch | None:
        """Return the next download that a client waits for; None ends the thread."""
        with self._lock:
            while self._waiting:
                fetch = self._waiting.popleft()
                if fetch.followers:
                    return fetch
                self._end(fetch, RemoteUnavailableError("no client waited for the download"))
            self._threads -= 1
            return None

    def _end(self, fetch: Fetch, error: ModelpackError | None) -> None:
        del self._running[_wanted(fetch.descriptor)]  # the next request starts another one
        fetch.error = error
        if error is None:
            fetch.ready = fetch.descriptor.size
        fetch.ended = True


def _wanted(descriptor: Descriptor) -> tuple[Digest, int]:
    # Of two sizes for one digest, one is wrong, and `sendable` depends on the size.
    return descriptor.digest, descriptor.size


class FollowingResponse(Response):
    """Part of a blob that is being downloaded, sent as it arrives.

    If the download fails or starts again, the connection is closed before the promised length: the
    client detects that and asks for the rest.
    """

    def __init__(self, fetch: Fetch, part: ByteRange, status: int, headers: dict[str, str]) -> None:
        headers["Content-Length"] = str(part.length)
        super().__init__(status_code=status, headers=headers)
        self._fetch = fetch
        self._attempt = fetch.attempt
        self._part = part

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        gone = asyncio.create_task(wait_for_disconnect(receive))
        descriptor = -1
        try:
            descriptor = await run_in_threadpool(self._fetch.open)
            await self._send_body(send, gone, descriptor)
        except NotFoundError:
            return  # a garbage collection deleted it
        finally:
            gone.cancel()
            if descriptor >= 0:
                os.close(descriptor)

    async def _send_body(self, send: Send, gone: asyncio.Task[None], descriptor: int) -> None:
        position, end = self._part.start, self._part.start + self._part.length
        pause = _FIRST_PAUSE
        while position < end:
            begins_again = self._fetch.attempt != self._attempt
            if self._fetch.error is not None or begins_again or gone.done():
                return
            was_all = self._fetch.ended
            size = min(PIECE, end - position, self._fetch.sendable() - position)
            content = b""
            if size > 0:  # bytes count as ready shortly before they are written
                content = await run_in_threadpool(os.pread, descriptor, size, position)
            if not content:
                if was_all:
                    return
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            pause = _FIRST_PAUSE
            position += len(content)
            await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


def failed(error: ModelpackError) -> ApiError:
    """Return the response to a client for an error of the upstream."""
    if isinstance(error, AuthError):  # it names a user and the source of the password
        _log.warning("the upstream refused our credentials: %s", error)
        return ApiError(502, Code.DENIED, "the upstream refused the credentials of this registry")
    if isinstance(error, RemoteUnavailableError):
        return ApiError(504, Code.UNKNOWN, f"the upstream cannot be reached: {error}")
    if isinstance(error, RegistryError | IntegrityError):
        return ApiError(502, Code.UNKNOWN, f"the upstream failed: {error}")
    raise error
