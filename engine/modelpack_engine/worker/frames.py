"""Messages between the server and a worker: a length of 4 bytes, big-endian, then JSON."""

from __future__ import annotations

import json
import struct
from typing import Any, BinaryIO

#: Bytes of one message.
MAX_FRAME = 256 * 1024 * 1024

LENGTH = struct.Struct(">I")


def encoded(message: dict[str, Any]) -> bytes:
    """Return a message as it is sent; raises `ValueError` if it has no JSON or is too large."""
    # ASCII: halves of surrogate pairs have no UTF-8.
    raw = json.dumps(message).encode()
    if len(raw) > MAX_FRAME:
        raise ValueError(f"it has {len(raw)} bytes, the limit is {MAX_FRAME}")
    return LENGTH.pack(len(raw)) + raw


def read(source: BinaryIO) -> dict[str, Any] | None:
    """Return the next message, None at the end."""
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(head)
    raw = source.read(size)
    if len(raw) < size:
        return None
    message: dict[str, Any] = json.loads(raw)
    return message
