"""Blob downloads: a stream that resumes by ranges, segments over connections, a seekable file.

A resumed download sends no `If-Range`: a digest always names the same bytes, while replicas of one
storage may disagree about ETags. A wrong byte is detected when the whole blob is verified.
`RemoteFile` reads the headers of weight files: a few hundred kilobytes of a blob that may have a
hundred gigabytes. Those bytes cannot be verified, because a digest covers the whole blob.
Sources: RFC 9110, section 14; distribution-spec, "Pulling blobs".
"""

from __future__ import annotations

import io
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import requests

from modelpack.artifacts.descriptor import Descriptor, size_mismatch
from modelpack.errors import (
    RegistryError,
    RemoteTimeoutError,
    RemoteUnavailableError,
    SizeMismatchError,
    UnsupportedError,
)
from modelpack.progress import RunningTasks, Stop
from modelpack.registry.endpoint import BlobLocation
from modelpack.registry.http_client import stated_number
from modelpack.registry.limits import FailedTry, Speed, either
from modelpack.registry.urls import origin_of
from modelpack.storage import SegmentSink, SegmentsRefused

#: Bytes asked of the socket at a time.
_READ_SIZE: Final = 512 * 1024
_CONTENT_RANGE = re.compile(r"bytes\s+([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)\Z")


