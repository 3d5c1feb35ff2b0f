"""`index.json`: which models the store has, and under which names.

One entry for each tag, the full reference in `org.opencontainers.image.ref.name`; a model without
tags keeps one entry without it. Other tools write here too: entries and fields that are not ours
stay as they are. Readers take no lock, since the file is replaced as a whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import decode_object, encode
from modelpack.artifacts.reference import DEFAULT_REGISTRY, Reference, spelled_in_full
from modelpack.errors import (
    IntegrityError,
    InvalidReferenceError,
    ManifestError,
    NotFoundError,
    StoreError,
)
from modelpack.store.filesystem import open_own, translating, write_atomically
from modelpack.store.lookup import Entry, Match, Names, may_name
from modelpack.store.tree import Tree

#: Of the file: a larger one is neither read nor written.
MAX_BYTES: Final = 256 * 1024 * 1024
_NAME_KEYS = (media_types.REF_NAME, media_types.CONTAINERD_NAME)
# A file changed this long ago looks different after its next change; clocks of file systems tick
# coarsely and inode numbers come again.
_SETTLED_NS = 200_000_000
# Names that are looked for one by one; for more, reading all entries costs less.
_SEARCHES = 4


class Item:
    """One element of `manifests`: as it stands there and, if we can read it, what it says.

    It is read when somebody asks: most commands want one model of a store that may have thousands.
    """

    __slots__ = ("_entry", "raw")

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self._entry: Entry | Literal[False] | None = False

    @property
    def entry(self) -> Entry | None:
        """What it says; None if that is no descriptor."""
        if self._entry is False:
            self._entry = _entry_of(self.raw)
        return self._entry


@dataclass(frozen=True)
class IndexDocument:
    """The content of an `index.json`; every change makes a new one."""

    value: Mapping[str, Any]
    items: tuple[Item, ...]

    @classmethod
    def parse(cls, raw: bytes, what: str) -> IndexDocument:
        """Return the document in `raw`; raises `ManifestError` if it is no index at all."""
        value = decode_object(raw, what, limit=MAX_BYTES)
        manifests = value.get("manifests")
        if manifests is None:
            manifests = []
        if not isinstance(manifests, list):
            raise ManifestError("'manifests' is no array", path=what)
        return cls(value, tuple(map(Item, manifests)))

    def with_elements(self, elements: Iterable[Any]) -> IndexDocument:
        """Return a document with these elements of `manifests` instead, as decoded JSON."""
        return self._replaced(tuple(map(Item, elements)))

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The entries that we can read."""
        return tuple(item.entry for item in self.items if item.entry is not None)

    def find(self, text: str) -> Match:
        """Return the manifest that `text` names; raises as `Names.find`.

        Reads only the entries that may be meant, unless there is none and the error has to say
        which names are alike, or it is asked again and again.
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
        """What was looked for without reading all entries."""
        return []

    @cached_property
    def _names(self) -> Names:
        return Names(self.entries)

    def encoded(self) -> bytes:
        """Return the bytes of the file; raise `StoreError` if they are more than can be read."""
        manifests = [item.raw for item in self.items]
        raw = encode({"schemaVersion": 2, **self.value, "manifests": manifests})
        if len(raw) > MAX_BYTES:
            raise StoreError(
                f"the store is full: index.json would have {len(raw)} bytes, "
                f"more than the limit of {MAX_BYTES}",
                hint="remove models, or use another store: --store DIR",
            )
        return raw

    def has(self, digest: Digest) -> bool:
        """Return whether an entry points at the manifest."""
        return bool(self.entries_of(digest))

    def entries_of(self, digest: Digest) -> tuple[Entry, ...]:
        """Return the entries of one manifest, without reading the others."""
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
        """Return a document that lists the manifest, untagged unless it was there."""
        if self.has(descriptor.digest):
            return self
        raw = Descriptor(
            descriptor.media_type,
            descriptor.digest,
            descriptor.size,
            artifact_type=descriptor.artifact_type,
        ).to_json()
        return self._replaced((*self.items, Item(raw)))

    def with_tag(self, descriptor: Descriptor, reference: Reference) -> IndexDocument:
        """Return a document where `reference` names the manifest, and nothing else."""
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
        """Return a document without the names of these entries; what they named stays."""
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
        """Return a document where the entries of the manifest say `key`: `value`; None drops it.

        With `reference` only the entry of that name does.
        """

        def changed(item: Item) -> Item:
            entry = item.entry
            if entry is None or entry.digest != digest:
                return item
            if reference is not None and entry.reference != reference:
                return item
            if entry.descriptor.annotations.get(key) == value:
                return item
            return Item(_with_annotation(item.raw, key, value))

        return self._replaced(tuple(map(changed, self.items)))

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
        """Return what the file says now; a missing file is an empty index.

        It is only parsed again after it changed.
        """
        path = self._tree.index
        with translating("read", path):
            try:
                descriptor = open_own(path, follow=True)
            except FileNotFoundError:
                return IndexDocument({}, ())
            with open(descriptor, "rb") as stream:
                found = os.fstat(stream.fileno())
                stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
                if self._seen is not None and self._seen[0] == stamp:
                    return self._seen[1]
                # A buffer of the size asked for is allocated at once, however short the file is.
                raw = stream.read(min(found.st_size, MAX_BYTES) + 1)
        try:
            document = IndexDocument.parse(raw, str(path))
        except ManifestError as error:
            raise StoreError(f"the store's list of models is damaged: {error}") from error
        if time.time_ns() - found.st_mtime_ns > _SETTLED_NS:
            self._seen = (stamp, document)
        return document

    def write(self, document: IndexDocument) -> None:
        """Replace the file, durably. The store's lock is held since `document` was read."""
        with translating("write", self._tree.index):
            write_atomically(self._tree.index, document.encoded(), by_way_of=self._tree.ingest)


def _entry_of(raw: Any) -> Entry | None:
    try:
        return _entry(Descriptor.parse(raw, "index.json"))
    except (ManifestError, IntegrityError):
        return None


def _entry(descriptor: Descriptor) -> Entry:
    """Return the entry and its name; Docker's tools put the full one beside a bare tag."""
    for key in (media_types.CONTAINERD_NAME, media_types.REF_NAME):
        name = descriptor.annotations.get(key)
        try:
            if name:
                return Entry(descriptor, name, _reference(name))
        except InvalidReferenceError:
            continue
    return Entry(descriptor, descriptor.annotations.get(media_types.REF_NAME))


def _reference(name: str) -> Reference:
    reference = spelled_in_full(name)
    if reference is None:
        reference = Reference.parse(name, default_registry=DEFAULT_REGISTRY).without_digest()
    return reference


def _with_annotation(raw: Mapping[str, Any], key: str, value: str | None) -> dict[str, Any]:
    annotations = {k: v for k, v in (raw.get("annotations") or {}).items() if k != key}
    if value is not None:
        annotations[key] = value
    changed = {name: held for name, held in raw.items() if name != "annotations"}
    if annotations:
        changed["annotations"] = annotations
    return changed


def _renamed(raw: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    annotations = {k: v for k, v in (raw.get("annotations") or {}).items() if k not in _NAME_KEYS}
    if name is not None:
        annotations[media_types.REF_NAME] = name
    changed = {key: value for key, value in raw.items() if key != "annotations"}
    if annotations:
        changed["annotations"] = annotations
    return changed
