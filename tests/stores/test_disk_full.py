"""A full disk, on a small file system for the test."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from modelpack.errors import StorageFullError
from modelpack.store import downloads, imports
from modelpack.store import filesystem as disk_space
from modelpack.store.layout import LayoutStore
from tests.contract.parts import BytesSource, Watcher, blob_of, content_of, small_model, write_model

MIB = 1024 * 1024
CONTENT = random.Random(19).randbytes(11 * MIB)
X = "docker.io/ai/x:latest"


@pytest.fixture
def small(disk: Path) -> LayoutStore:
    """A store on that disk, with a model in it."""
    store = LayoutStore(disk / "store")
    write_model(store, small_model(b"weights"), X)
    return store


def fill(disk: Path, leave: int) -> Path:
    """Fill the disk except for `leave` bytes."""
    found = os.statvfs(disk)
    path = disk / "filler"
    path.write_bytes(bytes(found.f_bavail * found.f_frsize - leave))
    return path


def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the check of free space, as if another process filled the disk later."""
    for module in (disk_space, downloads, imports):
        monkeypatch.setattr(module, "check_room", lambda *_: None)


@pytest.mark.scenario(19)
def test_a_download_that_cannot_fit_is_refused_at_once(
    disk: Path, small: LayoutStore, watcher: Watcher
) -> None:
    fill(disk, 8 * MIB)
    source = BytesSource(CONTENT)
    with pytest.raises(StorageFullError, match=r"need .* MB, have .* MB") as caught:
        small.write_blob(blob_of(CONTENT), source, watcher.watch)
    assert source.offsets == []
    assert caught.value.exit_code == 1
    assert caught.value.needed is not None
    assert len(CONTENT) < caught.value.needed < len(CONTENT) * 1.1


@pytest.mark.scenario(19)
def test_a_disk_that_fills_up_meanwhile_keeps_the_part_and_the_index(
    disk: Path, small: LayoutStore, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = (small.root / "index.json").read_bytes()
    filler, blob = fill(disk, 8 * MIB), blob_of(CONTENT)
    blind(monkeypatch)
    with pytest.raises(StorageFullError, match=r"need .*, have") as caught:
        small.write_blob(blob, BytesSource(CONTENT), watcher.watch)
    assert "goes on where it stopped" in str(caught.value.hint)
    part = small.root / "ingest" / f"sha256-{blob.digest.encoded}.part"
    kept = part.stat().st_size
    assert 4 * MIB < kept < len(CONTENT)
    assert part.read_bytes() == CONTENT[:kept]
    assert (small.root / "index.json").read_bytes() == index
    assert not small.has_blob(blob)
    assert small.resolve("x").size > 0
    assert small.fsck(watch=Watcher().watch).ok

    filler.unlink()
    source = BytesSource(CONTENT)
    small.write_blob(blob, source, watcher.watch)
    assert source.offsets == [kept]
    assert content_of(small, blob) == CONTENT


@pytest.mark.parametrize("looks", [True, False], ids=["looks first", "fills up meanwhile"])
def test_an_import_that_does_not_fit_leaves_nothing(
    disk: Path,
    small: LayoutStore,
    tmp_path: Path,
    watcher: Watcher,
    monkeypatch: pytest.MonkeyPatch,
    looks: bool,
) -> None:
    fill(disk, 8 * MIB)
    if not looks:
        blind(monkeypatch)
        monkeypatch.setattr(imports, "reserve", lambda *_: None)
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    before = os.statvfs(disk).f_bavail
    with pytest.raises(StorageFullError, match=r"need .*, have"):
        small.import_file(path, watcher.watch)
    assert os.statvfs(disk).f_bavail == before
    assert small.fsck(watch=Watcher().watch).ok


def test_reserving_notices_a_disk_that_fills_up_before_the_first_byte(
    disk: Path,
    small: LayoutStore,
    tmp_path: Path,
    watcher: Watcher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(disk, 8 * MIB)
    blind(monkeypatch)
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    with pytest.raises(StorageFullError, match=r"need .*, have"):
        small.import_file(path, watcher.watch)
    assert watcher.of("import") == []


def test_a_full_disk_leaves_the_index_as_it_was(disk: Path, small: LayoutStore) -> None:
    index = (small.root / "index.json").read_bytes()
    fill(disk, 0)
    other = small_model(b"other")
    with pytest.raises(StorageFullError):
        write_model(small, other, X)
    assert (small.root / "index.json").read_bytes() == index
    assert small.resolve("x").digest == small_model(b"weights").digest


def test_a_full_disk_does_not_stop_a_removal_from_freeing_it(
    disk: Path, small: LayoutStore
) -> None:
    lost = small.write_bytes(bytes(MIB), "text/plain")
    fill(disk, 0)
    report = small.gc(grace_seconds=0)
    assert report.removed == (lost.digest,)
    assert report.bytes_freed == MIB
