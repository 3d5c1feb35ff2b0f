from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable

import pytest

from modelpack.errors import WeightFormatError
from modelpack.formats import dduf
from modelpack.formats.dduf import DDUFEntry, read_dduf_header
from tests.formats.builders import as_file

INDEX = ("model_index.json", b'{"_class_name":"Tiny"}')
FILES = [INDEX, ("vae/config.json", b"{}"), ("vae/model.safetensors", bytes(100))]


def archive(
    *files: tuple[str, bytes],
    compression: int = zipfile.ZIP_STORED,
    zip64: bool = False,
    comment: bytes = b"",
) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as made:
        made.comment = comment
        for name, raw in files:
            with made.open(zipfile.ZipInfo(name), "w", force_zip64=zip64) as entry:
                entry.write(raw)
    if compression:  # ZipInfo objects do not take the archive's default
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", compression) as made:
            for name, raw in files:
                made.writestr(name, raw)
    return out.getvalue()


@pytest.mark.parametrize("zip64", [False, True])
@pytest.mark.parametrize("comment", [b"", b"a comment"])
def test_a_valid_archive(zip64: bool, comment: bytes) -> None:
    raw = archive(*FILES, zip64=zip64, comment=comment)
    header = read_dduf_header(as_file(raw))
    assert header.file_size == len(raw)
    assert [entry.name for entry in header.entries] == [name for name, _ in FILES]
    for entry, (_, content) in zip(header.entries, FILES, strict=True):
        assert raw[entry.offset : entry.offset + entry.size] == content


@pytest.mark.parametrize("name", ["vae/model.bin", "x.pt", "te/data.pkl", "README.md", "noext"])
def test_other_types_are_no_entries(name: str) -> None:
    with pytest.raises(WeightFormatError, match="is not of a type that DDUF has"):
        read_dduf_header(as_file(archive(*FILES, (name, b"\x80\x04."))))


def test_directories_are_no_entries() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.writestr("vae/", b"")
        for name, raw in FILES:
            made.writestr(name, raw)
    assert len(read_dduf_header(as_file(out.getvalue())).entries) == 3


def test_a_zip64_end(monkeypatch: pytest.MonkeyPatch) -> None:
    # A low limit makes zipfile write ZIP64 records.
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    raw = archive(*FILES)
    assert b"PK\x06\x06" in raw
    at = raw.index(b"PK\x05\x06")
    raw = raw[: at + 8] + struct.pack("<2H2L", 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1) + raw[-2:]
    assert len(read_dduf_header(as_file(raw)).entries) == len(FILES)
    broken = raw.replace(b"PK\x06\x06", b"PK\x06\x08")
    with pytest.raises(
        WeightFormatError, match="the ZIP64 locator does not point to a ZIP64 end record"
    ):
        read_dduf_header(as_file(broken))


def test_large_entries_have_their_sizes_elsewhere() -> None:
    raw = bytearray(archive(INDEX))
    # Write the entry's sizes and offset as ZIP64 does: 0xffffffff here, the numbers in `extra`.
    central = raw.index(b"PK\x01\x02")
    end = raw.index(b"PK\x05\x06")
    size, local = len(INDEX[1]), 0
    struct.pack_into("<2L", raw, central + 20, 2**32 - 1, 2**32 - 1)
    struct.pack_into("<L", raw, central + 42, 2**32 - 1)
    extra = struct.pack("<2HB", 0x9999, 1, 0) + struct.pack("<2H3Q", 1, 24, size, size, local)
    struct.pack_into("<H", raw, central + 30, len(extra))
    struct.pack_into("<L", raw, end + 12, end - central + len(extra))
    raw[end:end] = extra
    (entry,) = read_dduf_header(as_file(bytes(raw))).entries
    assert entry == DDUFEntry(INDEX[0], entry.offset, size)
    struct.pack_into("<2H", raw, end + 5, 2, 24)  # the field with the sizes is missing
    with pytest.raises(WeightFormatError, match="the ZIP64 entry does not hold its sizes"):
        read_dduf_header(as_file(bytes(raw)))


