"""What the registry serves: the store, seen as repositories."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool

from modelpack import mediatypes
from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.errors import (
    ConflictError,
    FormatError,
    IntegrityError,
    LockedError,
    NotFoundError,
)
from modelpack.manifest import (
    Index,
    Manifest,
    parse_manifest_or_index,
    referrer_descriptor,
)
from modelpack.server.errors import ApiError, Code
from modelpack.server.names import Repository
from modelpack.server.repositories import (
    Members,
    Repositories,
    with_manifest,
    with_tag,
    without_manifest,
    without_tag,
)
from modelpack.stores.index import IndexDocument
from modelpack.stores.layout import LayoutStore
from modelpack.stores.os_errors import translating
from modelpack.stores.tree import Tree

if TYPE_CHECKING:
    from starlette.requests import Request

    from modelpack.server.following import Fetch

_SERVED = frozenset({*mediatypes.MANIFEST_TYPES, *mediatypes.INDEX_TYPES})
_BROKEN = (NotFoundError, IntegrityError, FormatError)


class Content:
    """A store as the endpoints use it; every method that is not async blocks."""

    def __init__(self, store: LayoutStore, *, sparse: bool) -> None:
        self._store = store
        self._sparse = sparse
        self._seen = Repositories(IndexDocument({}, ()))

    @property
    def uploads_directory(self) -> Path:
        """Where upload sessions live: on the file system of the blobs."""
        return Tree(self._store.root).uploads

    def open_blob(self, digest: Digest) -> int | None:
        """Return an open file, None if there is no such blob; it stays readable if deleted."""
        try:
            path = self._store.blob_path(digest)
            with translating("read", path):
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except NotFoundError:
            return None

    def touch_blob(self, digest: Digest) -> bool:
        """Return whether the blob is there; a client that is told so will not upload it."""
        return self._store.touch_blob(digest)

    def publish_blob(self, staged: Path, digest: Digest) -> None:
        """Make a verified file a blob."""
        self._store.take_file(staged, digest)

    def delete_blob(self, digest: Digest) -> bool:
        """Delete a blob; return whether it was there.

        All repositories share the blobs. One that a manifest needs is refused, in whatever
        repository that is: deleting it would break a model that this client may know nothing of.
        """
        try:
            return self._store.delete_blob(digest)
        except LockedError:
            raise
        except ConflictError as error:
            raise ApiError(405, Code.DENIED, str(error), headers={"Allow": "GET, HEAD"}) from None

    def repositories(self) -> Repositories:
        """Return all repositories as they are now."""
        document = self._store.index()
        if self._seen.document is not document:
            self._seen = Repositories(document)
        return self._seen

    async def manifest(
        self, repository: Repository, target: Digest | str
    ) -> tuple[Descriptor, bytes] | None:
        """Return the manifest that a tag or a digest names, and its bytes; None if there is none.

        By digest, what an index of the repository lists is found too, pushed here or not, as long
        as it is a manifest: an index may call any blob whatever it likes.
        """
        return await run_in_threadpool(self.stored_manifest, repository, target)

    async def tags(self, repository: Repository) -> list[str] | None:
        """Return the tags of a repository in ASCII order, None if there is no such repository."""
        return await run_in_threadpool(self.stored_tags, repository)

    async def referrers(self, repository: Repository, subject: Digest) -> list[Descriptor]:
        """Return descriptors of the repository's manifests about `subject`, in a fixed order."""
        return await run_in_threadpool(self.stored_referrers, repository, subject)

    def stored_manifest(
        self, repository: Repository, target: Digest | str
    ) -> tuple[Descriptor, bytes] | None:
        """Return what `manifest` does, of what is stored here."""
        members = self.repositories().find(repository)
        if members is None:
            return None
        if isinstance(target, str):
            descriptor = members.tags.get(target)
        else:
            descriptor = members.manifests.get(target) or next(
                (child for child in self._children(members) if child.digest == target), None
            )
        if descriptor is None or descriptor.media_type not in _SERVED:
            return None
        try:
            return descriptor, self._store.fetch_manifest(descriptor)
        except NotFoundError:
            return None

    def put_manifest(
        self,
        repository: Repository,
        descriptor: Descriptor,
        raw: bytes,
        tags: Sequence[str],
        needed: Sequence[Descriptor],
    ) -> tuple[Descriptor, ...]:
        """Store a manifest under its digest and `tags`, unless something that it needs is missing.

        Returns what is missing.
        """
        references = [repository.tagged(tag) for tag in tags]

        def change(document: IndexDocument) -> IndexDocument:
            for reference in references:
                document = with_tag(document, reference, descriptor)
            return with_manifest(document, repository, descriptor)

        digests = [descriptor.digest, *(blob.digest for blob in needed)]
        with self._store.lease(digests):
            missing = tuple(blob for blob in needed if not self._store.has_blob(blob))
            if missing and not self._sparse:
                return missing
            with self._staged(raw) as path:
                self._store.take_file(path, descriptor.digest)
            self._store.change_index(change)
        return ()

    def delete_manifest(self, repository: Repository, target: Digest | str) -> bool:
        """Delete a tag, or a manifest with all tags of it; return whether it was there."""
        found = True

        def change(document: IndexDocument) -> IndexDocument:
            nonlocal found
            members = Repositories(document).find(repository) or Members()
            if isinstance(target, str):
                found = target in members.tags
                return without_tag(document, repository.tagged(target)) if found else document
            found = target in members.manifests
            if any(child.digest == target for child in self._children(members)):
                raise ApiError(
                    405,
                    Code.DENIED,
                    f"{target} is part of an index in {repository}: delete that first",
                    headers={"Allow": "GET, HEAD, PUT"},
                )
            return without_manifest(document, repository, target) if found else document

        self._store.change_index(change)
        if found and isinstance(target, Digest):
            # Otherwise what this manifest says about another one would keep it from collection.
            with suppress(ConflictError):  # another repository has it
                self._store.delete_blob(target)
        return found

    def stored_tags(self, repository: Repository) -> list[str] | None:
        """Return what `tags` does, of what is stored here."""
        members = self.repositories().find(repository)
        return None if members is None else sorted(members.tags)

    def needed(self, repository: Repository, digest: Digest) -> Descriptor | None:
        """Return the descriptor of a blob that is not here and can be fetched; None if none can."""
        del repository, digest
        return None

    def fetch(self, repository: Repository, descriptor: Descriptor) -> Fetch:
        """Return the download of a blob that is `needed`, which the caller has to `begin`."""
        raise NotImplementedError

    async def begin(self, fetch: Fetch, request: Request) -> None:
        """Return once a download has something to send; see `Fetches.begin`."""
        raise NotImplementedError

    def stored_referrers(self, repository: Repository, subject: Digest) -> list[Descriptor]:
        """Return what `referrers` does, of what is stored here.

        What only an index lists counts: so do the lists that clients keep under a fallback tag.
        """
        members = self.repositories().find(repository)
        if members is None:
            return []
        found = {}
        seen: set[Digest] = set()
        for descriptor in (*members.manifests.values(), *self._children(members)):
            manifest = self._parsed(descriptor, seen)
            if manifest and manifest.subject and manifest.subject.digest == subject:
                found[descriptor.digest] = referrer_descriptor(descriptor, manifest)
        return sorted(found.values(), key=lambda one: str(one.digest))

    def _children(self, members: Members) -> Iterator[Descriptor]:
        """Return what the repository's indexes list, indexes in indexes included."""
        seen: set[Digest] = set()
        waiting = list(members.manifests.values())
        while waiting:
            descriptor = waiting.pop()
            if descriptor.media_type not in mediatypes.INDEX_TYPES:
                continue
            index = self._parsed(descriptor, seen)
            if isinstance(index, Index):
                yield from index.manifests
                waiting.extend(index.manifests)

    def _parsed(self, descriptor: Descriptor, seen: set[Digest]) -> Manifest | Index | None:
        """Return the manifest, None for what is damaged, of another size, or in `seen` already.

        An index may list a manifest any number of times, and give it any size.
        """
        if descriptor.digest in seen or not self._store.has_blob(descriptor):
            return None
        seen.add(descriptor.digest)
        try:
            raw = self._store.fetch_manifest(descriptor)
            return parse_manifest_or_index(raw, str(descriptor.digest))
        except _BROKEN:
            return None

    @contextmanager
    def _staged(self, raw: bytes) -> Iterator[Path]:
        self.uploads_directory.mkdir(parents=True, exist_ok=True)
        path = self.uploads_directory / f"manifest-{uuid.uuid4().hex}"
        try:
            with translating("write", path):
                path.write_bytes(raw)
            yield path
        finally:
            path.unlink(missing_ok=True)
