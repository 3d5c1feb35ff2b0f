"""The tar reader reads archives of other programs and rejects invalid entries."""

from __future__ import annotations

import io
import subprocess
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpack.bundles.tar import TarReader
from modelpack.errors import FormatError, ModelpackError, UnsafePathError, UnsupportedError
from tests.unpacking.tars import END, by_tarfile, file, folder, gnu_name, header, padded, pax

LIMIT = 64 * 1024


class Trickle:
    """A stream that returns fewer bytes than requested."""

    def __init__(self, data: bytes, most: int) -> None:
        self._buffer, self._most = io.BytesIO(data), most

    def read(self, size: int, /) -> bytes:
        return self._buffer.read(min(size, self._most))


def entries(data: bytes, most: int = 1 << 20) -> dict[str, bytes]:
    """Return the content of each entry by name; names of directories end in a slash."""
    reader = TarReader(Trickle(data, most), "layer x", max_header_bytes=LIMIT)
    found: dict[str, bytes] = {}
    for entry in reader:
        content = b"".join(iter(lambda: reader.read(1000), b""))
        assert len(content) == entry.size
        found[entry.name.rstrip("/") + "/" * entry.is_directory] = content
    return found


FILES = {
    "empty.txt": b"",
    "sub/": b"",
    "sub/one": b"1",
    "sub/block": b"b" * 512,
    "sub/more": b"m" * 513,
    "sub/größe.json": b"{}",
}
LONG = {
    "a" * 90 + "/" + "b" * 90: b"x",  # fits ustar's prefix
    "c" * 100: b"y",
}
LONGER = {"/".join(["d" * 120] * 4): b"z", "e" * 250: b"w"}


@pytest.mark.parametrize(
    ("format", "files"),
    [
        (tarfile.USTAR_FORMAT, FILES | LONG),
        (tarfile.GNU_FORMAT, FILES | LONG | LONGER),
        (tarfile.PAX_FORMAT, FILES | LONG | LONGER),
    ],
    ids=["ustar", "gnu", "pax"],
)
@pytest.mark.parametrize("most", [1, 7, 1 << 20])
def test_reads_what_tarfile_writes(format: int, files: dict[str, bytes], most: int) -> None:
    assert entries(by_tarfile(files, format), most) == files


@pytest.mark.parametrize("format", ["ustar", "pax", "gnutar", "v7"])
def test_reads_what_tar_writes(tmp_path: Path, format: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "run.sh").write_bytes(b"#!/bin/sh\n" * 100)
    (tmp_path / "sub" / "run.sh").chmod(0o4755)
    option = "gnu" if format == "gnutar" and "GNU" in _tar("--version").decode() else format
    data = _tar(f"--format={option}", "-cf", "-", "-C", str(tmp_path), ".")
    assert entries(data) == {"./": b"", "./sub/": b"", "./sub/run.sh": b"#!/bin/sh\n" * 100}


