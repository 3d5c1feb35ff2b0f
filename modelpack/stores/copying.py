"""Moving bytes: every byte is read once, into a buffer that is hashed and written from there.

Hashing, reading and writing release the interpreter's lock, so with a second thread for the writes
a copy takes hardly longer than the hash alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

from modelpack.digest import Digest, new_hasher
from modelpack.stores.durability import write_all
from modelpack.stores.os_errors import translated, translating

if TYPE_CHECKING:
    from hashlib import _Hash
    from types import TracebackType

CHUNK: Final = 1024 * 1024
_BUFFERS = 4
# Below this a thread costs more than it saves.
_WORTH_A_THREAD = 8 * CHUNK


class Writer:
    """Writes buffers to an open file, in order; in a thread of its own if `size` is worth one.

    `buffer` gives a free one (it stays readable until the next call of `buffer`), `write` hands
    the filled part over. Leaving the block waits for the last write. A write that failed raises
    its `StoreError` in one of the three. What was written is a prefix of what was handed over.
    """

    def __init__(self, descriptor: int, size: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        self._filled: SimpleQueue[tuple[memoryview, int] | None] = SimpleQueue()
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None
        threaded = size >= _WORTH_A_THREAD
        for _ in range(_BUFFERS if threaded else 1):
            self._free.put(memoryview(bytearray(min(CHUNK, size + 1))))
        if threaded:
            self._thread = threading.Thread(target=self._run, name="modelpack-writer", daemon=True)

    def __enter__(self) -> Writer:
        if self._thread is not None:
            self._thread.start()
        return self

    def buffer(self) -> memoryview:
        """Return a buffer to fill; raises the error of an earlier write."""
        buffer = self._free.get()
        if self._error is not None:
            self._free.put(buffer)
            raise translated(self._error, "write", self._path) from self._error
        return buffer

    def write(self, buffer: memoryview, length: int) -> None:
        """Hand over the first `length` bytes of what `buffer` gave."""
        if self._thread is not None:
            self._filled.put((buffer, length))
        else:
            self._free.put(buffer)
            with translating("write", self._path):
                write_all(self._descriptor, buffer[:length])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            self._filled.put(None)
            self._thread.join()
        if self._error is not None and error is None:
            raise translated(self._error, "write", self._path) from self._error

    def _run(self) -> None:
        while (item := self._filled.get()) is not None:
            buffer, length = item
            try:
                if self._error is None:
                    write_all(self._descriptor, buffer[:length])
            except OSError as error:
                self._error = error
            self._free.put(buffer)


def copy_and_hash(source: int, writer: Writer, hasher: _Hash, seen: Callable[[int], None]) -> int:
    """Copy the open file `source` and feed it to `hasher`; return its bytes.

    `seen` is called with the number of bytes after each chunk, and may raise to end it.
    """
    total = 0
    with writer:
        while True:
            buffer = writer.buffer()
            length = os.readv(source, [buffer])
            if not length:
                return total
            writer.write(buffer, length)
            hasher.update(buffer[:length])
            total += length
            seen(total)


def read_and_hash(source: int, hasher: _Hash, seen: Callable[[int], None]) -> int:
    """Feed the open file `source` to `hasher`; return its bytes."""
    buffer = memoryview(bytearray(CHUNK))
    total = 0
    while length := os.readv(source, [buffer]):
        hasher.update(buffer[:length])
        total += length
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
