"""Registry and Repository: manifests, tags and blobs of a registry, also read through mirrors.

These are the classes that the operations use; `manifests`, `referrers`, `blob_download` and
`blob_upload` make the requests of one `Endpoint`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Final, TypeVar

from modelpack.artifacts.byte_ranges import ByteRanges
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import parse_manifest_or_index, referrer_descriptor
from modelpack.errors import (
    AuthError,
    IntegrityError,
    InvalidReferenceError,
    NotFoundError,
    RegistryError,
    RemoteUnavailableError,
    UnsupportedError,
)
from modelpack.progress import Action, Progress, ProgressCallback, Stop, serialized, silent
from modelpack.registry import manifests, referrers
from modelpack.registry.auth import RegistryAuthenticator, Scopes, TokenRequest
from modelpack.registry.blob_download import LIMIT, RemoteBlob, RemoteFile
from modelpack.registry.blob_upload import Upload
from modelpack.registry.credentials import CredentialSource, default_credentials
from modelpack.registry.endpoint import Endpoint
from modelpack.registry.http_client import HttpClient
from modelpack.registry.limits import BlobOptions, RetryPolicy, Timeouts
from modelpack.registry.mirrors import Mirror
from modelpack.registry.tls import TlsOptions
from modelpack.registry.urls import api_host, origin_of, uses_plain_http
from modelpack.storage import (
    BlobReader,
    BlobSource,
    Outcome,
    PlacedTarget,
    SegmentedSource,
    SegmentSink,
    SegmentsRefused,
    Source,
    Watch,
)

_PAGE: Final = 1000
_CATALOG: Final[Scopes] = frozenset({("registry:catalog", "*")})


class Repository:
    """Manifests, tags and blobs under one name; fulfils `Source` and `Target`.

    Names are tags or digests. Any request may raise `AuthError`, `DeniedError`, `RegistryError`
    and, after retries, `RemoteUnavailableError`; what does not exist is a `NotFoundError`.
    """

    def __init__(self, registry: Registry, endpoint: Endpoint) -> None:
        self.registry = registry
        self.name = endpoint.name
        #: The registry and the name, as a store records where a blob is.
        self.place = endpoint.label
        self._endpoint = endpoint
        self._client = endpoint.client
        self._lock = threading.Lock()
        self._sessions: dict[Digest, str] = {}  # URLs of sessions that failed mounts opened
        self._no_mounts: set[str] = set()  # repositories that the registry refused to mount from

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
        """Return the blob as a source; opening it raises `NotFoundError` if it is missing."""
        return RemoteBlob(self._endpoint.blob(descriptor), descriptor)

    def open_file(self, descriptor: Descriptor, *, limit: int = LIMIT) -> RemoteFile:
        """Return the blob as a seekable file, read by ranges; not verified, `limit` bytes at most.

        Reading it raises `NotFoundError` if it is missing.
        """
        return RemoteFile(self._endpoint.blob(descriptor), descriptor, limit=limit)

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Return whether the repository has the blob, with the right size."""
        return self._client.retried(self._upload(descriptor).exists)

    def write_blob(self, descriptor: Descriptor, source: BlobSource, watch: Watch) -> Outcome:
        """Upload the blob from `source` unless the repository has it.

        Raises `DigestMismatchError` or `SizeMismatchError` if the source has other bytes, what the
        source raises, and `InterruptedTransferError`; each of them cancels the upload.
        """
        with self._lock:
            session = self._sessions.pop(descriptor.digest, "")
        return Upload(self._endpoint, descriptor, watch).send(source, session)

    def mount_blob(self, descriptor: Descriptor, source: Source) -> bool:
        """Link the blob from another repository of this registry; return whether that worked.

        The other repository is `source`, or one that the store `source` has recorded.
        """
        upload = self._upload(descriptor)
        mounted = False
        if isinstance(source, PlacedTarget):
            if source.has_blob(descriptor):  # link nothing that the user could not upload
                mounted = self._mount_recorded(upload, source.places(descriptor.digest))
        elif isinstance(source, Repository) and source._client.origin == self._client.origin:
            try:
                mounted = source.name != self.name and self._mount(upload, source._endpoint)
            except RemoteUnavailableError:
                raise
            except RegistryError:
                return False  # the upload fails with the reason if more than the mount is refused
        if upload.session:
            with self._lock:
                self._sessions[descriptor.digest] = upload.session
        return mounted

    def _mount_recorded(self, upload: Upload, places: Iterable[str]) -> bool:
        """Try the places in this registry; failures do not matter, since an upload follows."""
        host = self.registry.host
        for registry, _, name in (place.partition("/") for place in places):
            if registry != host or name == self.name or name in self._no_mounts:
                continue
            try:
                if self._mount(upload, Endpoint(self._client, host, name)):
                    return True
            except (RegistryError, InvalidReferenceError):
                self._no_mounts.add(name)
        return False

    def _mount(self, upload: Upload, other: Endpoint) -> bool:
        return self._client.retried(lambda: upload.mount(other))

    def write_manifest(self, descriptor: Descriptor, raw: bytes, name: str | None = None) -> None:
        """Write a manifest whose blobs the registry has and, with `name`, tag it.

        A manifest with a subject is listed as its referrer: by the registry or, if that has no
        referrers API, under the fallback tag.
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
        """Delete a manifest that has a subject, and remove it from the subject's fallback tag.

        If the registry deletes no manifests, removing it from the fallback tag suffices. Raises
        `NotFoundError`, and `UnsupportedError` if the manifest has no subject.
        """
        descriptor, raw = self.fetch_manifest_by_name(str(digest))
        what = self._endpoint.manifest_label(str(digest))
        subject = parse_manifest_or_index(raw, what, media_type=descriptor.media_type).subject
        if subject is None:
            raise UnsupportedError("has no subject, so it is not a referrer", path=what)
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
        self._client.request(url, "DELETE", what=what, scopes=self._endpoint.delete)

    def _upload(self, descriptor: Descriptor) -> Upload:
        return Upload(self._endpoint, descriptor, Watch(silent, self._client.stop))


DEFAULT_TIMEOUTS: Final = Timeouts()
DEFAULT_RETRY: Final = RetryPolicy()
DEFAULT_TLS: Final = TlsOptions()
DEFAULT_BLOBS: Final = BlobOptions()


class Registry:
    """A registry, by `host[:port]`; docker.io stands for Docker Hub. Threads may share it.

    `credentials` defaults to `default_credentials`; it is read only if the registry asks for
    credentials. `stop` ends running calls within two seconds, with `InterruptedTransferError`.
    `report` gets a report of each retry.
    """

    def __init__(
        self,
        host: str,
        *,
        plain_http: bool | None = None,
        credentials: CredentialSource | None = None,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
        retry: RetryPolicy = DEFAULT_RETRY,
        stop: Stop | None = None,
        report: ProgressCallback = silent,
        tls: TlsOptions = DEFAULT_TLS,
        blobs: BlobOptions = DEFAULT_BLOBS,
    ) -> None:
        self.host = host
        address = api_host(host)
        scheme = "http" if uses_plain_http(address, plain_http) else "https"
        self._url = f"{scheme}://{address}"
        report = serialized(report)

        def authenticator(request_token: TokenRequest) -> RegistryAuthenticator:
            return RegistryAuthenticator(
                host,
                credentials or default_credentials(),
                request_token,
                plain_http=scheme == "http",
                insecure=tls.insecure,
                report=report,
            )

        self._client = HttpClient(
            origin_of(self._url),
            authenticator,
            timeouts=timeouts,
            retry=retry,
            stop=stop or Stop(),
            report=report,
            tls=tls,
            blobs=blobs,
        )

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Registry({self.host!r})"

    def repository(self, name: str) -> Repository:
        """Return the repository `name`, which need not exist; raise `InvalidReferenceError`."""
        return Repository(self, Endpoint(self._client, self.host, name))

    def mirrored_repository(
        self, name: str, mirrors: Sequence[tuple[Mirror, Repository]]
    ) -> Repository:
        """Return the repository `name`, read from `mirrors` first; the caller closes those."""
        return MirroredRepository(self, Endpoint(self._client, self.host, name), mirrors)

    def repositories(self) -> Iterator[str]:
        """Yield the names of all repositories, by Docker's extension `/v2/_catalog`.

        Raises `RegistryError` if the registry does not list them, `AuthError` if it lists them to
        other accounts only.
        """
        url = f"{self._url}/v2/_catalog?n={_PAGE}"
        what = f"repositories of {self.host}"
        try:
            yield from manifests.names(self._client, url, "repositories", what, _CATALOG)
        except AuthError as error:
            # Docker Hub lists them to nobody.
            hint = f"{error.hint}; or name the repositories" if error.hint else None
            raise type(error)(
                f"{what}: {error.message}",
                host=error.host,
                status_code=error.status_code,
                code=error.code,
                hint=hint or "name the repositories",
            ) from None
        except RegistryError as error:
            if not isinstance(error, NotFoundError) and error.status_code not in (400, 405, 501):
                raise
            raise RegistryError(
                f"{self.host} does not list its repositories",
                host=self.host,
                status_code=error.status_code,
                hint="name the repositories",
            ) from None

    def ping(self) -> None:
        """Raise unless the host is a registry that accepts the credentials ("Probe")."""
        try:
            self._client.request(f"{self._url}/v2/", what="ping")
        except NotFoundError as error:
            raise RegistryError(
                f"{self.host} is not an OCI registry: it has no /v2/",
                host=self.host,
                status_code=error.status_code,
            ) from None

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


T = TypeVar("T")
#: Errors after which the next place is tried; any other, such as a stop, ends the call.
_TROUBLE = (RegistryError, IntegrityError)


class MirroredRepository(Repository):
    """A repository that is read from its mirrors in order, then from the registry itself.

    A mirror that did not respond is not used again. Bytes of a mirror are verified as all others.
    """

    def __init__(
        self, registry: Registry, endpoint: Endpoint, mirrors: Sequence[tuple[Mirror, Repository]]
    ) -> None:
        super().__init__(registry, endpoint)
        self._own = Repository(registry, endpoint)
        self._mirrors = list(mirrors)
        self._mirrors_lock = threading.Lock()
        self._read_from: dict[Digest, int] = {}

    def resolve(self, name: str) -> Descriptor:
        """Return the descriptor of the manifest `name`."""
        return self._first(name, lambda place: place.resolve(name))

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """Return a manifest's bytes, checked against size, digest and media type."""
        return self._first(str(descriptor.digest), lambda place: place.fetch_manifest(descriptor))

    def fetch_manifest_by_name(self, name: str) -> tuple[Descriptor, bytes]:
        """Return the manifest `name` with its descriptor, by one request."""
        return self._first(name, lambda place: place.fetch_manifest_by_name(name))

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """Return the blob as a source; opening it raises `NotFoundError` if it is missing."""
        places = [r.blob(descriptor) for m, r in self._usable() if m.serves(str(descriptor.digest))]
        return _MirroredBlob(self, descriptor, [*places, self._own.blob(descriptor)])

    def open_file(self, descriptor: Descriptor, *, limit: int = LIMIT) -> RemoteFile:
        """Return the blob as a file, from the first place that gives its first byte."""

        def opened(place: Repository) -> RemoteFile:
            file = place.open_file(descriptor, limit=limit)
            if place is self._own:
                return file
            try:
                file.read(1)
                file.seek(0)
            except BaseException:
                file.close()
                raise
            return file

        return self._first(str(descriptor.digest), opened)

    def next_place(self, digest: Digest, count: int) -> int:
        """Return the index of the place (of `count`) to read a blob from, the next at each restart.

        A blob whose bytes were wrong is read again from its start, and so from another place.
        """
        with self._mirrors_lock:
            place = min(self._read_from.get(digest, 0), count - 1)
            self._read_from[digest] = place + 1
            return place

    def current_place(self, digest: Digest) -> int:
        """Return the index of the place that the blob was last started from."""
        with self._mirrors_lock:
            return max(self._read_from.get(digest, 0) - 1, 0)

    def note(self, error: Exception) -> None:
        """Report that a mirror failed."""
        self._client.report(Progress(Action.NOTE, message=f"{error}; trying the next source"))

    def _usable(self) -> list[tuple[Mirror, Repository]]:
        with self._mirrors_lock:
            return list(self._mirrors)

    def _first(self, name: str, read: Callable[[Repository], T]) -> T:
        for mirror, place in self._usable():
            if not mirror.serves(name):
                continue
            try:
                return read(place)
            except _TROUBLE as error:
                self.note(error)
                if isinstance(error, RemoteUnavailableError):
                    with self._mirrors_lock:
                        self._mirrors = [kept for kept in self._mirrors if kept[1] is not place]
        return read(self._own)


