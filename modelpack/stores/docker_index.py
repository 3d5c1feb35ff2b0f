"""`models.json` of Docker Model Runner's store: which models it has, under which tags.

The bytes are as its own code writes them (Go's `json.MarshalIndent`): two spaces, no newline at the
end, `null` where a model has no tags. Fields and entries that are not understood stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from modelpack.digest import Digest
from modelpack.errors import (
    InvalidDigestError,
    InvalidReferenceError,
    ManifestError,
    StoreError,
)
from modelpack.gojson import decode_object
from modelpack.reference import DEFAULT_REGISTRY, Reference

#: Of the file: a larger one is neither read nor written.
MAX_BYTES: Final = 64 * 1024 * 1024
_GO_ESCAPES: Final = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})


@dataclass(frozen=True, slots=True)
class DockerIndex:
    """The content of models.json; every change makes a new one."""

    value: Mapping[str, Any]
    elements: tuple[Any, ...] = ()

    @classmethod
    def parse(cls, raw: bytes, what: str) -> DockerIndex:
        """Return the index in `raw`; raises `ManifestError`."""
        value = decode_object(raw, what, limit=MAX_BYTES)
        elements = value.get("models")
        if elements is None:
            elements = []
        if not isinstance(elements, list):
            raise ManifestError("'models' is no array", path=what)
        return cls(value, tuple(elements))

    def encoded(self) -> bytes:
        """Return the bytes of the file; raise `StoreError` if they are more than can be read."""
        raw = go_indented({**self.value, "models": list(self.elements)})
        if len(raw) > MAX_BYTES:
            raise StoreError(
                f"Docker's model store is full: models.json would have {len(raw)} bytes, "
                f"more than the limit of {MAX_BYTES}",
                hint="remove models from it: docker model rm",
            )
        return raw

    def models(self) -> dict[Digest, tuple[tuple[str, Reference | None], ...]]:
        """Return each model's tags: as they are written, and what that means."""
        found: dict[Digest, list[tuple[str, Reference | None]]] = {}
        for element in self.elements:
            digest = _id(element)
            if digest is not None:
                tags = found.setdefault(digest, [])
                tags += ((tag, _reference(tag)) for tag in _strings(element, "tags"))
        return {digest: tuple(tags) for digest, tags in found.items()}

    def files(self) -> set[str]:
        """Return the digests of all blobs that a model has."""
        return {name for element in self.elements for name in _strings(element, "files")}

    def with_model(
        self, digest: Digest, files: Iterable[Digest], reference: Reference | None
    ) -> DockerIndex:
        """Return an index that has the model, where `reference` names it and nothing else."""
        elements = list(self.elements)
        if not any(_id(element) == digest for element in elements):
            elements.append({"id": str(digest), "tags": None, "files": [str(f) for f in files]})
        if reference is not None:
            elements = [_tagged(e, reference, wanted=_id(e) == digest) for e in elements]
        return DockerIndex(self.value, tuple(elements))


def go_indented(value: Any) -> bytes:
    """Return JSON as Go's `json.MarshalIndent(value, "", "  ")` writes it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return text.translate(_GO_ESCAPES).encode()


def _tagged(element: Any, reference: Reference, *, wanted: bool) -> Any:
    """Return the element with the tag, if it is `wanted` there, or without it."""
    if not isinstance(element, dict):
        return element
    tags = _strings(element, "tags")
    if wanted and any(_reference(tag) == reference for tag in tags):
        return element
    kept = [tag for tag in tags if _reference(tag) != reference]
    if not wanted and len(kept) == len(tags):
        return element
    if wanted:
        kept.append(str(reference))
    return {**element, "tags": kept or None}


def _id(element: Any) -> Digest | None:
    try:
        return Digest.parse(element["id"])
    except (InvalidDigestError, TypeError, KeyError, AttributeError):
        return None


def _strings(element: Any, key: str) -> list[str]:
    values = element.get(key) if isinstance(element, dict) else None
    return [v for v in values if isinstance(v, str)] if isinstance(values, list) else []


def _reference(tag: str) -> Reference | None:
    try:
        return Reference.parse(tag, default_registry=DEFAULT_REGISTRY).without_digest()
    except InvalidReferenceError:
        return None
