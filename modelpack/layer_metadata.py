"""LayerMetadata: the file that a layer is, as its `org.cncf.model.file.metadata+json` says.

Source: CNCF model-spec, docs/annotations.md; Docker Model Runner writes the same object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modelpack.errors import ManifestError
from modelpack.gojson import decode_object, encode_text, kind_of

_WHAT = "layer file metadata"


@dataclass(frozen=True, slots=True)
class LayerMetadata:
    """Name, permission bits, size in bytes and modification time (RFC 3339) of a layer's file."""

    name: str
    mode: int
    size: int
    mtime: str
    uid: int = 0
    gid: int = 0
    typeflag: int = 0

    @classmethod
    def parse(cls, text: str) -> LayerMetadata:
        """Return the metadata that an annotation's JSON text holds; raise `ManifestError`."""
        value = decode_object(text.encode(errors="surrogateescape"), _WHAT)
        return cls(
            name=_field(value, "name", str),
            mode=_number(value, "mode"),
            size=_number(value, "size"),
            mtime=_field(value, "mtime", str),
            uid=_number(value, "uid"),
            gid=_number(value, "gid"),
            typeflag=_number(value, "typeflag"),
        )

    def encode(self) -> str:
        """Return the JSON text, fields in the order that Docker Model Runner writes."""
        return encode_text(
            {
                "name": self.name,
                "mode": self.mode,
                "uid": self.uid,
                "gid": self.gid,
                "size": self.size,
                "mtime": self.mtime,
                "typeflag": self.typeflag,
            }
        )


def _field(value: dict[str, Any], key: str, kind: type) -> Any:
    if key not in value:
        raise ManifestError(f"has no {key!r}", path=_WHAT)
    if type(value[key]) is not kind:
        wanted = "a string" if kind is str else "a whole number"
        raise ManifestError(f"{key!r} is {kind_of(value[key])}, expected {wanted}", path=_WHAT)
    return value[key]


def _number(value: dict[str, Any], key: str) -> int:
    number: int = _field(value, key, int)
    if not 0 <= number < 2**63:
        raise ManifestError(f"{key!r} is {number}, expected 0 or more", path=_WHAT)
    return number
