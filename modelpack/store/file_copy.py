"""Copy and hash large files with little memory: direct writes, write-behind, worker threads.

A copied model is seldom read soon, so its pages in the page cache cost more than they give: they
need fresh memory and evict what other programs have cached. Where the system allows it (Linux with
O_DIRECT), files are written without the page cache; otherwise, writing to the disk starts early.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

from modelpack.artifacts.digest import Digest, new_hasher
from modelpack.store.filesystem import FULL, map_os_errors

if TYPE_CHECKING:
    from hashlib import _Hash

#: Addresses and lengths of direct writes are multiples of this, which suits all usual disks.
ALIGNMENT: Final = 4096
# Smaller files are written through the cache.
_MIN_DIRECT_BYTES: Final = 8 * 1024 * 1024


class DirectWriter:
    """Appends views to an open file, without the page cache as long as that works.

    `size` is the number of bytes to write. Views should be aligned in memory, as pages of `mmap`
    are. Unaligned views, lengths that are not a multiple of `ALIGNMENT` (usually the last one), and
    file systems without direct writes go through the cache.
    """

    def __init__(self, file: int, size: int) -> None:
        self._file = file
        self._direct = False
        if size >= _MIN_DIRECT_BYTES and hasattr(os, "O_DIRECT"):
            self._direct = self._switch(on=True)

    def write(self, view: memoryview) -> None:
        """Write all of `view`; raises `OSError`."""
        while view:
            if self._direct and len(view) % ALIGNMENT:
                self.give_up()
            try:
                view = view[os.write(self._file, view) :]
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self.give_up()

    def give_up(self) -> None:
        """Write through the cache from now on; every user of the open file needs that."""
        if self._direct:
            self._direct = False
            self._switch(on=False)

    def _switch(self, *, on: bool) -> bool:
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        flags = flags | os.O_DIRECT if on else flags & ~os.O_DIRECT
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags)
        except OSError:
            return False
        return True


_WRITE_BEHIND_BYTES: Final = 8 * 1024 * 1024
# Stop giving advice to a disk that makes us wait longer than this.
_BYTES_PER_SECOND: Final = 1e9
_GRACE_SECONDS: Final = 0.1


class WriteBehind:
    """Asks the kernel to write a file early, from `start` on; ignores errors.

    Otherwise the kernel keeps gigabytes of written pages, and the flush at the end takes long.
    """

    def __init__(self, file: int, start: int) -> None:
        self._file = file
        self._advised = start
        self._patience = _GRACE_SECONDS
        self._active = hasattr(os, "posix_fadvise")

    def written(self, position: int) -> None:
        """Record that everything before `position` is written."""
        if not self._active or position - self._advised < _WRITE_BEHIND_BYTES:
            return
        # The kernel starts to write the dirty pages of the range, and keeps them cached.
        length = position - self._advised
        started = time.monotonic()
        try:
            os.posix_fadvise(self._file, self._advised, length, os.POSIX_FADV_DONTNEED)
        except OSError:
            self._active = False
        self._patience += length / _BYTES_PER_SECOND
        self._patience -= time.monotonic() - started
        if self._patience < 0:
            self._active = False
        self._advised = position


#: Bytes read, hashed and written at a time.
CHUNK: Final = 1024 * 1024
#: Bytes between two progress reports.
STEP: Final = 1024 * 1024
_BUFFERS = 8
# A thread costs more than it saves for fewer bytes.
_MIN_BYTES_FOR_THREAD = 8 * STEP

_busy = 0  # number of threads that hash or copy
_busy_mutex = threading.Lock()


class Hashing:
    """Feeds a hasher, in a thread of its own if `size` bytes are worth one.

    `buffer` returns a buffer to fill, and `update` hashes its filled part; the buffer stays
    readable until the next call of `buffer`. Everything is hashed at the end of the block. There is
    no thread if other copies in this process already use all processors.
    """

    def __init__(self, hasher: _Hash, size: int) -> None:
        self._hasher = hasher
        self.size = size
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        self._filled: SimpleQueue[tuple[memoryview, int] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._share = 0

    def __enter__(self) -> Hashing:
        global _busy
        with _busy_mutex:
            threaded = self.size >= _MIN_BYTES_FOR_THREAD and _busy + 2 <= _processors()
            self._share = 2 if threaded else 1
            _busy += self._share
        for _ in range(_BUFFERS if threaded else 2):
            # Whole pages, as direct writes need them.
            self._free.put(memoryview(mmap.mmap(-1, CHUNK)))
        if threaded:
            self._thread = threading.Thread(target=self._run, name="modelpack-hash", daemon=True)
            self._thread.start()
        return self

    @property
    def has_thread(self) -> bool:
        """Whether a thread hashes the buffers."""
        return self._thread is not None

    def buffer(self) -> memoryview:
        """Return a buffer to fill."""
        return self._free.get()

    def update(self, buffer: memoryview, length: int) -> None:
        """Hash the first `length` bytes of a buffer, maybe later."""
        if self._thread is not None:
            self._filled.put((buffer, length))
        else:
            self._hasher.update(buffer[:length])
            self._free.put(buffer)

    def __exit__(self, *_: object) -> None:
        global _busy
        if self._thread is not None:
            self._filled.put(None)
            self._thread.join()
        with _busy_mutex:
            _busy -= self._share

    def _run(self) -> None:
        while (item := self._filled.get()) is not None:
            buffer, length = item
            self._hasher.update(buffer[:length])
            self._free.put(buffer)


def copy_and_hash(
    fill: Callable[[memoryview], int],
    target: int,
    path: Path,
    hashing: Hashing,
    seen: Callable[[int], None],
) -> int:
    """Write the bytes from `fill` to the open file `target` and hash them; return their number.

    `fill` puts bytes into a buffer and returns their number, 0 at the end. `path` names the target
    in errors. `seen` is called with the number of bytes every `STEP` bytes and at the end; it may
    raise to stop the copy.
    """
    total = reported = 0
    with hashing, _BufferWriter(DirectWriter(target, hashing.size), path, hashing) as writing:
        while True:
            buffer = hashing.buffer()
            length = fill(buffer)
            if not length:
                break
            writing.put(buffer, length)
            total += length
            if total - reported >= STEP:
                reported = total
                seen(total)
    if reported != total:
        seen(total)
    return total


class _BufferWriter:
    """Writes buffers and then has them hashed; in a thread of its own if `hashing` has one too.

    Direct writes wait for the disk, so the next buffers are filled and earlier ones are hashed
    meanwhile. Everything is written at the end of the block; `path` names the file in errors.
    Without a thread, other copies of this process use the processor during a write.
    """

    def __init__(self, writer: DirectWriter, path: Path, hashing: Hashing) -> None:
        self._writer = writer
        self._path = path
        self._hashing = hashing
        self._filled: SimpleQueue[tuple[memoryview, int] | None] = SimpleQueue()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> _BufferWriter:
        if self._hashing.has_thread:
            self._thread = threading.Thread(target=self._run, name="modelpack-write", daemon=True)
            self._thread.start()
        return self

    def put(self, buffer: memoryview, length: int) -> None:
        """Write the first `length` bytes of a buffer, maybe later; raises earlier errors."""
        if self._failure is not None:
            raise self._failure
        if self._thread is not None:
            self._filled.put((buffer, length))
        else:
            self._write(buffer, length)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._thread is not None:
            self._filled.put(None)
            self._thread.join()
        if error is None and self._failure is not None:
            raise self._failure

    def _write(self, buffer: memoryview, length: int) -> None:
        with map_os_errors("write", self._path):
            self._writer.write(buffer[:length])
        self._hashing.update(buffer, length)

    def _run(self) -> None:
        while (item := self._filled.get()) is not None:
            buffer, length = item
            if self._failure is None:
                try:
                    self._write(buffer, length)
                except Exception as error:  # noqa: BLE001 - raised by `put` and at the end
                    self._failure = error
            if self._failure is not None:
                self._hashing.update(buffer, 0)  # free the buffer: `buffer` may wait for one


def fill_from(source: int) -> Callable[[memoryview], int]:
    """Return a function that reads the open file `source` into a buffer."""
    return lambda buffer: os.readv(source, [buffer])


def read_and_hash(
    source: int, hasher: _Hash, seen: Callable[[int], None], most: int | None = None
) -> int:
    """Feed the open file `source` to `hasher`, at most `most` bytes; return the number of bytes.

    `seen` is as in `copy_and_hash`.
    """
    buffer = memoryview(bytearray(CHUNK))
    total = reported = 0
    while length := os.readv(source, [buffer[: CHUNK if most is None else most - total]]):
        hasher.update(buffer[:length])
        total += length
        if total - reported >= STEP:
            reported = total
            seen(total)
    if reported != total:
        seen(total)
    return total


def hash_file(
    path: Path, algorithm: str = "sha256", seen: Callable[[int], None] = lambda _: None
) -> Digest:
    """Return the digest of a file's content."""
    hasher = new_hasher(algorithm)
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        read_and_hash(source, hasher, seen)
    finally:
        os.close(source)
    return Digest.of_hasher(hasher)


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_FICLONE = 0x40049409  # linux/fs.h


def clone(source: int, target: int) -> bool:
    """Try to make the open, empty file `target` share all blocks of `source`.

    Return whether that succeeded: it needs Linux and a file system such as btrfs or XFS.
    """
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def reserve(target: int, size: int) -> None:
    """Reserve `size` bytes for the open file if possible; raise `OSError` if the disk is full.

    This makes writing faster and detects a full disk at once.
    """
    if size == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(target, 0, size)
    except OSError as error:
        if error.errno in FULL:
            raise
