"""Scattering: a part that several connections write all over, hashed in order behind them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final

from modelpack.stores.copying import CHUNK, STEP
from modelpack.stores.staging import Partial

#: Bytes after which the journal is written again: no more is fetched twice after a kill.
SAVE: Final = 4 * 1024 * 1024
_SMALLEST: Final = 8 * 1024 * 1024
_LARGEST: Final = 64 * 1024 * 1024
# Into so many segments at least, so that all connections are busy to the end.
_SEGMENTS: Final = 16


class Scattering:
    """A context in which a part is written from several threads; fulfils `SegmentSink`.

    `report` is told how many bytes are there. After the block everything that has no gap before it
    is hashed, or the block has failed; what is there is kept either way.
    """

    def __init__(self, part: Partial, report: Callable[[int], None]) -> None:
        self._part = part
        self._report = report
        self._present = part.scatter()
        self._changed = threading.Condition()
        self._done = False
        self._failure: Exception | None = None
        self._unsaved = 0
        self._told = self._present.total
        self._follower = threading.Thread(target=self._follow, name="modelpack-hash", daemon=True)

    def segments(self) -> list[tuple[int, int]]:
        """Return what is missing, in pieces that are worth a request."""
        size = self._part.wanted.size
        missing = size - self._present.total
        step = min(_LARGEST, max(_SMALLEST, missing // _SEGMENTS))
        return [
            (position, min(position + step, end))
            for start, end in self._present.missing(0, size)
            for position in range(start, end, step)
        ]

    def __enter__(self) -> Scattering:
        self._follower.start()
        return self

    def write(self, offset: int, view: memoryview) -> None:
        """Write bytes that arrived; raises what went wrong behind them."""
        self._part.write_at(offset, view)
        with self._changed:
            if self._failure is not None:
                raise self._failure
            before = self._present.prefix
            self._present.add(offset, offset + len(view))
            if self._present.prefix != before:
                self._changed.notify()
            self._unsaved += len(view)
            if self._unsaved >= SAVE:
                self._unsaved = 0
                self._part.journal()
            total = self._present.total
            tell = total - self._told >= STEP or total == self._part.wanted.size
            if tell:
                self._told = total
        if tell:
            self._report(total)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._done = True
            if error is not None and self._failure is None:
                self._failure = InterruptedError()  # no need to hash what is there already
            self._changed.notify()
        self._follower.join()
        self._part.journal()
        if error is None and self._failure is not None:
            raise self._failure

    def _follow(self) -> None:
        buffer = memoryview(bytearray(CHUNK))
        try:
            while (end := self._next_end()) is not None:
                self._part.catch_up(end, buffer)
        except Exception as error:  # noqa: BLE001 - raised by `write` and at the end
            with self._changed:
                self._failure = error

    def _next_end(self) -> int | None:
        """Wait for bytes that can be hashed; return how far, None for the end."""
        with self._changed:
            while True:
                if self._failure is not None:
                    return None
                length, prefix = self._part.length, self._present.prefix
                if prefix >= length + CHUNK or (self._done and prefix > length):
                    return min(prefix, length + 8 * CHUNK)
                if self._done:
                    return None
                self._changed.wait()
