"""FileStore: models made of files that stay where they are."""

from __future__ import annotations

from pathlib import Path

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.errors import PackagingError
from modelpack.progress import Action, Progress
from modelpack.storage import BlobSource, Outcome, Watch
from modelpack.store.blobs import StoredBlob
from modelpack.store.file_copy import hash_file
from modelpack.store.imports import ImportedFile
from modelpack.store.layout import LayoutStore


class FileStore(LayoutStore):
    """A store whose imported files are read in place; its root has only manifests and configs.

    Give it a directory that is deleted at the end: the files are known to this object only.
    """

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self._paths: dict[Digest, Path] = {}

    def import_file(self, path: Path, watch: Watch, *, link: bool = False) -> ImportedFile:
        """Hash a file and remember its path. Raises `PackagingError` if it cannot be read."""

        def seen(done: int) -> None:
            watch.stop.check()
            watch.report(Progress(Action.VERIFY, path.name, None, done, size))

        try:
            size = path.stat().st_size
            digest = hash_file(path, seen=seen)
            found = path.stat()
        except OSError as error:
            raise PackagingError(f"{path}: cannot be read: {error.strerror}") from error
        self._paths[digest] = path
        identity = found.st_dev, found.st_ino, found.st_mtime_ns
        return ImportedFile(digest, found.st_size, Outcome.EXISTED, *identity)

    def write_manifest(
        self,
        descriptor: Descriptor,
        raw: bytes,
        name: str | None = None,
        *,
        origin: str | None = None,
        partial: bool = True,
    ) -> None:
        """Store a manifest whose layers are files elsewhere."""
        super().write_manifest(descriptor, raw, name, origin=origin, partial=True)

    def missing(self, model: str | Descriptor) -> tuple[Descriptor, ...]:
        """Return nothing: `import_file` has read all layers."""
        return ()

    def blob_path(self, digest: Digest) -> Path:
        """Return the path of a file or of a blob of the store; raises `NotFoundError`."""
        return self._paths.get(digest) or super().blob_path(digest)

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """Return a file or a blob of the store as a source."""
        return StoredBlob(self.blob_path, descriptor.digest)
