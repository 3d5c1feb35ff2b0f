"""Export stored models to tar archives, and import them: OCI image layouts and Docker's format.

A layout (image-spec, image-layout.md) holds any number of models and their names. The archive of
Docker Model Runner (its pkg/distribution/tarball) holds one model without a name: the files
`blobs/sha256/<hex>` of the layers and the config, then the manifest as `manifest.json`. `docker
model package` writes it, and `POST /models/load` accepts it.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import IO, Final, Literal

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import check_document_size, encode
from modelpack.artifacts.manifest import Index, Manifest, parse_manifest_or_index
from modelpack.artifacts.reference import Reference
from modelpack.bundles.links import open_blob
from modelpack.bundles.tar import TarReader
from modelpack.errors import (
    FormatError,
    InvalidDigestError,
    InvalidReferenceError,
    ManifestError,
    ModelpackError,
    NotFoundError,
    UnsafePathError,
    UnsupportedError,
    UsageError,
)
from modelpack.operations.docker import check_docker_format
from modelpack.operations.lookup import check_whole, named_references, stored_model
from modelpack.operations.remote import new_reference
from modelpack.operations.transfer import MAX_DEPTH, MAX_MANIFESTS
from modelpack.progress import Action, Progress
from modelpack.storage import Outcome, Watch
from modelpack.store.layout import LayoutStore
from modelpack.store.manifests import successors

Form = Literal["oci", "docker"]
FORMS: Final[tuple[Form, ...]] = ("oci", "docker")
MANIFEST_JSON: Final = "manifest.json"
INDEX_JSON: Final = "index.json"
_LAYOUT: Final = b'{"imageLayoutVersion": "1.0.0"}'
_CHUNK: Final = 1024 * 1024
_BLOCK: Final = 512


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive to write: its `size` in bytes and its content as `pieces`, an iterator of bytes.

    The models' blobs are not deleted until the iterator ends.
    """

    size: int
    digests: tuple[Digest, ...]
    pieces: Iterator[bytes]


def archive_of(
    store: LayoutStore, names: Sequence[str], watch: Watch, *, form: Form = "oci"
) -> Archive:
    """Return the archive of stored models; the same models give the same bytes.

    Raises `NotFoundError`, `PartialModelError`, and `UsageError` for several models in the form
    "docker".
    """
    if form not in FORMS:
        raise UsageError(f"archive form {form!r}: expected one of {', '.join(FORMS)}")
    if form == "docker":
        if len(names) != 1:
            raise UsageError(f"Docker's archive holds one model, got {len(names)}")
        return _docker_archive(store, names[0], watch)
    if not names:
        raise UsageError("an archive needs at least one model")
    documents: dict[Digest, bytes] = {}
    blobs: dict[Digest, Descriptor] = {}
    entries = []
    for name in names:
        descriptor = store.resolve(name)
        _collect(store, name, descriptor, documents, blobs)
        references = named_references(store, name) or (None,)
        entries += [_entry(descriptor, reference) for reference in references]
    index = encode(
        {
            "schemaVersion": 2,
            "mediaType": media_types.OCI_INDEX,
            "manifests": [entry.to_json() for entry in entries],
        }
    )
    files = {"oci-layout": _LAYOUT, INDEX_JSON: index}
    files |= {_path(digest): raw for digest, raw in documents.items()}
    kept = tuple(blob for digest, blob in sorted(blobs.items()) if digest not in documents)
    return Archive(
        _size(files.values(), kept),
        tuple(dict.fromkeys(entry.digest for entry in entries)),
        _written(store, files, kept, {}, watch),
    )


def _docker_archive(store: LayoutStore, name: str, watch: Watch) -> Archive:
    model = stored_model(store, name)
    check_whole(store, model)
    check_docker_format(model.manifest, name)
    last = {MANIFEST_JSON: model.manifest.raw}
    blobs = model.manifest.unique_blobs
    written = _written(store, {}, blobs, last, watch)
    return Archive(_size(last.values(), blobs), (model.digest,), written)


def _collect(
    store: LayoutStore,
    name: str,
    descriptor: Descriptor,
    documents: dict[Digest, bytes],
    blobs: dict[Digest, Descriptor],
) -> None:
    """Add a manifest or an index and everything that it lists to `documents` and `blobs`."""
    if descriptor.digest in documents:
        return
    raw = store.fetch_manifest(descriptor)
    document = parse_manifest_or_index(raw, name, media_type=descriptor.media_type)
    documents[descriptor.digest] = raw
    if isinstance(document, Index):
        for child in document.manifests:
            _collect(store, f"{name}, {child.digest.short}", child, documents, blobs)
        return
    if store.missing(descriptor):
        check_whole(store, stored_model(store, str(descriptor.digest)))
    blobs |= {blob.digest: blob for blob in document.unique_blobs}


