"""Blobs to verify again: after a crash, and when they share their bytes with a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from modelpack.artifacts.digest import Digest
from modelpack.errors import NotFoundError
from modelpack.storage import Outcome
from modelpack.store import blobs as verified_marks
from modelpack.store import filesystem as durability
from modelpack.store import fsck
from modelpack.store.layout import LayoutStore
from modelpack.store.tree import Tree, label
from tests.contract.parts import Watcher, blob_of


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"weights" * 1000)
    return path


@pytest.fixture
def imported(store: LayoutStore, source: Path) -> Digest:
    return store.import_file(source, Watcher().watch).digest


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The blobs that were verified again."""
    seen: list[Path] = []
    real = verified_marks.hash_file

    def hash_file(path: Path, algorithm: str) -> Digest:
        seen.append(path)
        return real(path, algorithm)

    monkeypatch.setattr(verified_marks, "hash_file", hash_file)
    return seen


def mark(store: LayoutStore, digest: Digest, kind: str = "unflushed") -> Path:
    return store.root / "ingest" / kind / label(digest)


def reboot(store: LayoutStore, digest: Digest) -> None:
    """Make the mark one of another boot."""
    assert mark(store, digest).read_text() == durability.boot_id()
    mark(store, digest).write_text("another-boot")


def damage(path: Path) -> None:
    mode = path.stat().st_mode
    path.chmod(0o644)
    with path.open("r+b") as stream:
        stream.write(b"W")
    path.chmod(mode)


def uses(store: LayoutStore, digest: Digest) -> bool:
    try:
        with store.blob(blob_of(b"weights" * 1000)).open():
            return store.blob_path(digest).exists()
    except NotFoundError:
        return False


def test_an_imported_blob_is_trusted_in_the_same_boot(
    store: LayoutStore, imported: Digest, hashed: list[Path]
) -> None:
    assert uses(store, imported)
    assert hashed == []
    assert mark(store, imported).exists()


def test_after_a_restart_it_is_verified_once(
    store: LayoutStore, imported: Digest, hashed: list[Path]
) -> None:
    reboot(store, imported)
    assert uses(store, imported)
    assert uses(LayoutStore(store.root), imported)
    assert len(hashed) == 1
    assert not mark(store, imported).exists()


@pytest.mark.parametrize("content", ["", "garbage\n"])
def test_a_mark_that_a_crash_spoiled_counts_as_one_of_another_boot(
    store: LayoutStore, imported: Digest, hashed: list[Path], content: str
) -> None:
    mark(store, imported).write_text(content)
    assert uses(store, imported)
    assert len(hashed) == 1


def test_what_the_crash_damaged_is_set_aside_and_counts_as_absent(
    store: LayoutStore, imported: Digest, source: Path
) -> None:
    reboot(store, imported)
    damage(store.root / "blobs" / "sha256" / imported.encoded)
    with pytest.raises(NotFoundError, match="damaged and moved to quarantine") as caught:
        store.blob_path(imported)
    assert "package the model again" in str(caught.value.hint)
    assert not store.has_blob(blob_of(source.read_bytes()))
    assert (store.root / "quarantine" / label(imported)).exists()
    assert not mark(store, imported).exists()

    assert store.import_file(source, Watcher().watch).outcome is Outcome.WRITTEN
    assert uses(store, imported)


def test_importing_over_what_the_crash_damaged_replaces_it(
    store: LayoutStore, imported: Digest, source: Path
) -> None:
    reboot(store, imported)
    damage(store.root / "blobs" / "sha256" / imported.encoded)
    assert store.import_file(source, Watcher().watch).outcome is Outcome.WRITTEN
    assert store.blob_path(imported).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("clean", ["gc", "fsck"])
