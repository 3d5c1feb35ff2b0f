"""Imports of files: one pass, and no change of the file meanwhile."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from modelpack.artifacts.digest import Digest
from modelpack.errors import (
    DigestMismatchError,
    InterruptedTransferError,
    NotFoundError,
    PackagingError,
    SizeMismatchError,
    SourceChangedError,
    StorageFullError,
)
from modelpack.progress import Progress, Stop
from modelpack.storage import Outcome, Watch
from modelpack.store import file_copy as cloning
from modelpack.store import file_copy as copying
from modelpack.store import filesystem as disk_space
from modelpack.store import imports
from modelpack.store.layout import LayoutStore
from tests.contract.parts import Watcher, blob_of, content_of

MIB = 1024 * 1024


@pytest.fixture(params=[0, 1, 3 * MIB + 1, 9 * MIB + 1])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "weights.gguf"
    path.write_bytes(os.urandom(request.param))
    return path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.gguf"
    path.write_bytes(os.urandom(9 * MIB + 1))
    return path


def left_in_ingest(store: LayoutStore) -> list[str]:
    return sorted(path.name for path in (store.root / "ingest").iterdir() if path.is_file())


def test_a_file_is_hashed_and_copied(store: LayoutStore, source: Path, watcher: Watcher) -> None:
    before = source.stat()
    imported = store.import_file(source, watcher.watch)

    content = source.read_bytes()
    assert imported.digest == Digest.of(content)
    assert imported.size == len(content)
    assert imported.outcome is Outcome.WRITTEN
    assert (imported.device, imported.inode) == (before.st_dev, before.st_ino)
    assert imported.mtime_ns == before.st_mtime_ns
    path = store.blob_path(imported.digest)
    assert path.read_bytes() == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert path.stat().st_nlink == 1
    assert left_in_ingest(store) == []
    assert store.import_file(source, watcher.watch).outcome is Outcome.EXISTED
    assert left_in_ingest(store) == []


def test_each_byte_is_read_once(
    store: LayoutStore, large: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    real = os.readv

    def counting(file: int, buffers: list[memoryview]) -> int:
        taken.append(real(file, buffers))
        return taken[-1]

    monkeypatch.setattr(copying.os, "readv", counting)
    store.import_file(large, watcher.watch)
    assert sum(taken) == large.stat().st_size


def test_progress_counts_to_the_size(store: LayoutStore, large: Path, watcher: Watcher) -> None:
    store.import_file(large, watcher.watch)
    assert [r.completed for r in watcher.of("import")] == [*range(MIB, 10 * MIB, MIB), 9 * MIB + 1]
    assert watcher.reports[-1].finished


def changed_by_appending(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"x")


def changed_in_place(path: Path) -> None:
    found = path.stat()
    with path.open("r+b") as stream:
        stream.write(b"x")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


def changed_by_truncating(path: Path) -> None:
    os.truncate(path, 2 * MIB)


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(os.urandom(path.stat().st_size))
    os.replace(other, path)


def removed(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("link", [False, True], ids=["copy", "link"])
@pytest.mark.parametrize(
    "change",
    [changed_by_appending, changed_in_place, changed_by_truncating, replaced, removed],
)
def test_a_file_that_changes_meanwhile_is_refused(
    store: LayoutStore, large: Path, change: Callable[[Path], None], link: bool
) -> None:
    calls = []

    def interfere(progress: Progress) -> None:
        calls.append(progress)
        if len(calls) == 4:
            change(large)

    with pytest.raises(SourceChangedError) as caught:
        store.import_file(large, Watch(interfere, Stop()), link=link)
    assert caught.value.exit_code == 5
    assert str(large) in str(caught.value)
    assert list(store._blobs.digests()) == []
    assert left_in_ingest(store) == []


def test_a_stop_request_ends_an_import(store: LayoutStore, large: Path) -> None:
    watcher = Watcher()

    def stop(_: Progress) -> None:
        watcher.stop.request()

    with pytest.raises(InterruptedTransferError):
        store.import_file(large, Watch(stop, watcher.stop))
    assert list(store._blobs.digests()) == []
    assert left_in_ingest(store) == []


def test_what_is_no_file_is_refused(store: LayoutStore, tmp_path: Path, watcher: Watcher) -> None:
    os.mkfifo(tmp_path / "fifo")  # opening it for reading would block
    for name in ("fifo", "."):
        with pytest.raises(PackagingError, match="not a regular file"):
            store.import_file(tmp_path / name, watcher.watch)
    with pytest.raises(NotFoundError):
        store.import_file(tmp_path / "absent", watcher.watch)


def test_a_link_shares_the_file_and_leaves_its_mode_and_time(
    store: LayoutStore, source: Path, watcher: Watcher
) -> None:
    source.chmod(0o640)
    before = source.stat()
    imported = store.import_file(source, watcher.watch, link=True)
    after, blob = source.stat(), store.blob_path(imported.digest).stat()
    assert (blob.st_dev, blob.st_ino) == (after.st_dev, after.st_ino)
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert after.st_nlink == 2
    assert left_in_ingest(store) == []
    source.unlink()
    assert store.blob_path(imported.digest).stat().st_size == imported.size


def test_a_symbolic_link_is_linked_as_its_target(
    store: LayoutStore, large: Path, watcher: Watcher
) -> None:
    link = large.with_name("link")
    link.symlink_to(large)
    imported = store.import_file(link, watcher.watch, link=True)
    path = store.blob_path(imported.digest)
    assert not path.is_symlink()
    assert path.samefile(large)


def test_where_links_are_impossible_the_file_is_copied(
    store: LayoutStore, large: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(imports.os, "link", refuse)
    imported = store.import_file(large, watcher.watch, link=True)
    assert not store.blob_path(imported.digest).samefile(large)
    assert "cross-device" in watcher.of("note")[0].message
    assert watcher.reports[-1].finished


def test_shared_blocks_where_the_file_system_has_them(
    store: LayoutStore, large: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This file system has no clones, so `clone` is replaced; the steps around it are tested."""

    def clone(source: int, target: int) -> bool:
        os.write(target, os.pread(source, large.stat().st_size, 0))
        return True

    monkeypatch.setattr(imports, "clone", clone)
    monkeypatch.setattr(imports, "copy_and_hash", None)
    imported = store.import_file(large, watcher.watch)
    assert imported.digest == Digest.of(large.read_bytes())
    assert content_of(store, blob_of(large.read_bytes())) == large.read_bytes()
    assert watcher.reports[-1].finished