def _entry(descriptor: Descriptor, reference: Reference | None) -> Descriptor:
    """Return the index entry of a manifest, with its reference as annotations."""
    keys = () if reference is None else (media_types.REF_NAME, media_types.CONTAINERD_NAME)
    return Descriptor(
        descriptor.media_type,
        descriptor.digest,
        descriptor.size,
        {key: str(reference) for key in keys},
        descriptor.artifact_type,
    )


def _written(
    store: LayoutStore,
    first: dict[str, bytes],
    blobs: Sequence[Descriptor],
    last: dict[str, bytes],
    watch: Watch,
) -> Iterator[bytes]:
    with store.lease(blob.digest for blob in blobs):
        for folder in ("blobs", "blobs/sha256"):
            yield tar_header(folder, 0, tarfile.DIRTYPE, 0o755)
        yield from _small(first)
        for blob in blobs:
            yield tar_header(_path(blob.digest), blob.size)
            with open_blob(store.blob_path(blob.digest), blob) as stream:
                done = 0
                while piece := stream.read(_CHUNK):
                    watch.stop.check()
                    yield piece
                    done += len(piece)
                    name = blob.filepath or blob.digest.short
                    watch.report(Progress(Action.COPY, name, blob.digest, done, blob.size))
            yield bytes(-blob.size % _BLOCK)
        yield from _small(last)
        yield bytes(2 * _BLOCK)


def _small(files: dict[str, bytes]) -> Iterator[bytes]:
    for name, raw in files.items():
        yield tar_header(name, len(raw)) + raw + bytes(-len(raw) % _BLOCK)


def _size(files: Iterable[bytes], blobs: Sequence[Descriptor]) -> int:
    sizes = [len(raw) for raw in files] + [blob.size for blob in blobs]
    folders, end = 2, 2
    return _BLOCK * (folders + end + len(sizes)) + sum(size + -size % _BLOCK for size in sizes)


