"""Find stored models by name: references, digests, short ids and unique prefixes of ids.

Works on plain lists of entries, so that every kind of store shares it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import ALGORITHMS, Digest
from modelpack.artifacts.reference import Reference, is_full_or_invalid
from modelpack.errors import (
    AmbiguousError,
    IntegrityError,
    InvalidDigestError,
    InvalidReferenceError,
    NotFoundError,
)

_SHORTEST_PREFIX = 4
# The comparison with more names would take more than about 0.1 s.
_MAX_COMPARED = 1_000
#: Annotations that may hold the name of an entry.
NAME_KEYS: Final = (media_types.REF_NAME, media_types.CONTAINERD_NAME)
_HEX = re.compile(rf"(?:({'|'.join(ALGORITHMS)}):)?([0-9a-f]{{1,128}})\Z")


@dataclass(frozen=True, slots=True)
class Entry:
    """One index entry: a manifest and one of its names, None if it is untagged.

    `name` is the text in the index; `reference` is the parsed name, None if it does not parse.
    """

    descriptor: Descriptor
    name: str | None = None
    reference: Reference | None = None

    @property
    def digest(self) -> Digest:
        """The manifest's digest."""
        return self.descriptor.digest

    @property
    def is_partial(self) -> bool:
        """Whether layers of the manifest were left out by a partial pull."""
        return self.descriptor.annotations.get(media_types.PARTIAL) == "true"

    @property
    def origin(self) -> str | None:
        """The repository (`registry/repository`) it was pulled from, if known."""
        return self.descriptor.annotations.get(media_types.ORIGIN)

    @property
    def manifest(self) -> Descriptor:
        """The manifest's descriptor, without the annotations that belong to the entry."""
        return replace(self.descriptor, annotations={}, platform=None)


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model in a store and all its names.

    `names` are the names as stored, including those that do not parse as references.
    `is_partial`: a partial pull left out layers; some may have been pulled since.
    `origins`: the repositories (`registry/repository`) it was pulled from, if known.
    """

    descriptor: Descriptor
    references: tuple[Reference, ...] = ()
    names: tuple[str, ...] = ()
    is_partial: bool = False
    origins: tuple[str, ...] = ()

    @property
    def digest(self) -> Digest:
        """The model's id: the digest of its manifest."""
        return self.descriptor.digest

    @property
    def places(self) -> tuple[str, ...]:
        """The repositories that may have it: its origins and those of its names."""
        return tuple(dict.fromkeys((*self.origins, *(ref.name for ref in self.references))))


@dataclass(frozen=True, slots=True)
class Match:
    """The result of a lookup; `entry` is one entry of the manifest.

    `by_name` is False for an id: removing a name and removing an id differ.
    """

    entry: Entry
    by_name: bool


