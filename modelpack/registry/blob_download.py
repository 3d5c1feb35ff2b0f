"""Blob downloads: a stream that resumes by ranges, and segments over several connections.

A resumed download sends no `If-Range`: a digest always names the same bytes, while replicas of one
storage may disagree about ETags. A wrong byte is detected when the whole blob is verified.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final

import requests

from modelpack.artifacts.descriptor import Descriptor
from modelpack.errors import (
    RegistryError,
    RemoteTimeoutError,
    RemoteUnavailableError,
    SizeMismatchError,
)
from modelpack.progress import Stop
from modelpack.registry.endpoint import BlobLocation
from modelpack.registry.http_client import Call, stated_number
from modelpack.registry.limits import Speed, either
from modelpack.registry.retry import FailedTry
from modelpack.registry.urls import origin_of
from modelpack.storage import SegmentSink, SegmentsRefused

#: Bytes asked of the socket at a time.
_READ_SIZE: Final = 512 * 1024
_CONTENT_RANGE = re.compile(r"bytes\s+([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)\Z")


class BlobStream:
    """The bytes of a blob from an offset on, over as many connections as it takes.

    With `end` it is a segment: the bytes before `end`, and `SegmentsRefused` where the registry
    answers with something else.
    """

    def __init__(
        self,
        location: BlobLocation,
        descriptor: Descriptor,
        offset: int,
        end: int | None = None,
        stop: Stop | None = None,
    ) -> None:
        self._location = location
        self._client = location.client
        self._descriptor = descriptor
        self._what = location.label
        self._position = offset
        self._is_segment = end is not None
        self._end = descriptor.size if end is None else end
        self._stop = either(stop or self._client.stop, self._client.stop)
        self._retries = self._client.retries(self._stop)
        self._rate = self._client.blobs.rate
        self._step = min(_READ_SIZE, self._rate.step) if self._rate else _READ_SIZE
        self._ranges_work = True
        self._response: requests.Response | None = None
        self._speed = Speed(self._client.timeouts)
        self._ended = offset == self._end and offset > 0
        if not self._ended:
            self._reconnect(None)

    def __enter__(self) -> BlobStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connection; it serves again if the blob was read to its end."""
        response, self._response = self._response, None
        self._ended = True
        if response is not None:
            response.close()

    def readinto(self, buffer: memoryview) -> int:
        """Fill `buffer` from its start with what has arrived; 0 means the end.

        Raises `SizeMismatchError` if the blob ends early or goes on too long, and
        `RemoteUnavailableError` when reconnecting does not help any more.
        """
        while not self._ended:
            try:
                data = self._receive(min(len(buffer), self._end - self._position))
            except FailedTry as failed:
                self._reconnect(failed)
                continue
            count = len(data)
            if count:
                buffer[:count] = data
                self._position += count
                return count
            self._finish()
        return 0

    def _receive(self, length: int) -> bytes:
        """Return up to `length` bytes, fewer only at the end of the answer."""
        assert self._response is not None
        url = self._response.url
        self._stop.check()
        inflow = self._client.inflow(self._step)
        with self._client.guarded(self._what, url, self._stop, inflow), self._speed.clocked():
            # One more byte at the end shows an answer that is too long, and frees the connection.
            data: bytes = self._response.raw.read1(min(length or 1, self._step))
        if data and not length:
            raise self._wrong_size(f"more than {self._descriptor.size}")
        if self._rate is not None:
            self._rate.wait(len(data), self._stop)
        if self._speed.is_too_low(len(data)):
            host = origin_of(url).netloc
            raise FailedTry(
                RemoteTimeoutError(f"{self._what}: {host} sends next to nothing", host=host)
            )
        return data

    def _finish(self) -> None:
        """Take the end of an answer: it is the end of the blob, or the connection was cut."""
        if self._position < self._end:
            assert self._response is not None
            self._reconnect(self._cut_off(self._response, self._position))
        else:
            self.close()

    def _cut_off(self, response: requests.Response, position: int) -> FailedTry:
        """Return the failed try that an answer is which ended at `position` of the blob."""
        if "Transfer-Encoding" in response.headers:  # it ended as it meant to
            raise self._wrong_size(str(position))
        return FailedTry(
            RemoteUnavailableError(
                f"{self._what}: the connection ended after {position} "
                f"of {self._descriptor.size} bytes",
                host=origin_of(response.url).netloc,
            )
        )

    def _reconnect(self, failed: FailedTry | None) -> None:
        """Connect to go on at the current position, as often as that may help."""
        while True:
            if self._response is not None:
                self._response.close()
                self._response = None
            if failed is not None:
                pause = self._client.retry.first_delay
                if self._speed.was_fair(self._descriptor.size, pause):
                    self._retries.made_progress()
                self._retries.wait_after(failed)
            self._speed = Speed(self._client.timeouts)
            try:
                self._response = self._connect()
                return
            except FailedTry as another:
                failed = another

    def _connect(self) -> requests.Response:
        position = self._position if self._ranges_work else 0
        last = str(self._end - 1) if self._is_segment else ""
        headers = {"Range": f"bytes={position}-{last}"} if position or last else {}
        try:
            response = self._client.attempt(
                Call(
                    self._what,
                    "GET",
                    self._location.url,
                    headers,
                    scopes=self._location.scopes,
                    stream=True,
                    stop=self._stop,
                )
            )
        except RegistryError as error:
            if error.status_code == 416:
                raise self._wrong_size(f"at most {position}") from None
            raise
        try:
            if self._is_segment and response.status_code != 206:
                raise SegmentsRefused(f"{self._what}: answered {response.status_code} to a range")
            self._check_length(response, position)
            if position != self._position or (position and response.status_code != 206):
                self._skip(response)
        except BaseException:
            response.close()
            raise
        return response

    def _check_length(self, response: requests.Response, position: int) -> None:
        """Refuse an answer that is not the wanted part of a blob of the right size."""
        size = self._descriptor.size
        start = 0
        if response.status_code == 206:
            match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != position or int(match[2]) >= self._end:
                self._ranges_work = False
                if self._is_segment:
                    raise SegmentsRefused(f"{self._what}: the registry answers other ranges")
                shown = response.headers.get("Content-Range", "nothing")[:60]
                raise FailedTry(
                    RegistryError(
                        f"{self._what}: asked for the bytes from {position} on, "
                        f"got the range {shown!r}",
                        host=origin_of(response.url).netloc,
                        status_code=206,
                    )
                )
            if match[3] not in ("*", str(size)):
                raise self._wrong_size(match[3])
            start = position
        length = stated_number(response)
        if length is not None and "Transfer-Encoding" not in response.headers:
            total = start + length
            # A server may send less than the whole rest of a range: another request gets more.
            if total > self._end or (total < size and response.status_code != 206):
                raise self._wrong_size(str(total))

    def _skip(self, response: requests.Response) -> None:
        """Read past what is there already: the server does not do ranges."""
        position = 0
        inflow = self._client.inflow(self._position)
        with self._client.guarded(self._what, response.url, self._stop, inflow):
            while position < self._position:
                self._stop.check()
                data = response.raw.read1(min(self._position - position, _READ_SIZE))
                if not data:
                    raise self._cut_off(response, position)
                position += len(data)

    def _wrong_size(self, got: str) -> SizeMismatchError:
        self.close()
        expected = str(self._descriptor.size)
        return SizeMismatchError(
            f"{self._what}: size mismatch: expected {expected} bytes, got {got}",
            expected=expected,
            got=got,
        )