@settings(max_examples=12, deadline=None)
@given(
    files=st.dictionaries(
        st.lists(
            st.text("aé .-_~\u4e2d", min_size=1, max_size=60).filter(
                lambda x: x not in (".", "..")
            ),
            min_size=1,
            max_size=5,
        ).map("/".join),
        st.binary(max_size=3000),
        max_size=6,
    ),
    format=st.sampled_from(["gnu", "pax"]),
)
def test_reads_any_tree_that_tar_writes(files: dict[str, bytes], format: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        root, written = Path(name), {}
        for path, content in files.items():
            with suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_bytes(content)
                written[path] = content
        option = format if "GNU" in _tar("--version").decode() else "pax"
        found = entries(_tar(f"--format={option}", "-cf", "-", "-C", name, "."))
    assert {k.removeprefix("./"): v for k, v in found.items() if not k.endswith("/")} == written


def _tar(*arguments: str) -> bytes:
    return subprocess.run(["tar", *arguments], capture_output=True, check=True).stdout


@settings(max_examples=60, deadline=None)
@given(
    files=st.dictionaries(
        st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=200).filter(
            lambda name: not name.endswith("/")
        ),
        st.binary(max_size=2000),
        max_size=5,
    ),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_reads_any_names_and_contents(files: dict[str, bytes], format: int) -> None:
    assert entries(by_tarfile(files, format)) == files


@pytest.mark.parametrize("executable", [b"0000755\0", b"0000100\0", b"0000001\0", b"0104711\0"])
def test_executable(executable: bytes) -> None:
    data = file(b"x", mode=executable) + file(b"y", mode=b"0006666\0") + END
    reader = TarReader(io.BytesIO(data), "layer x", max_header_bytes=LIMIT)
    assert [entry.executable for entry in reader] == [True, False]


def test_unread_data_is_skipped() -> None:
    data = file(b"a", b"A" * 5000) + file(b"b", b"B") + END
    reader = TarReader(io.BytesIO(data), "layer x", max_header_bytes=LIMIT)
    assert [(entry.name, entry.size) for entry in reader] == [("a", 5000), ("b", 1)]
    reader = TarReader(io.BytesIO(data), "layer x", max_header_bytes=LIMIT)
    assert [reader.read(7) for _ in reader] == [b"A" * 7, b"B"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (END, {}),
        (bytes(512), {}),  # a single block of zeros
        (END + b"what pads an archive is not defined", {}),
        (file(b"a", b"x", kind=b"\0", magic=b"") + END, {"a": b"x"}),  # before ustar
        (file(b"a", b"x", kind=b"7") + END, {"a": b"x"}),
        (header(b"a/", kind=b"\0", magic=b"") + END, {"a/": b""}),
        (header(b"a/") + END, {"a/": b""}),
        (file(b"n" * 100, b"x") + END, {"n" * 100: b"x"}),
        (file(b"b", b"x", prefix=b"a") + END, {"a/b": b"x"}),
        (file(b"b", b"x", magic=b"ustar  \0", prefix=b"14722") + END, {"b": b"x"}),
        (pax({b"path": b"p", b"mtime": b"1.5"}) + file(b"a", b"x") + END, {"p": b"x"}),
        (pax({b"path": b"p"}) + pax({b"path": b"q"}) + file(b"a") + END, {"q": b""}),
        (pax({b"path": b"p\n1 =="}) + file(b"a") + END, {"p\n1 ==": b""}),
        (pax({b"size": b"3"}) + header(b"a", 0) + padded(b"xyz") + END, {"a": b"xyz"}),
        (pax({b"comment": b"c"}, b"g") + file(b"a", b"x") + END, {"a": b"x"}),
        (gnu_name(b"long") + file(b"a", b"x") + END, {"long": b"x"}),
        (
            header(b"a", size_field=b"\x80" + b"\0" * 10 + b"\x02") + padded(b"xy") + END,
            {"a": b"xy"},
        ),
        (header(b"a", size_field=b"  2 \0" + b" " * 7) + padded(b"xy") + END, {"a": b"xy"}),
        (header(b"a", size_field=bytes(12)) + END, {"a": b""}),
    ],
)
def test_odd_but_sound(data: bytes, expected: dict[str, bytes]) -> None:
    assert entries(data) == expected


def test_checksum_of_signed_bytes() -> None:
    """Some old programs sum signed characters."""
    block = header(b"\xc3\xa9")
    blank = block[:148] + b" " * 8 + block[156:]
    signed = sum(byte - 256 if byte > 127 else byte for byte in blank)
    assert entries(header(b"\xc3\xa9", checksum=b"%06o\0 " % signed) + END) == {"é": b""}


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (b"1", "a hard link"),
        (b"2", "a symbolic link"),
        (b"3", "a character device"),
        (b"4", "a block device"),
        (b"6", "a FIFO"),
    ],
)
@pytest.mark.scenario(24)
def test_what_is_no_file_is_refused_by_name(kind: bytes, what: str) -> None:
    data = file(b"first", b"x") + header(b"sub/evil", kind=kind, link=b"first") + END
    with pytest.raises(UnsafePathError, match=f"layer x: 'sub/evil' is {what}"):
        entries(data)
    with pytest.raises(UnsafePathError, match="'long' is"):
        entries(gnu_name(b"/etc/passwd", b"K") + pax({b"path": b"long"}) + header(b"a", kind=kind))


