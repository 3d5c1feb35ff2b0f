"""Consistency check of a store: are all blobs of all models there, and are they intact?"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.errors import FormatError, IntegrityError, NotFoundError, StoreError
from modelpack.progress import Action, Progress
from modelpack.storage import Watch
from modelpack.store.blobs import Blobs, VerifiedMarks, not_removed
from modelpack.store.file_copy import hash_file
from modelpack.store.filesystem import map_os_errors
from modelpack.store.index import IndexFile
from modelpack.store.kept_bundles import KeptBundles, State
from modelpack.store.manifests import read_manifest, successors
from modelpack.store.tree import Tree


class Fault(StrEnum):
    """The kinds of problems."""

    INDEX = "index"  # index.json or one of its entries does not parse
    MISSING = "missing"  # a blob that a model needs does not exist
    SIZE = "size"  # a descriptor has another size than the blob
    CONTENT = "content"  # a blob did not match its digest; it is in quarantine
    MANIFEST = "manifest"  # a manifest is intact but does not parse
    STRAY = "stray"  # a file under blobs/ is not a blob
    BUNDLE = "bundle"  # a bundle differed from its model and was deleted


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem; `models` are the names (or ids) of the models that it affects."""

    kind: Fault
    message: str
    digest: Digest | None = None
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FsckReport:
    """The result of a check: the number of blobs `checked`, and the bytes hashed.

    `partial` are the names (or ids) of partially pulled models, `unnamed` the manifests that are
    kept although they have no name and nothing with a name needs them; neither is a problem.
    """

    checked: int
    bytes_checked: int
    problems: tuple[Problem, ...]
    partial: tuple[str, ...] = ()
    unnamed: tuple[Digest, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


@dataclass(slots=True)
class _Need:
    """A blob reachable from the index: its sizes by descriptors, and the models that need it.

    `vital` are the models that are broken without it; partial models may lack layers.
    """

    sizes: set[int] = field(default_factory=set)
    models: set[str] = field(default_factory=set)
    vital: set[str] = field(default_factory=set)


class Checker:
    """One consistency check of a store."""

    def __init__(
        self,
        tree: Tree,
        blobs: Blobs,
        marks: VerifiedMarks,
        index: IndexFile,
        bundles: KeptBundles,
        watch: Watch,
        *,
        fast: bool,
    ) -> None:
        self._tree, self._blobs, self._marks = tree, blobs, marks
        self._index, self._bundles = index, bundles
        self._watch = watch
        self._fast = fast
        self._needs: dict[Digest, _Need] = {}
        self._problems: list[Problem] = []
        self._intact: set[Digest] = set()
        self._damaged: set[Digest] = set()
        self._lacking: set[str] = set()
        self._unnamed: list[Digest] = []
        self._bytes_checked = 0
        self._unparsable: dict[Digest, str] = {}
        self._successors: dict[Descriptor, tuple[Descriptor | None, tuple[Descriptor, ...]]] = {}

    def check(self) -> FsckReport:
        """Check index, manifests, blobs and bundles; unless `fast`, hash every blob.

        Damaged blobs are moved to quarantine. Bundles that differ from their blobs are deleted, and
        made again at their next use. A fast check hashes only manifests, blobs of a wrong size, and
        files of bundles that have another modification time.
        """
        self._walk_index()
        present = set(self._blobs.digests())
        for digest in sorted(present | self._needs.keys()):
            self._watch.stop.check()
            self._check_blob(digest)
        for path in self._blobs.strays():
            self._add(
                Fault.STRAY, f"{path} is not a blob; some tools refuse a store that contains it"
            )
        for path, manifest in self._bundles.all().items():
            self._watch.stop.check()
            self._check_bundle(path, manifest)
        if not self._fast:
            self._marks.settle((d, self._tree.blob(d)) for d in sorted(present - self._damaged))
        return FsckReport(
            len(present),
            self._bytes_checked,
            tuple(self._problems),
            tuple(sorted(self._lacking)),
            tuple(sorted(self._unnamed)),
        )

    def _add(self, fault: Fault, message: str, digest: Digest | None = None) -> None:
        """Record a problem."""
        need = self._needs.get(digest, _Need()) if digest else _Need()
        self._problems.append(Problem(fault, message, digest, tuple(sorted(need.models))))

    def _walk_index(self) -> None:
        """Check the index and collect the blobs that its manifests need."""
        try:
            document = self._index.read()
        except StoreError as error:
            return self._add(Fault.INDEX, str(error))
        for number, item in enumerate(document.items):
            if item.entry is None:
                self._add(Fault.INDEX, f"index.json: manifests[{number}] is not a descriptor")
            else:
                name = item.entry.name or item.entry.digest.short
                self._walk(item.entry.descriptor, name, partial=item.entry.is_partial)
        self._unnamed = [
            entry.digest
            for entry in document.entries
            if not entry.descriptor.annotations
            and self._needs[entry.digest].models == {entry.digest.short}
            and not self._is_referrer(entry.descriptor)
        ]
        return None

    def _is_referrer(self, descriptor: Descriptor) -> bool:
        """Return whether the subject of a manifest is in the store, or whether it is unreadable."""
        try:
            subject = read_manifest(self._blobs, descriptor).subject
        except (FormatError, IntegrityError, NotFoundError):
            return True  # a problem of its own
        return subject is not None and subject.digest in self._needs

    def _check_blob(self, digest: Digest) -> None:
        """Check one blob that exists or should exist."""
        path = self._tree.blob(digest)
        need = self._needs.get(digest, _Need())
        if path.is_symlink() and not self._tree.holds(path):
            return self._add(Fault.STRAY, f"{path} points outside the store", digest)
        try:
            found = path.stat()
        except FileNotFoundError:
            if digest in self._damaged:
                where = self._tree.quarantine
                message = f"blob {digest} was damaged and is in {where} now"
                return self._add(Fault.CONTENT, message, digest)
            return self._missing(digest, need)
        if not stat.S_ISREG(found.st_mode):
            return self._add(Fault.STRAY, f"{path} is not a file", digest)
        size = found.st_size
        wrong = sorted(need.sizes - {size})
        try:
            intact = (self._fast and not wrong) or self._hashes(digest, path)
        except NotFoundError:
            return self._missing(digest, need)
        if not intact:
            message = f"blob {digest} was damaged and is in {self._tree.quarantine} now"
            return self._add(Fault.CONTENT, message, digest)
        if wrong:
            message = f"blob {digest} has {size} bytes, a descriptor says {wrong[0]}"
            return self._add(Fault.SIZE, message, digest)
        if digest in self._unparsable:
            return self._add(Fault.MANIFEST, self._unparsable[digest], digest)
        return None

    def _check_bundle(self, path: Path, manifest: Digest | None) -> None:
        """Check one bundle; delete it if it differs from its model."""
        if manifest is None:
            return  # left by another version; the garbage collection deletes it

        def seen(_completed: int) -> None:
            self._watch.stop.check()

        try:
            inode = os.lstat(path).st_ino
            is_live = manifest in self._needs
            state, why = self._bundles.verify(path, is_live=is_live, fast=self._fast, seen=seen)
        except FileNotFoundError:  # replaced or removed since it was listed
            return
        if state is State.SOUND:
            return
        with self._tree.lock().held():
            dropped = self._bundles.drop(path, inode=inode)
        if dropped and state is State.DAMAGED:
            message = (
                f"the bundle {path} differed from its model ({why}) and was deleted: "
                "restart runtimes that opened it"
            )
            self._add(Fault.BUNDLE, message, manifest)

    def _missing(self, digest: Digest, need: _Need) -> None:
        listed = {entry.name or entry.digest.short for entry in self._index.read().entries}
        self._lacking |= (need.models - need.vital) & listed
        if need.vital & listed:  # otherwise it was removed during the check
            self._add(Fault.MISSING, f"blob {digest} is missing", digest)

    def _walk(self, root: Descriptor, name: str, *, partial: bool) -> None:
        """Record the blobs of the model `name`; a `partial` model may lack its layers."""
        waiting = [(root, True)]
        while waiting:
            descriptor, vital = waiting.pop()
            need = self._needs.setdefault(descriptor.digest, _Need())
            need.sizes.add(descriptor.size)
            if vital:
                need.vital.add(name)
            if name in need.models:
                continue
            need.models.add(name)
            if descriptor not in self._successors:
                self._successors[descriptor] = self._successors_of(descriptor)
            config, found = self._successors[descriptor]
            may_lack = partial and descriptor is root
            waiting += [(one, not may_lack or one == config) for one in found]

    def _successors_of(
        self, descriptor: Descriptor
    ) -> tuple[Descriptor | None, tuple[Descriptor, ...]]:
        """Return the config of a manifest and all its successors; nothing for other blobs."""
        path = self._tree.blob(descriptor.digest)
        if descriptor.media_type not in media_types.MANIFEST_AND_INDEX_TYPES or not path.is_file():
            return None, ()
        try:
            if self._hashes(descriptor.digest, path):
                manifest = read_manifest(self._blobs, descriptor)
                config = manifest.config if isinstance(manifest, Manifest) else None
                return config, successors(manifest)
        except (FormatError, IntegrityError) as error:
            self._unparsable[descriptor.digest] = f"manifest {error}"
        except NotFoundError:  # removed during the check
            pass
        return None, ()

    def _hashes(self, digest: Digest, path: Path) -> bool:
        """Return whether the blob is intact; if not, move it to quarantine.

        Raises `NotFoundError` if another process removes it.
        """
        if digest in self._intact or digest in self._damaged:
            return digest in self._intact
        size = 0

        def seen(completed: int) -> None:
            self._watch.stop.check()
            report = Progress(Action.VERIFY, digest.short, digest, completed, size)
            self._watch.report(report)

        with map_os_errors("read", path), not_removed(digest):
            found = path.stat()
            size = found.st_size
            got = hash_file(path, digest.algorithm, seen)
        self._bytes_checked += size
        if got == digest:
            self._intact.add(digest)
            return True
        self._damaged.add(digest)
        with self._tree.lock().held():
            self._marks.put_in_quarantine(digest, path, found)
        return False
