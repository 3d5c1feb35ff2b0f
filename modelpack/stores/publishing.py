"""The last step of everything that comes in: a name among the blobs, and safety from collection.

Each method takes the store's lock, so that a collection sees a blob either not at all or as needed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.storage import Outcome
from modelpack.stores.blobs import BLOB_MODE, Blobs
from modelpack.stores.durability import flush_file
from modelpack.stores.imports import Read
from modelpack.stores.leases import Leases
from modelpack.stores.os_errors import translating
from modelpack.stores.tree import Tree
from modelpack.stores.trust import Trust


@dataclass(frozen=True, slots=True)
class Publisher:
    """Publishes into one store."""

    tree: Tree
    blobs: Blobs
    trust: Trust
    leases: Leases

    def keep(self, descriptor: Descriptor) -> bool:
        """Return whether the blob is there; note in any case that it is needed."""
        there = self.blobs.holds(descriptor)
        with self.tree.lock().held():
            return self._found(descriptor.digest, there=there)

    def touch(self, digest: Digest) -> bool:
        """Return whether the blob is there; count it as recently used."""
        path = self.blobs.find(digest)
        if path is None or self.tree.is_read_only():
            return path is not None
        with self.tree.lock().held():
            there = path.is_file()
            if there:
                self.trust.touch(digest, path)
        return there

    def publish(self, read: Read) -> Outcome:
        """Make a file that was read a blob, unless it is one already."""
        there = self.blobs.find(read.digest) is not None
        with self.tree.lock().held():
            if self._found(read.digest, there=there):
                return Outcome.EXISTED
            if read.linked:
                read.link()
                self.trust.mark_linked(read.digest, read.found)
            self.blobs.publish(read.staged, read.digest, flushed=False)
        return Outcome.WRITTEN

    def take(self, path: Path, digest: Digest) -> Outcome:
        """Make a verified file of the same file system a blob; it loses its name."""
        with translating("flush", path):
            path.chmod(BLOB_MODE)
            flush_file(path)
        there = self.blobs.find(digest) is not None
        with self.tree.lock().held():
            if self._found(digest, there=there):
                path.unlink()
                return Outcome.EXISTED
            self.blobs.publish(path, digest, flushed=True)
        return Outcome.WRITTEN

    def write(self, digest: Digest, content: bytes) -> None:
        """Have a small blob, durably."""
        with self.tree.lock().held():
            self.write_locked(digest, content)

    def write_locked(self, digest: Digest, content: bytes) -> None:
        """Do as `write`; the store's lock is held."""
        if not self._found(digest, there=self.blobs.find(digest) is not None):
            self.blobs.write(digest, content)

    def _found(self, digest: Digest, *, there: bool) -> bool:
        """Note that the blob is needed; return whether it is (still) there."""
        self.leases.note(digest)
        path = self.tree.blob(digest)
        if not there or not os.path.isfile(path):
            return False
        self.trust.touch(digest, path)
        return True