class BlobStream:
    """The bytes of a blob from an offset on; connects again after a failure.

    With `end` it is a segment, which ends before the byte `end`; it raises `SegmentsRefused` if the
    registry does not return that range.
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

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the response; its connection is reused if the blob was read to its end."""
        response, self._response = self._response, None
        self._ended = True
        if response is not None:
            response.close()

    def readinto(self, buffer: memoryview) -> int:
        """Fill `buffer` from its start with what has arrived; 0 means the end.

        Raises `SizeMismatchError` if the blob is shorter or longer than its descriptor says, and
        `RemoteUnavailableError` after the last retry.
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
            if self._position == self._end:
                self.close()
            else:
                assert self._response is not None
                self._reconnect(self._cut_off(self._response, self._position))
        return 0

    def _receive(self, length: int) -> bytes:
        """Return up to `length` bytes; none mean the end of the response."""
        assert self._response is not None
        url = self._response.url
        self._stop.check()
        inflow = self._client.inflow(self._step)
        with self._client.guarded(self._what, url, self._stop, inflow), self._speed.clocked():
            # Reading at the end detects a response that is too long, and frees the connection.
            data: bytes = self._response.raw.read1(min(length or 1, self._step))
        if data and not length:
            raise self._wrong_size(f"more than {self._descriptor.size}")
        if self._rate is not None:
            self._rate.wait(len(data), self._stop)
        if self._speed.is_too_low(len(data)):
            host = origin_of(url).netloc
            raise FailedTry(RemoteTimeoutError(f"{self._what}: {host} sends too slowly", host=host))
        return data

    def _cut_off(self, response: requests.Response, position: int) -> FailedTry:
        """Return the `FailedTry` for a response that ended at `position` of the blob."""
        if "Transfer-Encoding" in response.headers:  # the response is complete
            raise self._wrong_size(str(position))
        return _ended_early(self._what, response, position, self._descriptor.size)

    def _reconnect(self, failed: FailedTry | None) -> None:
        """Connect again at the current position; raise the last error when no tries are left."""
        if self._response is not None:
            self._response.close()
            self._response = None
        while True:
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
            response = self._client.attempt(self._location.read_call(headers, self._stop))
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
        """Raise unless the response is the requested part of a blob of the right size."""
        size = self._descriptor.size
        start = 0
        if response.status_code == 206:
            match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != position or int(match[2]) >= self._end:
                self._ranges_work = False
                if self._is_segment:
                    raise SegmentsRefused(f"{self._what}: the registry returns other ranges")
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
        """Skip the bytes before the current position: the server ignores ranges."""
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
        return size_mismatch(self._what, self._descriptor.size, got)


# Seconds after which a thread that waits for a connection checks whether segments are left.
_LOOK: Final = 0.1


class SegmentFetch:
    """The download of some segments of a blob to a sink."""

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
        self._helping = RunningTasks()
        self._lock = threading.Lock()

    def run(self, connections: int) -> None:
        """Fetch all segments, in this thread and up to `connections` - 1 others.

        The others start after the first range response, so that a registry without ranges does not
        get several requests for the whole blob.
        """
        others: list[threading.Thread] = []

        def start_others() -> None:
            count = min(connections - 1, len(self._left))
            for number in range(count if not others else 0):
                name = f"modelpack-segment-{number}"
                others.append(threading.Thread(target=self._help, name=name))
                others[-1].start()

        try:
            while (segment := self._next()) is not None:
                self._fetch(segment, start_others)
        except BaseException as error:  # noqa: BLE001 - raised below
            self._fail(error)
        while True:
            try:
                self._helping.wait()
                break
            except KeyboardInterrupt as error:
                self._fail(error)
        if self._failure is not None:
            raise self._failure

    def _help(self) -> None:
        """Fetch segments until none are left, each when one of the shared connections is free."""
        lanes = self._location.client.segment_slots
        if not self._helping.begin():
            return
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
        finally:
            self._helping.end()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            # Keep the first failure, as the others follow from it; an interrupt takes precedence.
            if self._failure is None or isinstance(error, KeyboardInterrupt):
                self._failure = error
        self._failed.request()

    def _next(self) -> tuple[int, int] | None:
        with suppress(IndexError):
            return self._left.popleft()
        return None

    def _fetch(self, segment: tuple[int, int], when_open: Callable[[], None] | None = None) -> None:
        position, end = segment
        buffer = memoryview(bytearray(min(_READ_SIZE, end - position)))
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
        """The number of connections for segments; one reaches a rate limit."""
        blobs = self._location.client.blobs
        return blobs.connections if blobs.rate is None else 1

    def fetch_segments(
        self, segments: Sequence[tuple[int, int]], sink: SegmentSink, stop: Stop
    ) -> None:
        """Write the bytes of `segments` to `sink`, over several connections."""
        SegmentFetch(self._location, self._descriptor, segments, sink, stop).run(self.connections)


#: Bytes of a block, the least to request; the header of most safetensors files fits.
BLOCK: Final = 128 * 1024
#: Bytes fetched at most for one file; the longest vocabularies make headers of 30 MB.
LIMIT: Final = 64 * 1024 * 1024
# Blocks of one request: their number doubles while reading is sequential.
_MAX_AHEAD: Final = 32
_MAX_KEPT: Final = 128


class RemoteFile(io.RawIOBase):
    """The blob `descriptor` as a seekable binary file; close it, or use it as a context.

    `bytes_fetched` and `requests` count what was read so far. If the registry ignores ranges, the
    blob is read from its start, over one connection. Reading more than `limit` bytes raises
    `UnsupportedError`; a blob of another size raises `SizeMismatchError`.
    """

    def __init__(
        self, location: BlobLocation, descriptor: Descriptor, *, limit: int = LIMIT
    ) -> None:
        super().__init__()
        self.bytes_fetched = 0
        self.requests = 0
        self._location = location
        self._client = location.client
        self._size = descriptor.size
        self._what = location.label
        self._limit = limit
        self._at = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._ahead = 1
        self._next = 0  # the block after the last one fetched
        self._whole: requests.Response | None = None  # the whole blob, if ranges are ignored
        self._start = bytearray()  # the bytes received of it

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to `offset` from the start, from here or from the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"offset {base + offset} is before the start")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from its start with the next bytes, at most to the end of a block."""
        view = memoryview(buffer).cast("B")
        length = min(len(view), self._size - self._at)
        if length <= 0:
            return 0
        number, inside = divmod(self._at, BLOCK)
        content = self._block(number)[inside : inside + length]
        view[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        """Close the connection, if one is open."""
        if self._whole is not None:
            self._whole.close()
            self._whole = None
        super().close()

    def _block(self, number: int) -> bytes:
        found = self._blocks.get(number)
        if found is None:
            if self._whole is None:
                self._ahead = min(self._ahead * 2, _MAX_AHEAD) if number == self._next else 1
                self._fetch(number * BLOCK, min((number + self._ahead) * BLOCK, self._size))
            if self._whole is not None:
                self._read_up_to(min((number + 1) * BLOCK, self._size))
            found = self._blocks[number]
        self._blocks.move_to_end(number)
        return found

    def _keep(self, start: int, content: bytes) -> None:
        """Keep blocks; the content is whole blocks from `start` on, or ends with the blob."""
        for offset in range(0, len(content), BLOCK):
            self._blocks[(start + offset) // BLOCK] = content[offset : offset + BLOCK]
        self._next = (start + len(content)) // BLOCK
        while len(self._blocks) > _MAX_KEPT:
            self._blocks.popitem(last=False)

    def _fetch(self, start: int, end: int) -> None:
        """Fetch the blocks from `start` to `end`, or open `_whole` if ranges are ignored."""
        self._check_limit(end - start)
        content = self._client.retried(lambda: self._ask(start, end))
        if content is not None:
            self._keep(start, content)

    def _ask(self, start: int, end: int) -> bytes | None:
        """Return the bytes of one request; None, with `_whole` open, if ranges are ignored."""
        self.requests += 1
        call = self._location.read_call({"Range": f"bytes={start}-{end - 1}"})
        try:
            response = self._client.attempt(call)
        except RegistryError as error:
            if error.status_code == 416:
                raise self._wrong_size(f"at most {start}") from None
            raise
        try:
            if response.status_code != 206:
                length = stated_number(response)
                if length not in (None, self._size):
                    raise self._wrong_size(str(length))
                self._whole = response
                return None
            self._check_range(response, start, end)
            content = self._receive(response, end - start)
        except BaseException:
            response.close()
            raise
        if len(content) < end - start:
            raise _ended_early(self._what, response, start + len(content), self._size)
        response.close()
        return content

    def _check_range(self, response: requests.Response, start: int, end: int) -> None:
        shown = response.headers.get("Content-Range", "nothing")[:60]
        match = _CONTENT_RANGE.match(shown)
        if match is not None and match[3] not in ("*", str(self._size)):
            raise self._wrong_size(match[3])
        if match is None or (int(match[1]), int(match[2])) != (start, end - 1):
            raise RegistryError(
                f"{self._what}: asked for the bytes {start} to {end - 1}, got the range {shown!r}",
                host=origin_of(response.url).netloc,
                status_code=206,
            )

    def _read_up_to(self, end: int) -> None:
        """Read `_whole` up to the byte `end`, and keep the last block."""
        assert self._whole is not None
        missing = end - len(self._start)
        if missing > 0:
            self._check_limit(missing)
            try:
                content = self._receive(self._whole, missing)
            except FailedTry as failed:
                raise failed.error from None
            self._start += content
            if len(content) < missing:
                raise _ended_early(self._what, self._whole, len(self._start), self._size).error
        first = (end - 1) // BLOCK * BLOCK
        self._keep(first, bytes(self._start[first:end]))

    def _receive(self, response: requests.Response, length: int) -> bytes:
        """Return `length` bytes of a response, fewer if it ends."""
        content = bytearray()
        inflow = self._client.inflow(length)
        with self._client.guarded(self._what, response.url, inflow=inflow):
            while len(content) < length:
                self._client.stop.check()
                part = response.raw.read1(min(length - len(content), _READ_SIZE))
                if not part:
                    break
                content += part
                self.bytes_fetched += len(part)
        return bytes(content)

    def _check_limit(self, more: int) -> None:
        if self.bytes_fetched + more > self._limit:
            raise UnsupportedError(
                f"reading its header takes more than {self._limit} bytes",
                path=self._what,
                hint="pull the model, then inspect it in the store",
            )

    def _wrong_size(self, got: str) -> SizeMismatchError:
        return size_mismatch(self._what, self._size, got)


def _ended_early(what: str, response: requests.Response, position: int, size: int) -> FailedTry:
    host = origin_of(response.url).netloc
    message = f"{what}: the connection ended after {position} of {size} bytes"
    return FailedTry(RemoteUnavailableError(message, host=host))
