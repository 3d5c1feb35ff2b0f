"""Writers of tar archives without checks, to build invalid ones."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Mapping

import zstandard

END = bytes(1024)


def header(
    name: bytes,
    size: int = 0,
    kind: bytes = b"0",
    *,
    mode: bytes = b"0000644\0",
    size_field: bytes | None = None,
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    checksum: bytes | None = None,
) -> bytes:
    """Return a header block, with the right checksum by default."""
    assert len(name) <= 100, "use an extended header"
    block = bytearray(512)
    for start, field in (
        (0, name),
        (100, mode),
        (108, b"0000000\0" * 2),
        (124, b"%011o\0" % size if size_field is None else size_field),
        (136, b"00000000000\0"),
        (148, b" " * 8),
        (156, kind),
        (157, link),
        (257, magic),
        (345, prefix),
    ):
        block[start : start + len(field)] = field
    block[148:156] = b"%06o\0 " % sum(block) if checksum is None else checksum
    assert len(block) == 512
    return bytes(block)


def padded(data: bytes) -> bytes:
    """Return `data` filled up to a whole number of blocks."""
    return data + bytes(-len(data) % 512)


def file(name: bytes, data: bytes = b"", **fields: bytes) -> bytes:
    """Return a regular file: header and data."""
    return header(name, len(data), **fields) + padded(data)


def folder(name: bytes) -> bytes:
    """Return a directory's header."""
    return header(name, kind=b"5", mode=b"0000755\0")


def pax(records: Mapping[bytes, bytes], kind: bytes = b"x") -> bytes:
    """Return an extended header."""
    payload = b"".join(_record(key, value) for key, value in records.items())
    return file(b"PaxHeaders/x", payload, kind=kind)


def _record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d %s=%s\n" % (length, key, value)) != length:
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def gnu_name(name: bytes, kind: bytes = b"L") -> bytes:
    """Return the GNU header of a long name."""
    return file(b"././@LongLink", name + b"\0", kind=kind, magic=b"ustar  \0")


def by_tarfile(
    files: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT, mode: int = 0o644
) -> bytes:
    """Return an archive written by `tarfile`; a name ending in `/` is a directory."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name.removesuffix("/"))
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size, info.mode = len(data), mode
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def gzipped(data: bytes) -> bytes:
    made = bytearray(gzip.compress(data, mtime=0))
    made[9] = 3  # Unix: the default system differs between versions of Python
    return bytes(made)


def zstandard_of(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def zstandard_bomb(head: bytes, zeros: int) -> bytes:
    """Return a frame of `head` and that many zero bytes, 4 bytes for each 128 KiB."""
    block = 128 * 1024
    assert zeros % block == 0
    # RFC 8878: magic, a frame header of a 1 MiB window, raw blocks, run-length blocks.
    frame = bytearray(b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([10 << 3]))
    for start in range(0, len(head), block):
        part = head[start : start + block]
        frame += (len(part) << 3).to_bytes(3, "little") + part
    run = ((block << 3) | (1 << 1)).to_bytes(3, "little") + b"\0"
    frame += run * (zeros // block)
    frame += (0b001).to_bytes(3, "little")  # the last block: raw and empty
    return bytes(frame)


def gnu_sparse(name: bytes, real_size: int, data: bytes = b"", *, extended: bool = False) -> bytes:
    """Return a sparse file as GNU tar wrote them first (type S): `data`, then a hole."""
    block = bytearray(header(name, len(data), kind=b"S", magic=b"ustar  \0"))
    block[386:398] = b"%011o\0" % 0
    block[398:410] = b"%011o\0" % len(data)
    block[482] = int(extended)
    block[483:495] = b"%011o\0" % real_size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + (bytes(512) if extended else b"") + padded(data)
