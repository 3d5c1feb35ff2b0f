"""Hostile tar archives: each raises an error, uses little memory and leaves the store unchanged."""

from __future__ import annotations

import io
import json
import subprocess
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import pytest

import modelpack
from modelpack import errors
from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.errors import FormatError, ManifestError, UnsafePathError, UnsupportedError
from modelpack.operations import archives as archive_reading
from modelpack.operations.archives import archive_of, import_archive
from modelpack.storage import watching
from tests.cli.running import modelpack as command
from tests.models import store_of_two
from tests.unpacking.tars import (
    END,
    file,
    folder,
    gnu_name,
    gnu_sparse,
    gzipped,
    header,
    padded,
    pax,
)

ZEROS = bytes(1 << 20)
GOOD = b"a blob that is what its name says"
_MEMORY = 24 << 20


def blob_name(content: bytes) -> bytes:
    return b"blobs/sha256/" + Digest.of(content).encoded.encode()


def blob(content: bytes) -> bytes:
    return file(blob_name(content), content)


def big(size: int) -> bytes:
    """Return the size field of a number in base 256."""
    return b"\x80" + size.to_bytes(11, "big")


def entry(content: bytes, media_type: str = media_types.OCI_INDEX) -> dict[str, object]:
    return {"mediaType": media_type, "digest": str(Digest.of(content)), "size": len(content)}


def index(*entries: Mapping[str, object]) -> bytes:
    value = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": entries}
    return json.dumps(value).encode()


def nested_indexes(width: int, depth: int) -> bytes:
    """Return a layout with `depth` nested indexes, each of which lists the next `width` times."""
    document = index(entry(b"nothing", media_types.OCI_MANIFEST))
    blobs = [blob(document)]
    for _ in range(depth):
        document = index(*[entry(document)] * width)
        blobs.append(blob(document))
    return b"".join(blobs) + file(b"index.json", document)


