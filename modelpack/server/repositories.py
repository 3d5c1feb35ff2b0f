"""Which manifests and tags each repository has, as `index.json` tells.

A tag is an entry with a full reference as its name. A manifest that a client pushed by digest, or
whose last tag went elsewhere, stays pullable by its digest: an entry says so with the annotation
`org.modelpack.repository`. An entry may have a name and the annotation; then it is in both
repositories.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from modelpack import mediatypes
from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.reference import Reference
from modelpack.server.names import Repository
from modelpack.stores.index import IndexDocument
from modelpack.stores.lookup import Entry

#: The repository (`registry/path`) that has the manifest without a tag, too.
REPOSITORY: Final = "org.modelpack.repository"
_NAME_KEYS: Final = (mediatypes.REF_NAME, mediatypes.CONTAINERD_NAME)


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
