"""Downloads: fetch blobs into partial files that survive an interruption, then publish them.

A download starts as one stream. If the blob is large and the stream slow, the rest is fetched in
ranges over several connections. Everything is hashed while it arrives.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Final

from modelpack.artifacts.byte_ranges import ByteRanges
from modelpack.artifacts.descriptor import Descriptor, size_mismatch
from modelpack.artifacts.digest import Digest
from modelpack.errors import DigestMismatchError, SizeMismatchError, StorageFullError
from modelpack.progress import Action, Progress, SpeedMeter, Stop
from modelpack.storage import BlobSource, Outcome, SegmentedSource, SegmentsRefused, Watch
from modelpack.store.blobs import BLOB_MODE, Blobs
from modelpack.store.file_copy import (
    ALIGNMENT,
    CHUNK,
    STEP,
    DirectWriter,
    Hashing,
    WriteBehind,
    read_and_hash,
)
from modelpack.store.filesystem import (
    FileLock,
    boot_id,
    check_room,
    map_os_errors,
    no_room,
    read_own,
    write_all,
    write_own,
)
from modelpack.store.tree import Tree, label

#: Bytes over which the speed of a stream is measured.
WINDOW: Final = 8 * 1024 * 1024
#: Missing bytes from which fetching ranges over several connections pays.
MIN_BYTES_FOR_RANGES: Final = 4 * WINDOW
#: Bytes per second above which one stream is fast enough.
FAST: Final = 150e6
#: Seconds to wait for a full piece before writing a shorter one.
PATIENCE: Final = 0.5
#: Bytes between two writes of the journal: at most so many are fetched again after a kill.
SAVE: Final = 4 * 1024 * 1024
# Size of one range, and the least number of ranges, to keep all connections busy to the end.
_SMALLEST: Final = 8 * 1024 * 1024
_LARGEST: Final = 64 * 1024 * 1024
_SEGMENTS: Final = 16
_MAX_JOURNAL_BYTES: Final = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Downloads:
    """Downloads blobs into one store."""

    tree: Tree
    blobs: Blobs

    def fetch(self, descriptor: Descriptor, source: BlobSource, watch: Watch) -> Outcome:
        """Download the blob; two processes that need the same blob download it once."""
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
        """Download until the part is verified; after a mismatch, try once more from the start.

        A body of a wrong size is retried only after a resume: a server would repeat it.
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
                BlobDownload(part, source, report, watch.stop).run()
            except StorageFullError as error:
                missing = size - part.present
                raise no_room(self.tree.ingest, missing, error.available, name) from error
        else:
            report(size)
        part.check()


class BlobDownload:
    """The transfer of one blob into its part; calls `report` with the bytes present so far."""

    def __init__(
        self, part: Partial, source: BlobSource, report: Callable[[int], None], stop: Stop
    ) -> None:
        self._part = part
        self._source = source
        self._report = report
        self._stop = stop
        self._may_use_ranges = isinstance(source, SegmentedSource) and source.connections > 1

    def run(self) -> None:
        """Fetch the missing bytes; the caller verifies them."""
        if self._part.present_ranges is None and not self._read_on():
            return
        if self._may_use_ranges:
            try:
                assert isinstance(self._source, SegmentedSource)
                with ParallelRanges(self._part, self._report) as sink:
                    self._source.fetch_segments(sink.segments(), sink, self._stop)
            except SegmentsRefused:
                self._may_use_ranges = False
            else:
                return
        self._part.drop_ranges()
        self._read_on()

    def _read_on(self) -> bool:
        """Append one stream to the part; return whether it was stopped for being too slow."""
        part, size = self._part, self._part.wanted.size
        reported = part.length
        speed, wait = SpeedMeter(), SpeedMeter()  # of a window, of a piece
        is_too_slow = is_over = False
        with (
            self._source.open(part.length) as reader,
            part.hashing() as hashing,
            PieceWriter(part, hashing) as writing,
        ):
            while not is_too_slow and not is_over:
                buffer = hashing.buffer()
                # Read one byte more than is missing to detect a body that is too long.
                piece = buffer[: size - writing.length + 1]
                filled = 0
                try:
                    while filled < len(piece) and wait.seconds < PATIENCE:
                        self._stop.check()
                        with speed, wait:
                            length = reader.readinto(piece[filled:])
                        filled += length
                        if not length:
                            is_over = True
                            break
                finally:  # keep what arrived before an error
                    writing.put(buffer, filled)
                if part.length - reported >= STEP:
                    reported = part.length
                    self._report(reported)
                is_large = self._may_use_ranges and size - writing.length >= MIN_BYTES_FOR_RANGES
                wait.reset()
                speed.bytes += filled
                if speed.bytes >= WINDOW:
                    is_too_slow = is_large and speed.is_below(FAST)
                    speed.reset()
        if reported != part.length:
            self._report(part.length)
        return is_too_slow


