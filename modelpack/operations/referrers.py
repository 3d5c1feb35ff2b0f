"""Attach, detach and list: manifests that say something about a model (OCI image-spec 1.1).

A signature, an SBOM, an evaluation: each is a manifest with an artifact type, the empty config, a
layer for each file, and the model as its subject.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modelpack import mediatypes
from modelpack.descriptor import Descriptor, checked_media_type
from modelpack.digest import Digest
from modelpack.errors import ManifestError, UnsupportedError, UsageError
from modelpack.manifest import Manifest, parse_manifest_or_index
from modelpack.operations.attached_files import AttachedFiles
from modelpack.operations.remote import (
    RemoteOptions,
    fetch_referenced_manifest,
    open_repository,
)
from modelpack.operations.transfer import transfer
from modelpack.operations.watching import watching
from modelpack.progress import ProgressCallback, Stop
from modelpack.reference import Reference
from modelpack.stores.layout import LayoutStore

#: The type of a file's layer, unless the caller says better.
DEFAULT_FILE_TYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class AttachedFile:
    """A file to attach, as a layer of `media_type`; its name goes into the layer's title."""

    path: Path
    media_type: str = DEFAULT_FILE_TYPE


@dataclass(frozen=True, slots=True)
class Attached:
    """What was attached: the new `manifest`, and its `subject`."""

    reference: Reference
    subject: Descriptor
    manifest: Manifest = field(repr=False)

    @property
    def digest(self) -> Digest:
        """The digest of what was attached."""
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

    The same files give the same digest, so that attaching them again changes nothing. Without
    files, the annotations are what is said. Raises `UsageError`, and what a push raises.
    """
    where = Reference.parse(reference) if isinstance(reference, str) else reference
    watch = watching(progress, stop)
    given = [f if isinstance(f, AttachedFile) else AttachedFile(f) for f in files]
    _check_type(artifact_type, "the artifact type")
    for file in given:
        _check_type(file.media_type, str(file.path))
    if not given and not annotations:
        raise UsageError("nothing to attach", hint="name a file, or give an annotation")
    source = AttachedFiles.read([(file.path, file.media_type) for file in given], watch)

    def manifest_about(subject: Descriptor) -> Manifest:
        about = Descriptor(subject.media_type, subject.digest, subject.size)
        return Manifest.build(
            source.empty,
            source.layers or (source.empty,),
            artifact_type=artifact_type,
            subject=about,
            annotations=annotations,
        )

    if store is not None:
        subject = store.resolve(_subject_named(where))
        manifest = manifest_about(subject)
        with store.lease(()):
            transfer(
                source, store, manifest.descriptor, manifest.raw, None, concurrency=1, watch=watch
            )
        return Attached(where, subject, manifest)
    options = remote or RemoteOptions()
    with open_repository(where, options, watch, writes=True) as repository:
        subject, _ = fetch_referenced_manifest(repository, where)
        manifest = manifest_about(subject)
        transfer(
            source,
            repository,
            manifest.descriptor,
            manifest.raw,
            None,
            concurrency=options.concurrency,
            watch=watch,
        )
    return Attached(where, subject, manifest)


def referrers(
    reference: str | Reference,
    *,
    artifact_type: str | None = None,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    stop: Stop | None = None,
) -> tuple[Descriptor, ...]:
    """Return what is attached to the model `reference` in its registry or, with `store`, there.

    Each descriptor has the artifact type and the annotations of its manifest. A registry without
    the referrers API is asked for the fallback tag.
    """
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
    """Delete what is attached, by the digest in `reference`, from its registry or from `store`.

    Takes it off the fallback tag too. Raises `NotFoundError`, `UsageError` without a digest, and
    `UnsupportedError` if that manifest is attached to nothing.
    """
    where = Reference.parse(reference) if isinstance(reference, str) else reference
    if where.digest is None:
        raise UsageError(
            f"{where}: name what is to be detached by its digest",
            hint="REPOSITORY@DIGEST; `modelpack referrers` lists the digests",
        )
    if store is not None:
        descriptor = store.resolve(str(where.digest))
        raw = store.fetch_manifest(descriptor)
        if parse_manifest_or_index(raw, str(where)).subject is None:
            raise UnsupportedError("has no subject, so it is attached to nothing", path=str(where))
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
    if media_type == mediatypes.OCI_EMPTY:
        raise UsageError(f"{what}: {media_type} stands for nothing", hint="choose a type")


def _subject_named(where: Reference) -> str:
    """Return the name of a subject in a store, where what is attached has no repository."""
    return str(where if where.tag is not None else where.digest)
