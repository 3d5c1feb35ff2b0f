"""Byte ranges: `Range` of a download (RFC 9110, section 14) and `Content-Range` of a chunk."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Bytes that are read and sent at once; less costs more processor time for each byte.
PIECE = 1024 * 1024
_RANGE = re.compile(r"bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*\Z", re.IGNORECASE | re.ASCII)
# distribution-spec "Pushing a blob in chunks": no unit, no total.
_CHUNK_RANGE = re.compile(r"(\d+)-(\d+)\Z", re.ASCII)
_MAX_DIGITS = 19  # 2**63 has as many; `int` refuses thousands with another error


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`length` bytes from `start` on."""

    start: int
    length: int

    @property
    def last(self) -> int:
        """The position of the last byte."""
        return self.start + self.length - 1


class UnsatisfiableRange(ValueError):
    """A well-formed range that no byte of the content falls into."""


def requested_range(header: str | None, size: int) -> ByteRange | None:
    """Return what to send of `size` bytes; None is everything.

    Several ranges at once, other units and malformed headers are answered with everything, as RFC
    9110 allows. Raises `UnsatisfiableRange`, also for a range that ends before it starts.
    """
    match = _RANGE.match(header) if header else None
    if match is None or max(map(len, match.groups())) > _MAX_DIGITS:
        return None
    first, last = match.groups()
    if first:
        start = int(first)
        end = min(int(last) if last else size - 1, size - 1)
        if start >= size or end < start:
            raise UnsatisfiableRange(header)
        return ByteRange(start, end - start + 1)
    if not last:
        return None
    length = min(int(last), size)
    if length == 0:
        raise UnsatisfiableRange(header)
    return ByteRange(size - length, length)


def chunk_range(header: str) -> ByteRange | None:
    """Return the range that a chunk claims to be, None if the header is malformed."""
    match = _CHUNK_RANGE.match(header)
    if match is None or max(map(len, match.groups())) > _MAX_DIGITS:
        return None
    first, last = (int(group) for group in match.groups())
    return ByteRange(first, last - first + 1) if last >= first else None
