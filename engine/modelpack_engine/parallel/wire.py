"""Messages between ranks: a kind, a length, and a body of JSON or of plain integers.

Nothing of a message is ever run: no pickle. What does not look as it should is an error.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from modelpack_engine.errors import EngineError

#: The most bytes of a body: a step of 2048 rows with tables of a million tokens fits many times.
MAX_BODY = 1 << 28

_HEADER = struct.Struct("<BI")


class Kind(IntEnum):
    """What a message says. Bodies are JSON, but for those from STEP to WARM_UP."""

    # What a follower says.
    HELLO = 1  # its rank and versions, once
    DONE = 2  # what it was asked for, and what came of it
    REFUSED = 3  # it could not do that; it goes on
    FAILED = 4  # why it ends now
    # What rank 0 says.
    LOAD = 16  # load a model, which is named
    CONFIGURE = 17  # how the engine is to run; answered by the sizes that there is room for
    BUILD = 18  # the sizes of all ranks; answered once steps can come
    STEP = 19
    RELEASE = 20  # sequences whose state is void
    SCRUB = 21  # blocks to be zeroed
    SCRUB_SLOTS = 22  # single tokens to be zeroed
    WARM_UP = 23  # shapes of steps to be compiled
    UNLOAD = 24
    BYE = 25


class WireError(EngineError):
    """A message that is none."""


def encode(kind: Kind, body: bytes | Mapping[str, Any] = b"") -> bytes:
    """Return a message as bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert len(raw) <= MAX_BODY, f"a message of {len(raw)} bytes"
    return _HEADER.pack(kind, len(raw)) + raw


def receive(connection: socket.socket) -> tuple[Kind, bytes] | None:
    """Return the next message, None at the end of the connection; raises `WireError`."""
    header = receive_exactly(connection, _HEADER.size)
    if header is None:
        return None
    number, length = _HEADER.unpack(header)
    if length > MAX_BODY:
        raise WireError(f"a message of {length} bytes, expected at most {MAX_BODY}")
    try:
        kind = Kind(number)
    except ValueError:
        raise WireError(f"a message of the unknown kind {number}") from None
    body = receive_exactly(connection, length)
    return None if body is None else (kind, body)


def receive_exactly(connection: socket.socket, length: int) -> bytes | None:
    """Return `length` bytes, None if the connection ends before."""
    data = bytearray(length)
    view, got = memoryview(data), 0
    while got < length:
        count = connection.recv_into(view[got:])
        if not count:
            return None
        got += count
    return bytes(data)


def fields(body: bytes, **types: type) -> dict[str, Any]:
    """Return the fields of a JSON body, each of the type that is asked for; raises `WireError`.

    An `int` is no `bool`; fields that are not asked for are left out.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise WireError("a message that is no JSON") from None
    if not isinstance(value, dict):
        raise WireError(f"a message of {type(value).__name__}, expected an object")
    found = {}
    for name, kind in types.items():
        given = value.get(name)
        if not isinstance(given, kind) or (kind is int and isinstance(given, bool)):
            raise WireError(f"a message's {name} is {str(given)[:100]!r}, expected {kind.__name__}")
        found[name] = given
    return found
