"""`index.json`: the models of a store and their names.

There is one entry per tag, with the full reference in `org.opencontainers.image.ref.name`; a model
without tags has one entry without it. Other tools write this file too, so unknown entries and
fields are preserved. Readers take no lock: the file is always replaced as a whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import decode_object, encode
from modelpack.artifacts.reference import DEFAULT_REGISTRY, Reference, parse_full
from modelpack.errors import (
    IntegrityError,
    InvalidReferenceError,
    ManifestError,
    NotFoundError,
    StoreError,
)
from modelpack.store.filesystem import map_os_errors, open_own, write_atomically
from modelpack.store.lookup import Entry, Match, Names, may_name
from modelpack.store.tree import Tree

#: Size limit of `index.json` for reading and writing.
MAX_BYTES: Final = 256 * 1024 * 1024
# Cache the parsed file only if it is older than this: file systems have coarse clocks and reuse
# inode numbers, so two quick changes could have the same stamp.
_SETTLED_NS = 200_000_000
# Names to search for one by one; parsing all entries costs less for more names.
_SEARCHES = 4


class Item:
    """One element of `manifests`: its JSON and, if it is a valid descriptor, its entry.

    It is parsed on first use: most commands need one model of a store that may have thousands.
    """

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    @cached_property
    def entry(self) -> Entry | None:
        """The parsed entry; None if the element is not a valid descriptor."""
        try:
            return _entry(Descriptor.parse(self.raw, "index.json"))
        except (ManifestError, IntegrityError):
            return None


@dataclass(frozen=True)
class IndexDocument:
    """The immutable content of an `index.json`."""

    value: Mapping[str, Any]
    items: tuple[Item, ...]

    @classmethod
    def parse(cls, raw: bytes, what: str) -> IndexDocument:
        """Return the document in `raw`; raises `ManifestError` if it is not an index."""
        value = decode_object(raw, what, limit=MAX_BYTES)
        manifests = [] if value.get("manifests") is None else value["manifests"]
        if not isinstance(manifests, list):
            raise ManifestError("'manifests' is not an array", path=what)
        return cls(value, tuple(map(Item, manifests)))

    def with_elements(self, elements: Iterable[Any]) -> IndexDocument:
        """Return a document whose `manifests` are these decoded JSON values."""
        return self._replaced(tuple(map(Item, elements)))

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The valid entries."""
        return tuple(item.entry for item in self.items if item.entry is not None)

    def find(self, text: str) -> Match:
        """Return the manifest called `text`; raises as `Names.find`.

        Parses only the entries that may match. Parses all of them after several calls, or if none
        matches: the error then suggests similar names.
        """
        if "entries" not in self.__dict__ and len(self._searches) < _SEARCHES:
            self._searches.append(text)
            may_be = may_name(text)
            found = [item.entry for item in self.items if may_be(item.raw)]
            with suppress(NotFoundError):
                return Names([entry for entry in found if entry is not None]).find(text)
        return self._names.find(text)

    @cached_property
    def _searches(self) -> list[str]:
        """The names searched for so far without parsing all entries."""
        return []

    @cached_property
    def _names(self) -> Names:
        return Names(self.entries)

    def encoded(self) -> bytes:
        """Return the bytes of the file; raise `StoreError` if they exceed `MAX_BYTES`."""
        manifests = [item.raw for item in self.items]
        raw = encode({"schemaVersion": 2, **self.value, "manifests": manifests})
        if len(raw) > MAX_BYTES:
            raise StoreError(
                f"the store is full: index.json would have {len(raw)} bytes, "
                f"more than the limit of {MAX_BYTES}",
                hint="remove models, or use another store with --store DIR",
            )
        return raw

    def has(self, digest: Digest) -> bool:
        """Return whether the document lists the manifest."""
        return bool(self.entries_of(digest))

    def entries_of(self, digest: Digest) -> tuple[Entry, ...]:
        """Return the entries of one manifest, without parsing the others."""
        items = self._items_by_digest.get(str(digest), ())
        return tuple(item.entry for item in items if item.entry is not None)

    @cached_property
    def _items_by_digest(self) -> Mapping[str, list[Item]]:
        grouped: dict[str, list[Item]] = {}
        for item in self.items:
            text = item.raw.get("digest") if isinstance(item.raw, dict) else None
            if isinstance(text, str):
                grouped.setdefault(text, []).append(item)
        return grouped

    def with_manifest(self, descriptor: Descriptor) -> IndexDocument:
        """Return a document that also lists the manifest, untagged if it is new."""
        if self.has(descriptor.digest):
            return self
        return self._replaced((*self.items, Item(Entry(descriptor).manifest.to_json())))

    def with_tag(self, descriptor: Descriptor, reference: Reference) -> IndexDocument:
        """Return a document where `reference` names this manifest and no other."""
        if any(e.digest == descriptor.digest and e.reference == reference for e in self.entries):
            return self
        document = self.with_manifest(descriptor).untagged(lambda e: e.reference == reference)
        of_model = [i for i in document.items if i.entry and i.entry.digest == descriptor.digest]
        tagged = Item(_renamed(of_model[0].raw, str(reference)))
        bare = next((item for item in of_model if item.entry and item.entry.name is None), None)
        if bare is None:
            return document._replaced((*document.items, tagged))
        return document._replaced(
            tuple(tagged if item is bare else item for item in document.items)
        )

    def untagged(self, unwanted: Callable[[Entry], bool]) -> IndexDocument:
        """Return a document without the names of these entries; their manifests stay listed."""
        listed = {e.digest for e in self.entries if not unwanted(e)}
        kept = []
        for item in self.items:
            if item.entry is None or not unwanted(item.entry):
                kept.append(item)
            elif item.entry.digest not in listed:
                listed.add(item.entry.digest)
                kept.append(Item(_renamed(item.raw, None)))
        return self._replaced(tuple(kept))

    def annotated(
        self, digest: Digest, key: str, value: str | None, reference: Reference | None = None
    ) -> IndexDocument:
        """Return a document with the annotation set on all entries of a manifest; None removes it.

        With `reference`, only the entry of that name is changed.
        """

        def changed(item: Item) -> Item:
            entry = item.entry
            if entry is None or entry.digest != digest or reference not in (None, entry.reference):
                return item
            if entry.descriptor.annotations.get(key) == value:
                return item
            return Item(_with_annotation(item.raw, key, value))

        return self._replaced(tuple(map(changed, self.items)))

    def bare(self, digests: Collection[Digest]) -> tuple[Descriptor, ...]:
        """Return those of the manifests that are listed with no name and no annotation at all."""
        return tuple(
            found[0].descriptor
            for found in map(self.entries_of, digests)
            if found and not any(entry.descriptor.annotations for entry in found)
        )

    def without_manifest(self, digest: Digest) -> IndexDocument:
        """Return a document without any entry of the manifest."""
        return self._replaced(
            tuple(i for i in self.items if i.entry is None or i.entry.digest != digest)
        )

    def _replaced(self, items: tuple[Item, ...]) -> IndexDocument:
        return IndexDocument(self.value, items)


