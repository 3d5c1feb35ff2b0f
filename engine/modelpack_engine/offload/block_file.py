"""One block as a file: a header that says whose it is, and bytes that are checked when read.

    magic 8 | identity 16 | hash 16 | length of the content, u64 little-endian | SHA-256 | content

The checksum covers everything but itself. A file appears under its name when it is complete. It is
not synced: what a power failure leaves of it fails its check, and is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import stat
import struct
from pathlib import Path

from modelpack_engine.errors import EngineError

MAGIC = b"MPKVBLK1"
_HEAD = struct.Struct("<8s16s16sQ")
_CHECKSUM_SIZE = 32
HEADER_SIZE = _HEAD.size + _CHECKSUM_SIZE

_numbers = itertools.count()


class BadBlockFileError(EngineError):
    """A file does not hold the block that its name says."""


def write_block(path: Path, identity: bytes, hash_: bytes, content: bytes) -> None:
    """Write a file, readable by its owner only, all at once; raises `OSError`."""
    head = _HEAD.pack(MAGIC, identity, hash_, len(content))
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{next(_numbers)}.tmp")
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, 0o600), "wb", buffering=0) as file:
            for part in (head, _checksum(head, content), content):
                rest = memoryview(part)
                while rest:
                    rest = rest[file.write(rest) :]
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_block(path: Path, identity: bytes, hash_: bytes, length: int) -> bytes:
    """Return the content of a file, which has to be `length` bytes of this identity and hash.

    Raises `BadBlockFileError` if it is anything else, and `OSError`.
    """
    # A pipe would keep us waiting for a writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(path, flags)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise BadBlockFileError("it is not a file")
        if found.st_size != HEADER_SIZE + length:
            raise BadBlockFileError(f"{found.st_size} bytes, expected {HEADER_SIZE + length}")
        with open(file, "rb", 0, closefd=False) as stream:
            data = stream.read()
    finally:
        os.close(file)
    expected = _HEAD.pack(MAGIC, identity, hash_, length)
    if data[: _HEAD.size] != expected:
        raise BadBlockFileError("its header is another block's")
    content = data[HEADER_SIZE:]
    if len(content) != length or data[_HEAD.size : HEADER_SIZE] != _checksum(expected, content):
        raise BadBlockFileError("its bytes and its checksum differ")
    return content


def _checksum(head: bytes, content: bytes) -> bytes:
    checksum = hashlib.sha256(head)
    checksum.update(content)
    return checksum.digest()
