"""Parse the directory of a DDUF archive, a ZIP file with a diffusers pipeline, within limits.

Every entry is stored uncompressed, so that weights can be mapped in place; `model_index.json`
names the parts. Source: the DDUF description of Hugging Face and APPNOTE.TXT of ZIP.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from stat import S_ISDIR, S_ISREG

from modelpack.artifacts.paths import path_problem
from modelpack.errors import WeightFormatError
from modelpack.formats.reader import CUT_SHORT, WeightFile, WeightSource, opened, quoted

MODEL_INDEX = "model_index.json"
MAX_MODEL_INDEX_BYTES = 1024 * 1024
#: What the names of files end in (huggingface_hub's `DDUF_ALLOWED_ENTRIES`): no file is a pickle.
EXTENSIONS = (".json", ".model", ".safetensors", ".txt")
#: Pipelines have dozens of files.
MAX_ENTRIES = 10_000
MAX_DIRECTORY_BYTES = 4 * 1024 * 1024

_LOCAL_SIGNATURE = b"PK\x03\x04"
_END = struct.Struct("<4s4H2LH")
_END_SIGNATURE = b"PK\x05\x06"
_LOCATOR = struct.Struct("<4sLQL")
_LOCATOR_SIGNATURE = b"PK\x06\x07"
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_SIGNATURE = b"PK\x06\x06"
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_CENTRAL_SIGNATURE = b"PK\x01\x02"
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT = 65_535
_UINT16, _UINT32 = 0xFFFF, 0xFFFFFFFF
_ZIP64_EXTRA = 0x0001
_UNICODE_PATH = 0x7075
_ENCRYPTED, _UTF8 = 0x0001, 0x0800


@dataclass(frozen=True, slots=True)
class DDUFEntry:
    """One file of the archive: `size` bytes at the byte `offset` of the archive."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class DDUFHeader:
    """The directory of a DDUF archive."""

    path: str
    file_size: int
    entries: tuple[DDUFEntry, ...]


@dataclass(frozen=True, slots=True)
class _Record:
    """An entry of the central directory, at byte `at`; its local header is at byte `local`."""

    name: str
    raw_name: bytes
    local: int
    size: int
    at: int


def read_dduf_header(source: WeightSource) -> DDUFHeader:
    """Return the directory of the DDUF archive `source`.

    Raises `WeightFormatError` with the byte if an entry is compressed, has an unsafe or repeated
    name or a type that DDUF does not have, lies outside the archive or overlaps another, or if
    `model_index.json` is missing or broken.
    """
    with opened(source) as file:
        if not file.head().startswith(_LOCAL_SIGNATURE):
            raise file.foreign("a DDUF archive")
        offset, size, count = _find_directory(file)
        records = _records(file, file.read(offset, size), offset, count)
        entries = tuple(_located(file, record) for record in records)
        _check_layout(file, entries, offset)
        _check_model_index(file, entries)
        return DDUFHeader(file.path, file.size, entries)


def _find_directory(file: WeightFile) -> tuple[int, int, int]:
    """Return the offset and the size of the directory in bytes, and its number of entries."""
    start = max(0, file.size - _END.size - _MAX_COMMENT)
    tail = file.read(start, file.size - start)
    at = tail.rfind(_END_SIGNATURE)
    # ZIP readers disagree on which of several end records counts, so a comment must not hold one.
    fields = _END.unpack_from(tail, at) if 0 <= at <= len(tail) - _END.size else None
    if fields is None or at + _END.size + fields[-1] != len(tail):
        raise file.error(
            "the end record of the ZIP archive is missing",
            file.size,
            hint=CUT_SHORT,
        )
    end = start + at
    _, disk, first_disk, _, count, size, offset, _ = fields
    if end >= _LOCATOR.size and file.read(end - _LOCATOR.size, 4) == _LOCATOR_SIGNATURE:
        narrow = (disk, first_disk, count, size, offset)
        _, _, at64, _ = _LOCATOR.unpack(file.read(end - _LOCATOR.size, _LOCATOR.size))
        end -= _LOCATOR.size + _END64.size
        # Some readers follow the locator, others read the bytes right before it.
        wide = _END64.unpack(file.read(end, _END64.size)) if at64 == end else (b"",)
        if wide[0] != _END64_SIGNATURE:
            raise file.error("the ZIP64 locator does not point to a ZIP64 end record", at64)
        _, _, _, _, disk, first_disk, _, count, size, offset = wide
        values = (disk, first_disk, count, size, offset)
        limits = (_UINT16, _UINT16, _UINT16, _UINT32, _UINT32)
        if any(n not in (w, most) for n, w, most in zip(narrow, values, limits, strict=True)):
            raise file.error("the ZIP and ZIP64 end records disagree", end)
    if disk or first_disk:
        raise file.error("the archive has several parts, expected one file", end)
    if count > MAX_ENTRIES or size > MAX_DIRECTORY_BYTES:
        raise file.error(
            f"the directory has {count} entries in {size} bytes, the limits are {MAX_ENTRIES} and"
            f" {MAX_DIRECTORY_BYTES}",
            end,
        )
    if offset + size > end:
        raise file.error("the directory overlaps the end record of the archive", end)
    if offset + size < end:  # other readers expect the directory to end right before the record
        raise file.error("unexpected bytes between the directory and the end record", end)
    return offset, size, count


