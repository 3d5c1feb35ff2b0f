"""A pull-through cache: a registry that fetches what it lacks from an upstream, and keeps it.

Content is verified before it is kept, fetched once for any number of clients, and served from the
store while the upstream cannot be reached. A tag is resolved again (by HEAD) after `ttl` seconds.
The registry uses its own credentials for the upstream: clients do not see them, and their own
credentials are not passed on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import check_document_size
from modelpack.artifacts.manifest import Index, Manifest, parse_manifest_or_index
from modelpack.errors import ModelpackError, NotFoundError, RemoteUnavailableError, UnsupportedError
from modelpack.progress import Stop, silent
from modelpack.registry.urls import api_host
from modelpack.registry_server.blob_fetch import Fetch, Fetches, failed
from modelpack.registry_server.content import Content, Repository, with_manifest, with_tag
from modelpack.registry_server.errors import ApiError, Code
from modelpack.storage import Watch
from modelpack.store.filesystem import check_room
from modelpack.store.index import IndexDocument
from modelpack.store.layout import LayoutStore

if TYPE_CHECKING:
    from modelpack.registry import Registry
    from modelpack.registry import Repository as OriginRepository

T = TypeVar("T")
_log = logging.getLogger(__name__)
# Seconds after a failed request in which stored content is served without asking the upstream.
_REST: Final = 5.0
_MOST_TAGS: Final = 100_000
_DEEPEST: Final = 4
#: Requests that may wait for the upstream at a time, each in a thread of its own.
_MOST_WAITING: Final = 40


@dataclass(frozen=True, slots=True)
class Upstream:
    """The registry to fetch from; tags are resolved again after `ttl` seconds.

    `stop` ends the running downloads; their bytes are kept, and the next download resumes.
    """

    origin: Registry
    ttl: float = 60.0
    stop: Stop = field(default_factory=Stop)

    def namespace(self, request: Request) -> str | None:
        """Return the registry that the request names by `ns`, None if it names none.

        Source: distribution-spec, "Registry Proxying". Raises `ApiError` (404) for a registry other
        than the upstream, whose content must not be served under the name of that one.
        """
        named = [ns for ns in request.query_params.getlist("ns") if ns]
        for ns in named:
            if _canonical_host(ns) != _canonical_host(self.origin.host):
                message = f"this cache does not serve the registry {ns[:200]!r}"
                raise ApiError(404, Code.NAME_UNKNOWN, message)
        return named[0] if named else None


def _canonical_host(registry: str) -> str:
    host = api_host(registry.lower())
    name, _, port = host.rpartition(":")
    return name if port == "443" and (":" not in name or name.endswith("]")) else host


class CachedContent(Content):
    """The content of a store and, for what it lacks, of an upstream.

    Calls that may wait for the upstream have their own threads, so that stored content is always
    served.
    """

    def __init__(self, store: LayoutStore, upstream: Upstream, *, keep_free: int = 0) -> None:
        """Fetched content leaves `keep_free` bytes free on the disk."""
        super().__init__(store, sparse=True)
        self._keep_free = keep_free
        self._upstream = upstream
        self._fetches = Fetches(store, upstream.stop)
        self._checked: dict[tuple[Repository, str], float] = {}
        self._locks = [threading.Lock() for _ in range(64)]
        self._resting_until = 0.0
        self._waiting: CapacityLimiter | None = None

    async def manifest(
        self, repository: Repository, target: Digest | str
    ) -> tuple[Descriptor, bytes] | None:
        """Return a manifest, from the store if it is there and fresh."""
        if self._is_fresh(repository, target):
            held = await run_in_threadpool(self.stored_manifest, repository, target)
            if held is not None:
                return held
        return await self._in_waiting(self._fresh_manifest, repository, target)

    async def tags(self, repository: Repository) -> list[str] | None:
        """Return the upstream's tags; the stored ones if it cannot be reached."""
        return await self._in_waiting(self._upstream_tags, repository)

    async def referrers(self, repository: Repository, subject: Digest) -> list[Descriptor]:
        """Return the upstream's referrers; the stored ones if it cannot be reached."""
        return await self._in_waiting(self._upstream_referrers, repository, subject)

    async def _in_waiting(self, call: Callable[..., T], *args: object) -> T:
        """Return what `call` returns, run in a thread that may wait for the upstream."""
        if self._waiting is None:
            self._waiting = CapacityLimiter(_MOST_WAITING)
        return await anyio.to_thread.run_sync(call, *args, limiter=self._waiting)

    def _fresh_manifest(
        self, repository: Repository, target: Digest | str
    ) -> tuple[Descriptor, bytes] | None:
        with self._locks[hash((repository, target)) % len(self._locks)]:
            held = self.stored_manifest(repository, target)
            if held is not None and self._is_fresh(repository, target):
                return held
            try:
                found = self._fetched(repository, target, held)
            except NotFoundError:
                return None
            except RemoteUnavailableError as error:
                self._resting_until = time.monotonic() + _REST
                if held is None:
                    raise failed(error) from error
                _log.warning(
                    "the upstream cannot be reached: serving %s from the store", repository
                )
                return held
            except ModelpackError as error:
                raise failed(error) from error
            if isinstance(target, str):
                if len(self._checked) >= _MOST_TAGS:
                    self._checked.clear()
                self._checked[repository, target] = time.monotonic()
            return found

    async def fetch(
        self, repository: Repository, descriptor: Descriptor, request: Request
    ) -> Fetch:
        """Return the download of a `needed` blob, shared by all clients, once it has bytes to send.

        Raises as `Fetches.begin`.
        """

        def joined() -> Fetch:
            self._check_room(descriptor)
            return self._fetches.of(descriptor, lambda: self._origin(repository).blob(descriptor))

        fetch = await run_in_threadpool(joined)
        await self._fetches.begin(fetch, request)
        return fetch

    def _check_room(self, descriptor: Descriptor) -> None:
        missing = descriptor.size
        with suppress(FileNotFoundError):  # bytes of an earlier download are on the disk
            missing -= self._store.partial_path(descriptor.digest).stat().st_blocks * 512
        what = f"blob {descriptor.digest.short}"
        check_room(self._store.root, max(missing, 0) + self._keep_free, what)

    def _upstream_tags(self, repository: Repository) -> list[str] | None:
        try:
            return sorted(self._origin(repository).tags())
        except RemoteUnavailableError:
            return self.stored_tags(repository)
        except NotFoundError:
            return None
        except ModelpackError as error:
            raise failed(error) from error

    def _upstream_referrers(self, repository: Repository, subject: Digest) -> list[Descriptor]:
        try:
            return self._origin(repository).referrers(subject)
        except RemoteUnavailableError:
            return self.stored_referrers(repository, subject)
        except ModelpackError as error:
            raise failed(error) from error

    def _is_fresh(self, repository: Repository, target: Digest | str) -> bool:
        if isinstance(target, Digest):
            return True
        now = time.monotonic()
        checked = self._checked.get((repository, target))
        fresh = checked is not None and now - checked < self._upstream.ttl
        return fresh or now < self._resting_until

    def _origin(self, repository: Repository) -> OriginRepository:
        if repository.name is None:
            raise NotFoundError(f"no URL can name {repository}")
        return self._upstream.origin.repository(repository.name)

    def _fetched(
        self, repository: Repository, target: Digest | str, held: tuple[Descriptor, bytes] | None
    ) -> tuple[Descriptor, bytes]:
        """Fetch, keep and return the upstream's manifest, or `held` if that is current."""
        origin = self._origin(repository)
        if held is not None and origin.resolve(str(target)).digest == held[0].digest:
            return held
        descriptor, raw = origin.fetch_manifest_by_name(str(target))
        with self._store.lease([descriptor.digest]):
            self._keep(origin, descriptor, raw, 0, set())

            def change(document: IndexDocument) -> IndexDocument:
                if isinstance(target, str):
                    document = with_tag(document, repository.tagged(target), descriptor)
                return with_manifest(document, repository, descriptor)

            self._store.change_index(change)
        return descriptor, raw

    def _keep(
        self,
        origin: OriginRepository,
        descriptor: Descriptor,
        raw: bytes,
        deep: int,
        kept: set[Digest],
    ) -> None:
        """Store a manifest with its config or, for an index, with its manifests.

        An index may list a manifest any number of times; those in `kept` are stored already.
        """
        if deep > _DEEPEST:
            raise UnsupportedError(
                f"nests indexes more than {_DEEPEST} deep", path=str(descriptor.digest)
            )
        what = f"manifest {descriptor.digest}"
        document = parse_manifest_or_index(raw, what, media_type=descriptor.media_type)
        vital = document.manifests if isinstance(document, Index) else (document.config,)
        watch = Watch(silent, self._upstream.stop)
        for child in vital:
            if child.digest in kept and self._store.has_blob(child):
                continue
            kept.add(child.digest)
            if (
                isinstance(document, Index)
                and child.media_type in media_types.MANIFEST_AND_INDEX_TYPES
            ):
                self._keep(origin, child, origin.fetch_manifest(child), deep + 1, kept)
                continue
            check_document_size(child.size, f"{what}: config")
            self._check_room(child)
            self._store.write_blob(child, origin.blob(child), watch)
        self._store.write_manifest(descriptor, raw, partial=True)

    def needed(self, repository: Repository, digest: Digest) -> Descriptor | None:
        """Return the descriptor of a blob in a stored manifest of the repository, or None."""
        members = self.repositories().find(repository)
        if members is None:
            return None
        seen: set[Digest] = set()
        for descriptor in (*members.manifests.values(), *self._children(members)):
            manifest = self._parsed(descriptor, seen)
            if isinstance(manifest, Manifest):
                for blob in manifest.blobs:
                    if blob.digest == digest:
                        return blob
        return None
