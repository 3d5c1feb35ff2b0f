"""The repositories of the embedded registry, with their manifests and tags, in `index.json`.

A tag is an entry whose name is a full reference. A manifest without a tag, pushed by digest or
left by a tag that moved, has an entry with the annotation `org.modelpack.repository` and stays
pullable by digest. An entry with both a name and the annotation is in both repositories.

The name in a URL is read like a reference that a user types: `ai/smol` and `smol` are
docker.io/ai/smol, and `ghcr.io/org/x` is that repository, not one below docker.io. So `modelpack`
resolves what is pushed here in the same store. Each repository has one canonical name; the aliases
(`smol`, `docker.io/ai/smol`) are accepted too. A repository of the store has no name here if its
registry has a port or upper-case letters, which a URL cannot spell.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from starlette.concurrency import run_in_threadpool

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import (
    Index,
    Manifest,
    parse_manifest_or_index,
    referrer_descriptor,
)
from modelpack.artifacts.reference import (
    DEFAULT_ORGANISATION,
    DEFAULT_REGISTRY,
    Reference,
    check_repository,
)
from modelpack.errors import (
    ConflictError,
    FormatError,
    IntegrityError,
    InvalidReferenceError,
    LockedError,
    NotFoundError,
)
from modelpack.registry_server.errors import ApiError, Code
from modelpack.store.filesystem import map_os_errors
from modelpack.store.index import IndexDocument
from modelpack.store.layout import LayoutStore
from modelpack.store.lookup import NAME_KEYS, Entry
from modelpack.store.tree import Tree

# A first component that is a host; the grammar of paths allows no ports and no upper case.
_HOST = re.compile(r"localhost\Z|.*\.")


@dataclass(frozen=True, slots=True, order=True)
class Repository:
    """A repository of the store."""

    registry: str
    path: str

    @classmethod
    def parse(cls, name: str) -> Repository:
        """Return the repository that the `name` in a URL stands for.

        Raises `InvalidReferenceError`. The environment's default registry is not used.
        """
        check_repository(name, name)
        # A bare name of 12 or 64 hex digits would be read as the id of a model.
        text = name if "/" in name else f"{DEFAULT_ORGANISATION}/{name}"
        reference = Reference.parse(text, default_registry=DEFAULT_REGISTRY)
        return cls(reference.registry, reference.repository)

    @classmethod
    def of(cls, reference: Reference) -> Repository:
        """Return the repository of `reference`."""
        return cls(reference.registry, reference.repository)

    @property
    def name(self) -> str | None:
        """The canonical name in URLs, None if a URL cannot spell it."""
        name = f"{self.registry}/{self.path}"
        if self.registry == DEFAULT_REGISTRY and not _HOST.match(self.path.partition("/")[0]):
            name = self.path
        try:
            return name if Repository.parse(name) == self else None
        except InvalidReferenceError:
            return None

    def tagged(self, tag: str) -> Reference:
        """Return the reference of `tag`; raise `InvalidReferenceError` if it is not a tag."""
        return Reference(self.registry, self.path).with_tag(tag)

    def __str__(self) -> str:
        return f"{self.registry}/{self.path}"


#: The annotation with the repository (`registry/path`) that has the manifest also without a tag.
REPOSITORY: Final = "org.modelpack.repository"


@dataclass(slots=True)
class Members:
    """The tags and manifests of one repository."""

    tags: dict[str, Descriptor] = field(default_factory=dict)
    manifests: dict[Digest, Descriptor] = field(default_factory=dict)


class Repositories:
    """The repositories of one state of the index."""

    def __init__(self, document: IndexDocument) -> None:
        self.document = document
        self._members: dict[str, Members] = {}
        for entry in document.entries:
            reference = entry.reference
            if reference is not None and reference.tag is not None:
                members = self._of(str(Repository.of(reference)))
                members.tags.setdefault(reference.tag, entry.manifest)
                members.manifests.setdefault(entry.digest, entry.manifest)
            untagged = entry.descriptor.annotations.get(REPOSITORY)
            if untagged is not None:
                self._of(untagged).manifests.setdefault(entry.digest, entry.manifest)

    def find(self, repository: Repository) -> Members | None:
        """Return the tags and manifests of the repository, None if it has none."""
        return self._members.get(str(repository))

    def names(self) -> list[str]:
        """Return the canonical names of all repositories that a URL can spell, sorted."""
        named = (Repository(*key.split("/", 1)).name for key in self._members if "/" in key)
        return sorted(name for name in named if name is not None)

    def _of(self, key: str) -> Members:
        return self._members.setdefault(key, Members())


def with_manifest(
    document: IndexDocument, repository: Repository, descriptor: Descriptor
) -> IndexDocument:
    """Return a document where the repository has the manifest, by a tag or by its digest."""
    if any(e.digest == descriptor.digest and _has(repository, e) for e in document.entries):
        return document
    mark = {REPOSITORY: str(repository)}
    elements = [item.raw for item in document.items]
    for i, item in enumerate(document.items):
        # An entry without a name and a repository: of another tool, or one whose tag moved.
        if item.entry and item.entry.digest == descriptor.digest and not _is_claimed(item.entry):
            annotations = {**(item.raw.get("annotations") or {}), **mark}
            elements[i] = {**item.raw, "annotations": annotations}
            break
    else:
        elements.append(replace(descriptor, annotations=mark).to_json())
    return document.with_elements(elements)


def with_tag(
    document: IndexDocument, reference: Reference, descriptor: Descriptor
) -> IndexDocument:
    """Return a document where `reference` names the manifest; the last one stays, by digest."""
    before = _named(document, reference)
    document = document.with_tag(descriptor, reference)
    if before is None or before.digest == descriptor.digest:
        return document
    return with_manifest(document, Repository.of(reference), before)


def without_tag(document: IndexDocument, reference: Reference) -> IndexDocument:
    """Return a document without the tag; its manifest stays, by digest."""
    before = _named(document, reference)
    if before is None:
        return document
    document = document.untagged(lambda entry: entry.reference == reference)
    return with_manifest(document, Repository.of(reference), before)


def without_manifest(
    document: IndexDocument, repository: Repository, digest: Digest
) -> IndexDocument:
    """Return a document where the repository has neither the manifest nor a tag of it."""
    kept = []
    for item in document.items:
        raw: Mapping[str, Any] | None = item.raw
        if item.entry and item.entry.digest == digest and _has(repository, item.entry):
            raw = _stripped(item.raw, item.entry, repository)
        if raw is not None:
            kept.append(raw)
    return document.with_elements(kept)


def _named(document: IndexDocument, reference: Reference) -> Descriptor | None:
    found = (entry for entry in document.entries if entry.reference == reference)
    return next((entry.manifest for entry in found), None)


def _has(repository: Repository, entry: Entry) -> bool:
    named = entry.reference is not None and Repository.of(entry.reference) == repository
    return named or entry.descriptor.annotations.get(REPOSITORY) == str(repository)


def _is_claimed(entry: Entry) -> bool:
    return entry.name is not None or REPOSITORY in entry.descriptor.annotations


def _stripped(
    raw: Mapping[str, Any], entry: Entry, repository: Repository
) -> Mapping[str, Any] | None:
    """Return the element without this repository, None if it belongs to no other one."""
    dropped: Sequence[str] = ()
    if entry.reference is not None and Repository.of(entry.reference) == repository:
        dropped = NAME_KEYS
    annotations = {k: v for k, v in (raw.get("annotations") or {}).items() if k not in dropped}
    if annotations.get(REPOSITORY) == str(repository):
        del annotations[REPOSITORY]
    if not any(key in annotations for key in (*NAME_KEYS, REPOSITORY)):
        return None
    return {**raw, "annotations": annotations}


_BROKEN = (NotFoundError, IntegrityError, FormatError)


class Content:
    """A store as the endpoints use it; all methods that are not async block."""

    def __init__(self, store: LayoutStore, *, sparse: bool) -> None:
        self._store = store
        self._sparse = sparse
        self._seen = Repositories(IndexDocument({}, ()))

    @property
    def uploads_directory(self) -> Path:
        """The directory of upload sessions, on the file system of the blobs."""
        return Tree(self._store.root).uploads

    def open_blob(self, digest: Digest) -> int | None:
        """Return an open file, None if there is no such blob; deletion does not end reading."""
        try:
            path = self._store.blob_path(digest)
            with map_os_errors("read", path):
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except NotFoundError:
            return None

    def touch_blob(self, digest: Digest) -> bool:
        """Return whether the blob exists, and restart its grace period: a client may rely on it."""
        return self._store.touch_blob(digest)

    def publish_blob(self, staged: Path, digest: Digest) -> None:
        """Make a verified file a blob."""
        self._store.take_file(staged, digest)

    def delete_blob(self, digest: Digest) -> bool:
        """Delete a blob; return whether it existed.

        All repositories share the blobs. A blob that a manifest in any repository needs is not
        deleted (405), since that would break a model that this client may not know.
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

        A digest may also be that of a manifest that only an index of the repository lists. Other
        blobs are not returned, whatever media type the index gives them.
        """
        return await run_in_threadpool(self.stored_manifest, repository, target)

    async def tags(self, repository: Repository) -> list[str] | None:
        """Return the tags of a repository in ASCII order, None if there is no such repository."""
        return await run_in_threadpool(self.stored_tags, repository)

    async def referrers(self, repository: Repository, subject: Digest) -> list[Descriptor]:
        """Return descriptors of the referrers of `subject` in the repository, in a fixed order."""
        return await run_in_threadpool(self.stored_referrers, repository, subject)

    def stored_manifest(
        self, repository: Repository, target: Digest | str
    ) -> tuple[Descriptor, bytes] | None:
        """Return what `manifest` returns, from the store only."""
        members = self.repositories().find(repository)
        if members is None:
            return None
        if isinstance(target, str):
            descriptor = members.tags.get(target)
        else:
            descriptor = members.manifests.get(target) or next(
                (child for child in self._children(members) if child.digest == target), None
            )
        if descriptor is None or descriptor.media_type not in media_types.MANIFEST_AND_INDEX_TYPES:
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
        """Store a manifest under its digest and `tags`, unless a blob that it needs is missing.

        Returns the missing blobs.
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
        """Delete a tag, or a manifest with all its tags; return whether it existed."""
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
                    f"{target} is part of an index in {repository}: delete the index first",
                    headers={"Allow": "GET, HEAD, PUT"},
                )
            return without_manifest(document, repository, target) if found else document

        self._store.change_index(change)
        if found and isinstance(target, Digest):
            # Otherwise a referrer would stay as long as its subject does.
            with suppress(ConflictError):  # another repository has it
                self._store.delete_blob(target)
        return found

    def stored_tags(self, repository: Repository) -> list[str] | None:
        """Return what `tags` returns, from the store only."""
        members = self.repositories().find(repository)
        return None if members is None else sorted(members.tags)

    def stored_referrers(self, repository: Repository, subject: Digest) -> list[Descriptor]:
        """Return what `referrers` returns, from the store only.

        It includes manifests that only an index lists, as clients keep lists under fallback tags.
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
        """Yield the manifests in the repository's indexes, also in nested ones."""
        seen: set[Digest] = set()
        waiting = list(members.manifests.values())
        while waiting:
            descriptor = waiting.pop()
            if descriptor.media_type not in media_types.INDEX_TYPES:
                continue
            index = self._parsed(descriptor, seen)
            if isinstance(index, Index):
                yield from index.manifests
                waiting.extend(index.manifests)

    def _parsed(self, descriptor: Descriptor, seen: set[Digest]) -> Manifest | Index | None:
        """Return the manifest, None if it is damaged, has another size or is in `seen` already.

        An index may list a manifest any number of times, and with any size.
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
            with map_os_errors("write", path):
                path.write_bytes(raw)
            yield path
        finally:
            path.unlink(missing_ok=True)
