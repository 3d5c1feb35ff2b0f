"""A block file holds the block that it is named after, or is rejected."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from modelpack_engine.offload.directory import (
    HEADER_SIZE,
    BadBlockFileError,
    read_block,
    write_block,
)

IDENTITY, HASH = bytes(range(16)), bytes(range(16, 32))
CONTENT = bytes(range(256)) * 3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / f"{HASH.hex()}.kv"
    write_block(path, IDENTITY, HASH, CONTENT)
    return path


def test_what_is_written_is_read(path: Path) -> None:
    assert read_block(path, IDENTITY, HASH, len(CONTENT)) == CONTENT
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == [path.name]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.integers(0, HEADER_SIZE + len(CONTENT) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    other = path.with_name("flipped")
    other.write_bytes(data)
    with pytest.raises(BadBlockFileError):
        read_block(other, IDENTITY, HASH, len(CONTENT))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(length=st.integers(0, HEADER_SIZE + len(CONTENT) - 1), fill=st.booleans())
def test_a_torn_file_is_found(path: Path, length: int, fill: bool) -> None:
    """A file that is cut off, or has zeros from some byte on."""
    data = path.read_bytes()
    rest = b"\0" * (len(data) - length) if fill else b""
    if data[length:] == rest:
        return
    other = path.with_name("torn")
    other.write_bytes(data[:length] + rest)
    with pytest.raises(BadBlockFileError):
        read_block(other, IDENTITY, HASH, len(CONTENT))


@pytest.mark.parametrize(
    ("identity", "hash_", "length"),
    [
        (HASH, HASH, len(CONTENT)),
        (IDENTITY, IDENTITY, len(CONTENT)),
        (IDENTITY, HASH, len(CONTENT) - 1),
        (IDENTITY, HASH, len(CONTENT) + 1),
    ],
    ids=["another identity", "another hash", "shorter blocks", "longer blocks"],
)
def test_another_block_is_found(path: Path, identity: bytes, hash_: bytes, length: int) -> None:
    with pytest.raises(BadBlockFileError):
        read_block(path, identity, hash_, length)


def test_a_link_is_not_followed(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    with pytest.raises(OSError, match="symbolic"):
        read_block(link, IDENTITY, HASH, len(CONTENT))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_found_and_closed(path: Path, make: Callable[[Path], None]) -> None:
    other = path.with_name("other")
    make(other)
    before = os.listdir("/dev/fd")
    with pytest.raises(BadBlockFileError, match="not a regular file"):
        read_block(other, IDENTITY, HASH, len(CONTENT))
    assert len(os.listdir("/dev/fd")) == len(before)


def test_a_write_that_fails_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="space"):
        write_block(path, IDENTITY, HASH, CONTENT[::-1])
    assert os.listdir(path.parent) == [path.name]
    assert read_block(path, IDENTITY, HASH, len(CONTENT)) == CONTENT
