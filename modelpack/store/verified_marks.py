"""Which blobs need another look before they are used.

A blob is verified before it gets its name, and after that its file is trusted, with two
exceptions, each noted by a small file:

- Imported blobs are not flushed to the disk: that would take longer than hashing and copying them.
  The mark `ingest/unflushed/<alg>-<hex>` holds the id of the boot in which that happened. When the
  machine has started again since, the blob is hashed before its first use.
- Hard-linked blobs can be changed through the other name of the file. The mark
  `ingest/linked/<alg>-<hex>` holds the size and time of change at which the blob was verified;
  when they differ it is hashed again.

A blob that fails goes to `quarantine/` and counts as absent.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from modelpack.artifacts.digest import Digest
from modelpack.store.file_copy import hash_file
from modelpack.store.filesystem import boot_id, flush_file, read_own, translating, write_own
from modelpack.store.tree import Tree, label, labelled

if TYPE_CHECKING:
    from logging import Logger

_MAX_MARK_BYTES = 4096


class Trust:
    """The marks of one store."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._unflushed, self._linked = str(tree.unflushed), str(tree.linked)
        self._vouched: set[Digest] = set()  # verified by this process, mark not removable

    def mark_unflushed(self, digest: Digest) -> None:
        """Note that the blob may not survive a power cut; before it gets its name.

        The mark is not flushed either: journalling file systems keep the order of names, and a mark
        without content reads as one of another boot.
        """
        self._mark(self._tree.unflushed, digest, boot_id())

    def mark_linked(self, digest: Digest, found: os.stat_result) -> None:
        """Note that the blob shares its bytes with another file, verified as `found` says."""
        self._mark(self._tree.linked, digest, _stamp(found))

    def forget(self, digest: Digest) -> None:
        """Remove the marks of a blob that is gone, or durable and ours alone."""
        for folder in (self._tree.unflushed, self._tree.linked):
            (folder / label(digest)).unlink(missing_ok=True)

    def is_linked(self, digest: Digest) -> bool:
        """Return whether the blob shares its bytes with a file elsewhere."""
        return (self._tree.linked / label(digest)).exists()

    def last_used(self, digest: Digest, path: Path) -> float:
        """Return when the blob was stored or found useful, in seconds since the epoch."""
        return self._clock(digest, path).stat().st_mtime

    def touch(self, digest: Digest, path: Path) -> None:
        """Set `last_used` to now; the times of a linked file are left to its owner."""
        with suppress(OSError):
            os.utime(self._clock(digest, path))

    def confirms(self, digest: Digest, path: Path) -> bool:
        """Return whether the blob at `path` can be used; hashes it if there is doubt.

        If it is damaged it is in quarantine afterwards.
        """
        doubts = self._doubts(digest, path)
        if not doubts or digest in self._vouched:
            return True
        _log().info("verifying blob %s before its first use", digest)
        if hash_file(path, digest.algorithm) != digest:
            self.put_in_quarantine(digest, path)
            return False
        try:
            for mark in doubts:
                if mark.parent == self._tree.linked:
                    write_own(mark, _stamp(path.stat()).encode())
                else:
                    mark.unlink(missing_ok=True)
        except OSError:  # a store that cannot be written to can still be read
            self._vouched.add(digest)
        return True

    def put_in_quarantine(self, digest: Digest, path: Path) -> None:
        """Move a damaged blob aside."""
        _log().warning("blob %s is damaged: moved to %s", digest, self._tree.quarantine)
        self._tree.check_inside()
        self._tree.quarantine.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # somebody else was faster
            os.replace(path, self._tree.quarantine / label(digest))
        self.forget(digest)

    def was_damaged(self, digest: Digest) -> bool:
        """Return whether a damaged copy of the blob is in quarantine."""
        return (self._tree.quarantine / label(digest)).exists()

    def drop_quarantined(self, digest: Digest) -> None:
        """Delete the damaged copy of a blob."""
        (self._tree.quarantine / label(digest)).unlink(missing_ok=True)

    def settle(self, blobs: Iterable[tuple[Digest, Path]], *, limit: int) -> None:
        """Flush unflushed blobs of this boot and remove their marks, `limit` bytes at most."""
        for digest, path in blobs:
            mark = self._tree.unflushed / label(digest)
            with suppress(OSError):
                if _read(mark) != boot_id():
                    continue
                limit -= path.stat().st_size
                if limit < 0:
                    return
                flush_file(path)
                mark.unlink()

    def stale_marks(self) -> list[Path]:
        """Return the marks of blobs that are gone."""
        return [
            mark
            for folder in (self._tree.unflushed, self._tree.linked)
            if folder.is_dir()
            for mark in folder.iterdir()
            if (digest := labelled(mark.name)) is None or not self._tree.blob(digest).exists()
        ]

    def _mark(self, folder: Path, digest: Digest, text: str) -> None:
        mark = folder / label(digest)
        with translating("write", mark):
            folder.mkdir(parents=True, exist_ok=True)
            write_own(mark, text.encode())

    def _clock(self, digest: Digest, path: Path) -> Path:
        mark = self._tree.linked / label(digest)
        return mark if mark.is_file() and not mark.is_symlink() else path

    def _doubts(self, digest: Digest, path: Path) -> list[Path]:
        """Return the marks that call for a look; most blobs have none, so that has to be fast."""
        doubts = []
        for folder in (self._unflushed, self._linked):
            mark = f"{folder}/{label(digest)}"
            if os.path.exists(mark):
                with suppress(FileNotFoundError):  # settled by another process
                    settled = boot_id() if folder is self._unflushed else _stamp(path.stat())
                    if _read(mark) != settled:
                        doubts.append(Path(mark))
        return doubts


def _read(mark: Path | str) -> str:
    """Return the text of a mark; "" for what is none, which calls for a look."""
    try:
        return read_own(mark, _MAX_MARK_BYTES).decode(errors="replace")
    except FileNotFoundError:
        raise
    except OSError:
        return ""


def _stamp(found: os.stat_result) -> str:
    return f"{found.st_size} {found.st_mtime_ns}"


def _log() -> Logger:
    import logging  # for the few that have something to say

    return logging.getLogger(__name__)
