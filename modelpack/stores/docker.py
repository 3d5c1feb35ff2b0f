"""DockerStore: the models of Docker Model Runner on this machine.

Its own format, not an OCI layout (model-runner, pkg/distribution/internal/store)::

    layout.json                  {"version": "1.0.0"}
    models.json                  see `docker_index`
    blobs/sha256/<hex>           layers and configs
    manifests/sha256/<hex>

Its programs verify little and lock nothing. They read models.json again for every operation, so
what is written here shows at once.
"""

from __future__ import annotations

import fcntl
import io
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.errors import (
    IntegrityError,
    ManifestError,
    ModelpackError,
    NotFoundError,
    SizeMismatchError,
    StoreError,
    UnsafePathError,
)
from modelpack.gojson import MAX_DOCUMENT_BYTES, decode_object
from modelpack.manifest import Manifest
from modelpack.reference import Reference
from modelpack.storage import BlobReader, BlobSource
from modelpack.stores import lookup
from modelpack.stores.blobs import read_verified
from modelpack.stores.cloning import clone
from modelpack.stores.copying import Hashing, copy_and_hash, filling, hash_file, read_and_hash
from modelpack.stores.disk_space import check_room
from modelpack.stores.docker_index import MAX_BYTES, DockerIndex, go_indented
from modelpack.stores.durability import flush_directory, read_own, write_durably
from modelpack.stores.lookup import Entry, StoredModel
from modelpack.stores.os_errors import translating

_VERSION: Final = "1.0.0"


def default_docker_root() -> Path:
    """Return $MODELS_PATH, else `~/.docker/models`, as Docker Model Runner does."""
    configured = os.environ.get("MODELS_PATH")
    return Path(configured) if configured else Path.home() / ".docker" / "models"


@dataclass(frozen=True, slots=True)
class DockerBlob:
    """A blob in Docker's store; whether it exists shows when it is opened."""

    store: DockerStore
    digest: Digest

    def open(self, offset: int = 0) -> AbstractContextManager[BlobReader]:
        """Return the open file at `offset`; raises `NotFoundError`."""
        path = self.store.blob_path(self.digest)
        with translating("read", path):
            stream = io.FileIO(path)
            stream.seek(offset)
        return stream


