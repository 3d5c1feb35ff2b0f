"""PieceWriting: a part is written piece by piece, each while the next one arrives."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from modelpack.stores.copying import Hashing
from modelpack.stores.staging import Partial


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
