"""Attach files to a model, and list and delete its referrers, in a registry or a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor, checked_media_type
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest, parse_manifest_or_index
from modelpack.artifacts.reference import Reference, begins_id
from modelpack.errors import (
    ManifestError,
    NotFoundError,
    PackagingError,
    UnsupportedError,
    UsageError,
)
from modelpack.operations.remote import RemoteOptions, fetch_referenced_manifest, open_repository
from modelpack.operations.transfer import TransferOptions, transfer_model
from modelpack.progress import Action, Progress, ProgressCallback, Stop
from modelpack.storage import BlobSource, BytesBlob, FileBlob, Target, Watch, watching
from modelpack.store.file_copy import hash_file
from modelpack.store.layout import LayoutStore

#: The empty JSON object, and its descriptor (image-spec, "Guidance for an Empty Descriptor").
EMPTY = b"{}"
EMPTY_CONFIG = Descriptor(media_types.OCI_EMPTY, Digest.of(EMPTY), len(EMPTY))


@dataclass(frozen=True, slots=True)
class BlobsSource:
    """A `Source` of the given blobs and manifests, by digest."""

    blobs: Mapping[Digest, BlobSource]
    manifests: Mapping[Digest, bytes] = field(default_factory=dict)

    def resolve(self, name: str) -> Descriptor:
        """Raise `NotFoundError`: the manifests have no names."""
        raise NotFoundError(f"no such manifest: {name}")

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """Return a manifest; raises `NotFoundError`."""
        raw = self.manifests.get(descriptor.digest)
        if raw is None:
            raise NotFoundError(f"no such manifest: {descriptor.digest}")
        return raw

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """Return the blob to read from; raises `NotFoundError`."""
        blob = self.blobs.get(descriptor.digest)
        if blob is None:
            raise NotFoundError(f"no such blob: {descriptor.digest}")
        return blob


def _layer(file: AttachedFile, watch: Watch) -> Descriptor:
    """Hash a file and return it as a layer; raises `PackagingError`."""
    path = file.path
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise PackagingError(f"{path} is not a file", hint="attach each file of a directory")

        def seen(completed: int) -> None:
            watch.stop.check()
            watch.report(Progress(Action.VERIFY, path.name, None, completed, size))

        digest = hash_file(path, "sha256", seen)
    except OSError as error:
        raise PackagingError(f"{path}: cannot be read: {error.strerror}") from error
    return Descriptor(file.media_type, digest, size, {media_types.TITLE: path.name})


#: The default media type of an attached file.
DEFAULT_FILE_TYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class AttachedFile:
    """A file to attach as a layer of `media_type`; the file name becomes the layer's title."""

    path: Path
    media_type: str = DEFAULT_FILE_TYPE


@dataclass(frozen=True, slots=True)
class Attached:
    """The `manifest` of a new referrer, and its `subject`."""

    reference: Reference
    subject: Descriptor
    manifest: Manifest = field(repr=False)

    @property
    def digest(self) -> Digest:
        """The digest of the referrer."""
        return self.manifest.digest


def attach(
    reference: str | Reference,
    files: Sequence[AttachedFile | Path],
    *,
    artifact_type: str,
    annotations: Mapping[str, str] | None = None,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Attached:
    """Attach files to the model `reference` in its registry or, with `store`, in that store.

    The same files give the same digest, so attaching them again changes nothing. A referrer may
    have annotations only, without files. Raises `UsageError`, and the errors of a push.
    """
    where = Reference.parse(reference) if isinstance(reference, str) else reference
    watch = watching(progress, stop)
    given = [f if isinstance(f, AttachedFile) else AttachedFile(f) for f in files]
    _check_type(artifact_type, "the artifact type")
    for file in given:
        _check_type(file.media_type, str(file.path))
    if not given and not annotations:
        raise UsageError("no files and no annotations to attach", hint="give a file")
    names = [file.path.name for file in given]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two files have the name {twice!r}", hint="rename one of them")
    layers = [_layer(file, watch) for file in given]
    blobs: dict[Digest, BlobSource] = {EMPTY_CONFIG.digest: BytesBlob(EMPTY)}
    blobs |= {layer.digest: FileBlob(file.path) for layer, file in zip(layers, given, strict=True)}

    def put(subject: Descriptor, place: Target, concurrency: int) -> Attached:
        manifest = Manifest.build(
            EMPTY_CONFIG,
            layers or (EMPTY_CONFIG,),
            artifact_type=artifact_type,
            subject=Descriptor(subject.media_type, subject.digest, subject.size),
            annotations=annotations,
        )
        how = TransferOptions(watch, concurrency)
        transfer_model(BlobsSource(blobs), place, manifest.descriptor, manifest.raw, None, how)
        return Attached(where, subject, manifest)

    if store is not None:
        with store.lease(()):
            return put(store.resolve(_subject_named(where)), store, 1)
    options = remote or RemoteOptions()
    with open_repository(where, options, watch, writes=True) as repository:
        subject, _ = fetch_referenced_manifest(repository, where)
        return put(subject, repository, options.concurrency)


def referrers(
    reference: str | Reference,
    *,
    artifact_type: str | None = None,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    stop: Stop | None = None,
) -> tuple[Descriptor, ...]:
    """Return the referrers of the model `reference` in its registry or, with `store`, there.

    In a store, `reference` may also be an id or a unique prefix of one.
    Each descriptor has the artifact type and the annotations of its manifest. For a registry
    without the referrers API, the fallback tag is read.
    """
    if store is not None and isinstance(reference, str) and begins_id(reference):
        return tuple(store.referrers(store.resolve(reference).digest, artifact_type))
    where = Reference.parse(reference) if isinstance(reference, str) else reference
    if store is not None:
        return tuple(store.referrers(store.resolve(_subject_named(where)).digest, artifact_type))
    with open_repository(where, remote or RemoteOptions(), watching(None, stop)) as repository:
        descriptor, _ = fetch_referenced_manifest(repository, where)
        return tuple(repository.referrers(descriptor.digest, artifact_type))


def detach(
    reference: str | Reference,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    stop: Stop | None = None,
) -> Digest:
    """Delete the referrer with the digest in `reference` from its registry or from `store`.

    Also removes it from the fallback tag. Raises `NotFoundError`, `UsageError` without a digest,
    and `UnsupportedError` if the manifest is not a referrer.
    """
    where = Reference.parse(reference) if isinstance(reference, str) else reference
    if where.digest is None:
        raise UsageError(
            f"{where}: expected the digest of a referrer, REPOSITORY@DIGEST",
            hint="run `modelpack referrers` to list the digests",
        )
    if store is not None:
        descriptor = store.resolve(str(where.digest))
        raw = store.fetch_manifest(descriptor)
        if parse_manifest_or_index(raw, str(where)).subject is None:
            raise UnsupportedError("is not a referrer: it has no subject", path=str(where))
        store.remove(str(where.digest))
        return where.digest
    options = remote or RemoteOptions()
    with open_repository(where, options, watching(None, stop), writes=True) as repository:
        repository.delete_referrer(where.digest)
    return where.digest


def _check_type(media_type: str, what: str) -> None:
    try:
        checked_media_type(media_type, what)
    except ManifestError as error:
        raise UsageError(str(error)) from None
    if media_type == media_types.OCI_EMPTY:
        raise UsageError(f"{what} cannot be {media_type}", hint="choose another media type")


def _subject_named(where: Reference) -> str:
    """Return the name of a subject in a store: the tagged reference, else the digest alone."""
    return str(where if where.tag is not None else where.digest)