def _records(file: WeightFile, raw: bytes, offset: int, count: int) -> Iterator[_Record]:
    """Yield the files among the `count` entries of the directory `raw` at byte `offset`."""
    at = 0
    seen: set[str] = set()
    for _ in range(count):
        position = offset + at
        if at + _CENTRAL.size > len(raw):
            raise file.error("the directory ends too early", position)
        fields = _CENTRAL.unpack_from(raw, at)
        signature, made_by, _, flags, method = fields[:5]
        stored, size, name_length, extra_length, comment_length = fields[8:13]
        attributes, local = fields[15:17]
        if signature != _CENTRAL_SIGNATURE:
            raise file.error("not an entry of a ZIP directory", position)
        at += _CENTRAL.size
        raw_name = raw[at : at + name_length]
        extra = raw[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        if at > len(raw):
            raise file.error("the directory ends too early", position)
        name = _checked_name(file, raw_name, flags, position)
        if name in seen:
            raise file.error(f"the entry {quoted(name)} occurs twice", position)
        seen.add(name)
        if flags & _ENCRYPTED:
            raise file.error(f"the entry {quoted(name)} is encrypted", position)
        if method != 0:
            raise file.error(
                f"the entry {quoted(name)} is compressed (method {method}), expected stored",
                position,
                hint="write the archive with ZIP_STORED: DDUF requires uncompressed entries",
            )
        size, stored, local = _wide(file, extra, (size, stored, local), position)
        if size != stored:
            raise file.error(f"the two sizes of the entry {quoted(name)} differ", position)
        mode = attributes >> 16 if made_by >> 8 == 3 else 0  # 3: written on Unix
        if mode and not (S_ISREG(mode) or S_ISDIR(mode) or mode < 0o10000):
            raise file.error(f"the entry {quoted(name)} is not a regular file", position)
        if name.endswith("/"):
            if size:
                raise file.error(f"the directory {quoted(name)} has data", position)
            continue
        if not name.endswith(EXTENSIONS):
            raise file.error(
                f"the entry {quoted(name)} is not of a type that DDUF has "
                f"({', '.join(EXTENSIONS)})",
                position,
                hint="convert weights to safetensors: pickles can run code when they are loaded",
            )
        yield _Record(name, raw_name, local, size, position)
    if at != len(raw):
        raise file.error("unexpected bytes follow the last entry", offset + at)


def _checked_name(file: WeightFile, raw: bytes, flags: int, position: int) -> str:
    try:
        name = raw.decode("utf-8" if flags & _UTF8 else "ascii")
    except UnicodeDecodeError:
        raise file.error("the name of an entry is not UTF-8", position) from None
    problem = path_problem(name.removesuffix("/"))
    if problem:
        raise file.error(f"the entry {quoted(name)} has an unsafe name: {problem}", position)
    return name


def _wide(
    file: WeightFile, extra: bytes, values: tuple[int, ...], position: int
) -> tuple[int, ...]:
    """Return `values` with each 0xffffffff replaced by the number in the ZIP64 field."""
    wide = b""
    kinds = set()
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == _UNICODE_PATH or kind in kinds:
            raise file.error(
                "the entry has a second name, or two extra fields of one kind", position
            )
        kinds.add(kind)
        if kind == _ZIP64_EXTRA:
            wide = extra[4 : 4 + length]
        extra = extra[4 + length :]
    if _UINT32 not in values:
        return values
    result: list[int] = []
    for value in values:
        if value == _UINT32:
            if len(wide) < 8:
                raise file.error("the ZIP64 entry does not hold its sizes", position)
            value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        result.append(value)
    return tuple(result)


def _located(file: WeightFile, record: _Record) -> DDUFEntry:
    """Return the entry of `record`; its local header must agree with the directory."""
    if record.local + _LOCAL.size > file.size:
        raise file.error(f"the entry {quoted(record.name)} lies outside the file", record.at)
    fields = _LOCAL.unpack(file.read(record.local, _LOCAL.size))
    signature, method, name_length, extra_length = fields[0], fields[3], fields[9], fields[10]
    start = record.local + _LOCAL.size
    if signature != _LOCAL_SIGNATURE or method != 0:
        raise file.error(
            f"expected the local header of the stored entry {quoted(record.name)}", record.local
        )
    if name_length != len(record.raw_name) or file.read(start, name_length) != record.raw_name:
        raise file.error(
            f"the entry {quoted(record.name)} has another name in its local header", record.local
        )
    return DDUFEntry(record.name, start + name_length + extra_length, record.size)


def _check_layout(file: WeightFile, entries: tuple[DDUFEntry, ...], directory: int) -> None:
    ordered = sorted(entries, key=lambda entry: (entry.offset, entry.size))
    for before, after in pairwise(ordered):
        if before.offset + before.size > after.offset:
            raise file.error(
                f"the entries {quoted(before.name)} and {quoted(after.name)} overlap",
                after.offset,
            )
    if ordered and ordered[-1].offset + ordered[-1].size > directory:
        raise file.error(
            f"the entry {quoted(ordered[-1].name)} runs into the directory", ordered[-1].offset
        )


def _check_model_index(file: WeightFile, entries: tuple[DDUFEntry, ...]) -> None:
    index = next((entry for entry in entries if entry.name == MODEL_INDEX), None)
    if index is None:
        raise _index_error(file, f"the archive has no {MODEL_INDEX}", file.size)
    if index.size > MAX_MODEL_INDEX_BYTES:
        message = f"{MODEL_INDEX} is {index.size} bytes long, the limit is {MAX_MODEL_INDEX_BYTES}"
        raise _index_error(file, message, index.offset)
    try:
        value = json.loads(file.read(index.offset, index.size).decode())
    except (ValueError, RecursionError) as error:
        raise _index_error(file, f"{MODEL_INDEX} is not JSON: {error}", index.offset) from None
    if not isinstance(value, dict):
        raise _index_error(file, f"{MODEL_INDEX} is not a JSON object", index.offset)


def _index_error(file: WeightFile, message: str, offset: int) -> WeightFormatError:
    return file.error(message, offset, hint=f"write the archive with a valid {MODEL_INDEX}")