class _MirroredBlob:
    """A blob in several places; fulfils `BlobSource` and `SegmentedSource`."""

    def __init__(
        self, repository: MirroredRepository, descriptor: Descriptor, places: Sequence[BlobSource]
    ) -> None:
        self._repository = repository
        self._descriptor = descriptor
        self._places = places

    def open(self, offset: int = 0) -> _MirroredStream:
        """Return the blob's bytes from `offset` on, from the first place that has them."""
        first = 0
        if offset == 0:
            first = self._repository.next_place(self._descriptor.digest, len(self._places))
        return _MirroredStream(self._repository, self._places[first:], offset)

    @property
    def connections(self) -> int:
        """The number of connections for segments at the current place."""
        place = self._places[self._current()]
        return place.connections if isinstance(place, SegmentedSource) else 1

    def fetch_segments(
        self, segments: Sequence[tuple[int, int]], sink: SegmentSink, stop: Stop
    ) -> None:
        """Write the bytes of `segments` to `sink`; get missing ones from the next place."""
        noted = _NotedSink(sink)
        places = self._places[self._current() :]
        for number, place in enumerate(places):
            left = [gap for start, end in segments for gap in noted.written.missing(start, end)]
            try:
                if not isinstance(place, SegmentedSource):
                    raise SegmentsRefused("the source has no segments")
                place.fetch_segments(left, noted, stop)
            except _TROUBLE as error:
                if number == len(places) - 1:
                    raise
                self._repository.note(error)
            else:
                return

    def _current(self) -> int:
        return min(self._repository.current_place(self._descriptor.digest), len(self._places) - 1)


