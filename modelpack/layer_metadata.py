"""LayerMetadata: the file that a layer is, as its `org.cncf.model.file.metadata+json` says.

Source: CNCF model-spec, docs/annotations.md; Docker Model Runner writes the same object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modelpack.errors import ManifestError
from modelpack.gojson import checked_time, decode_object, encode_text, kind_of

_WHAT = "layer file metadata"
# The largest values of Go's types in model-spec's FileMetadata.
_BYTE, _UINT32, _INT64 = 2**8 - 1, 2**32 - 1, 2**63 - 1


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
        value = decode_object(text.encode(errors="surrogatepass"), _WHAT)
        return cls(
            name=_field(value, "name", str),
            mode=_number(value, "mode", _UINT32),
            size=_number(value, "size", _INT64),
            mtime=checked_time(_field(value, "mtime", str), f"{_WHAT}: mtime"),
            uid=_number(value, "uid", _UINT32),
            gid=_number(value, "gid", _UINT32),
            typeflag=_number(value, "typeflag", _BYTE),
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


def _number(value: dict[str, Any], key: str, largest: int) -> int:
    number: int = _field(value, key, int)
    if not 0 <= number <= largest:
        raise ManifestError(f"{key!r} is {number}, expected 0 to {largest}", path=_WHAT)
    return number
