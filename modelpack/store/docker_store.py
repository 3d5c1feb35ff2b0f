"""DockerStore: read Docker Model Runner's own store, and add models to it.

`DockerIndex` is the store's `models.json`. It is written as Go's `json.MarshalIndent` does: two
spaces, no newline at the end, `null` for a model without tags. Unknown fields and entries are
preserved.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import MAX_DOCUMENT_BYTES, decode_object
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.reference import DEFAULT_REGISTRY, Reference
from modelpack.errors import (
    IntegrityError,
    InvalidDigestError,
    InvalidReferenceError,
    ManifestError,
    ModelpackError,
    NotFoundError,
    StoreError,
    UnsafePathError,
)
from modelpack.progress import Action, Progress
from modelpack.storage import BlobSource, Watch, watching
from modelpack.store import lookup
from modelpack.store.blobs import StoredBlob, read_verified
from modelpack.store.file_copy import (
    Hashing,
    clone,
    copy_and_hash,
    fill_from,
    hash_file,
    read_and_hash,
)
from modelpack.store.filesystem import (
    check_room,
    map_os_errors,
    read_own,
    write_atomically,
)
from modelpack.store.lookup import Entry, StoredModel

#: Size limit of `models.json` for reading and writing.
MAX_BYTES: Final = 64 * 1024 * 1024
_GO_ESCAPES: Final = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})


@dataclass(frozen=True, slots=True)
class DockerIndex:
    """The immutable content of a `models.json`."""

    value: Mapping[str, Any]
    elements: tuple[Any, ...] = ()

    @classmethod
    def parse(cls, raw: bytes, what: str) -> DockerIndex:
        """Return the index in `raw`; raises `ManifestError`."""
        value = decode_object(raw, what, limit=MAX_BYTES)
        elements = [] if value.get("models") is None else value["models"]
        if not isinstance(elements, list):
            raise ManifestError("'models' is not an array", path=what)
        return cls(value, tuple(elements))

    def encoded(self) -> bytes:
        """Return the bytes of the file; raise `StoreError` if they exceed `MAX_BYTES`."""
        raw = go_indented({**self.value, "models": list(self.elements)})
        if len(raw) > MAX_BYTES:
            raise StoreError(
                f"Docker's model store is full: models.json would have {len(raw)} bytes, "
                f"more than the limit of {MAX_BYTES}",
                hint="remove models with `docker model rm`",
            )
        return raw

    def models(self) -> dict[Digest, tuple[tuple[str, Reference | None], ...]]:
        """Return the tags of each model, each as text and as the parsed reference."""
        found: dict[Digest, list[tuple[str, Reference | None]]] = {}
        for element in self.elements:
            digest = _id(element)
            if digest is not None:
                tags = found.setdefault(digest, [])
                tags += ((tag, _reference(tag)) for tag in _strings(element, "tags"))
        return {digest: tuple(tags) for digest, tags in found.items()}

    def files(self) -> set[str]:
        """Return the digests of the blobs of all models."""
        return {name for element in self.elements for name in _strings(element, "files")}

    def with_model(
        self, digest: Digest, files: Iterable[Digest], reference: Reference | None
    ) -> DockerIndex:
        """Return an index with the model, where `reference` names it and no other model."""
        elements = list(self.elements)
        if not any(_id(element) == digest for element in elements):
            elements.append({"id": str(digest), "tags": None, "files": [str(f) for f in files]})
        if reference is not None:
            elements = [_tagged(e, reference, wanted=_id(e) == digest) for e in elements]
        return DockerIndex(self.value, tuple(elements))


def go_indented(value: Any) -> bytes:
    """Return JSON as Go's `json.MarshalIndent(value, "", "  ")` writes it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return text.translate(_GO_ESCAPES).encode()


def _tagged(element: Any, reference: Reference, *, wanted: bool) -> Any:
    """Return the element with the tag if `wanted`, otherwise without it."""
    if not isinstance(element, dict):
        return element
    tags = _strings(element, "tags")
    if wanted and any(_reference(tag) == reference for tag in tags):
        return element
    kept = [tag for tag in tags if _reference(tag) != reference]
    if not wanted and len(kept) == len(tags):
        return element
    if wanted:
        kept.append(str(reference))
    return {**element, "tags": kept or None}


def _id(element: Any) -> Digest | None:
    try:
        return Digest.parse(element["id"])
    except (InvalidDigestError, TypeError, KeyError, AttributeError):
        return None


def _strings(element: Any, key: str) -> list[str]:
    values = element.get(key) if isinstance(element, dict) else None
    return [v for v in values if isinstance(v, str)] if isinstance(values, list) else []


def _reference(tag: str) -> Reference | None:
    try:
        return Reference.parse(tag, default_registry=DEFAULT_REGISTRY).without_digest()
    except InvalidReferenceError:
        return None


_VERSION: Final = "1.0.0"


def default_docker_root() -> Path:
    """Return $MODELS_PATH, else `~/.docker/models`, as Docker Model Runner does."""
    configured = os.environ.get("MODELS_PATH")
    return Path(configured) if configured else Path.home() / ".docker" / "models"


