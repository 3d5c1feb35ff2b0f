"""Reading models out of tar archives, as a stream: what is in them is verified as it is stored."""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import IO

from modelpack import mediatypes
from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.errors import (
    FormatError,
    IntegrityError,
    InvalidDigestError,
    InvalidReferenceError,
    ManifestError,
    NotFoundError,
    UnsafePathError,
    UnsupportedError,
    UsageError,
)
from modelpack.gojson import MAX_DOCUMENT_BYTES
from modelpack.manifest import Index, Manifest, parse_manifest_or_index
from modelpack.operations.archives import INDEX_JSON, MANIFEST_JSON
from modelpack.reference import Reference
from modelpack.storage import BlobReader, Watch
from modelpack.stores.layout import LayoutStore

_CHUNK = 1024 * 1024
#: Manifests of one archive; an index within an index is followed this deep.
_MAX_MANIFESTS = 10_000
_MAX_DEPTH = 4
# Until the manifest comes, nobody knows what a blob is.
_UNKNOWN = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Imported:
    """A model that came out of an archive, and the name that it has in the store, if any."""

    digest: Digest
    reference: Reference | None


def import_archive(
    store: LayoutStore, stream: IO[bytes], watch: Watch, *, to: str | Reference | None = None
) -> tuple[Imported, ...]:
    """Keep the models of an archive: under the names that it gives, or the only one as `to`.

    Nothing shows before all of it is there and verified. Raises `FormatError` for what is no such
    archive, `IntegrityError`, `StorageFullError`, `UnsupportedError` for what is no model.
    """
    where = Reference.parse(to) if isinstance(to, str) else to
    if where is not None and where.digest is not None:
        raise UsageError(f"{where}: a digest cannot be chosen, it follows from the archive")
    with store.lease(()):
        documents = _read_blobs(store, stream, watch)
        index, manifest = documents.get(INDEX_JSON), documents.get(MANIFEST_JSON)
        if index is not None:
            return _keep_layout(store, Index.parse(index, INDEX_JSON), where)
        if manifest is None:
            raise ManifestError(f"has no {INDEX_JSON} and no {MANIFEST_JSON}", path="archive")
        if manifest.lstrip().startswith(b"["):
            raise UnsupportedError(
                f"its {MANIFEST_JSON} is one of `docker save`, which holds images",
                path="archive",
            )
        document = Manifest.parse(manifest, MANIFEST_JSON)
        document.check_is_model(MANIFEST_JSON)
        store.write_manifest(document.descriptor, manifest, str(where) if where else None)
        return (Imported(document.digest, where),)


def _read_blobs(store: LayoutStore, stream: IO[bytes], watch: Watch) -> dict[str, bytes]:
    """Store all blobs; return the documents beside them."""
    documents: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_CHUNK) as archive:
            for entry in archive:
                watch.stop.check()
                content = archive.extractfile(entry) if entry.isfile() else None
                if content is None:
                    continue
                name = posixpath.normpath(entry.name)
                if name in (INDEX_JSON, MANIFEST_JSON):
                    raw = content.read(MAX_DOCUMENT_BYTES + 1)
                    if len(raw) > MAX_DOCUMENT_BYTES:
                        raise ManifestError(f"has more than {MAX_DOCUMENT_BYTES} bytes", path=name)
                    documents[name] = raw
                elif (digest := _digest_of(entry.name)) is not None:
                    blob = Descriptor(_UNKNOWN, digest, entry.size)
                    store.write_blob(blob, _Member(content, digest), watch)
    except tarfile.TarError as error:
        raise FormatError(f"is no tar archive: {error}", path="archive") from error
    return documents


def _keep_layout(store: LayoutStore, index: Index, where: Reference | None) -> tuple[Imported, ...]:
    listed = {entry.digest for entry in index.manifests}
    if not listed:
        raise ManifestError("lists no manifest", path=INDEX_JSON)
    if where is not None and len(listed) > 1:
        raise UsageError(
            f"the archive holds {len(listed)} models, so they cannot all be {where}",
            hint="leave the reference out: they have names of their own",
        )
    found = []
    # Everything is looked at before anything has a name.
    orders = [list(_in_order(store, entry, 0)) for entry in index.manifests]
    if sum(map(len, orders)) > _MAX_MANIFESTS:
        raise UnsupportedError(f"more than {_MAX_MANIFESTS} manifests", path=INDEX_JSON)
    for entry, order in zip(index.manifests, orders, strict=True):
        name = where or _name_of(entry)
        for descriptor, raw in order:
            top = descriptor.digest == entry.digest
            store.write_manifest(descriptor, raw, str(name) if top and name else None)
        found.append(Imported(entry.digest, name))
    return tuple(found)


def _in_order(
    store: LayoutStore, descriptor: Descriptor, depth: int
) -> Iterator[tuple[Descriptor, bytes]]:
    """Yield a manifest, behind those that it lists."""
    what = f"{descriptor.digest} in the archive"
    if descriptor.media_type not in (*mediatypes.MANIFEST_TYPES, *mediatypes.INDEX_TYPES):
        raise UnsupportedError(f"is a {descriptor.media_type}, expected a manifest", path=what)
    if depth > _MAX_DEPTH:
        raise UnsupportedError(f"indexes are nested more than {_MAX_DEPTH} deep", path=what)
    own = Descriptor(
        descriptor.media_type,
        descriptor.digest,
        descriptor.size,
        artifact_type=descriptor.artifact_type,
    )
    try:
        raw = store.fetch_manifest(own)
    except NotFoundError:
        raise ManifestError("is listed, but is not there", path=what) from None
    document = parse_manifest_or_index(raw, what, media_type=own.media_type)
    if isinstance(document, Index):
        for child in document.manifests:
            yield from _in_order(store, child, depth + 1)
    elif document.subject is None:
        document.check_is_model(what)
    yield own, raw


def _name_of(entry: Descriptor) -> Reference | None:
    """Return the name that an archive gives; a bare tag, as others write it, is none."""
    for key in (mediatypes.CONTAINERD_NAME, mediatypes.REF_NAME):
        text = entry.annotations.get(key, "")
        if "/" not in text:
            continue
        try:
            found = Reference.parse(text)
        except InvalidReferenceError:
            continue
        if found.digest is None:
            return found
    return None


@dataclass(slots=True)
class _Member:
    """A blob in an archive that is read once, from its start to its end."""

    stream: IO[bytes]
    digest: Digest
    opened: bool = False

    def open(self, offset: int = 0) -> AbstractContextManager[BlobReader]:
        """Return the stream at `offset`."""
        if self.opened:
            raise IntegrityError(f"the archive has other bytes for {self.digest}")
        self.opened = True
        while offset:
            offset -= len(self.stream.read(min(offset, _CHUNK)))
        return closing(_Reader(self.stream))


class _Reader(io.RawIOBase):
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = self._stream.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def _digest_of(name: str) -> Digest | None:
    """Return the digest of a blob from its path; None for paths of nothing that is known."""
    parts = posixpath.normpath(name).split("/")
    if ".." in parts:
        raise UnsafePathError(f"the archive holds the path {name!r}, which leads out of it")
    if len(parts) != 3 or parts[0] not in ("blobs", "manifests"):
        return None
    try:
        return Digest.parse(f"{parts[1]}:{parts[2]}")
    except InvalidDigestError as error:
        raise FormatError(f"{name!r} is no blob: {error}", path="archive") from error
