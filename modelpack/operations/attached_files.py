"""Files that are to be attached to a model, as a source of blobs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from modelpack import mediatypes
from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.errors import NotFoundError, PackagingError, UsageError
from modelpack.progress import Action, Progress
from modelpack.storage import BlobReader, BlobSource, Watch
from modelpack.stores.copying import hash_file

#: The empty JSON object, and its descriptor as a config.
EMPTY = b"{}"
EMPTY_CONFIG = Descriptor(mediatypes.OCI_EMPTY, Digest.of(EMPTY), len(EMPTY))


@dataclass(frozen=True, slots=True)
class FileOnDisk:
    """A file as a blob; whoever reads it verifies that it did not change."""

    path: Path

    def open(self, offset: int = 0) -> AbstractContextManager[BlobReader]:
        """Return the open file at `offset`; raises `PackagingError`."""
        try:
            stream = io.FileIO(self.path)
        except OSError as error:
            raise PackagingError(f"{self.path}: cannot be read: {error.strerror}") from error
        stream.seek(offset)
        return stream


@dataclass(frozen=True, slots=True)
class _Bytes:
    content: bytes

    def open(self, offset: int = 0) -> AbstractContextManager[BlobReader]:
        return io.BytesIO(self.content[offset:])


@dataclass(frozen=True, slots=True)
class BytesSource:
    """Blobs that were made here; fulfils `Source` for them, and has no manifests."""

    contents: Mapping[Digest, bytes]

    def resolve(self, name: str) -> Descriptor:
        """Raise `NotFoundError`: there are none."""
        raise NotFoundError(f"there is no manifest {name} here")

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """Raise `NotFoundError`: there are none."""
        raise NotFoundError(f"there is no manifest {descriptor.digest} here")

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """Return the blob to read from; one that was made elsewhere has to be there already."""
        content = self.contents.get(descriptor.digest)
        if content is None:
            raise NotFoundError(f"blob {descriptor.digest} is gone")
        return _Bytes(content)


@dataclass(frozen=True, slots=True)
class AttachedFiles:
    """The layers that files become, and the empty config (image-spec 1.1, "Guidance for an Empty
    Descriptor"); fulfils `Source` for their blobs, and has no manifests.
    """

    layers: tuple[Descriptor, ...]
    paths: dict[Digest, Path]

    @classmethod
    def read(cls, files: Sequence[tuple[Path, str]], watch: Watch) -> AttachedFiles:
        """Hash the files, which come with their media types.

        Raises `PackagingError`, and `UsageError` for two files of one name.
        """
        layers, paths = [], {}
        for path, media_type in files:
            digest, size = _hashed(path, watch)
            layers.append(Descriptor(media_type, digest, size, {mediatypes.TITLE: path.name}))
            paths[digest] = path
        names = [layer.annotations[mediatypes.TITLE] for layer in layers]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"two files are called {twice!r}", hint="rename one of them")
        return cls(tuple(layers), paths)

    @property
    def empty(self) -> Descriptor:
        """The descriptor of the empty JSON object."""
        return EMPTY_CONFIG

    def resolve(self, name: str) -> Descriptor:
        """Raise `NotFoundError`: files are no manifests."""
        raise NotFoundError(f"there is no manifest {name} among files")

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """Raise `NotFoundError`: files are no manifests."""
        raise NotFoundError(f"there is no manifest {descriptor.digest} among files")

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """Return the file to read from."""
        path = self.paths.get(descriptor.digest)
        return FileOnDisk(path) if path is not None else _Bytes(EMPTY)


def _hashed(path: Path, watch: Watch) -> tuple[Digest, int]:
    try:
        if not path.is_file():
            raise PackagingError(f"{path}: is no file", hint="only files can be attached")
        size = path.stat().st_size

        def seen(completed: int) -> None:
            watch.stop.check()
            watch.report(Progress(Action.VERIFY, path.name, None, completed, size))

        return hash_file(path, "sha256", seen), size
    except OSError as error:
        raise PackagingError(f"{path}: cannot be read: {error.strerror}") from error
