"""SegmentFetch: parts of one blob over several connections.

One connection often gets only a part of what a link carries: the registry limits each, or the link
is long. Each segment is a range request of its own, with the retries of its own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from modelpack.descriptor import Descriptor
from modelpack.progress import Stop
from modelpack.registry.blob_stream import BlobStream
from modelpack.registry.endpoint import Endpoint
from modelpack.registry.stops import either
from modelpack.storage import SegmentSink

_BUFFER: Final = 512 * 1024
# Seconds after which a thread that waits for its turn looks whether there is anything left to do.
_LOOK: Final = 0.1


class SegmentFetch:
    """Some segments of a blob on their way to a sink."""

    def __init__(
        self,
        endpoint: Endpoint,
        descriptor: Descriptor,
        segments: Sequence[tuple[int, int]],
        sink: SegmentSink,
        stop: Stop,
    ) -> None:
        self._endpoint = endpoint
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
        lanes = self._endpoint.transport.lanes
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
        with BlobStream(self._endpoint, self._descriptor, position, end, self._stop) as stream:
            if when_open is not None:
                when_open()
            while count := stream.readinto(buffer):
                self._sink.write(position, buffer[:count])
                position += count
