from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from modelpack.errors import ModelpackError, NotFoundError, SourceChangedError, WeightFormatError
from modelpack.formats.gguf import read_gguf_header
from modelpack.formats.reader import WeightFile, quoted
from modelpack.formats.safetensors import read_safetensors_header
from tests.formats.builders import as_file
from tests.formats.vectors import TINY_GGUF, put

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 98362432\n"
)

FOREIGN = [
    (POINTER, "is a Git LFS pointer to a file of 98362432 bytes, not the file itself"),
    (b"", "is an empty file"),
    (b"<!DOCTYPE html>\n<html><body>Sign in", "is an HTML page"),
    (b"\n <HTML>", "is an HTML page"),
    (b"<?xml version='1.0'?><Error/>", "is an XML document"),
    (b'{"error":"gated"}', "is a JSON document"),
    (b"PK\x03\x04" + bytes(30), "is a ZIP archive"),
    (b"\x80\x02}q\x00." + bytes(20), "is a Python pickle"),
    (b"lmgg" + bytes(20), "is a GGML file"),
    (b"hello world, no weights", "is of an unknown kind (it starts with b'hello wo')"),
]


@pytest.mark.parametrize(("raw", "message"), FOREIGN)
def test_what_is_no_weight_is_named(raw: bytes, message: str) -> None:
    for read in (read_gguf_header, read_safetensors_header):
        with pytest.raises(WeightFormatError) as caught:
            read(as_file(raw, "dir/x.weights"))
        assert caught.value.message.startswith(message)
        assert str(caught.value).startswith("dir/x.weights at byte 0: is ")
        assert (caught.value.path, caught.value.offset) == ("dir/x.weights", 0)


def test_a_pointer_has_a_hint() -> None:
    with pytest.raises(WeightFormatError) as caught:
        read_gguf_header(as_file(POINTER))
    assert caught.value.hint
    assert "git lfs pull" in caught.value.hint


def test_files_that_cannot_be_weights(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.gguf: no such file"):
        read_gguf_header(tmp_path / "none.gguf")
    with pytest.raises(ModelpackError, match="is a directory, expected a weight file"):
        read_gguf_header(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelpackError, match="is not a regular file"):
        read_gguf_header(tmp_path / "pipe.gguf")


def test_a_file_that_shrinks() -> None:
    with pytest.raises(SourceChangedError, match="the file shrank while it was read"):
        WeightFile(io.BytesIO(b"short"), path="x", size=10).read(0, 10)


def test_reading_is_bounded_by_the_size(tmp_path: Path) -> None:
    with WeightFile.open(put(tmp_path, "x", TINY_GGUF)) as file:
        assert file.read(4, 4) == b"\x03\0\0\0"
        assert file.bytes_read == 4
        with pytest.raises(WeightFormatError) as caught:
            file.read(250, 7)
    assert caught.value.message == ("the file ends too early: expected at least 257 bytes, got 256")


def test_an_open_file_stays_open_and_a_path_is_closed(tmp_path: Path) -> None:
    file = as_file(TINY_GGUF)
    read_gguf_header(file)
    assert file.read(0, 4) == b"GGUF"
    # A file left open would be a ResourceWarning, which is an error in these tests.
    read_gguf_header(put(tmp_path, "x.gguf", TINY_GGUF))


def test_names_in_messages_are_short() -> None:
    assert quoted("a\nb") == r"'a\nb'"
    assert len(quoted("x" * 70_000)) < 120


def test_a_file_that_is_cut_short_has_a_hint(tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(TINY_GGUF[:200])
    with pytest.raises(WeightFormatError) as caught:
        read_gguf_header(cut)
    assert "run `modelpack fsck --repair`" in (caught.value.hint or "")
