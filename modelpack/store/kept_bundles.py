"""Kept bundles: model directories in the store for runtimes to open, one per manifest.

    bundles/<alg>-<hex>/config.json, model/    see `modelpack.bundles.bundle`
    bundles/<alg>-<hex>/bundle.json            the state of each file when the bundle was made
    ingest/bundles/<alg>-<hex>/, .lock         a bundle that is being made, and the owner
    ingest/bundles/*.gone                      a bundle that is being deleted

A bundle appears and disappears in one step. Each of its files is a hard link of a blob, or a copy
with a stamp (inode, size, times) of when its digest was verified. A bundle with any other file is
not used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from modelpack.artifacts.digest import Digest
from modelpack.errors import InvalidDigestError, LockedError
from modelpack.progress import Stop
from modelpack.store.blobs import Blobs, VerifiedMarks
from modelpack.store.file_copy import hash_file
from modelpack.store.filesystem import (
    FileLock,
    boot_id,
    delete_tree,
    files_below,
    map_os_errors,
    random_name,
    read_own,
    write_atomically,
)
from modelpack.store.tree import Tree, label, labelled_digest

_RECORD: Final = "bundle.json"
_MAX_RECORD_BYTES: Final = 64 * 1024 * 1024
_GONE: Final = ".gone"
_LOCK: Final = ".lock"


class State(StrEnum):
    """The result of a check of a bundle."""

    SOUND = "sound"
    OUTDATED = "outdated"  # its bytes are right, but it has to be made again before its next use
    DAMAGED = "damaged"  # a runtime that opens it may read wrong bytes


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A file of a bundle: `path` with slashes, and the digest of its bytes.

    `stamp` is None for a hard link of the blob of that digest.
    """

    path: str
    digest: Digest
    stamp: str | None = None


@dataclass(frozen=True, slots=True)
class _Record:
    """The content of `bundle.json`.

    `boot` is the boot in which copies were written, "" once they were verified after a reboot.
    """

    files: tuple[KeptFile, ...]
    boot: str

    @classmethod
    def read(cls, directory: Path) -> _Record | None:
        """Return the record of a bundle; None if it is missing, damaged or behind a link."""
        if directory.is_symlink():
            return None
        try:
            value = json.loads(read_own(directory / _RECORD, _MAX_RECORD_BYTES))
            files = [
                KeptFile(str(path), Digest.parse(digest), None if stamp is None else str(stamp))
                for path, digest, stamp in value["files"]
            ]
            return cls(tuple(files), str(value["boot"]))
        except (OSError, ValueError, KeyError, TypeError, InvalidDigestError, RecursionError):
            return None

    def encoded(self) -> bytes:
        files = [[file.path, str(file.digest), file.stamp] for file in self.files]
        return json.dumps({"boot": self.boot, "files": files}, indent=1).encode()

    def of_boot(self) -> bool:
        """Return whether the copies are on the disk: written in this boot, or verified later."""
        return self.boot in ("", boot_id())