def _path(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.encoded}"


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE, mode: int = 0o644) -> bytes:
    """Return the header of a GNU tar entry without owner and time."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.type, entry.mode = size, kind, mode
    return entry.tobuf(tarfile.GNU_FORMAT)


#: The largest number of files and directories in one archive.
_MAX_ENTRIES = 100_000
#: The largest size of the headers of one entry.
_MAX_HEADER_BYTES = 64 * 1024
# Blobs precede the manifest, so their media types are unknown when they are read.
_UNKNOWN = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Imported:
    """A model imported from an archive, and its name in the store, or None."""

    digest: Digest
    reference: Reference | None


def import_archive(
    store: LayoutStore, stream: IO[bytes], watch: Watch, *, to: str | Reference | None = None
) -> tuple[Imported, ...]:
    """Import the models of an archive under their names in it, or a single model as `to`.

    The models appear in the store together, after everything was read and verified; if anything
    fails, the blobs that the archive added are deleted. Raises `FormatError` if the stream is not
    such an archive, `IntegrityError`, `StorageFullError`, `UnsafePathError` for links and devices,
    and `UnsupportedError` for sparse files and for manifests that are not models.
    """
    where = None if to is None else new_reference(to)
    added: list[Digest] = []
    try:
        with store.lease(()):
            return _import(store, stream, watch, where, added)
    except BaseException:
        with suppress(ModelpackError):  # garbage collection deletes them later
            store.discard_blobs(added)
        raise


def _import(
    store: LayoutStore,
    stream: IO[bytes],
    watch: Watch,
    where: Reference | None,
    added: list[Digest],
) -> tuple[Imported, ...]:
    what = _path_of(stream)
    documents = _read_blobs(store, stream, what, watch, added)
    index, manifest = documents.get(INDEX_JSON), documents.get(MANIFEST_JSON)
    if index is not None:
        return _keep_layout(store, Index.parse(index, INDEX_JSON), where)
    if manifest is None:
        raise ManifestError(f"has no {INDEX_JSON} and no {MANIFEST_JSON}", path=what)
    if manifest.lstrip().startswith(b"["):
        raise UnsupportedError(
            f"contains images: its {MANIFEST_JSON} was written by `docker save`",
            path=what,
        )
    document = Manifest.parse(manifest, MANIFEST_JSON)
    document.check_is_model(MANIFEST_JSON)
    store.write_manifest(document.descriptor, manifest, str(where) if where else None)
    return (Imported(document.digest, where),)


def _read_blobs(
    store: LayoutStore, stream: IO[bytes], what: str, watch: Watch, added: list[Digest]
) -> dict[str, bytes]:
    """Store all blobs, add the digests of new ones to `added`, and return the documents by name."""
    documents: dict[str, bytes] = {}
    sizes: dict[Digest, int] = {}
    reader = TarReader(stream, what, max_header_bytes=_MAX_HEADER_BYTES)
    for number, entry in enumerate(reader, start=1):
        watch.stop.check()
        if number > _MAX_ENTRIES:
            raise UnsupportedError(f"has more than {_MAX_ENTRIES} entries", path=what)
        name = _normalised(entry.name)
        if entry.is_directory:
            continue
        if name in (INDEX_JSON, MANIFEST_JSON):
            if name in documents:
                raise FormatError(f"contains {name} twice", path=what)
            check_document_size(entry.size, name)
            documents[name] = b"".join(iter(partial(reader.read, entry.size), b""))
        elif (digest := _digest_of(name)) is not None:
            if sizes.setdefault(digest, entry.size) != entry.size:
                raise FormatError(f"contains {name!r} twice with different sizes", path=what)
            blob = Descriptor(_UNKNOWN, digest, entry.size)
            if store.receive_blob(blob, _Member(reader), watch) is Outcome.WRITTEN:
                added.append(digest)
    return documents


def _path_of(stream: IO[bytes]) -> str:
    """Return the path of an open file, for errors; "archive" for other streams, also stdin."""
    name = getattr(stream, "name", None)
    return name if isinstance(name, str) and name != "<stdin>" else "archive"


def _keep_layout(store: LayoutStore, index: Index, where: Reference | None) -> tuple[Imported, ...]:
    listed = {entry.digest for entry in index.manifests}
    if not listed:
        raise ManifestError("lists no manifest", path=INDEX_JSON)
    if where is not None and len(listed) > 1:
        raise UsageError(
            f"cannot import the archive as {where}: it contains {len(listed)} models",
            hint="leave out the reference to import the models under their own names",
        )
    found: dict[Digest, Descriptor] = {}
    for entry in index.manifests:
        _collect_members(store, entry, 0, found)
    named = [(entry, where or _name_of(entry)) for entry in index.manifests]
    store.list_manifests(
        [(descriptor, None) for descriptor in found.values()]
        + [(found[entry.digest], str(name)) for entry, name in named if name is not None]
    )
    return tuple(Imported(entry.digest, name) for entry, name in named)


def _collect_members(
    store: LayoutStore, descriptor: Descriptor, depth: int, found: dict[Digest, Descriptor]
) -> None:
    """Check a manifest and those that it lists, and add their descriptors to `found`.

    Only descriptors are collected, since there may be many manifests, and each may be large.
    """
    what = f"{descriptor.digest} in the archive"
    if descriptor.digest in found:
        return
    if descriptor.media_type not in media_types.MANIFEST_AND_INDEX_TYPES:
        raise UnsupportedError(
            f"has the media type {descriptor.media_type!r}, expected a manifest", path=what
        )
    if depth > MAX_DEPTH:
        raise UnsupportedError(f"is nested in more than {MAX_DEPTH} indexes", path=what)
    if len(found) >= MAX_MANIFESTS:
        raise UnsupportedError(f"lists more than {MAX_MANIFESTS} manifests", path=INDEX_JSON)
    own = Descriptor(
        descriptor.media_type,
        descriptor.digest,
        descriptor.size,
        artifact_type=descriptor.artifact_type,
    )
    try:
        raw = store.fetch_manifest(own)
    except NotFoundError:
        raise ManifestError("is listed, but missing", path=what) from None
    document = parse_manifest_or_index(raw, what, media_type=own.media_type)
    if isinstance(document, Manifest):
        if document.subject is None:
            document.check_is_model(what)
        for blob in successors(document):
            if not store.has_blob(blob):
                raise ManifestError(f"lists the blob {blob.digest}, which is missing", path=what)
    found[own.digest] = own
    if isinstance(document, Index):
        for child in document.manifests:
            _collect_members(store, child, depth + 1, found)


def _name_of(entry: Descriptor) -> Reference | None:
    """Return the full reference that an archive gives to a model; None if it gives only a tag."""
    for key in (media_types.CONTAINERD_NAME, media_types.REF_NAME):
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


@dataclass(frozen=True, slots=True)
class _Member:
    """The content of the current entry of a `TarReader`, as a `BlobReader`."""

    reader: TarReader

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill `buffer` from its start; return the number of bytes, 0 at the end."""
        piece = self.reader.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def _normalised(name: str) -> str:
    """Return the path of an entry without `.` and `//`; raise `UnsafePathError` for `..`."""
    parts = posixpath.normpath(name).split("/")
    if ".." in parts:
        raise UnsafePathError(f"the archive contains the path {name[:200]!r}, which leaves it")
    return "/".join(parts)


def _digest_of(name: str) -> Digest | None:
    """Return the digest of a blob from its path; None for any other path."""
    parts = name.split("/")
    if len(parts) != 3 or parts[0] not in ("blobs", "manifests"):
        return None
    try:
        return Digest.parse(f"{parts[1]}:{parts[2]}")
    except InvalidDigestError as error:
        raise FormatError(f"{name[:200]!r} is not a blob: {error}", path="archive") from error
