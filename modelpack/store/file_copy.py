"""Writing large files past the page cache, where the system can: Linux with O_DIRECT.

A copied model is seldom read soon, and its pages cost more than they give: fresh memory has to be
found and cleared for them, and what others have cached is pushed out.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

from modelpack.artifacts.digest import Digest, new_hasher
from modelpack.store.filesystem import FULL, translating

if TYPE_CHECKING:
    from hashlib import _Hash
    from types import TracebackType

#: Addresses and lengths of direct writes are multiples of this; it suits every usual disk.
ALIGNMENT: Final = 4096
# Small files are better off in the cache.
_WORTH_IT: Final = 8 * 1024 * 1024


class DirectWriter:
    """Writes views to an open file one after the other, directly as long as that works.

    `size` is what is going to be written. Views should be aligned in memory (pages of `mmap` are);
    those that are not, a length that is not a multiple of `ALIGNMENT` (the last, usually) and file
    systems that cannot do it are written through the cache.
    """

    def __init__(self, file: int, size: int) -> None:
        self._file = file
        self._direct = False
        if size >= _WORTH_IT and hasattr(os, "O_DIRECT"):
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
        """Write through the cache from now on, as everybody else who uses the open file does."""
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


#: What is read, hashed and written at a time.
CHUNK: Final = 1024 * 1024
#: Bytes between two progress reports.
STEP: Final = 1024 * 1024
_BUFFERS = 8
# Below this a thread costs more than it saves.
_WORTH_A_THREAD = 8 * STEP

_busy = 0  # threads that hash or copy now
_busy_mutex = threading.Lock()


class Hashing:
    """Feeds a hasher, from a thread of its own where `size` bytes are worth one.

    `buffer` gives a buffer to fill, `update` hands its filled part over; it stays readable until
    the next call of `buffer`. After the block everything is hashed. Where all processors are at
    work for others in this process, a thread would only get in their way, so there is none.
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
            threaded = self.size >= _WORTH_A_THREAD and _busy + 2 <= _processors()
            self._share = 2 if threaded else 1
            _busy += self._share
        for _ in range(_BUFFERS if threaded else 2):  # one may be on its way to the disk
            # Whole pages, so that they can be written directly.
            self._free.put(memoryview(mmap.mmap(-1, CHUNK)))
        if threaded:
            self._thread = threading.Thread(target=self._run, name="modelpack-hash", daemon=True)
            self._thread.start()
        return self

    def buffer(self) -> memoryview:
        """Return a buffer to fill."""
        return self._free.get()

    def update(self, buffer: memoryview, length: int) -> None:
        """Hash the first `length` bytes of what `buffer` gave, sooner or later."""
        if self._thread is not None:
            self._filled.put((buffer, length))
        else:
            self._hasher.update(buffer[:length])
            self._free.put(buffer)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
    """Write what `fill` reads to the open file `target` at `path`, hash it; return the byte count.

    `fill` puts bytes into a buffer and returns their number, 0 at the end. `seen` is called with
    the number of bytes every `STEP` bytes and at the end; it may raise to end the copy.
    """
    total = told = 0
    writer = DirectWriter(target, hashing.size)
    with hashing:
        while True:
            buffer = hashing.buffer()
            length = fill(buffer)
            if not length:
                break
            hashing.update(buffer, length)
            with translating("write", path):
                writer.write(buffer[:length])
            total += length
            if total - told >= STEP:
                told = total
                seen(total)
    if told != total:
        seen(total)
    return total


def filling(source: int) -> Callable[[memoryview], int]:
    """Return a function that reads the open file `source` into a buffer."""
    return lambda buffer: os.readv(source, [buffer])


def read_and_hash(
    source: int, hasher: _Hash, seen: Callable[[int], None], most: int | None = None
) -> int:
    """Feed the open file `source` to `hasher`; return its bytes. `seen` as in `copy_and_hash`.

    With `most`, that many bytes at most are read.
    """
    buffer = memoryview(bytearray(CHUNK))
    total = told = 0
    while length := os.readv(source, [buffer[: CHUNK if most is None else most - total]]):
        hasher.update(buffer[:length])
        total += length
        if total - told >= STEP:
            told = total
            seen(total)
    if told != total:
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
    """Make the open, empty file `target` share all blocks of `source`; return whether that worked.

    Linux (btrfs, XFS, bcachefs, ...). Elsewhere the bytes are copied.
    """
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def reserve(target: int, size: int) -> None:
    """Reserve `size` bytes for the open file, where possible; raises `OSError` if the disk is full.

    Writing is faster after that, and a full disk shows at once.
    """
    if size == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(target, 0, size)
    except OSError as error:
        if error.errno in FULL:
            raise