@pytest.mark.parametrize(
    "data",
    [
        header(b"a", kind=b"S", magic=b"ustar  \0"),
        pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0"}) + file(b"a", b"1\n0\n"),
        pax({b"GNU.sparse.map": b"0,1"}) + file(b"a", b"x"),
        header(b"a", kind=b"D"),
        header(b"a", kind=b"V"),
        header(b"a", kind=b"M"),
        header(b"a", kind=b"Z"),
        pax({b"path": b"p"}, b"g"),
        pax({b"size": b"1"}, b"g"),
        pax({b"GNU.sparse.size": b"1"}, b"g"),
    ],
)
def test_what_we_do_not_unpack_is_said(data: bytes) -> None:
    with pytest.raises(UnsupportedError, match="layer x"):
        entries(data + END)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "ends inside"),
        (bytes(511), "ends inside"),
        (file(b"a", b"x"), "without the blocks that mark its end"),
        (header(b"a", 10) + b"x" * 9, "ends 1 bytes before"),
        (header(b"a", 10) + b"x" * 10, "502 bytes before"),  # the padding is missing
        (header(b"a", 1 << 32) + b"x" * 512, "before the end of a file"),
        (b"not a tar".ljust(512, b"!") + END, "checksum"),
        (b"\x1f\x8b" + b"\x08" * 510, "compressed: decompress it"),
        (header(b"a", checksum=b"000001\0 "), "checksum"),
        (header(b"a", checksum=b"zz\0     "), "checksum"),
        (header(b"a", size_field=b"99999999999\0"), "its size"),
        (header(b"a", size_field=b"-1".ljust(12, b"\0")), "its size"),
        (header(b"a", size_field=b"1_0".ljust(12, b"\0")), "its size"),
        (header(b"a", size_field=b"0o7".ljust(12, b"\0")), "its size"),
        (header(b"a", size_field=b"\xff" * 12), "its size"),  # base 256, negative
        (header(b"a", mode=b"rw-r--r-"), "its mode"),
        (header(b"\xff\xfe"), "UTF-8"),
        (header(b"d/", 5, kind=b"5") + padded(b"12345"), "5 bytes of data"),
        (file(b"d/", b"12345"), "5 bytes of data"),
        (pax({b"size": b"5"}) + folder(b"d") + padded(b"12345"), "5 bytes of data"),
        (pax({b"size": b"-1"}) + file(b"a"), "size"),
        (pax({b"size": b"1e3"}) + file(b"a"), "size"),
        (pax({b"size": b"9" * 30}) + file(b"a"), "size"),
        (pax({b"path": b"\xff"}) + file(b"a"), "UTF-8"),
        (pax({b"\xff": b"x"}) + file(b"a"), "UTF-8"),
        (pax({b"path": b"p"}) + END, "after an extended header"),
        (file(b"x", b"nonsense", kind=b"x") + file(b"a"), "does not parse"),
        (file(b"x", b"0 a=b\n", kind=b"x") + file(b"a"), "does not parse"),
        (file(b"x", b"6 a=bc", kind=b"x") + file(b"a"), "does not parse"),  # no newline
        (file(b"x", b"99 a=b\n", kind=b"x") + file(b"a"), "does not parse"),
        (file(b"x", b"4 a\n", kind=b"x") + file(b"a"), "does not parse"),
        (file(b"x", b"5 =b\n", kind=b"x") + file(b"a"), "does not parse"),
        (file(b"x", b"6 a=b\n\0\0", kind=b"x") + file(b"a"), "does not parse"),
        (file(b"x", b"1" * 5000 + b" a=b\n", kind=b"x") + file(b"a"), "does not parse"),
        (header(b"x", LIMIT, kind=b"x"), "more than 65536 bytes"),
        (header(b"x", 1 << 33, kind=b"g"), "more than 65536 bytes"),
        (header(b"x", 1 << 33, kind=b"L"), "more than 65536 bytes"),
        (header(b"x", 1 << 33, kind=b"K"), "more than 65536 bytes"),
        (header(b"x", kind=b"g") * 200, "more than 65536 bytes"),
    ],
)
def test_damage(data: bytes, problem: str) -> None:
    with pytest.raises(FormatError, match=problem) as caught:
        entries(data + (END if data and len(data) % 512 == 0 and "end" not in problem else b""))
    assert "layer x" in str(caught.value)


def test_every_cut_is_noticed() -> None:
    data = pax({b"path": b"p"}) + file(b"a", b"x" * 600) + folder(b"d") + file(b"b", b"y")
    assert entries(data + END)
    for size in range(0, len(data) + 512, 64):
        with pytest.raises(FormatError):
            entries((data + END)[:size])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_raise_our_errors_only(data: st.DataObject) -> None:
    sound = (
        pax({b"path": b"p" * 120, b"size": b"3"})
        + file(b"a", b"xyz")
        + gnu_name(b"q" * 200)
        + file(b"b", b"y" * 600)
        + folder(b"c")
        + END
    )
    broken = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(sound) - 1))
        broken[at] = data.draw(st.integers(0, 255))
        # Correct the checksum of the block, otherwise the reader stops at it.
        start = at - at % 512
        block = broken[start : start + 512]
        block[148:156] = b" " * 8
        broken[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    with suppress(ModelpackError):
        entries(bytes(broken))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3000))
def test_any_bytes_raise_our_errors_only(data: bytes) -> None:
    with suppress(ModelpackError):
        assert entries(data) == {}