def test_upkeep_flushes_what_is_not_yet_on_the_disk(
    store: LayoutStore, imported: Digest, monkeypatch: pytest.MonkeyPatch, clean: str
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(verified_marks, "flush_file", flushed.append)
    with store.lease([imported]):
        if clean == "gc":
            store.change_index(lambda d: d.with_manifest(blob_of(b"weights" * 1000, "text/plain")))
            store.gc()
        else:
            store.fsck(watch=Watcher().watch)
    assert flushed == [store.root / "blobs" / "sha256" / imported.encoded]
    assert not mark(store, imported).exists()


def test_a_fast_check_flushes_nothing(store: LayoutStore, imported: Digest) -> None:
    assert store.fsck(fast=True, watch=Watcher().watch).ok
    assert mark(store, imported).exists()


def test_marks_of_blobs_that_are_gone_go_too(store: LayoutStore, imported: Digest) -> None:
    store.gc(grace_seconds=0)
    assert not mark(store, imported).exists()
    mark(store, imported).write_text("x")
    store.gc()
    assert not mark(store, imported).exists()


def test_a_blob_of_which_a_flushed_copy_comes_needs_no_mark(
    store: LayoutStore, imported: Digest, source: Path
) -> None:
    staged = store.root / "ingest" / "upload"
    staged.write_bytes(source.read_bytes())
    (store.root / "blobs" / "sha256" / imported.encoded).unlink()
    store.take_file(staged, imported)
    assert not mark(store, imported).exists()


def test_a_changed_link_is_noticed(store: LayoutStore, source: Path, hashed: list[Path]) -> None:
    digest = store.import_file(source, Watcher().watch, link=True).digest
    assert mark(store, digest, "linked").exists()
    assert uses(store, digest)
    assert hashed == []

    with source.open("r+b") as stream:
        stream.write(b"W")
    os.utime(source, ns=(1, 1))
    changed = source.read_bytes()
    assert not uses(store, digest)
    assert source.read_bytes() == changed, "the user's file stays"
    assert not mark(store, digest, "linked").exists()


def test_a_touched_link_is_hashed_once(
    store: LayoutStore, source: Path, hashed: list[Path]
) -> None:
    digest = store.import_file(source, Watcher().watch, link=True).digest
    os.utime(source, ns=(1, 1))
    for _ in range(3):
        assert uses(store, digest)
    assert len(hashed) == 1
    assert source.stat().st_mtime_ns == 1


def test_a_link_that_is_removed_before_it_is_hashed(
    store: LayoutStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.import_file(source, Watcher().watch, link=True).digest
    os.utime(source, ns=(1, 1))
    before = verified_marks.hash_file

    def removed(path: Path, algorithm: str) -> Digest:
        path.unlink()
        return before(path, algorithm)

    monkeypatch.setattr(verified_marks, "hash_file", removed)
    with pytest.raises(NotFoundError):
        store.blob_path(digest)


def after_hashing(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Let another process do `change` when a blob has been read to be verified again, once."""
    real, changes = verified_marks.hash_file, [change]

    def hash_file(path: Path, algorithm: str, *seen: Callable[[int], None]) -> Digest:
        found = real(path, algorithm, *seen)
        while changes:
            changes.pop()()
        return found

    for module in (verified_marks, fsck):
        monkeypatch.setattr(module, "hash_file", hash_file)


def test_a_link_that_is_changed_while_it_is_hashed_is_noticed(
    store: LayoutStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.import_file(source, Watcher().watch, link=True).digest
    os.utime(source, ns=(1, 1))

    def change() -> None:
        with source.open("r+b") as stream:
            stream.write(b"W")
        os.utime(source, ns=(2, 2))

    after_hashing(monkeypatch, change)
    uses(store, digest)
    assert not uses(store, digest)


def test_a_link_in_a_store_that_cannot_be_written_to(
    store: LayoutStore, source: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is hashed once for each state of the file."""
    digest = store.import_file(source, Watcher().watch, link=True).digest

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(verified_marks, "write_own", refuse)
    os.utime(source, ns=(1, 1))
    for _ in range(3):
        assert uses(store, digest)
    assert len(hashed) == 1
    with source.open("r+b") as stream:
        stream.write(b"W")
    os.utime(source, ns=(2, 2))
    assert not uses(store, digest)


def test_a_blob_that_is_stored_again_while_it_is_flushed_keeps_its_mark(
    store: LayoutStore, source: Path, imported: Digest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is not the one that was flushed."""

    def flush_file(path: Path) -> None:
        path.unlink()
        store.import_file(source, Watcher().watch)

    monkeypatch.setattr(verified_marks, "flush_file", flush_file)
    marks = verified_marks.VerifiedMarks(Tree(store.root))
    marks.settle([(imported, store.blob_path(imported))])
    assert mark(store, imported).exists()


@pytest.mark.parametrize("check", ["use", "fsck"])
def test_a_blob_that_is_repaired_while_it_is_hashed_stays(
    store: LayoutStore, source: Path, imported: Digest, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    """Two processes find the same damage; the slower one must not take the new file away."""
    reboot(store, imported)
    damage(store.root / "blobs" / "sha256" / imported.encoded)
    other = LayoutStore(store.root)

    def repair() -> None:
        assert not uses(other, imported)
        other.import_file(source, Watcher().watch)

    after_hashing(monkeypatch, repair)
    if check == "use":
        assert uses(store, imported)
    else:
        store.fsck(watch=Watcher().watch)
    assert uses(LayoutStore(store.root), imported)
    assert store.blob_path(imported).read_bytes() == source.read_bytes()


def test_a_full_check_notices_a_change_that_left_no_trace(store: LayoutStore, source: Path) -> None:
    found = source.stat()
    digest = store.import_file(source, Watcher().watch, link=True).digest
    with source.open("r+b") as stream:
        stream.write(b"W")
    os.utime(source, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert uses(store, digest), "size and time are as before"
    (problem,) = store.fsck(watch=Watcher().watch).problems
    assert (problem.kind, problem.digest) == ("content", digest)
    assert not uses(store, digest)


def test_a_store_that_cannot_be_written_to_can_be_read(
    store: LayoutStore, imported: Digest, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reboot(store, imported)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    for _ in range(3):
        assert uses(store, imported)
    assert len(hashed) == 1


def test_the_boot_has_a_name() -> None:
    assert durability.boot_id() == durability.boot_id()
    assert len(durability.boot_id()) > 8
