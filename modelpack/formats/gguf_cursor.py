"""A forward cursor over the header of a GGUF file, reading it in windows.

It owns the byte order and the width of lengths, which differ by version, and the limits on what
a header may cost; the meaning of the fields is `gguf`'s business.
"""

from __future__ import annotations

import struct

from modelpack.errors import WeightFormatError
from modelpack.formats.reading import WeightFile

#: The end of the tensor descriptions lies before this byte.
MAX_HEADER_BYTES = 128 * 1024 * 1024
#: Strings and nested arrays that are walked over, in all arrays of one file. The largest
#: vocabularies have 262,144 tokens and twice as many merges.
MAX_WALKED_ITEMS = 4 * 1024 * 1024
#: A rough count of the memory that names, values and tensor descriptions take once parsed.
MAX_KEPT_BYTES = 40 * 1024 * 1024

_WINDOW = 64 * 1024


class Cursor:
    """The position in `file`; every method moves it forward or raises `WeightFormatError`."""

    def __init__(self, file: WeightFile, position: int, *, order: str, version: int) -> None:
        self._file = file
        self._base = position
        self._at = 0
        self._window = b""
        self._end = min(file.size, MAX_HEADER_BYTES)
        self._order = order
        self._u32 = struct.Struct(order + "I")
        self._u64 = struct.Struct(order + "Q")
        # GGUF v1 counts with 32 bits.
        self._length = self._u32 if version == 1 else self._u64
        self._tails: dict[int, struct.Struct] = {}
        #: Whether a string, key or name of no bytes was met.
        self.empty_string = False
        self._walked = 0
        self._kept = 0

    @property
    def position(self) -> int:
        """The byte of the file that is read next."""
        return self._base + self._at

    def remaining(self) -> int:
        """Return how many bytes of the file follow."""
        return self._file.size - self.position

    def u32(self) -> int:
        return self._unpack(self._u32)

    def u64(self) -> int:
        return self._unpack(self._u64)

    def length(self) -> int:
        """Return a count or a length: 32 bits in version 1, else 64."""
        return self._unpack(self._length)

    def unpack(self, code: str) -> tuple[int | float, ...]:
        """Return the numbers of the `struct` format `code`."""
        packed = struct.Struct(self._order + code)
        return packed.unpack(self.take(packed.size))

    def tensor_tail(self, dimensions: int) -> tuple[int, ...]:
        """Return what follows the number of dimensions: each of them, the type, the offset."""
        packed = self._tails.get(dimensions)
        if packed is None:
            length = "I" if self._length is self._u32 else "Q"
            packed = struct.Struct(f"{self._order}{dimensions}{length}IQ")
            self._tails[dimensions] = packed
        return packed.unpack(self.take(packed.size))

    def take(self, length: int) -> bytes:
        """Return the next `length` bytes. The caller has bounded `length`."""
        self._need(length)
        start = self._at
        self._at += length
        return self._window[start : self._at]

    def text(self, what: str, limit: int) -> str:
        """Return a string of at most `limit` bytes; bytes that are not UTF-8 become surrogates."""
        start = self.position
        length = self.length()
        if length > limit:
            raise self.error(f"{what} is {length} bytes long, the limit is {limit}", start)
        return self.kept_text(length)

    def kept_text(self, length: int) -> str:
        """Return the next `length` bytes as text, counted as memory. The caller bounded them."""
        self.empty_string |= not length
        self.keep(length)
        text = self.take(length).decode(errors="surrogateescape")
        if not text.isascii():  # one such character, and each takes up to four bytes
            self.keep(3 * length)
        return text

    def text_at(self, offset: int, length: int) -> str:
        """Return the string of `length` bytes at `offset`, without moving the cursor."""
        return self._file.read(offset, length).decode(errors="surrogateescape")

    def skip(self, length: int) -> None:
        """Move over `length` bytes without reading them."""
        start = self.position
        self._at += length
        if self.position > self._end:
            raise self._beyond(start, self.position)

    def skip_strings(self, count: int) -> None:
        """Move over `count` strings. Only their lengths are looked at."""
        self.walk(count)
        unpack, width = self._length.unpack_from, self._length.size
        while count:
            self._need(width)
            window, at, left = self._window, self._at, count
            last = before = len(window) - width
            for _ in range(count):
                if at > last:
                    break
                before = at
                length = unpack(window, at)[0]
                if not length:
                    self.empty_string = True
                at += width + length
                left -= 1
            if self._base + at > self._end:
                raise self._beyond(self._base + before, self._base + at)
            self._at, count = at, left

    def walk(self, items: int) -> None:
        """Count `items` that have to be looked at one by one."""
        self._walked += items
        if self._walked > MAX_WALKED_ITEMS:
            raise self.error(f"the metadata holds more than {MAX_WALKED_ITEMS} array items")

    def keep(self, size: int) -> None:
        """Count `size` bytes of memory that the parsed header will take."""
        self._kept += size
        if self._kept > MAX_KEPT_BYTES:
            raise self.error(f"the header holds more than {MAX_KEPT_BYTES} bytes of values")

    def error(self, message: str, offset: int | None = None) -> WeightFormatError:
        """Return the error that says `message`, at `offset` or where the cursor is."""
        return self._file.error(message, self.position if offset is None else offset)

    def _unpack(self, packed: struct.Struct) -> int:
        at = self._at
        if at + packed.size > len(self._window):
            self._need(packed.size)
            at = self._at
        self._at = at + packed.size
        value: int = packed.unpack_from(self._window, at)[0]
        return value

    def _need(self, length: int) -> None:
        """Have the next `length` bytes in the window."""
        if self._at + length <= len(self._window):
            return
        start = self.position
        if start + length > self._end:
            raise self._beyond(start, start + length)
        size = min(max(length, _WINDOW), self._end - start)
        self._window = self._file.read(start, size)
        self._base, self._at = start, 0

    def _beyond(self, start: int, needed: int) -> WeightFormatError:
        if needed > self._file.size:
            return self._file.truncated(start, needed)
        return self.error(f"the header is longer than the limit of {MAX_HEADER_BYTES} bytes", start)