class DockerStore:
    """Docker Model Runner's store at `root`; fulfils `modelpack.storage.Source`.

    Nothing in it counts as verified: Docker Model Runner checks no digest when it reads.
    """

    def __init__(self, root: str | Path | None = None, *, create: bool = False) -> None:
        """Open the store; `create` makes one in an absent or empty directory.

        None means `default_docker_root`. Raises `StoreError` where there is something else.
        """
        where = default_docker_root() if root is None else Path(root).expanduser()
        self.root = Path(os.path.abspath(where))
        with translating("open Docker's model store", self.root):
            if create and (not self.root.exists() or not any(self.root.iterdir())):
                self._initialise()
            self._check_layout()

    def resolve(self, name: str) -> Descriptor:
        """Return the manifest that `name` (a tag, id, short id or prefix) means."""
        return self.get(name).descriptor

    def get(self, name: str) -> StoredModel:
        """Return the model that `name` means, with all its tags; raises `NotFoundError`."""
        entries = self._entries()
        return lookup.model(entries, lookup.find(entries, name).entry.digest)

    def models(self) -> tuple[StoredModel, ...]:
        """Return all models whose manifest is there, by name."""
        return lookup.models(self._entries())

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """Return a manifest's bytes, checked against size and digest."""
        raw = self._read_manifest(descriptor.digest)
        if len(raw) != descriptor.size:
            raise SizeMismatchError(
                f"manifest {descriptor.digest} should have {descriptor.size} bytes, got {len(raw)}",
                expected=str(descriptor.size),
                got=str(len(raw)),
            )
        return raw

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """Return the blob to read from; whether it exists shows when it is opened."""
        return DockerBlob(self, descriptor.digest)

    def blob_path(self, digest: Digest) -> Path:
        """Return the path of a blob, not verified; raises `NotFoundError`."""
        path = self._place("blobs", digest)
        if not path.is_file():
            raise NotFoundError(f"blob {digest} is not in Docker's model store {self.root}")
        if not os.path.realpath(path).startswith(os.path.realpath(self.root) + os.sep):
            raise UnsafePathError(f"{path} leads out of the store", got=os.path.realpath(path))
        return path

    def write_model(
        self,
        raw: bytes,
        blob_path: Callable[[Descriptor], Path],
        reference: Reference | None,
        *,
        link: bool = True,
    ) -> Descriptor:
        """Add a model under a tag, taking the tag from the model that had it.

        `blob_path` tells where the file of each blob is. It is hashed, then hard-linked if `link`
        and the file system allow it, else copied. Model Runner finds the model at once.
        Raises `IntegrityError` if a file is not its blob, `StorageFullError`, `ManifestError`.
        """
        manifest = Manifest.parse(raw)
        new: list[Digest] = []
        with self._locked():
            self._index()  # a damaged one shows before anything is written
            try:
                for blob in manifest.unique_blobs:
                    if not self._holds(blob):
                        self._add_blob(blob, blob_path(blob), link=link)
                        new.append(blob.digest)
                if not self._place("manifests", manifest.digest).exists():
                    self._replace(self._place("manifests", manifest.digest), raw)
                index = self._index().with_model(
                    manifest.digest,
                    [blob.digest for blob in manifest.blobs],
                    reference.without_digest() if reference else None,
                )
                self._replace(self.root / "models.json", index.encoded())
            except BaseException:
                self._take_back(new)
                raise
        return manifest.descriptor

    def _initialise(self) -> None:
        for kind in ("blobs", "manifests"):
            (self.root / kind / "sha256").mkdir(parents=True, exist_ok=True)
        self._replace(self.root / "models.json", DockerIndex({}).encoded())
        self._replace(self.root / "layout.json", go_indented({"version": _VERSION}))

    def _check_layout(self) -> None:
        path = self.root / "layout.json"
        if not path.is_file():
            raise StoreError(
                f"there is no Docker Model Runner store at {self.root}",
                hint="name its directory; MODELS_PATH is used too",
            )
        with translating("read", path):
            raw = read_own(path, MAX_DOCUMENT_BYTES, follow=True)
        version = decode_object(raw, str(path)).get("version")
        if version != _VERSION:
            raise StoreError(
                f"Docker's model store {self.root} has version {version!r}, expected {_VERSION!r}"
            )

    def _index(self) -> DockerIndex:
        path = self.root / "models.json"
        with translating("read", path):
            try:
                raw = read_own(path, MAX_BYTES, follow=True)
            except FileNotFoundError:
                return DockerIndex({})
        return DockerIndex.parse(raw, str(path))

    def _entries(self) -> tuple[Entry, ...]:
        entries = []
        for digest, tags in self._index().models().items():
            # What is damaged cannot be had, but must not hide the others.
            with suppress(NotFoundError, IntegrityError, ManifestError):
                manifest = Manifest.parse(self._read_manifest(digest), str(digest)).descriptor
                entries += [Entry(manifest, tag, reference) for tag, reference in tags]
                entries += [] if tags else [Entry(manifest)]
        return tuple(entries)

    def _read_manifest(self, digest: Digest) -> bytes:
        path = self._place("manifests", digest)
        if not path.is_file():
            raise NotFoundError(f"manifest {digest} is not in Docker's model store {self.root}")
        return read_verified(path, digest, "manifest")

    def _place(self, kind: str, digest: Digest) -> Path:
        return self.root / kind / digest.algorithm / digest.encoded

    def _holds(self, descriptor: Descriptor) -> bool:
        path = self._place("blobs", descriptor.digest)
        return path.is_file() and path.stat().st_size == descriptor.size

    def _add_blob(self, descriptor: Descriptor, source: Path, *, link: bool) -> None:
        final = self._place("blobs", descriptor.digest)
        staged = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex}")
        with translating("write", final):
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                if link and _linked(source, staged):
                    got = hash_file(staged, descriptor.digest.algorithm)
                else:
                    got = self._copied(descriptor, source, staged)
                descriptor.digest.check_equal(got, str(source))
                os.replace(staged, final)
            finally:
                staged.unlink(missing_ok=True)

    def _copied(self, descriptor: Descriptor, source: Path, staged: Path) -> Digest:
        hasher = descriptor.digest.hasher()
        with source.open("rb", buffering=0) as reader, staged.open("xb", buffering=0) as writer:
            if clone(reader.fileno(), writer.fileno()):
                read_and_hash(reader.fileno(), hasher, lambda _: None)
            else:
                check_room(self.root, descriptor.size, str(descriptor.digest))
                hashing = Hashing(hasher, descriptor.size)
                fill = filling(reader.fileno())
                copy_and_hash(fill, writer.fileno(), staged, hashing, lambda _: None)
            os.fchmod(writer.fileno(), 0o644)
            os.fsync(writer.fileno())
        return Digest.of_hasher(hasher)

    def _replace(self, path: Path, content: bytes) -> None:
        """Replace a small file as Model Runner does: a temporary file beside it, then a rename."""
        staged = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
        with translating("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_durably(staged, content, mode=0o644)
                os.replace(staged, path)
            finally:
                staged.unlink(missing_ok=True)
            flush_directory(path.parent)

    def _take_back(self, digests: list[Digest]) -> None:
        """Delete blobs that no model got: nothing else would ever collect them."""
        with suppress(ModelpackError, OSError):
            needed = self._index().files()
            for digest in digests:
                if str(digest) not in needed:
                    self._place("blobs", digest).unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes of ours out; Model Runner itself knows no lock."""
        with translating("lock", self.root):
            directory = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            yield
        finally:
            os.close(directory)


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        return False
    return True
