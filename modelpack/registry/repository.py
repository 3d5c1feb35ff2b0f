"""Repository: one repository of a registry, as a source and a target of models."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.errors import RegistryError, RemoteUnavailableError, UnsupportedError
from modelpack.manifest import parse_manifest_or_index, referrer_descriptor
from modelpack.progress import silent
from modelpack.registry import manifests, referrers
from modelpack.registry.downloads import RemoteBlob
from modelpack.registry.endpoint import Endpoint
from modelpack.registry.remote_file import LIMIT, RemoteFile
from modelpack.registry.uploads import Upload
from modelpack.storage import BlobSource, Outcome, Source, Watch

if TYPE_CHECKING:
    from modelpack.registry.registry import Registry


class Repository:
    """Manifests, tags and blobs under one name; fulfils `Source`, `Target` and `Mounter`.

    Names are tags or digests. Any request may raise `AuthError`, `DeniedError`, `RegistryError`
    and, after retries, `RemoteUnavailableError`; what does not exist is a `NotFoundError`.
    """

    def __init__(self, registry: Registry, endpoint: Endpoint) -> None:
        self.registry = registry
        self.name = endpoint.name
        self._endpoint = endpoint
        self._transport = endpoint.transport
        self._lock = threading.Lock()
        self._sessions: dict[Digest, str] = {}  # uploads that a mount opened instead

    def __repr__(self) -> str:
        return f"Repository({self._endpoint.label!r})"

    def resolve(self, name: str) -> Descriptor:
        """Return the descriptor of the manifest `name`."""
        return manifests.resolve(self._endpoint, name)

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """Return a manifest's bytes, checked against size, digest and media type."""
        return manifests.fetch(self._endpoint, descriptor)

    def fetch_manifest_by_name(self, name: str) -> tuple[Descriptor, bytes]:
        """Return the manifest `name` with its descriptor, by one request."""
        return manifests.fetch_by_name(self._endpoint, name)

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """Return the blob to read from; whether it exists shows when it is opened."""
        return RemoteBlob(self._endpoint, descriptor)

    def open_file(self, descriptor: Descriptor, *, limit: int = LIMIT) -> RemoteFile:
        """Return the blob as a seekable file, read by ranges; not verified, `limit` bytes at most.

        Whether it exists shows when it is read.
        """
        return RemoteFile(self._endpoint, descriptor, limit=limit)

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Return whether the blob is there, with the right size."""
        return self._transport.retried(self._upload(descriptor).exists)

    def write_blob(self, descriptor: Descriptor, source: BlobSource, watch: Watch) -> Outcome:
        """Have the blob, sending it from `source` if it is not there.

        Raises `DigestMismatchError`, `SizeMismatchError` or what the source raises if its bytes are
        others, and `InterruptedTransferError`; none of them leaves an upload behind.
        """
        with self._lock:
            session = self._sessions.pop(descriptor.digest, "")
        return Upload(self._endpoint, descriptor, watch).send(source, session)

    def mount_blob(self, descriptor: Descriptor, source: Source) -> bool:
        """Link the blob from another repository of this registry; return whether that worked."""
        if (
            not isinstance(source, Repository)
            or source._transport.origin != self._transport.origin
            or source.name == self.name
        ):
            return False
        try:
            session = self._upload(descriptor).mount(source._endpoint)
        except RemoteUnavailableError:
            raise
        except RegistryError:
            return False  # a plain upload says what is wrong, if it is not just the mount
        if session is None:
            return True
        with self._lock:
            self._sessions[descriptor.digest] = session
        return False

    def write_manifest(self, descriptor: Descriptor, raw: bytes, name: str | None = None) -> None:
        """Write a manifest whose blobs are all there and, with `name`, tag it.

        One with a subject is listed with it: by the registry or, where that has no referrers API,
        under the fallback tag.
        """
        noted = manifests.write(self._endpoint, descriptor, raw, name)
        document = parse_manifest_or_index(raw, str(descriptor.digest))
        if document.subject is not None and not noted:
            listed = referrer_descriptor(descriptor, document)
            referrers.add(self._endpoint, document.subject.digest, listed)

    def referrers(self, subject: Digest, artifact_type: str | None = None) -> list[Descriptor]:
        """Return the manifests whose subject is this one, those of `artifact_type` if given."""
        return referrers.listed(self._endpoint, subject, artifact_type)

    def delete_referrer(self, digest: Digest) -> None:
        """Delete a manifest that has a subject, and take it off the subject's fallback tag.

        Where the registry deletes nothing, it is taken off the list if that is ours to keep.
        Raises `NotFoundError`, and `UnsupportedError` if the manifest has no subject.
        """
        descriptor, raw = self.fetch_manifest_by_name(str(digest))
        what = self._endpoint.manifest_label(str(digest))
        subject = parse_manifest_or_index(raw, what, media_type=descriptor.media_type).subject
        if subject is None:
            raise UnsupportedError("has no subject, so it is attached to nothing", path=what)
        listed = referrers.remove(self._endpoint, subject.digest, digest)
        try:
            self.delete_manifest(str(digest))
        except RegistryError as error:
            if not listed or error.status_code not in (400, 405, 501):
                raise

    def tags(self) -> Iterator[str]:
        """Yield the tags as the registry orders them; pages are fetched as they are needed."""
        return manifests.tags(self._endpoint)

    def delete_manifest(self, name: str) -> None:
        """Delete a tag, or with a digest the manifest and all its tags."""
        manifests.delete(self._endpoint, name)

    def delete_blob(self, digest: Digest) -> None:
        """Delete a blob."""
        what = f"blob {digest} of {self._endpoint.label}"
        url = self._endpoint.blob_url(digest)
        self._endpoint.request(url, "DELETE", what, self._endpoint.delete, {})

    def _upload(self, descriptor: Descriptor) -> Upload:
        return Upload(self._endpoint, descriptor, Watch(silent, self._transport.stop))