class ParallelRanges:
    """A context in which several threads write ranges of a part; implements `SegmentSink`.

    Calls `report` with the number of bytes present. At the end of the block, all bytes before the
    first gap are hashed, or the block fails; the part keeps its bytes either way.
    """

    def __init__(self, part: Partial, report: Callable[[int], None]) -> None:
        self._part = part
        self._report = report
        self._present = part.open_ranges()
        self._changed = threading.Condition()
        self._done = False
        self._failure: Exception | None = None
        self._unsaved = 0
        self._reported = self._present.total
        self._follower = threading.Thread(target=self._follow, name="modelpack-hash", daemon=True)

    def segments(self) -> list[tuple[int, int]]:
        """Return the missing ranges, in segments that are worth a request."""
        size = self._part.wanted.size
        missing = size - self._present.total
        step = min(_LARGEST, max(_SMALLEST, missing // _SEGMENTS))
        return [
            (position, min(position + step, end))
            for start, end in self._present.missing(0, size)
            for position in range(start, end, step)
        ]

    def __enter__(self) -> ParallelRanges:
        self._follower.start()
        return self

    def write(self, offset: int, view: memoryview) -> None:
        """Write bytes at an offset; raises an earlier error of the hashing thread."""
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
            is_due = total - self._reported >= STEP or total == self._part.wanted.size
            if is_due:
                self._reported = total
        if is_due:
            self._report(total)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._changed:
            self._done = True
            if error is not None and self._failure is None:
                self._failure = InterruptedError()  # stop hashing
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
        """Wait for bytes to hash; return their end, or None if there are no more."""
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


class PieceWriter:
    """Writes and hashes pieces of a part while the next one arrives; all are written at the end.

    A write that bypasses the page cache waits for the disk, so a thread does it from the second
    piece on. A piece is hashed after it is written; only then its buffer is free again.
    """

    def __init__(self, part: Partial, hashing: Hashing) -> None:
        self._part = part
        self._hashing = hashing
        self._executor: ThreadPoolExecutor | None = None
        self._pending: tuple[Future[None], memoryview, int] | None = None
        self._is_first = True
        #: The end of the last piece, which may not be written yet.
        self.length = part.length

    def put(self, buffer: memoryview, length: int) -> None:
        """Write the first `length` bytes of a buffer of `Hashing.buffer`, maybe later.

        Raises the errors of the previous write.
        """
        self.settle()
        self.length += length
        if self._is_first:
            self._is_first = False
            self._part.write(buffer[:length])
            self._hashing.update(buffer, length)
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "modelpack-write")
        future = self._executor.submit(self._part.write, buffer[:length])
        self._pending = (future, buffer, length)

    def settle(self) -> None:
        """Wait until the current piece is written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            future, buffer, length = pending
            future.result()
            self._hashing.update(buffer, length)

    def __enter__(self) -> PieceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.settle()
        finally:
            if self._executor is not None:
                self._executor.shutdown()


class Partial:
    """A partial download: the file `ingest/<alg>-<hex>.part` and its journal, a `.json` file.

    A part is written in order, or in ranges: then the file has its full size from the beginning,
    and the journal lists the ranges that are present. The content found at the start is hashed
    again, so damage is detected at the end at the latest. Only the holder of its lock may open it.
    """

    def __init__(self, tree: Tree, descriptor: Descriptor) -> None:
        self.wanted = descriptor
        self.path = tree.partial(descriptor.digest)
        self._journal = self.path.with_suffix(".json")
        self._draft = self.path.with_suffix(".json.tmp")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with map_os_errors("open", self.path):
            try:
                self.file = os.open(self.path, flags, 0o644)
            except PermissionError:  # read-only: its process was killed after `seal`
                self.path.chmod(0o644)
                self.file = os.open(self.path, flags)
        self._hasher = descriptor.digest.hasher()
        self._behind = WriteBehind(self.file, 0)
        self._direct: DirectWriter | None = None
        #: Number of bytes at the beginning that are present and hashed.
        self.length = 0
        #: The ranges present in a part that is written in ranges; None for one written in order.
        self.present_ranges: ByteRanges | None = None

    @property
    def present(self) -> int:
        """The number of bytes present."""
        return self.length if self.present_ranges is None else self.present_ranges.total

    @staticmethod
    def lock(tree: Tree, digest: Digest) -> FileLock:
        """Return the lock that allows only one process to download a blob."""
        return FileLock(tree.ingest / f"{label(digest)}.lock")

    def resume(self, seen: Callable[[int], None]) -> None:
        """Continue with the existing content; call `seen` with the bytes hashed so far."""
        with map_os_errors("read", self.path):
            if os.fstat(self.file).st_size > self.wanted.size:
                os.ftruncate(self.file, 0)
            self.present_ranges = self._journalled_ranges(os.fstat(self.file).st_size)
            most = None if self.present_ranges is None else self.present_ranges.prefix
            os.lseek(self.file, 0, os.SEEK_SET)
            self.length = read_and_hash(self.file, self._hasher, seen, most)
        self._behind = WriteBehind(self.file, self.length)

    def open_ranges(self) -> ByteRanges:
        """Switch to writing in ranges; return the present ranges, for the caller to extend."""
        self._write_cached()
        if self.present_ranges is None:
            self.present_ranges = ByteRanges([(0, self.length)])
        self.journal()  # before the file grows, as its size then means nothing
        with map_os_errors("write", self.path):
            os.ftruncate(self.file, self.wanted.size)
        return self.present_ranges

    def drop_ranges(self) -> None:
        """Switch back to writing in order; drop the bytes after the first gap."""
        if self.present_ranges is not None:
            with map_os_errors("truncate", self.path):
                os.ftruncate(self.file, self.length)
                os.lseek(self.file, self.length, os.SEEK_SET)
            self.present_ranges = None
            self.journal()

    def write_at(self, offset: int, view: memoryview) -> None:
        """Write bytes of a part that is written in ranges."""
        if offset + len(view) > self.wanted.size:
            raise self._wrong_size("more")
        with map_os_errors("write", self.path):
            while view:
                count = os.pwrite(self.file, view, offset)
                view, offset = view[count:], offset + count

    def catch_up(self, end: int, buffer: memoryview) -> None:
        """Hash the bytes written by `write_at` up to `end`; there must be no gap."""
        with map_os_errors("read", self.path):
            while self.length < end:
                count = os.preadv(self.file, [buffer[: end - self.length]], self.length)
                self._hasher.update(buffer[:count])
                self.length += count
        self._behind.written(self.length)

    def journal(self) -> None:
        """Write the journal; ignore a full disk."""
        text: dict[str, object] = {
            "digest": str(self.wanted.digest),
            "size": self.wanted.size,
            "mediaType": self.wanted.media_type,
            "pid": os.getpid(),
            "boot": boot_id(),
        }
        if self.present_ranges is not None:
            text["present"] = self.present_ranges.ranges
        with suppress(OSError):
            write_own(self._draft, json.dumps(text).encode())
            self._draft.replace(self._journal)  # so that a kill leaves a complete journal

    def hashing(self) -> Hashing:
        """Return the hasher of this part; the caller passes every byte to it and to `write`."""
        if self.length % ALIGNMENT == 0:
            self._direct = DirectWriter(self.file, self.wanted.size - self.length)
        return Hashing(self._hasher, self.wanted.size - self.length)

    def write(self, view: memoryview) -> None:
        """Append bytes; raises `SizeMismatchError` if there are too many."""
        if self.length + len(view) > self.wanted.size:
            raise self._wrong_size("more")
        with map_os_errors("write", self.path):
            if self._direct is not None:
                self._direct.write(view)
            else:
                write_all(self.file, view)
        self.length += len(view)
        self._behind.written(self.length)

    def check(self) -> None:
        """Raise `SizeMismatchError` or `DigestMismatchError` unless the part matches."""
        if self.length < self.wanted.size:
            raise self._wrong_size(str(self.length))
        self.wanted.digest.check_equal(Digest.of_hasher(self._hasher), "download")

    def restart(self) -> None:
        """Drop all content and start again."""
        self._write_cached()
        with map_os_errors("truncate", self.path):
            os.ftruncate(self.file, 0)
            os.lseek(self.file, 0, os.SEEK_SET)
        self._hasher = self.wanted.digest.hasher()
        self.length = 0
        self._behind = WriteBehind(self.file, 0)
        self.present_ranges = None
        self.journal()

    def seal(self) -> None:
        """Flush the content and set a blob's mode, so that the file can be renamed."""
        with map_os_errors("flush", self.path):
            os.fchmod(self.file, BLOB_MODE)
            os.utime(self.file)
            os.fsync(self.file)

    def discard(self) -> None:
        """Delete the part."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; delete the journal if the part no longer exists."""
        os.close(self.file)
        if not self.path.exists():
            for path in (self._journal, self._draft):
                with suppress(OSError):
                    path.unlink()

    def _write_cached(self) -> None:
        if self._direct is not None:
            self._direct.give_up()
        self._direct = None

    def _journalled_ranges(self, size: int) -> ByteRanges | None:
        """Return the ranges in the journal; None if the part was written in order."""
        try:
            text = json.loads(read_own(self._journal, _MAX_JOURNAL_BYTES))
            if "present" not in text or text["digest"] != str(self.wanted.digest):
                return None
            ranges = [(int(start), int(end)) for start, end in text["present"]]
            return ByteRanges((min(start, size), min(end, size)) for start, end in ranges)
        except (OSError, ValueError, OverflowError, TypeError, KeyError, RecursionError):
            return None

    def _wrong_size(self, got: str) -> SizeMismatchError:
        return size_mismatch(f"blob {self.wanted.digest}", self.wanted.size, got)
