"""Models in tar archives: an OCI image layout, or as `docker model package` sends them.

A layout (image-spec, image-layout.md) holds any number of models and their names. Docker Model
Runner's archive holds one without a name: `blobs/sha256/<hex>` for each layer and the config, then
`manifest.json`, the manifest itself (its pkg/distribution/tarball); `POST /models/load` takes it.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from modelpack import mediatypes
from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.errors import UsageError
from modelpack.gojson import encode
from modelpack.manifest import Index, parse_manifest_or_index
from modelpack.operations.docker import check_docker_takes
from modelpack.operations.find import stored_model
from modelpack.operations.wholeness import check_whole
from modelpack.progress import Action, Progress
from modelpack.reference import Reference
from modelpack.storage import Watch
from modelpack.stores.layout import LayoutStore
from modelpack.unpacking.blobs import open_blob

Form = Literal["oci", "docker"]
FORMS: Final[tuple[Form, ...]] = ("oci", "docker")
MANIFEST_JSON: Final = "manifest.json"
INDEX_JSON: Final = "index.json"
_LAYOUT: Final = b'{"imageLayoutVersion": "1.0.0"}'
_CHUNK: Final = 1024 * 1024
_BLOCK: Final = 512


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive to write: `size` in bytes, and the `pieces` that it is made of, read once.

    The models' blobs are kept until the last piece was taken.
    """

    size: int
    digests: tuple[Digest, ...]
    pieces: Iterator[bytes]


@dataclass(frozen=True, slots=True)
class _Document:
    """A manifest or an index that goes into an archive."""

    descriptor: Descriptor
    raw: bytes


def archive_of(
    store: LayoutStore, names: Sequence[str], watch: Watch, *, form: Form = "oci"
) -> Archive:
    """Return the archive of stored models; the same models give the same bytes.

    Raises `NotFoundError`, `PartialModelError`, `UsageError` for several models in Docker's.
    """
    if form not in FORMS:
        raise UsageError(f"archive form {form!r}: expected one of {', '.join(FORMS)}")
    if form == "docker":
        if len(names) != 1:
            raise UsageError(f"Docker's archive holds one model, got {len(names)}")
        return _docker_archive(store, names[0], watch)
    if not names:
        raise UsageError("an archive needs a model")
    documents: dict[Digest, _Document] = {}
    blobs: dict[Digest, Descriptor] = {}
    entries = []
    for name in names:
        descriptor = store.resolve(name)
        _collect(store, name, descriptor, documents, blobs)
        entries += [_entry(descriptor, spelled) for spelled in _spellings(store, name)]
    index = encode(
        {
            "schemaVersion": 2,
            "mediaType": mediatypes.OCI_INDEX,
            "manifests": [entry.to_json() for entry in entries],
        }
    )
    files = {"oci-layout": _LAYOUT, INDEX_JSON: index}
    files |= {_path(digest): document.raw for digest, document in documents.items()}
    kept = tuple(blob for digest, blob in sorted(blobs.items()) if digest not in documents)
    return Archive(
        _size(files.values(), kept),
        tuple(dict.fromkeys(entry.digest for entry in entries)),
        _written(store, files, kept, {}, watch),
    )


def _docker_archive(store: LayoutStore, name: str, watch: Watch) -> Archive:
    model = stored_model(store, name)
    check_whole(store, model)
    check_docker_takes(model.manifest, name)
    manifest = model.manifest
    last = {MANIFEST_JSON: manifest.raw}
    blobs = manifest.unique_blobs
    return Archive(
        _size(last.values(), blobs),
        (manifest.digest,),
        _written(store, {}, blobs, last, watch),
    )


def _collect(
    store: LayoutStore,
    name: str,
    descriptor: Descriptor,
    documents: dict[Digest, _Document],
    blobs: dict[Digest, Descriptor],
) -> None:
    """Note all that a manifest or an index needs; what comes twice is read once."""
    if descriptor.digest in documents:
        return
    raw = store.fetch_manifest(descriptor)
    document = parse_manifest_or_index(raw, name, media_type=descriptor.media_type)
    documents[descriptor.digest] = _Document(descriptor, raw)
    if isinstance(document, Index):
        for child in document.manifests:
            _collect(store, f"{name}, {child.digest.short}", child, documents, blobs)
        return
    if store.missing(descriptor):
        check_whole(store, stored_model(store, str(descriptor.digest)))
    blobs |= {blob.digest: blob for blob in document.unique_blobs}


def _spellings(store: LayoutStore, name: str) -> list[str | None]:
    """Return the full references that a name stands for: itself, or all of an id's."""
    stored = store.get(name)
    named = [str(ref) for ref in stored.references if _is(name, ref)]
    return [*(named or map(str, stored.references))] or [None]


def _is(name: str, reference: Reference) -> bool:
    try:
        return Reference.parse(name).without_digest() == reference
    except ValueError:
        return False


def _entry(descriptor: Descriptor, name: str | None) -> Descriptor:
    said = {} if name is None else {mediatypes.REF_NAME: name, mediatypes.CONTAINERD_NAME: name}
    return Descriptor(
        descriptor.media_type,
        descriptor.digest,
        descriptor.size,
        said,
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
            yield _header(folder, 0, tarfile.DIRTYPE, 0o755)
        yield from _small(first)
        for blob in blobs:
            yield _header(_path(blob.digest), blob.size)
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
        yield _header(name, len(raw)) + raw + bytes(-len(raw) % _BLOCK)


def _size(files: Iterable[bytes], blobs: Sequence[Descriptor]) -> int:
    sizes = [len(raw) for raw in files] + [blob.size for blob in blobs]
    folders, end = 2, 2
    return _BLOCK * (folders + end + len(sizes)) + sum(size + -size % _BLOCK for size in sizes)


def _path(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.encoded}"


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE, mode: int = 0o644) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type, entry.mode = size, kind, mode
    return entry.tobuf(tarfile.GNU_FORMAT)