class Names:
    """A lookup table of `entries`; if two have the same name, the first one wins."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._by_digest = {entry.digest: entry for entry in reversed(entries)}
        self._by_name = {entry.name: entry for entry in reversed(entries) if entry.name}
        self._by_reference = {e.reference: e for e in reversed(entries) if e.reference}
        self._entries = entries

    def find(self, text: str) -> Match:
        """Return the manifest called `text`.

        Tries in order: a full digest, a name, a short id, a unique prefix of an id (4 digits or
        more). Raises `NotFoundError`, `AmbiguousError`, `InvalidReferenceError`, or
        `IntegrityError` if the tag and the digest in `text` disagree.
        """
        text = text.strip()
        digest = _full_digest(text)
        if digest is not None:
            return Match(self._with_digest(digest, text), by_name=False)
        try:
            match = self._find_name(text) or self._find_prefix(text)
        except InvalidReferenceError:
            match = self._find_prefix(text)
            if match is None:
                raise
        if match is None:
            raise self._not_found(text)
        return match

    def _with_digest(self, digest: Digest, text: str) -> Entry:
        entry = self._by_digest.get(digest)
        if entry is None:
            raise NotFoundError(f"{text}: no model in the store has this digest")
        return entry

    def _find_name(self, text: str) -> Match | None:
        if text in self._by_name:
            return Match(self._by_name[text], by_name=True)
        wanted = Reference.parse(text)
        if wanted.tag is None:
            return Match(self._in_repository(wanted, text), by_name=False)
        named = wanted.without_digest()
        entry = self._by_reference.get(named)
        if entry is None:
            return None
        if wanted.digest is not None and wanted.digest != entry.digest:
            raise IntegrityError(
                f"{named} is {entry.digest} in the store, not {wanted.digest}",
                expected=str(wanted.digest),
                got=str(entry.digest),
                hint=f"pull {text}, or leave out the digest",
            )
        return Match(entry, by_name=True)

    def _in_repository(self, wanted: Reference, text: str) -> Entry:
        """Return the manifest of `repository@digest`; it must belong to this repository."""
        assert wanted.digest is not None, "a reference has a tag or a digest"
        entry = self._with_digest(wanted.digest, text)
        places = {
            place
            for same in self._entries
            if same.digest == entry.digest
            for place in (same.origin, same.reference and same.reference.name)
        }
        if wanted.name not in places:
            raise NotFoundError(
                f"{text}: no model of {wanted.name} in the store has this digest",
                hint=f"pull {text}, or name the model by {wanted.digest} alone",
            )
        return entry

    def _find_prefix(self, text: str) -> Match | None:
        match = _HEX.match(text)
        if match is None or len(match[2]) < _SHORTEST_PREFIX:
            return None
        found = [digest for digest in self._by_digest if begins(text, digest)]
        if len(found) > 1:
            candidates = tuple(sorted(map(str, found)))
            raise AmbiguousError(
                f"{text} is a prefix of {len(found)} ids: {', '.join(candidates)}",
                candidates=candidates,
                hint="add digits until only one is left",
            )
        return Match(self._by_digest[found[0]], by_name=False) if found else None

    def _not_found(self, text: str) -> NotFoundError:
        wanted = Reference.parse(text)
        looked_for = "" if text == str(wanted) else f" (that is {wanted})"
        by_name: dict[str, list[str]] = {}
        for ref in self._by_reference:
            by_name.setdefault(ref.repository.rpartition("/")[2], []).append(str(ref))
        last = wanted.repository.rpartition("/")[2]
        close = [last] if last in by_name else []
        if not close and len(by_name) <= _MAX_COMPARED:
            from difflib import get_close_matches

            close = get_close_matches(last, by_name, n=3, cutoff=0.7)
        alike = [ref for name in close for ref in sorted(by_name[name])]
        hint = "run `modelpack list` to see the models"
        if alike:
            hint = f"did you mean {', '.join(alike[:5])}?"
        return NotFoundError(f"no such model in the store: {text}{looked_for}", hint=hint)


def begins(text: str, digest: Digest) -> bool:
    """Return whether a digest, or its hex digits, begin with `text`."""
    match = _HEX.match(text)
    if match is None:
        return False
    return match[1] in (None, digest.algorithm) and digest.encoded.startswith(match[2])


def may_name(text: str) -> Callable[[Any], bool]:
    """Return a filter of raw elements of `manifests` that keeps all that `text` may name.

    It may keep too many elements, but never drops one that matches.
    """
    text = text.strip()
    names = {text}
    digest, match = _full_digest(text), _HEX.match(text)
    with suppress(InvalidReferenceError):
        wanted = Reference.parse(text)
        names.add(str(wanted.without_digest()))
        digest = digest or wanted.digest
    encoded = digest.encoded if digest else match[2] if match else None

    def may_be(raw: Any) -> bool:
        if not isinstance(raw, dict):
            return False
        if encoded is not None:
            found = raw.get("digest")
            if isinstance(found, str) and found.partition(":")[2].startswith(encoded):
                return True
        annotations = raw.get("annotations") or {}
        if not isinstance(annotations, dict):
            return False
        for key in NAME_KEYS:
            name = annotations.get(key)
            if isinstance(name, str) and (name in names or not is_full_or_invalid(name)):
                return True
        return False

    return may_be


def models(
    entries: Iterable[Entry], types: Sequence[str] = media_types.MANIFEST_TYPES
) -> tuple[StoredModel, ...]:
    """Return the manifests of these types with their names: named ones first, sorted by name.

    Referrers such as signatures are left out.
    """
    by_digest: dict[Digest, list[Entry]] = {}
    for entry in entries:
        if entry.descriptor.media_type in types:
            by_digest.setdefault(entry.digest, []).append(entry)
    found = [model for model in map(_model, by_digest.values()) if not _is_referrer(model)]
    return tuple(sorted(found, key=lambda model: (not model.names, model.names, model.digest)))


def model(entries: Iterable[Entry], digest: Digest) -> StoredModel:
    """Return the manifest `digest` of `entries` with all its names."""
    return _model([entry for entry in entries if entry.digest == digest])


def _model(group: Sequence[Entry]) -> StoredModel:
    return StoredModel(
        group[0].manifest,
        tuple(sorted({e.reference for e in group if e.reference}, key=str)),
        tuple(sorted({e.name for e in group if e.name})),
        any(e.is_partial for e in group),
        tuple(sorted({e.origin for e in group if e.origin})),
    )


def _is_referrer(model: StoredModel) -> bool:
    kind = model.descriptor.artifact_type
    known = (media_types.CNCF_MANIFEST, media_types.CNAI_MANIFEST, *media_types.MODEL_CONFIG_TYPES)
    return not model.names and kind is not None and kind not in known


def _full_digest(text: str) -> Digest | None:
    try:
        return Digest.parse(text if ":" in text else f"sha256:{text}")
    except InvalidDigestError:
        return None