ZERO, NAME = blob_name(ZEROS), blob_name(b"x")
LONG = b"n" * (1 << 20)
TABLE: dict[str, tuple[bytes, type[Exception]]] = {
    # Sparse files: a few bytes that expand to many.
    "sparse, old GNU": (gnu_sparse(ZERO, len(ZEROS)), UnsupportedError),
    "sparse, old GNU, 8 GiB": (gnu_sparse(ZERO, 8**11 - 1), UnsupportedError),
    "sparse, old GNU, extended": (gnu_sparse(ZERO, 1 << 32, extended=True), UnsupportedError),
    "sparse, GNU 0.0": (
        pax({b"GNU.sparse.size": b"1048576", b"GNU.sparse.numblocks": b"0"}) + file(ZERO),
        UnsupportedError,
    ),
    "sparse, GNU 0.1": (
        pax({b"GNU.sparse.map": b"0,0", b"GNU.sparse.size": b"1048576"}) + file(ZERO),
        UnsupportedError,
    ),
    "sparse, GNU 1.0": (
        pax({
            b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.name": ZERO,
            b"GNU.sparse.realsize": b"1048576",
        }) + file(b"x", padded(b"0\n")),
        UnsupportedError,
    ),
    "sparse, GNU 1.0, 2 GiB map": (
        pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"size": b"%d" % (1 << 31)})
        + header(ZERO),
        UnsupportedError,
    ),
    "sparse, star": (pax({b"SCHILY.realsize": b"1048576"}) + file(ZERO), UnsupportedError),
    "sparse, Solaris": (pax({b"SUN.holesdata": b" 0 1048576"}) + file(ZERO), UnsupportedError),
    "sparse for all": (pax({b"GNU.sparse.size": b"9"}, b"g") + file(ZERO), UnsupportedError),
    # Entries that are not files.
    "hard link": (header(NAME, kind=b"1", link=b"/etc/passwd"), UnsafePathError),
    "symbolic link": (header(NAME, kind=b"2", link=b"/etc/passwd"), UnsafePathError),
    "symbolic link to a directory": (header(b"blobs", kind=b"2", link=b"/"), UnsafePathError),
    "character device": (header(NAME, kind=b"3"), UnsafePathError),
    "block device": (header(NAME, kind=b"4"), UnsafePathError),
    "FIFO": (header(b"index.json", kind=b"6"), UnsafePathError),
    "directory of a dump": (header(NAME, kind=b"D"), UnsupportedError),
    "part of another volume": (header(NAME, kind=b"M"), UnsupportedError),
    "label of a volume": (header(NAME, kind=b"V"), UnsupportedError),
    "unknown type": (header(NAME, kind=b"!"), UnsupportedError),
    # Wrong sizes.
    "negative size": (header(NAME, size_field=b"\xff" * 12), FormatError),
    "negative size in a record": (pax({b"size": b"-1"}) + file(NAME), FormatError),
    "size of 88 bits": (header(NAME, size_field=big((1 << 88) - 1)), FormatError),
    "size of 63 bits": (header(NAME, size_field=big((1 << 63) - 1)), errors.StorageFullError),
    "size of 19 digits": (pax({b"size": b"9" * 19}) + file(NAME), FormatError),
    "size of 18 digits": (pax({b"size": b"9" * 18}) + file(NAME), errors.StorageFullError),
    "size that is no number": (header(NAME, size_field=b"0x10".ljust(12)), FormatError),
    "more than arrives": (header(NAME, 5000) + padded(b"x"), FormatError),
    "less than arrives": (pax({b"size": b"1"}) + file(NAME, b"x" * 1024), FormatError),
    "size for all": (pax({b"size": b"1"}, b"g") + file(NAME, b"x"), UnsupportedError),
    "directory with data": (header(b"d", 5, kind=b"5") + padded(b"12345"), FormatError),
    # Endless headers.
    "name of 4 GiB": (header(b"l", size_field=big(1 << 32), kind=b"L"), FormatError),
    "name of 1 MiB": (gnu_name(LONG) + file(b"a"), FormatError),
    "link name of 1 MiB": (gnu_name(LONG, b"K") + file(b"a"), FormatError),
    "records of 2 GiB": (header(b"x", 1 << 31, kind=b"x"), FormatError),
    "records of 1 MiB": (pax({b"comment": LONG}) + file(b"a"), FormatError),
    "records for all of 1 MiB": (pax({b"comment": LONG}, b"g") + file(b"a"), FormatError),
    "headers for headers": (pax({b"a": b"b"}, b"g") * 200 + file(b"a"), FormatError),
    "record beyond its header": (file(b"x", b"99 path=a\n", kind=b"x") + file(b"a"), FormatError),
    "record of many digits": (file(b"x", b"9" * 400, kind=b"x") + file(b"a"), FormatError),
    # Names.
    "path that leads out": (file(b"../" + NAME, b"x"), UnsafePathError),
    "path that leads out later": (file(b"blobs/../../x", b"x"), UnsafePathError),
    "record that leads out": (pax({b"path": b"a/../../b"}) + file(NAME, b"x"), UnsafePathError),
    "digest in capitals": (file(NAME.upper().replace(b"BLOBS/SHA256", b"blobs/sha256"), b"x"),
                           FormatError),
    "path that is no digest": (file(b"blobs/sha256/zz", b"x"), FormatError),
    "path of another algorithm": (file(b"blobs/md5/" + b"0" * 32, b"x"), FormatError),
    "path that is not UTF-8": (file(b"blobs/\xff", b"x"), FormatError),
    "absolute path": (file(b"/index.json", index()), ManifestError),
    "two indexes": (file(b"index.json", index()) * 2, FormatError),
    "two manifests": (file(b"manifest.json", b"{}") + file(b"./manifest.json"), FormatError),
    "two sizes of a blob": (blob(b"x") + file(NAME, b"xy"), FormatError),
    # Contents.
    "another blob than its name": (file(NAME, b"y"), errors.DigestMismatchError),
    "an index of 5 MB": (file(b"index.json", b" " * 5_000_000), ManifestError),
    "indexes of indexes": (nested_indexes(50, 4), ManifestError),
    "indexes too deep": (nested_indexes(1, 9), UnsupportedError),
    "nothing that is known": (folder(b"d") + file(b"readme", b"x"), ManifestError),
    "gzip": (gzipped(file(b"index.json", index()) + END), FormatError),
}  # fmt: skip


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> modelpack.Store:
    return store_of_two(tmp_path_factory.mktemp("origin"))


@pytest.fixture
def store(tmp_path: Path) -> modelpack.Store:
    return modelpack.Store(tmp_path / "store")


def read(store: modelpack.Store, raw: bytes) -> None:
    import_archive(store, io.BytesIO(raw), watching(None))


def files(store: modelpack.Store) -> dict[str, int]:
    """Return every file of the store and its size."""
    found = (path for path in store.root.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(store.root)): path.stat().st_size for path in found}


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) > 40


@pytest.mark.sample(9)
@pytest.mark.parametrize("name", TABLE)
def test_hostile(store: modelpack.Store, name: str) -> None:
    data, error = TABLE[name]
    lead = b"" if name == "gzip" else blob(GOOD)
    before = files(store)
    tracemalloc.start()
    try:
        with pytest.raises(error):
            read(store, lead + data + END)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < _MEMORY + len(data) * 4
    assert files(store) == before


