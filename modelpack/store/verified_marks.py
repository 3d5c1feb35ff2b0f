"""Verified-blob marks: which blobs have to be verified again before they are used.

A blob is verified before it gets its name, and its file is trusted from then on. There are two
exceptions, each recorded in a small file:

- Imported blobs are not flushed to the disk: that would take longer than hashing and copying them.
  The mark `ingest/unflushed/<alg>-<hex>` has the id of the boot in which the blob was written.
  After a reboot, the blob is hashed before its first use.
- Hard-linked blobs can be changed through the other name of the file. The mark
  `ingest/linked/<alg>-<hex>` has the size and modification time at which the blob was verified;
  the blob is hashed again when they differ.

A damaged blob is moved to `quarantine/` and counts as missing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from modelpack.artifacts.digest import Digest
from modelpack.store.file_copy import hash_file
from modelpack.store.filesystem import boot_id, flush_file, map_os_errors, read_own, write_own
from modelpack.store.tree import Tree, label, labelled_digest

if TYPE_CHECKING:
    from logging import Logger

_MAX_MARK_BYTES = 4096
# Bytes that one garbage collection or check flushes.
_FLUSH_LIMIT = 16 * 1024**3


class VerifiedMarks:
    """The marks of one store."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._unflushed, self._linked = str(tree.unflushed), str(tree.linked)
        self._vouched: set[Digest] = set()  # verified by this process, mark not removable

    def mark_unflushed(self, digest: Digest) -> None:
        """Mark a blob, before it gets its name, as one that a power cut may damage.

        The mark is not flushed either: journalling file systems keep the order of names, and an
        empty mark counts as one of another boot.
        """
        self._mark(self._tree.unflushed, digest, boot_id())

    def mark_linked(self, digest: Digest, found: os.stat_result) -> None:
        """Mark a blob as a hard link that was verified when its status was `found`."""
        self._mark(self._tree.linked, digest, _stamp(found))

    def forget(self, digest: Digest) -> None:
        """Remove the marks of a blob that was deleted, or flushed and not linked."""
        for folder in (self._tree.unflushed, self._tree.linked):
            (folder / label(digest)).unlink(missing_ok=True)

    def is_linked(self, digest: Digest) -> bool:
        """Return whether the blob is marked as a hard link."""
        return (self._tree.linked / label(digest)).exists()

    def last_used(self, digest: Digest, path: Path) -> float:
        """Return when the blob was last stored or used, in seconds since the epoch."""
        return self._clock(digest, path).stat().st_mtime

    def touch(self, digest: Digest, path: Path) -> None:
        """Set `last_used` to now; for a hard link, change only the times of its mark."""
        with suppress(OSError):
            os.utime(self._clock(digest, path))

    def confirms(self, digest: Digest, path: Path) -> bool:
        """Return whether the blob at `path` is usable; hash it if a mark is out of date.

        A damaged blob is moved to quarantine.
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
        except OSError:  # a read-only store can still be read
            self._vouched.add(digest)
        return True

    def put_in_quarantine(self, digest: Digest, path: Path) -> None:
        """Move a damaged blob to quarantine."""
        _log().warning("blob %s is damaged: moved to %s", digest, self._tree.quarantine)
        self._tree.check_inside()
        self._tree.quarantine.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another process was faster
            os.replace(path, self._tree.quarantine / label(digest))
        self.forget(digest)

    def was_damaged(self, digest: Digest) -> bool:
        """Return whether a damaged copy of the blob is in quarantine."""
        return (self._tree.quarantine / label(digest)).exists()

    def drop_quarantined(self, digest: Digest) -> None:
        """Delete the quarantined copy of a blob."""
        (self._tree.quarantine / label(digest)).unlink(missing_ok=True)

    def settle(self, blobs: Iterable[tuple[Digest, Path]], *, limit: int = _FLUSH_LIMIT) -> None:
        """Flush blobs that this boot wrote, at most `limit` bytes, and remove their marks."""
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
        """Return the marks of blobs that no longer exist."""
        return [
            mark
            for folder in (self._tree.unflushed, self._tree.linked)
            if folder.is_dir()
            for mark in folder.iterdir()
            if (digest := labelled_digest(mark.name)) is None
            or not self._tree.blob(digest).exists()
        ]

    def _mark(self, folder: Path, digest: Digest, text: str) -> None:
        mark = folder / label(digest)
        with map_os_errors("write", mark):
            folder.mkdir(parents=True, exist_ok=True)
            write_own(mark, text.encode())

    def _clock(self, digest: Digest, path: Path) -> Path:
        mark = self._tree.linked / label(digest)
        return mark if mark.is_file() and not mark.is_symlink() else path

    def _doubts(self, digest: Digest, path: Path) -> list[Path]:
        """Return the marks that are out of date; this must be fast, as most blobs have none."""
        doubts = []
        for folder in (self._unflushed, self._linked):
            mark = f"{folder}/{label(digest)}"
            if os.path.exists(mark):
                with suppress(FileNotFoundError):  # removed by another process
                    current = boot_id() if folder is self._unflushed else _stamp(path.stat())
                    if _read(mark) != current:
                        doubts.append(Path(mark))
        return doubts


def _read(mark: Path | str) -> str:
    """Return the text of a mark; "" if it is unreadable, which counts as out of date."""
    try:
        return read_own(mark, _MAX_MARK_BYTES).decode(errors="replace")
    except FileNotFoundError:
        raise
    except OSError:
        return ""


def _stamp(found: os.stat_result) -> str:
    return f"{found.st_size} {found.st_mtime_ns}"


def _log() -> Logger:
    import logging  # imported here to keep the start of commands fast

    return logging.getLogger(__name__)
