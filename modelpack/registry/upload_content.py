"""What an upload sends: a blob's bytes, hashed and counted on their way, from any offset on."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING, Final

from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.errors import SizeMismatchError
from modelpack.progress import Action, Progress, Stop
from modelpack.registry.rate import RateLimit
from modelpack.storage import BlobReader, BlobSource, Watch

if TYPE_CHECKING:
    from hashlib import _Hash

#: Bytes read, hashed and sent at a time.
_PIECE: Final = 1024 * 1024
#: Bytes between two states of the hash that are kept, to go on from.
CHECKPOINT: Final = 64 * 1024 * 1024


class UploadContent:
    """A blob's content, as parts that follow each other or start again further back.

    The last bytes are only given out once all of them are known to be right. Where a part starts
    again, the source is opened at the last checkpoint before it, not at its first byte.
    """

    def __init__(
        self,
        source: BlobSource,
        descriptor: Descriptor,
        what: str,
        stop: Stop,
        watch: Watch,
        rate: RateLimit | None = None,
    ) -> None:
        self._source = source
        self._descriptor = descriptor
        self._what = what
        self._stop = stop
        self._report = watch.report
        self._rate = rate
        self._name = descriptor.filepath or descriptor.digest.short
        self._checkpoints: list[tuple[int, _Hash]] = [(0, descriptor.digest.hasher())]
        self._stack = ExitStack()
        self._reader: BlobReader | None = None
        self._hasher = descriptor.digest.hasher()
        self._position = 0
        #: The end of what was ever given out: no registry can have more.
        self.sent = 0
        #: Why the content could not be had, as opposed to sent.
        self.failure: Exception | None = None

    def part(self, start: int, end: int) -> ContentPart:
        """Return the bytes from `start` to `end`, as the body of a request."""
        return ContentPart(self, start, end)

    def close(self) -> None:
        """Close the source, which a request that failed half-way leaves open."""
        self._reader = None
        self._stack.close()

    def read(self, start: int, end: int) -> Generator[memoryview, None, None]:
        """Yield the bytes from `start` to `end`, checked as they go."""
        self.failure = None
        try:
            self._go_to(start)
            yield from self._pieces(end)
        except Exception as error:
            self.failure = error
            self.close()
            raise
        except BaseException:
            self.close()
            raise

    def _go_to(self, start: int) -> None:
        if self._reader is not None and self._position == start:
            return
        self.close()
        self._position, kept = max(
            (c for c in self._checkpoints if c[0] <= start), key=lambda checkpoint: checkpoint[0]
        )
        self._hasher = kept.copy()
        self._reader = self._stack.enter_context(self._source.open(self._position))
        buffer = memoryview(bytearray(min(_PIECE, start - self._position)))
        while self._position < start:
            self._take(buffer[: start - self._position])

    def _pieces(self, end: int) -> Generator[memoryview, None, None]:
        size = self._descriptor.size
        step = min(_PIECE, self._rate.step) if self._rate else _PIECE
        buffer = memoryview(bytearray(min(step, end - self._position)))
        while True:
            piece = buffer[: end - self._position]
            self._take(piece)
            if self._position == size:
                self._check_end()
            if self._rate:
                self._rate.wait(len(piece), self._stop)
            self.sent = max(self.sent, self._position)
            yield piece
            report = Progress(
                Action.PUSH, self._name, self._descriptor.digest, self._position, size
            )
            self._report(report)
            if self._position == end:
                return

    def _take(self, piece: memoryview) -> None:
        """Read and hash as many bytes as `piece` has."""
        assert self._reader is not None
        self._stop.check()
        count = _fill(self._reader, piece)
        self._hasher.update(piece[:count])
        self._position += count
        if count < len(piece):
            raise self._wrong_size(str(self._position))
        if self._position >= self._checkpoints[-1][0] + CHECKPOINT:
            self._checkpoints.append((self._position, self._hasher.copy()))

    def _check_end(self) -> None:
        assert self._reader is not None
        if self._reader.readinto(memoryview(bytearray(1))):
            raise self._wrong_size(f"more than {self._descriptor.size}")
        self._descriptor.digest.check_equal(Digest.of_hasher(self._hasher), self._what)

    def _wrong_size(self, got: str) -> SizeMismatchError:
        expected = str(self._descriptor.size)
        return SizeMismatchError(
            f"{self._what}: the source has {got} bytes, expected {expected}",
            expected=expected,
            got=got,
        )


class ContentPart:
    """Part of an `UploadContent`; fulfils `Body`."""

    def __init__(self, content: UploadContent, start: int, end: int) -> None:
        self._content = content
        self._start = start
        self._end = end
        self._reading: Generator[memoryview, None, None] | None = None

    def __len__(self) -> int:
        return self._end - self._start

    def __iter__(self) -> Iterator[memoryview]:
        self.close()
        self._reading = self._content.read(self._start, self._end)
        # Read now, before the head of the request is sent: an empty part would be done with that.
        return chain([next(self._reading)], self._reading)

    def close(self) -> None:
        """Let go of the source if the part was not read to its end."""
        if self._reading is not None:
            self._reading.close()


def _fill(reader: BlobReader, buffer: memoryview) -> int:
    """Read until `buffer` is full or the source ends; return the number of bytes."""
    filled = 0
    while filled < len(buffer) and (count := reader.readinto(buffer[filled:])):
        filled += count
    return filled