class _NotedSink:
    """Passes bytes on to another sink, and records which ones."""

    def __init__(self, sink: SegmentSink) -> None:
        self._sink = sink
        self._lock = threading.Lock()
        self.written = ByteRanges()

    def write(self, offset: int, view: memoryview) -> None:
        self._sink.write(offset, view)
        with self._lock:
            self.written.add(offset, offset + len(view))


class _MirroredStream:
    """The bytes of a blob; if a mirror fails, they continue from the next place."""

    def __init__(
        self, repository: MirroredRepository, places: Sequence[BlobSource], offset: int
    ) -> None:
        self._repository = repository
        self._places = list(places)
        self._position = offset
        self._stack = ExitStack()
        self._reader = self._open()

    def __enter__(self) -> _MirroredStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill `buffer` from its start with what has arrived; 0 means the end."""
        while True:
            try:
                count = self._reader.readinto(buffer)
            except _TROUBLE as error:
                if not self._places:
                    raise
                self._repository.note(error)
                self._stack.close()
                self._reader = self._open()
            else:
                self._position += count
                return count

    def _open(self) -> BlobReader:
        while True:
            place = self._places.pop(0)
            try:
                opened: AbstractContextManager[BlobReader] = place.open(self._position)
                return self._stack.enter_context(opened)
            except _TROUBLE as error:
                if not self._places:
                    raise
                self._repository.note(error)
