"""Receiving: the bytes of a blob from its source into its part.

They come in order, from one stream, and are hashed from the buffer that they arrive in. Where that
stream turns out slow and the source can give several parts at a time, the rest is scattered.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from modelpack.progress import Stop
from modelpack.storage import BlobSource, SegmentedSource, SegmentsRefused
from modelpack.stores.copying import STEP
from modelpack.stores.piece_writing import PieceWriting
from modelpack.stores.scattering import Scattering
from modelpack.stores.staging import Partial

#: Bytes after which a stream has shown how fast it is, and that have to be left for more of them.
WINDOW: Final = 8 * 1024 * 1024
WORTH_SEGMENTS: Final = 4 * WINDOW
#: Bytes a second beyond which this machine is busy enough with one stream.
FAST: Final = 150e6

#: Seconds that bytes are kept back for, to be written as a whole piece.
PATIENCE: Final = 0.5


class Receiving:
    """One blob on its way into its part; `report` is told how many bytes are there."""

    def __init__(
        self, part: Partial, source: BlobSource, report: Callable[[int], None], stop: Stop
    ) -> None:
        self._part = part
        self._source = source
        self._report = report
        self._stop = stop
        self._may_scatter = isinstance(source, SegmentedSource) and source.connections > 1

    def run(self) -> None:
        """Receive what is missing; whether it is right has to be checked after it."""
        if self._part.scattered is None:
            is_too_slow = self._read_on()
            if not is_too_slow:
                return
        if self._may_scatter:
            try:
                self._scatter()
            except SegmentsRefused:
                self._may_scatter = False
            else:
                return
        self._part.gather()
        self._read_on()

    def _scatter(self) -> None:
        assert isinstance(self._source, SegmentedSource)
        with Scattering(self._part, self._report) as sink:
            self._source.fetch_segments(sink.segments(), sink, self._stop)

    def _read_on(self) -> bool:
        """Read from the end of the part on; return whether it ended early, as too slow."""
        part, size = self._part, self._part.wanted.size
        told = part.length
        pace, is_too_slow, is_over = _Pace(), False, False
        with (
            self._source.open(part.length) as reader,
            part.hashing() as hashing,
            PieceWriting(part, hashing) as writing,
        ):
            while not is_too_slow and not is_over:
                buffer = hashing.buffer()
                # One byte more than is missing shows a body that is too long.
                piece = buffer[: size - writing.length + 1]
                filled = 0
                try:
                    while filled < len(piece) and not pace.is_waiting_long():
                        self._stop.check()
                        with pace:
                            length = reader.readinto(piece[filled:])
                        filled += length
                        if not length:
                            is_over = True
                            break
                finally:  # what came before an error is kept
                    writing.put(buffer, filled)
                if part.length - told >= STEP:
                    told = part.length
                    self._report(told)
                is_large = self._may_scatter and size - writing.length >= WORTH_SEGMENTS
                is_too_slow = pace.is_slow(filled) and is_large
        if told != part.length:
            self._report(part.length)
        return is_too_slow


class _Pace:
    """How fast bytes come, by the time spent waiting for them; a context of each wait."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._bytes = 0
        self._started = 0.0
        self._piece_seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        elapsed = time.monotonic() - self._started
        self._seconds += elapsed
        self._piece_seconds += elapsed

    def is_waiting_long(self) -> bool:
        """Return whether it is time to write what came of a piece, though it is not full."""
        return self._piece_seconds >= PATIENCE

    def is_slow(self, count: int) -> bool:
        """Count the bytes of a piece; return whether those of a whole window were slow to come."""
        self._bytes += count
        self._piece_seconds = 0.0
        if self._bytes < WINDOW:
            return False
        slow = self._bytes < FAST * self._seconds
        self._seconds, self._bytes = 0.0, 0
        return slow