class DockerStore:
    """Docker Model Runner's store at `root`; implements `modelpack.storage.Source`.

    Its blobs do not count as verified: Docker Model Runner checks no digests when it reads them.
    """

    def __init__(self, root: str | Path | None = None, *, create: bool = False) -> None:
        """Open the store at `root` (default: `default_docker_root()`).

        With `create`, make a store in an absent or empty directory. Raises `StoreError` for any
        other directory.
        """
        where = default_docker_root() if root is None else Path(root).expanduser()
        self.root = Path(os.path.abspath(where))
        with map_os_errors("open Docker's model store", self.root):
            if create and (not self.root.exists() or not any(self.root.iterdir())):
                self._initialise()
            self._check_layout()

    def resolve(self, name: str) -> Descriptor:
        """Return the manifest called `name`: a tag, an id, a short id or a prefix of an id."""
        return self.get(name).descriptor

    def get(self, name: str) -> StoredModel:
        """Return the model called `name`, with all its tags; raises `NotFoundError`."""
        entries = self._entries()
        return lookup.model(entries, lookup.Names(entries).find(name).entry.digest)

    def models(self) -> tuple[StoredModel, ...]:
        """Return all models with a valid manifest, sorted by name."""
        return lookup.models(self._entries())

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """Return the bytes of a manifest, verified by size and digest."""
        raw = self._read_manifest(descriptor.digest)
        descriptor.check_size(len(raw), f"manifest {descriptor.digest}")
        return raw

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """Return the blob as a source; opening it raises `NotFoundError` if it is missing."""
        return StoredBlob(self.blob_path, descriptor.digest)

    def blob_path(self, digest: Digest) -> Path:
        """Return the path of an unverified blob; raises `NotFoundError`."""
        path = self._place("blobs", digest)
        if not path.is_file():
            raise NotFoundError(f"blob {digest} is not in Docker's model store {self.root}")
        if not os.path.realpath(path).startswith(os.path.realpath(self.root) + os.sep):
            raise UnsafePathError(f"{path} points outside the store", got=os.path.realpath(path))
        return path

    def write_model(
        self,
        raw: bytes,
        blob_path: Callable[[Descriptor], Path],
        reference: Reference | None,
        *,
        link: bool = True,
        watch: Watch | None = None,
    ) -> Descriptor:
        """Add a model and tag it; another model that has this tag loses it.

        `blob_path` returns the file of each blob. The file is hashed, then hard-linked if `link`
        and the file system allow it, otherwise copied. Model Runner sees the model at once.
        Raises `IntegrityError` if a file is not its blob, `StorageFullError`, `ManifestError`.
        """
        manifest = Manifest.parse(raw)
        new: list[Digest] = []
        with self._locked():
            self._index()  # raise for a damaged index before anything is written
            try:
                for blob in manifest.unique_blobs:
                    if not self._holds(blob):
                        self._add_blob(blob, blob_path(blob), link, watch or watching(None))
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
                self._delete_unused(new)
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
                hint="name its directory, or set MODELS_PATH",
            )
        with map_os_errors("read", path):
            raw = read_own(path, MAX_DOCUMENT_BYTES, follow=True)
        version = decode_object(raw, str(path)).get("version")
        if version != _VERSION:
            raise StoreError(
                f"Docker's model store {self.root} has version {version!r}, expected {_VERSION!r}"
            )

    def _index(self) -> DockerIndex:
        path = self.root / "models.json"
        with map_os_errors("read", path):
            try:
                raw = read_own(path, MAX_BYTES, follow=True)
            except FileNotFoundError:
                return DockerIndex({})
        return DockerIndex.parse(raw, str(path))

    def _entries(self) -> tuple[Entry, ...]:
        entries = []
        for digest, tags in self._index().models().items():
            # A damaged manifest must not hide the other models.
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

    def _add_blob(self, descriptor: Descriptor, source: Path, link: bool, watch: Watch) -> None:
        name = descriptor.filepath or descriptor.digest.short

        def seen(done: int) -> None:
            watch.stop.check()
            report = Progress(Action.COPY, name, descriptor.digest, done, descriptor.size)
            watch.report(report)

        final = self._place("blobs", descriptor.digest)
        staged = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex}")
        with map_os_errors("write", final):
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                if link and _linked(source, staged):
                    got = hash_file(staged, descriptor.digest.algorithm, seen)
                else:
                    got = self._copied(descriptor, source, staged, seen)
                descriptor.digest.check_equal(got, str(source))
                os.replace(staged, final)
            finally:
                staged.unlink(missing_ok=True)

    def _copied(
        self, descriptor: Descriptor, source: Path, staged: Path, seen: Callable[[int], None]
    ) -> Digest:
        hasher = descriptor.digest.hasher()
        with source.open("rb", buffering=0) as reader, staged.open("xb", buffering=0) as writer:
            if clone(reader.fileno(), writer.fileno()):
                read_and_hash(reader.fileno(), hasher, seen)
            else:
                check_room(self.root, descriptor.size, str(descriptor.digest))
                hashing = Hashing(hasher, descriptor.size)
                fill = fill_from(reader.fileno())
                copy_and_hash(fill, writer.fileno(), staged, hashing, seen)
            os.fchmod(writer.fileno(), 0o644)
            os.fsync(writer.fileno())
        return Digest.of_hasher(hasher)

    def _replace(self, path: Path, content: bytes) -> None:
        """Replace a small file as Model Runner does: write a temporary file, then rename it."""
        with map_os_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content, by_way_of=path.parent)

    def _delete_unused(self, digests: list[Digest]) -> None:
        """Delete blobs that no model uses: nothing else would ever delete them."""
        with suppress(ModelpackError, OSError):
            needed = self._index().files()
            for digest in digests:
                if str(digest) not in needed:
                    self._place("blobs", digest).unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock out other Modelpack processes; Model Runner itself takes no lock."""
        with map_os_errors("lock", self.root):
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