def test_clones_are_tried_and_may_fail(tmp_path: Path, large: Path) -> None:
    with large.open("rb") as source, (tmp_path / "target").open("wb") as target:
        if cloning.clone(source.fileno(), target.fileno()):
            assert (tmp_path / "target").read_bytes() == large.read_bytes()
        else:
            assert (tmp_path / "target").stat().st_size == 0


def test_too_little_room_is_said_at_once(
    store: LayoutStore, large: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        f_frsize, f_bavail, f_flag = 4096, 10, 0

    monkeypatch.setattr(disk_space.os, "statvfs", lambda _: Full)
    with pytest.raises(StorageFullError, match=r"need 9\.91 MB, have 40\.96 kB") as caught:
        store.import_file(large, watcher.watch)
    assert caught.value.available == 40960
    assert watcher.reports == []
    assert left_in_ingest(store) == []


def test_a_file_is_adopted_as_the_blob_it_is(
    store: LayoutStore, large: Path, watcher: Watcher
) -> None:
    blob = blob_of(large.read_bytes())
    assert store.adopt_file(large, blob, watcher.watch, link=True) is Outcome.WRITTEN
    assert store.blob_path(blob.digest).samefile(large)
    assert store.adopt_file(large, blob, watcher.watch, link=False) is Outcome.EXISTED
    assert watcher.of("skip")


@pytest.mark.parametrize("link", [False, True])
def test_a_file_that_is_not_the_blob_is_not_adopted(
    store: LayoutStore, large: Path, watcher: Watcher, link: bool
) -> None:
    content = large.read_bytes()
    for wrong, error in (
        (blob_of(content[:-1] + bytes([content[-1] ^ 1])), DigestMismatchError),
        (blob_of(content[:-1]), SizeMismatchError),
    ):
        with pytest.raises(error):
            store.adopt_file(large, wrong, watcher.watch, link=link)
    assert list(store._blobs.digests()) == []
    assert large.read_bytes() == content
    assert large.stat().st_nlink == 1


def test_a_verified_file_is_taken_over(store: LayoutStore) -> None:
    for outcome in (Outcome.WRITTEN, Outcome.EXISTED):
        staged = store.root / "ingest" / "upload"
        staged.write_bytes(b"weights")
        blob = blob_of(b"weights")
        assert store.take_file(staged, blob.digest) is outcome
        assert not staged.exists()
        assert content_of(store, blob) == b"weights"
        assert stat.S_IMODE(store.blob_path(blob.digest).stat().st_mode) == 0o444
