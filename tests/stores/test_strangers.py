"""Stores from an untrusted source: using one changes no file outside it, and does not hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from modelpack.errors import ModelpackError, NotFoundError, StoreError, UnsafePathError
from modelpack.store.fsck import Fault
from modelpack.store.layout import LayoutStore
from modelpack.store.tree import label
from tests.contract.parts import BytesSource, Watcher, blob_of, small_model, write_model

NAME = "docker.io/ai/x:latest"
MODEL = small_model(b"weights")
LAYER = MODEL.manifest.layers[0]
LATER = blob_of(b"fetched later")
MARK = label(LAYER.digest)


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Fail a test that waits for the other end of a FIFO."""

    def give_up(*_: object) -> None:
        raise AssertionError("waits for ever")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    store = LayoutStore(tmp_path / "store")
    write_model(store, MODEL, NAME)
    return store.root


def use(root: Path) -> Iterator[Callable[[], object]]:
    """Yield each use of a store; most open it anew, as a command does."""
    watch = Watcher().watch
    yield lambda: LayoutStore(root).models()
    yield lambda: LayoutStore(root).blob_path(LAYER.digest)
    yield lambda: LayoutStore(root).listing_cache.read()
    yield lambda: LayoutStore(root).bundles.check(MODEL.digest)
    yield lambda: LayoutStore(root).write_blob(LATER, BytesSource(b"fetched later"), watch)
    yield lambda: LayoutStore(root).note_links([LAYER.digest])
    yield lambda: LayoutStore(root).touch_blob(LAYER.digest)
    yield lambda: LayoutStore(root).note_place([LAYER.digest], "r.example/m")
    yield lambda: LayoutStore(root).fsck(watch=watch)
    yield lambda: LayoutStore(root).gc(grace_seconds=0)
    yield lambda: LayoutStore(root).remove(NAME)


OWN_FILES = [
    ".lock",
    "oci-layout",
    "index.json",
    f"ingest/linked/{MARK}",
    f"ingest/unflushed/{MARK}",
    f"ingest/{label(LATER.digest)}.lock",
    f"ingest/{label(LATER.digest)}.json",
    f"ingest/{label(LATER.digest)}.json.tmp",
    f"ingest/{label(LATER.digest)}.part",
    "ingest/leases/x",
    "ingest/listing.json",
    "ingest/places.json",
    "ingest/import-x.tmp",
    f"bundles/{label(MODEL.digest)}/bundle.json",
    f"quarantine/{MARK}",
    f"blobs/sha256/{LAYER.digest.encoded}",
    f"blobs/sha256/{'0' * 64}",
]


def replaced(root: Path, name: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


@pytest.mark.parametrize("name", OWN_FILES)
def test_links_to_files_elsewhere(root: Path, tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    os.utime(precious, (1, 1))
    replaced(root, name).symlink_to(precious)
    for attempt in use(root):
        with suppress(ModelpackError):
            attempt()
    assert precious.read_bytes() == b"mine"
    assert precious.stat().st_mtime == 1


def test_a_directory_of_uploads_elsewhere(root: Path, tmp_path: Path) -> None:
    """A collection deletes uploads that received nothing for a day."""
    outside = tmp_path / "outside"
    (outside / "thesis").mkdir(parents=True)
    long_ago = time.time() - 7 * 24 * 3600
    os.utime(outside / "thesis", (long_ago, long_ago))
    (root / "ingest" / "uploads").symlink_to(outside)
    with pytest.raises(UnsafePathError, match="points outside the store"):
        LayoutStore(root).gc()
    assert [path.name for path in outside.iterdir()] == ["thesis"]


@pytest.mark.long
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", OWN_FILES)
def test_what_is_no_file(root: Path, name: str, make: Callable[[Path], None]) -> None:
    make(replaced(root, name))
    for attempt in use(root):
        with suppress(ModelpackError):
            attempt()


@pytest.mark.parametrize("name", ["ingest/leases/x", "ingest/import-x.tmp", f"quarantine/{MARK}"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_collection_passes_over_what_is_not_of_the_store(
    root: Path, name: str, make: Callable[[Path], None]
) -> None:
    make(replaced(root, name))
    store = LayoutStore(root)
    stray = store.write_bytes(b"nobody needs it", "text/plain").digest
    assert store.gc(grace_seconds=0).removed == (stray,)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_check_names_what_is_no_blob(root: Path, make: Callable[[Path], None]) -> None:
    make(replaced(root, f"blobs/sha256/{LAYER.digest.encoded}"))
    store = LayoutStore(root)
    (problem,) = store.fsck(watch=Watcher().watch).problems
    assert (problem.kind, problem.digest, problem.models) == (Fault.STRAY, LAYER.digest, (NAME,))
    with pytest.raises(NotFoundError):
        store.blob_path(LAYER.digest)


@pytest.mark.parametrize("name", ["oci-layout", "index.json"])
def test_devices_without_end(root: Path, name: str) -> None:
    replaced(root, name).symlink_to("/dev/zero")
    with pytest.raises(StoreError, match="not a regular file"):
        LayoutStore(root).models()


@pytest.mark.parametrize(
    "name",
    ["oci-layout", f"ingest/linked/{MARK}", f"bundles/{label(MODEL.digest)}/bundle.json", ".lock"],
)
def test_files_of_any_length_take_no_memory(root: Path, name: str) -> None:
    with replaced(root, name).open("wb") as file:
        file.truncate(1 << 50 if os.uname().sysname == "Darwin" else 1 << 42)
    for attempt in use(root):
        with suppress(ModelpackError):
            attempt()


def test_a_mark_of_any_bytes_calls_for_a_look(root: Path) -> None:
    mark = replaced(root, f"ingest/linked/{MARK}")
    mark.write_bytes(b"\xff\xfe")
    store = LayoutStore(root)
    assert store.blob_path(LAYER.digest).read_bytes() == b"weights"
    assert mark.read_bytes() != b"\xff\xfe", "it was looked at, and found right"


@pytest.mark.parametrize(
    "journal",
    [b"[" * 100_000, b'{"digest": "%b", "present": [[0, 5.5]]}', b'{"digest": "%b", "present": 1}'],
    ids=["deep", "fractions", "no list"],
)
def test_a_journal_of_anything(root: Path, journal: bytes) -> None:
    part = root / "ingest" / f"{label(LATER.digest)}.part"
    part.write_bytes(b"something")
    part.with_suffix(".json").write_bytes(journal.replace(b"%b", str(LATER.digest).encode()))
    store = LayoutStore(root)
    store.write_blob(LATER, BytesSource(b"fetched later"), Watcher().watch)
    assert store.has_blob(LATER)