@pytest.mark.parametrize("name", [name for name in TABLE if "sparse" in name])
def test_sparse_layers(tmp_path: Path, name: str) -> None:
    from modelpack.bundles.tar import TarReader

    reader = TarReader(io.BytesIO(TABLE[name][0] + END), "layer x", max_header_bytes=1 << 20)
    with pytest.raises(UnsupportedError, match="layer x"):
        list(reader)


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=pax", "--sparse-version=0.0"],
        ["--format=pax", "--sparse-version=0.1"],
        ["--format=pax", "--sparse-version=1.0"],
    ],
    ids=" ".join,
)
def test_what_gnu_tar_makes_of_a_sparse_file(
    store: modelpack.Store, tmp_path: Path, options: list[str]
) -> None:
    if b"GNU" not in subprocess.run(["tar", "--version"], capture_output=True).stdout:
        pytest.skip("needs GNU tar")
    path = tmp_path / ZERO.decode()
    path.parent.mkdir(parents=True)
    with path.open("wb") as target:
        target.truncate(len(ZEROS))
    made = ["tar", "-S", *options, "-cf", "-", "-C", str(tmp_path), "blobs"]
    raw = subprocess.run(made, capture_output=True, check=True).stdout
    assert len(raw) < len(ZEROS)
    with pytest.raises(UnsupportedError, match="is a sparse file"):
        read(store, raw)
    assert not [*store.root.glob("blobs/*/*")]


def test_entries_are_counted(store: modelpack.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_reading, "_MAX_ENTRIES", 10)
    before = files(store)
    with pytest.raises(UnsupportedError, match="more than 10 entries"):
        read(store, blob(GOOD) + folder(b"d") * 10 + END)
    assert files(store) == before


def test_manifests_are_counted(store: modelpack.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_reading, "MAX_MANIFESTS", 3)
    with pytest.raises(UnsupportedError, match="more than 3 manifests"):
        read(store, nested_indexes(1, 4) + END)


def test_all_models_of_an_archive_or_none(origin: modelpack.Store, store: modelpack.Store) -> None:
    """The first model of the archive is complete, but a blob of the second one is missing."""
    names = ["docker.io/x/gguf:v1", "docker.io/x/st:v1"]
    whole = b"".join(archive_of(origin, names, watching(None)).pieces)
    lacking = modelpack.inspect(names[1], store=origin).manifest.layers[0].digest
    cut = b""
    for start in range(0, len(whole), 512):
        at_blob = whole[start : start + 100].rstrip(b"\0").endswith(lacking.encoded.encode())
        name = b"blobs/other" if at_blob else b""
        if at_blob:
            block = whole[start : start + 512]
            size = int(block[124:135], 8)
            cut += header(name, size)
        else:
            cut += whole[start : start + 512]
    before = files(store)
    with pytest.raises(ManifestError, match="which is missing"):
        read(store, cut)
    assert store.models() == ()
    assert files(store) == before
    read(store, whole)
    assert len(store.models()) == 2
    assert store.fsck(watch=watching(None)).ok


def test_what_others_need_stays(origin: modelpack.Store, store: modelpack.Store) -> None:
    whole = b"".join(archive_of(origin, ["x/gguf:v1"], watching(None)).pieces)
    read(store, whole)
    before = files(store)
    leased = Digest.of(b"leased")
    with modelpack.Store(store.root).lease([leased]), pytest.raises(FormatError):
        read(store, whole[:-1024] + blob(GOOD) + blob(b"leased") + b"!" * 512)
    after = {path for path in files(store) if path.startswith("blobs/")}
    assert after - set(before) == {f"blobs/sha256/{leased.encoded}"}
    assert store.fsck(watch=watching(None)).ok


def test_a_download_that_was_interrupted_is_kept(store: modelpack.Store) -> None:
    """A failed import keeps the partial blob of a pull, so that a later pull resumes it."""
    digest = Digest.of(b"x" * 5000)
    part = store.partial_path(digest)
    part.write_bytes(b"x" * 100)
    with pytest.raises(FormatError):
        read(store, (file(blob_name(b"x" * 5000), b"x" * 5000) + END)[:3000])
    assert part.read_bytes() == b"x" * 100


def test_on_the_command_line(store: modelpack.Store, tmp_path: Path) -> None:
    path = tmp_path / "bomb.tar"
    path.write_bytes(gnu_sparse(ZERO, 3 << 30) + END)
    assert path.stat().st_size < 2560
    result = command("import", path, "--store", store.root)
    assert result.code != 0
    assert "is a sparse file" in result.err
    assert not [*store.root.glob("blobs/*/*")]
