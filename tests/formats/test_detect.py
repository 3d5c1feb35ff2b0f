from __future__ import annotations

from pathlib import Path

import pytest

from modelpack.errors import WeightFormatError
from modelpack.formats.statistics import WeightFormat, detect_format, format_of_name
from tests.formats.builders import as_file
from tests.formats.vectors import MODEL_SAFETENSORS, TINY_GGUF, put

ZIP = b"PK\x03\x04" + bytes(40)

DETECTED = [
    (TINY_GGUF, "x.gguf", WeightFormat.GGUF),
    (TINY_GGUF, "x.GGUF", WeightFormat.GGUF),
    (TINY_GGUF, "0123abc", WeightFormat.GGUF),
    (b"FUGG" + bytes(9), "x", WeightFormat.GGUF),
    (MODEL_SAFETENSORS, "x.safetensors", WeightFormat.SAFETENSORS),
    (MODEL_SAFETENSORS, "blob", WeightFormat.SAFETENSORS),
    (ZIP, "x.dduf", WeightFormat.DDUF),
    (ZIP, "x", WeightFormat.DDUF),
]


@pytest.mark.parametrize(("raw", "name", "expected"), DETECTED)
def test_detected(raw: bytes, name: str, expected: WeightFormat) -> None:
    assert detect_format(as_file(raw, f"dir/{name}")) is expected


@pytest.mark.parametrize(
    ("raw", "name", "message"),
    [
        (MODEL_SAFETENSORS, "x.gguf", "is a safetensors file, but its name ends in .gguf"),
        (TINY_GGUF, "x.safetensors", "is a GGUF file, but its name ends in .safetensors"),
        (ZIP, "x.gguf", "is a ZIP archive, expected a GGUF file"),
        (b"<html>", "x.dduf", "is an HTML page, expected a DDUF archive"),
        (b"", "x.gguf", "is an empty file, expected a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "x.gguf", "is a Git LFS pointer"),
        (b"hello", "x", "is of an unknown kind"),
    ],
)
def test_refused(raw: bytes, name: str, message: str) -> None:
    with pytest.raises(WeightFormatError) as caught:
        detect_format(as_file(raw, name))
    assert caught.value.message.startswith(message)


def test_a_cut_safetensors_is_left_to_its_reader() -> None:
    assert detect_format(as_file(MODEL_SAFETENSORS[:90], "x.safetensors")) == "safetensors"


def test_by_path(tmp_path: Path) -> None:
    assert detect_format(put(tmp_path, "x.gguf", TINY_GGUF)) == "gguf"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.gguf", "gguf"),
        ("a.b.SafeTensors", "safetensors"),
        ("a.dduf", "dduf"),
        ("a.safetensors.index.json", None),
        ("gguf", None),
        (".gguf", None),
        ("a.bin", None),
    ],
)
def test_names(name: str, expected: str | None) -> None:
    assert format_of_name(name) == expected