@dataclass(frozen=True, slots=True)
class KeptBundles:
    """The kept bundles of one store."""

    tree: Tree
    blobs: Blobs
    marks: VerifiedMarks

    def directory(self, manifest: Digest) -> Path:
        """Return the path of the bundle of a manifest."""
        return self.tree.bundles / label(manifest)

    def check(self, manifest: Digest) -> str | None:
        """Return why the bundle of a manifest is unusable, "" if there is none, None if usable.

        Checks the status of each file, and hashes only copies that were touched.
        """
        directory = self.directory(manifest)
        if not os.path.lexists(directory):
            return ""
        try:
            return self._check(directory)
        except OSError as error:
            return f"it cannot be read: {error.strerror}"

    def verify(
        self, path: Path, *, is_live: bool, fast: bool, seen: Callable[[int], None]
    ) -> tuple[State, str]:
        """Check a bundle against the digests of its files; return its state and what differs.

        Unless `fast`, hash the copies. Links are not hashed here: the caller hashes the blobs.
        """
        try:
            verdict = self._verify(path, fast=fast, seen=seen)
        except OSError as error:
            verdict = State.DAMAGED, f"it cannot be read: {error.strerror}"
        if verdict[0] is State.OUTDATED and not is_live:
            return State.SOUND, ""  # it may be open still; `gc` deletes it later
        return verdict

    @contextmanager
    def workspace(
        self, manifest: Digest, stop: Stop, waiting: Callable[[str], None]
    ) -> Iterator[Path]:
        """Yield an empty directory to make the bundle in, under a lock for this bundle.

        The directory is deleted after the block; after a kill, the garbage collection deletes it.
        """
        folder = self.tree.bundle_ingest / label(manifest)
        with map_os_errors("make", folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(folder.name + _LOCK))
        with lock.held(patience=None, stop=stop, waiting=waiting, remove=True):
            delete_tree(folder)
            with map_os_errors("make", folder):
                folder.mkdir()
            try:
                yield folder
            finally:
                delete_tree(folder)

    def publish(self, manifest: Digest, made: Path, files: Iterable[KeptFile]) -> None:
        """Make the directory `made` the bundle of a manifest, replacing an existing one.

        `files` are all files below it; copies have any text as their stamp.
        """
        stamped = [
            replace(file, stamp=_stamp(os.lstat(made / file.path)))
            if file.stamp is not None
            else file
            for file in files
        ]
        final = self.directory(manifest)
        with map_os_errors("write", final):
            (made / _RECORD).write_bytes(_Record(tuple(stamped), boot_id()).encoded())
        with self.tree.lock().held(), map_os_errors("make", final):
            self._note_links(file.digest for file in stamped if file.stamp is None)
            final.parent.mkdir(exist_ok=True)
            gone = self._put_aside(final) if os.path.lexists(final) else None
            os.rename(made, final)
        if gone is not None:
            delete_tree(gone)

    def note_links(self, digests: Iterable[Digest]) -> None:
        """Mark these blobs as having hard links, through which they can be changed."""
        with self.tree.lock().held():
            self._note_links(digests)

    def all(self) -> dict[Path, Digest | None]:
        """Return the paths of all bundles with their manifests; None for other files."""
        try:
            names = sorted(os.listdir(self.tree.bundles))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {self.tree.bundles / name: labelled_digest(name) for name in names}

    def stale(self, live: Collection[Digest]) -> list[Path]:
        """Return the bundles of manifests that are not `live`."""
        return [path for path, manifest in self.all().items() if manifest not in live]

    def left_over(self, *, delete: bool) -> dict[str, Path]:
        """Return the unfinished and deleted bundles of killed processes, by name.

        With `delete`, move each aside so that no process uses it; the caller deletes it.
        """
        found = {}
        try:
            names = sorted(os.listdir(self.tree.bundle_ingest))
        except FileNotFoundError:
            return {}
        for name in names:
            path = self.tree.bundle_ingest / name
            if name.endswith(_GONE):
                found[name] = path
                continue
            lock = FileLock(path if name.endswith(_LOCK) else path.with_name(name + _LOCK))
            if not delete:
                if path != lock.path and lock.is_free():
                    found[name] = path
                continue
            with suppress(LockedError), lock.held(patience=0, remove=True):
                # Its process may have deleted it since it was listed.
                if path != lock.path and os.path.lexists(path):
                    found[name] = self._put_aside(path)
        return found

    def drop(self, path: Path, *, inode: int | None = None) -> bool:
        """Delete a bundle, with `inode` only if it still has that inode.

        The caller holds the store's lock.
        """
        if not os.path.lexists(path):
            return False
        with map_os_errors("delete", path):
            if inode is not None and os.lstat(path).st_ino != inode:
                return False
            gone = self._put_aside(path)
        delete_tree(gone)
        return True

    def _check(self, directory: Path) -> str | None:
        record = _Record.read(directory)
        if record is None:
            return f"it has no valid {_RECORD}"
        different = _different_names(directory, record.files)
        if different is not None:
            return different
        files = []
        for file in record.files:
            checked = self._checked(directory, file, trusted=record.of_boot())
            if checked is None:
                return f"{file.path} was changed"
            files.append(checked)
        settled = _Record(tuple(files), record.boot if record.of_boot() else "")
        if settled != record:
            self._write(directory, settled)
        return None

    def _verify(self, path: Path, *, fast: bool, seen: Callable[[int], None]) -> tuple[State, str]:
        record = _Record.read(path)
        if record is None:
            return State.OUTDATED, f"it has no valid {_RECORD}"
        different = _different_names(path, record.files)
        if different is not None:
            return State.DAMAGED, different
        verdict = State.SOUND, ""
        for file in record.files:
            place = path / file.path
            if file.stamp is None:
                if self._is_blob(place, file.digest):
                    continue
                verdict = State.OUTDATED, f"{file.path} is not a link of its blob"
                if fast:
                    continue
            elif fast and file.stamp == _stamp(os.lstat(place)):
                continue
            if hash_file(place, file.digest.algorithm, seen) != file.digest:
                return State.DAMAGED, f"{file.path} is not {file.digest}"
        return verdict

    def _put_aside(self, path: Path) -> Path:
        self.tree.bundle_ingest.mkdir(parents=True, exist_ok=True)
        gone = self.tree.bundle_ingest / f"{random_name()}{_GONE}"
        os.rename(path, gone)
        return gone

    def _note_links(self, digests: Iterable[Digest]) -> None:
        for digest in digests:
            if not self.marks.is_linked(digest):
                with suppress(FileNotFoundError):
                    self.marks.mark_linked(digest, self.tree.blob(digest).stat())

    def _is_blob(self, path: Path, digest: Digest) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.lstat(path), os.stat(self.tree.blob(digest)))
        return False

    def _checked(self, directory: Path, file: KeptFile, *, trusted: bool) -> KeptFile | None:
        """Return the file with its current stamp, or None if its bytes changed."""
        path = directory / file.path
        if file.stamp is None:
            usable = self.blobs.find(file.digest) is not None
            return file if usable and self._is_blob(path, file.digest) else None
        stamp = _stamp(os.lstat(path))
        if stamp == file.stamp and trusted:
            return file
        if hash_file(path, file.digest.algorithm) != file.digest:
            return None
        return replace(file, stamp=stamp)

    def _write(self, directory: Path, record: _Record) -> None:
        """Replace the record; in a read-only store, the next check hashes again."""
        with suppress(OSError):
            content = record.encoded()
            write_atomically(directory / _RECORD, content, by_way_of=self.tree.ingest)


def _different_names(directory: Path, files: Collection[KeptFile]) -> str | None:
    """Return how the names below a bundle differ from its record, or None."""
    found = {name: entry.is_file(follow_symlinks=False) for name, entry in files_below(directory)}
    found.pop(_RECORD, None)
    expected = {file.path for file in files}
    for path in sorted(expected ^ found.keys()):
        return f"{path} is missing" if path in expected else f"{path} was added"
    other = sorted(path for path, is_file in found.items() if not is_file)
    return f"{other[0]} is not a file" if other else None


def _stamp(found: os.stat_result) -> str:
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
