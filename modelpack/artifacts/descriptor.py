"""Descriptor: media type, digest and size of a blob (OCI image-spec, descriptor.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import check_spelling, kind_of
from modelpack.errors import InvalidDigestError, ManifestError, SizeMismatchError

_FIELDS = {
    key.casefold(): key
    for key in ("mediaType", "digest", "size", "annotations", "artifactType", "platform")
}
_NAMED = (media_types.OLLAMA_TENSOR, media_types.OLLAMA_JSON)
_MAX_SIZE = 2**63 - 1
# RFC 6838 section 4.2; image-spec has no parameters in media types.
_RESTRICTED = r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}"
_PLATFORM = re.compile(r"[a-z0-9._-]+/[a-z0-9._-]+(?:/[a-z0-9._-]+)?\Z")
_MEDIA_TYPE = re.compile(rf"{_RESTRICTED}/{_RESTRICTED}\Z")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """The media type, digest and size (in bytes) of a blob.

    `platform` is `os/architecture[/variant]`, for a manifest of an image index. `name` is the
    unchecked name that Ollama gives a tensor or a JSON file, in a field of its own.
    """

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)
    artifact_type: str | None = None
    platform: str | None = None
    name: str | None = None

    @classmethod
    def parse(cls, value: Any, where: str) -> Descriptor:
        """Return the descriptor in decoded JSON; `where` names its place in errors."""
        if not isinstance(value, dict):
            raise ManifestError(f"is {kind_of(value)}, expected a descriptor object", path=where)
        check_spelling(value, _FIELDS, where)
        media_type = checked_media_type(value.get("mediaType"), f"{where}.mediaType")
        digest = parsed_digest(value.get("digest"), f"{where}.digest")
        artifact_type = value.get("artifactType")
        if artifact_type is not None:
            checked_media_type(artifact_type, f"{where}.artifactType")
        return cls(
            media_type,
            digest,
            _size(value.get("size"), f"{where}.size"),
            parsed_annotations(value.get("annotations"), f"{where}.annotations"),
            artifact_type,
            _platform(value.get("platform"), f"{where}.platform"),
            _name(value.get("name"), f"{where}.name") if media_type in _NAMED else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object, with its fields in the order of Docker Model Runner."""
        value: dict[str, Any] = {
            "mediaType": self.media_type,
            "size": self.size,
            "digest": str(self.digest),
        }
        if self.annotations:
            value["annotations"] = {key: self.annotations[key] for key in sorted(self.annotations)}
        if self.artifact_type:
            value["artifactType"] = self.artifact_type
        if self.platform:
            system, architecture, *variant = self.platform.split("/")
            value["platform"] = {"architecture": architecture, "os": system}
            if variant:
                value["platform"]["variant"] = variant[0]
        return value

    @property
    def filepath(self) -> str | None:
        """The path annotation of a model layer, unchecked; see `paths.checked_path`."""
        return self.annotations.get(
            media_types.FILEPATH, self.annotations.get(media_types.FILEPATH_ALIAS)
        )

    def check_size(self, got: int, what: str) -> None:
        """Raise `SizeMismatchError`, naming `what`, unless `got` bytes are this size."""
        if got != self.size:
            raise size_mismatch(what, self.size, got)


def size_mismatch(what: str, expected: int, got: int | str) -> SizeMismatchError:
    """Return the error for content with `got` instead of `expected` bytes; `what` names it."""
    return SizeMismatchError(
        f"{what}: size mismatch: expected {expected} bytes, got {got}",
        expected=str(expected),
        got=str(got),
    )


def checked_media_type(value: Any, where: str) -> str:
    """Return `value` if it is a media type by RFC 6838, without parameters."""
    if not isinstance(value, str):
        raise ManifestError(f"is {kind_of(value)}, expected a media type", path=where)
    if not _MEDIA_TYPE.match(value):
        raise ManifestError(f"{value[:200]!r} is not a media type (type/subtype)", path=where)
    return value


def parsed_digest(value: Any, where: str) -> Digest:
    """Return the digest in decoded JSON; `where` names its place in errors."""
    if not isinstance(value, str):
        raise ManifestError(f"is {kind_of(value)}, expected a digest", path=where)
    try:
        return Digest.parse(value)
    except InvalidDigestError as error:
        raise InvalidDigestError(f"{where}: {error}", got=value[:200]) from None


def parsed_annotations(value: Any, where: str) -> dict[str, str]:
    """Return the annotations in decoded JSON: an object of strings, or null."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ManifestError(f"is {kind_of(value)}, expected an object of strings", path=where)
    for key, text in value.items():
        if not isinstance(text, str):
            raise ManifestError(f"is {kind_of(text)}, expected a string", path=f"{where}[{key!r}]")
    return value


def checked_platform(text: str, where: str) -> str:
    """Return `text` if it is `os/architecture[/variant]`; raise `ManifestError` otherwise."""
    if not _PLATFORM.match(text):
        raise ManifestError(
            f"{text[:100]!r} is not a platform; expected os/architecture", path=where
        )
    return text


def _platform(value: Any, where: str) -> str | None:
    """Return the platform in decoded JSON (image-index.md), or None if it is not usable."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ManifestError(f"is {kind_of(value)}, expected an object", path=where)
    parts = [value.get(key) for key in ("os", "architecture", "variant")]
    if not all(isinstance(part, str) for part in parts[:2]):
        raise ManifestError("needs 'os' and 'architecture', both strings", path=where)
    text = "/".join(part for part in parts if isinstance(part, str) and part)
    # Other tools write values such as `unknown/unknown`; those match no machine.
    return text if _PLATFORM.match(text) else None


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ManifestError(f"is {kind_of(value)}, expected the name of the layer", path=where)
    return value


def _size(value: Any, where: str) -> int:
    if type(value) is not int:
        raise ManifestError(f"is {kind_of(value)}, expected a whole number of bytes", path=where)
    if not 0 <= value <= _MAX_SIZE:
        raise ManifestError(f"is {value}, expected 0 to {_MAX_SIZE}", path=where)
    return value