def patched(raw: bytes, signature: bytes, at: int, code: str, *values: int | bytes) -> bytes:
    """Return `raw` with `values` written `at` bytes after the last `signature`."""
    out = bytearray(raw)
    struct.pack_into("<" + code, out, out.rindex(signature) + at, *values)
    return bytes(out)


GOOD = archive(*FILES)
CENTRAL, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"

INVALID: list[tuple[str, bytes, str]] = [
    ("a GGUF", b"GGUF" + bytes(60), "expected a DDUF archive"),
    ("cut", GOOD[:-1], "the end record of the ZIP archive is missing"),
    ("cut early", GOOD[:80], "the end record of the ZIP archive is missing"),
    ("compressed", archive(INDEX, ("x.json", bytes(99)), compression=zipfile.ZIP_DEFLATED),
     "compressed (method 8), expected stored"),
    ("encrypted", patched(GOOD, CENTRAL, 8, "H", 1), "is encrypted"),
    ("two sizes", patched(GOOD, CENTRAL, 20, "L", 99), "the two sizes of the entry"),
    ("climbing", archive(INDEX, ("../x", b"")), "unsafe name: it leaves the directory"),
    ("absolute", archive(INDEX, ("/etc/x", b"")), "unsafe name: it is absolute"),
    ("backslash", patched(GOOD, CENTRAL, 49, "c", b"\\"), "unsafe name: it contains a backslash"),
    ("not ASCII", patched(GOOD, CENTRAL, 46, "c", b"\xff"), "is not UTF-8"),
    ("a symlink", patched(patched(GOOD, CENTRAL, 4, "H", 0x31E), CENTRAL, 38, "L", 0o120777 << 16),
     "is not a regular file"),
    ("a directory with data", patched(GOOD, CENTRAL, 66, "c", b"/"), "has data"),
    ("outside", patched(GOOD, CENTRAL, 42, "L", 2**31), "lies outside the file"),
    ("no local header", patched(GOOD, CENTRAL, 42, "L", 1),
     "expected the local header of the stored entry"),
    ("another name", patched(GOOD, LOCAL, 30, "c", b"V"), "another name in its local header"),
    ("local compressed", patched(GOOD, LOCAL, 8, "H", 8),
     "expected the local header of the stored entry"),
    ("into the directory", patched(GOOD, CENTRAL, 20, "2L", 101, 101), "runs into the directory"),
    ("several disks", patched(GOOD, END, 4, "H", 1), "the archive has several parts"),
    ("directory outside", patched(GOOD, END, 16, "L", 2**30),
     "overlaps the end record of the archive"),
    ("directory too short", patched(GOOD, END, 12, "L", 60), "between the directory and the end"),
    ("two ends", archive(*FILES, comment=b"PK\x05\x06" + bytes(99)),
     "the end record of the ZIP archive is missing"),
    ("entry too long", patched(GOOD, CENTRAL, 30, "H", 99), "the directory ends too early"),
    ("more entries said", patched(GOOD, END, 10, "H", 4), "the directory ends too early"),
    ("fewer entries said", patched(GOOD, END, 10, "H", 2),
     "unexpected bytes follow the last entry"),
    ("no signature", patched(GOOD, CENTRAL, 0, "c", b"X"), "not an entry of a ZIP directory"),
    ("no index", archive(*FILES[1:]), "has no model_index.json"),
    ("index in a directory", archive(("a/model_index.json", b"{}")), "has no model_index.json"),
    ("no JSON", archive((INDEX[0], b"{")), "model_index.json is not JSON"),
    ("nested JSON", archive((INDEX[0], b"[" * 100_000)), "model_index.json is not JSON"),
    ("no object", archive((INDEX[0], b"[]")), "is not a JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "message"), [row[1:] for row in INVALID], ids=[row[0] for row in INVALID]
)
def test_invalid(raw: bytes, message: str) -> None:
    with pytest.raises(WeightFormatError) as caught:
        read_dduf_header(as_file(raw, "x.dduf"))
    assert message in caught.value.message
    assert caught.value.path == "x.dduf"
    assert caught.value.offset is not None


def evil(start: int, shift: int = 0) -> tuple[bytes, bytes]:
    """Return entries that begin at `start`, and a directory of the size of `GOOD`'s.

    The directory claims that the entries begin `shift` bytes earlier.
    """
    raw = archive(INDEX, ("../../config.js", b"{}"), ("../../../.ssh/aconfig", b""))
    first, last = raw.index(CENTRAL), raw.index(END)
    directory = bytearray(raw[first:last])
    at = directory.find(CENTRAL)
    while at >= 0:
        (local,) = struct.unpack_from("<L", directory, at + 42)
        struct.pack_into("<L", directory, at + 42, (local + start - shift) % 2**32)
        at = directory.find(CENTRAL, at + 1)
    return raw[:first], bytes(directory)


def test_other_readers_find_no_other_directory() -> None:
    """Python's zipfile looks for it right before the end, and for ZIP64 where nothing asks."""
    first, last = GOOD.index(CENTRAL), GOOD.index(END)
    entries, directory = evil(last)
    assert len(directory) == last - first
    shift = len(entries) + len(directory)
    _, moved = evil(last, shift)
    before = GOOD[:last] + entries + moved + GOOD[last:]
    assert "../../config.js" in zipfile.ZipFile(io.BytesIO(before)).namelist()
    with pytest.raises(WeightFormatError, match="between the directory and the end"):
        read_dduf_header(as_file(before))
    end = last + shift
    fields = (44, 45, 45, 0, 0, 3, 3, len(directory), last + len(entries))
    wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", *fields)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    unasked = GOOD[:last] + entries + directory + wide + locator + GOOD[last:]
    assert "../../config.js" in zipfile.ZipFile(io.BytesIO(unasked)).namelist()
    with pytest.raises(WeightFormatError, match="the ZIP and ZIP64 end records disagree"):
        read_dduf_header(as_file(unasked))


@pytest.mark.parametrize("field", [b"up", b"\x99\x99"])
def test_extra_fields_that_readers_disagree_about(field: bytes) -> None:
    """The first field gives the entry another name; the second field is repeated."""
    central, end = GOOD.index(CENTRAL), GOOD.index(END)
    extra = (field + struct.pack("<HB", 1, 1)) * 2
    raw = bytearray(GOOD)
    struct.pack_into("<H", raw, central + 30, len(extra))
    struct.pack_into("<L", raw, end + 12, end - central + len(extra))
    at = central + 46 + len(INDEX[0])
    raw[at:at] = extra
    with pytest.raises(WeightFormatError, match="two extra fields of one kind"):
        read_dduf_header(as_file(bytes(raw)))


def test_a_name_twice() -> None:
    raw = archive(INDEX, ("abc.json", b"{}"), ("abd.json", b"{}")).replace(b"abd.json", b"abc.json")
    with pytest.raises(WeightFormatError, match=r"the entry 'abc\.json' occurs twice"):
        read_dduf_header(as_file(raw))


def test_entries_over_each_other() -> None:
    raw = archive(INDEX, ("a.json", b"{}"), ("b.json", b"{}"))
    # The entry `a.json` claims the bytes of `b.json` as well.
    at = raw.index(CENTRAL, raw.index(CENTRAL) + 1)
    out = bytearray(raw)
    struct.pack_into("<2L", out, at + 20, 60, 60)
    with pytest.raises(WeightFormatError, match=r"'a\.json' and 'b\.json' overlap"):
        read_dduf_header(as_file(bytes(out)))


def test_a_large_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dduf, "MAX_MODEL_INDEX_BYTES", 10)
    with pytest.raises(WeightFormatError, match=r"model_index\.json is 22 bytes long"):
        read_dduf_header(as_file(archive(*FILES)))


@pytest.mark.parametrize("change", [lambda byte: byte ^ 0xFF, lambda byte: (byte + 1) % 256])
def test_every_changed_byte_is_an_error_or_harmless(change: Callable[[int], int]) -> None:
    for at in range(len(GOOD)):
        raw = bytearray(GOOD)
        raw[at] = change(raw[at])
        try:
            header = read_dduf_header(as_file(bytes(raw)))
        except WeightFormatError:
            continue
        assert all(entry.offset + entry.size <= len(raw) for entry in header.entries)
