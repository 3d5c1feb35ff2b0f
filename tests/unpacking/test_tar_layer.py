"""A tar archive generated from files: reading from any byte equals a written archive."""

from __future__ import annotations

import hashlib
import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack.operations.convert import TarFile, TarLayer
from modelpack.storage import BytesBlob


def content_of(layer: TarLayer, offset: int = 0, step: int = 1000) -> bytes:
    content, buffer = b"", memoryview(bytearray(step))
    with layer.open(offset) as reader:
        while count := reader.readinto(buffer):
            content += buffer[:count]
    return content


def layer_of(*files: tuple[str, bytes]) -> TarLayer:
    return TarLayer.of(TarFile(path, len(raw), BytesBlob(raw)) for path, raw in files)


FILES = (("models/a.txt", b"one"), ("models/sub/b", b""), ("models/sub/c", b"x" * 1024))


def test_the_archive_holds_the_files() -> None:
    layer = layer_of(*FILES)
    raw = content_of(layer)
    assert len(raw) == layer.size
    assert layer.digest(lambda _: None).encoded == hashlib.sha256(raw).hexdigest()
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        members = archive.getmembers()
        assert [(m.name, m.isdir(), m.mode, m.mtime, m.uid) for m in members] == [
            ("models", True, 0o755, 0, 0),
            ("models/a.txt", False, 0o644, 0, 0),
            ("models/sub", True, 0o755, 0, 0),
            ("models/sub/b", False, 0o644, 0, 0),
            ("models/sub/c", False, 0o644, 0, 0),
        ]
        for path, expected in FILES:
            found = archive.extractfile(path)
            assert found is not None
            assert found.read() == expected


@given(st.integers(0, 6000), st.integers(1, 3000))
def test_it_can_be_read_from_any_byte_on(offset: int, step: int) -> None:
    layer = layer_of(*FILES)
    assert content_of(layer, offset, step) == content_of(layer)[offset:]


@pytest.mark.parametrize("name", ["n" * 90, "d" * 120 + "/" + "n" * 200, "ü/ö"])
def test_long_and_foreign_names(name: str) -> None:
    with tarfile.open(fileobj=io.BytesIO(content_of(layer_of((name, b"x"))))) as archive:
        assert archive.getnames()[-1] == name


def test_a_file_beyond_eight_gigabytes() -> None:
    size = 9 << 30
    layer = TarLayer.of([TarFile("models/big", size, BytesBlob(b"short"))])
    with layer.open() as reader:
        head = memoryview(bytearray(1024))
        reader.readinto(head[:512])
        reader.readinto(head[512:])
    entry = tarfile.TarInfo.frombuf(bytes(head[512:]), "utf-8", "strict")
    assert (entry.name, entry.size) == ("models/big", size)
    # A file that ends early ends the archive: the missing bytes are not replaced.
    assert len(content_of(layer)) == 1024 + 5
