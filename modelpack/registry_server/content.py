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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

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
from modelpack.store.lookup import Entry
from modelpack.store.tree import Tree

if TYPE_CHECKING:
    from starlette.requests import Request

    from modelpack.registry_server.blob_fetch import Fetch

# A first component that is a host; the path grammar leaves no ports and no upper case.
_HOST = re.compile(r"localhost\Z|.*\.")


@dataclass(frozen=True, slots=True, order=True)
class Repository:
    """A repository of the store."""

    registry: str
    path: str

    @classmethod
    def parse(cls, name: str) -> Repository:
        """Return the repository that the `name` in a URL stands for.

        Raises `InvalidReferenceError`. The environment's default registry plays no part.
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
        """The canonical name in URLs, None where there is none."""
        name = f"{self.registry}/{self.path}"
        if self.registry == DEFAULT_REGISTRY and not _HOST.match(self.path.partition("/")[0]):
            name = self.path
        try:
            return name if Repository.parse(name) == self else None
        except InvalidReferenceError:
            return None

    def tagged(self, tag: str) -> Reference:
        """Return the reference of `tag`; raise `InvalidReferenceError` if it is no tag."""
        return Reference(self.registry, self.path).with_tag(tag)

    def __str__(self) -> str:
        return f"{self.registry}/{self.path}"


#: The repository (`registry/path`) that has the manifest without a tag, too.
REPOSITORY: Final = "org.modelpack.repository"
_NAME_KEYS: Final = (media_types.REF_NAME, media_types.CONTAINERD_NAME)


@dataclass(slots=True)
class Members:
    """What one repository has."""

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
        """Return what the repository has, None if it has nothing."""
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
    elements = list(_elements(document))
    for i, (raw, entry) in enumerate(elements):
        # Another tool's entry, or one whose tag moved, that nothing else says anything about.
        if entry and entry.digest == descriptor.digest and not _is_claimed(entry):
            elements[i] = _annotated(raw, repository), entry
            break
    else:
        raw = Descriptor(
            descriptor.media_type,
            descriptor.digest,
            descriptor.size,
            {REPOSITORY: str(repository)},
            descriptor.artifact_type,
        ).to_json()
        elements.append((raw, None))
    return document.with_elements([raw for raw, _ in elements])


def with_tag(
    document: IndexDocument, reference: Reference, descriptor: Descriptor
) -> IndexDocument:
    """Return a document where `reference` names the manifest; what it named keeps its digest."""
    before = _named(document, reference)
    document = document.with_tag(descriptor, reference)
    if before is None or before.digest == descriptor.digest:
        return document
    return with_manifest(document, Repository.of(reference), before)


def without_tag(document: IndexDocument, reference: Reference) -> IndexDocument:
    """Return a document without the tag; what it named keeps its digest."""
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
    for raw, entry in _elements(document):
        if entry is None or entry.digest != digest or not _has(repository, entry):
            kept.append(raw)
            continue
        stripped = _stripped(raw, entry, repository)
        if stripped is not None:
            kept.append(stripped)
    return document.with_elements(kept)


def _named(document: IndexDocument, reference: Reference) -> Descriptor | None:
    found = (entry for entry in document.entries if entry.reference == reference)
    return next((entry.manifest for entry in found), None)


def _elements(document: IndexDocument) -> Iterator[tuple[Mapping[str, Any], Entry | None]]:
    return ((item.raw, item.entry) for item in document.items)


def _has(repository: Repository, entry: Entry) -> bool:
    named = entry.reference is not None and Repository.of(entry.reference) == repository
    return named or entry.descriptor.annotations.get(REPOSITORY) == str(repository)


def _is_claimed(entry: Entry) -> bool:
    return entry.name is not None or REPOSITORY in entry.descriptor.annotations


def _annotated(raw: Mapping[str, Any], repository: Repository) -> dict[str, Any]:
    return {**raw, "annotations": {**(raw.get("annotations") or {}), REPOSITORY: str(repository)}}


def _stripped(
    raw: Mapping[str, Any], entry: Entry, repository: Repository
) -> Mapping[str, Any] | None:
    """Return the element as far as it belongs to other repositories, None if it does not."""
    dropped: Sequence[str] = ()
    if entry.reference is not None and Repository.of(entry.reference) == repository:
        dropped = _NAME_KEYS
    annotations = {k: v for k, v in (raw.get("annotations") or {}).items() if k not in dropped}
    if annotations.get(REPOSITORY) == str(repository):
        del annotations[REPOSITORY]
    if not any(key in annotations for key in (*_NAME_KEYS, REPOSITORY)):
        return None
    return {**raw, "annotations": annotations}


_SERVED = frozenset({*media_types.MANIFEST_TYPES, *media_types.INDEX_TYPES})
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
            with map_os_errors("read", path):
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
            if descriptor.media_type not in media_types.INDEX_TYPES:
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
            with map_os_errors("write", path):
                path.write_bytes(raw)
            yield path
        finally:
            path.unlink(missing_ok=True)