class IndexFile:
    """The `index.json` of one store."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._seen: tuple[tuple[int, int, int], IndexDocument] | None = None

    def read(self) -> IndexDocument:
        """Return the current document; a missing file is an empty index.

        The file is parsed again only if it changed.
        """
        path = self._tree.index
        with map_os_errors("read", path):
            try:
                descriptor = open_own(path, follow=True)
            except FileNotFoundError:
                return IndexDocument({}, ())
            with open(descriptor, "rb") as stream:
                found = os.fstat(stream.fileno())
                stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
                if self._seen is not None and self._seen[0] == stamp:
                    return self._seen[1]
                # `read(limit)` would allocate the whole limit, however short the file is.
                raw = stream.read(min(found.st_size, MAX_BYTES) + 1)
        try:
            document = IndexDocument.parse(raw, str(path))
        except ManifestError as error:
            raise StoreError(f"the store's index is damaged: {error}") from error
        if time.time_ns() - found.st_mtime_ns > _SETTLED_NS:
            self._seen = (stamp, document)
        return document

    def write(self, document: IndexDocument) -> None:
        """Replace the file durably. The caller holds the store's lock since it read `document`."""
        with map_os_errors("write", self._tree.index):
            write_atomically(self._tree.index, document.encoded(), by_way_of=self._tree.ingest)


def _entry(descriptor: Descriptor) -> Entry:
    """Return the entry with its name."""
    # Docker's tools write a bare tag as `ref.name` and the full name as containerd's annotation.
    for key in (media_types.CONTAINERD_NAME, media_types.REF_NAME):
        name = descriptor.annotations.get(key)
        try:
            if name:
                return Entry(descriptor, name, _reference(name))
        except InvalidReferenceError:
            continue
    return Entry(descriptor, descriptor.annotations.get(media_types.REF_NAME))


def _reference(name: str) -> Reference:
    known = parse_full(name)
    return known or Reference.parse(name, default_registry=DEFAULT_REGISTRY).without_digest()


def _with_annotation(raw: Mapping[str, Any], key: str, value: str | None) -> dict[str, Any]:
    annotations = {k: v for k, v in (raw.get("annotations") or {}).items() if k != key}
    if value is not None:
        annotations[key] = value
    changed = {name: held for name, held in raw.items() if name != "annotations"}
    if annotations:
        changed["annotations"] = annotations
    return changed


def _renamed(raw: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    bare = _with_annotation(raw, media_types.CONTAINERD_NAME, None)
    return _with_annotation(bare, media_types.REF_NAME, name)