_BUFFER: Final = 512 * 1024
# Seconds after which a thread that waits for its turn looks whether there is anything left to do.
_LOOK: Final = 0.1


class SegmentFetch:
    """Some segments of a blob on their way to a sink."""

    def __init__(
        self,
        location: BlobLocation,
        descriptor: Descriptor,
        segments: Sequence[tuple[int, int]],
        sink: SegmentSink,
        stop: Stop,
    ) -> None:
        self._location = location
        self._descriptor = descriptor
        self._left = deque(segments)
        self._sink = sink
        self._failed = Stop()  # asks all threads to end once one of them has failed
        self._stop = either(stop, self._failed)
        self._failure: BaseException | None = None
        self._lock = threading.Lock()

    def run(self, connections: int) -> None:
        """Fetch all; the calling thread works along, the others one segment later at the earliest.

        They begin once the first range is answered as one, so that a registry that knows no ranges
        is not asked for the whole blob several times.
        """
        threads: list[threading.Thread] = []

        def start_others() -> None:
            count = min(connections - 1, len(self._left))
            for number in range(count if not threads else 0):
                name = f"modelpack-segment-{number}"
                threads.append(threading.Thread(target=self._help, name=name))
                threads[-1].start()

        try:
            while (segment := self._next()) is not None:
                self._fetch(segment, start_others)
        except BaseException as error:  # noqa: BLE001 - raised below
            self._fail(error)
        finally:
            for thread in threads:
                self._join(thread)
        if self._failure is not None:
            raise self._failure

    def _join(self, thread: threading.Thread) -> None:
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt as error:
                self._fail(error)

    def _help(self) -> None:
        """Fetch segments while there are any, each when one of the shared connections is free."""
        lanes = self._location.client.segment_slots
        try:
            while self._left and not self._failed.is_requested():
                if not lanes.acquire(timeout=_LOOK):
                    continue
                try:
                    segment = self._next()
                    if segment is not None:
                        self._fetch(segment)
                finally:
                    lanes.release()
        except BaseException as error:  # noqa: BLE001 - raised by `run`
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            # What ends because another has failed says nothing new; an interrupt comes first.
            if self._failure is None or isinstance(error, KeyboardInterrupt):
                self._failure = error
        self._failed.request()

    def _next(self) -> tuple[int, int] | None:
        with suppress(IndexError):
            return self._left.popleft()
        return None

    def _fetch(self, segment: tuple[int, int], when_open: Callable[[], None] | None = None) -> None:
        position, end = segment
        buffer = memoryview(bytearray(min(_BUFFER, end - position)))
        with BlobStream(self._location, self._descriptor, position, end, self._stop) as stream:
            if when_open is not None:
                when_open()
            while count := stream.readinto(buffer):
                self._sink.write(position, buffer[:count])
                position += count


class RemoteBlob:
    """A blob in a registry; fulfils `BlobSource` and `SegmentedSource`."""

    def __init__(self, location: BlobLocation, descriptor: Descriptor) -> None:
        self._location = location
        self._descriptor = descriptor

    def open(self, offset: int = 0) -> BlobStream:
        """Return the blob's bytes from `offset` on, which is at most its size.

        Raises `NotFoundError`, `SizeMismatchError` if the registry's blob is longer or shorter, and
        what a request raises.
        """
        size = self._descriptor.size
        if not 0 <= offset <= size:
            raise ValueError(f"offset {offset} is outside a blob of {size} bytes")
        return BlobStream(self._location, self._descriptor, offset)

    @property
    def connections(self) -> int:
        """How many connections would fetch segments; a rate limit is reached with one."""
        blobs = self._location.client.blobs
        return blobs.connections if blobs.rate is None else 1

    def fetch_segments(
        self, segments: Sequence[tuple[int, int]], sink: SegmentSink, stop: Stop
    ) -> None:
        """Bring the bytes of `segments` to `sink`, over several connections."""
        SegmentFetch(self._location, self._descriptor, segments, sink, stop).run(self.connections)
