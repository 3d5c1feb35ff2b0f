"""PieceWriting: a part is written piece by piece, each while the next one arrives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from modelpack.artifacts.descriptor import Descriptor
from modelpack.errors import DigestMismatchError, SizeMismatchError, StorageFullError
from modelpack.progress import Action, Progress, Stop
from modelpack.storage import BlobSource, Outcome, SegmentedSource, SegmentsRefused, Watch
from modelpack.store.blobs import Blobs
from modelpack.store.file_copy import CHUNK, STEP, Hashing
from modelpack.store.filesystem import check_room, no_room
from modelpack.store.staging import Partial
from modelpack.store.tree import Tree


class PieceWriting:
    """Writes and hashes the pieces of a part; after the block all of them are in it.

    Writing past the page cache waits for the disk, so it has a thread of its own from the second
    piece on. A piece is hashed once it is written, so its buffer is free again only then.
    """

    def __init__(self, part: Partial, hashing: Hashing) -> None:
        self._part = part
        self._hashing = hashing
        self._executor: ThreadPoolExecutor | None = None
        self._pending: tuple[Future[None], memoryview, int] | None = None
        self._is_first = True
        #: The end of the last piece, which may be on its way yet.
        self.length = part.length

    def put(self, buffer: memoryview, length: int) -> None:
        """Take the first `length` bytes of what `Hashing.buffer` gave; raises what writing does."""
        self.settle()
        self.length += length
        if self._is_first:
            self._is_first = False
            self._write(buffer, length)
            self._hashing.update(buffer, length)
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "modelpack-write")
        self._pending = (self._executor.submit(self._write, buffer, length), buffer, length)

    def settle(self) -> None:
        """Wait for the piece that is being written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            future, buffer, length = pending
            future.result()
            self._hashing.update(buffer, length)

    def _write(self, buffer: memoryview, length: int) -> None:
        self._part.write(buffer[:length])

    def __enter__(self) -> PieceWriting:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.settle()
        finally:
            if self._executor is not None:
                self._executor.shutdown()


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


@dataclass(frozen=True, slots=True)
class Downloads:
    """Brings blobs into one store."""

    tree: Tree
    blobs: Blobs

    def fetch(self, descriptor: Descriptor, source: BlobSource, watch: Watch) -> Outcome:
        """Have the blob. Two processes that want the same one download it once."""
        name = descriptor.filepath or descriptor.digest.short

        def waiting(holder: str) -> None:
            message = f"{name} is being downloaded by {holder}: waiting"
            watch.report(Progress(Action.NOTE, name, descriptor.digest, message=message))

        lock = Partial.lock(self.tree, descriptor.digest)
        with lock.held(patience=None, stop=watch.stop, waiting=waiting, remove=True):
            if self.blobs.holds(descriptor):
                return Outcome.EXISTED
            with closing(Partial(self.tree, descriptor)) as part:
                self._fill(part, source, watch, name)
                part.seal()
                with self.tree.lock().held():
                    self.blobs.publish(part.path, descriptor.digest, flushed=True)
        return Outcome.WRITTEN

    def _fill(self, part: Partial, source: BlobSource, watch: Watch, name: str) -> None:
        """Download until the part is verified. What is wrong is dropped and tried once again.

        A short or long body is not: it will be so again, unless a resumed part is to blame.
        """
        part.resume(lambda _: watch.stop.check())
        part.journal()
        resumed = part.present > 0
        try:
            self._transfer(part, source, watch, name)
        except (DigestMismatchError, SizeMismatchError) as error:
            part.restart()
            if isinstance(error, SizeMismatchError) and not resumed:
                part.discard()
                raise
            message = f"{error}: trying once more from the start"
            watch.report(Progress(Action.RETRY, name, part.wanted.digest, message=message))
            try:
                self._transfer(part, source, watch, name)
            except (DigestMismatchError, SizeMismatchError):
                part.discard()
                raise

    def _transfer(self, part: Partial, source: BlobSource, watch: Watch, name: str) -> None:
        digest, size = part.wanted.digest, part.wanted.size
        check_room(self.tree.ingest, size - part.present, name)

        def report(completed: int) -> None:
            watch.report(Progress(Action.FETCH, name, digest, completed, size))

        if part.length < size or size == 0:
            try:
                Receiving(part, source, report, watch.stop).run()
            except StorageFullError as error:
                missing = size - part.present
                raise no_room(self.tree.ingest, missing, error.available, name) from error
        else:
            report(size)
        part.check()
