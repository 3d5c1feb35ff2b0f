"""JSON documents: strict, bounded decoding, and encoding with the bytes of Go's `encoding/json`.

Docker Model Runner writes manifests and configs with Go's encoder; digests are equal only if every
byte is. Go escapes `<`, `>`, `&`, U+2028 and U+2029, and writes each invalid UTF-8 byte as
the six characters ``\\ufffd``.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from datetime import date
from typing import Any, NoReturn

from modelpack.errors import ManifestError

#: Size limit of manifests and configs, in bytes, for the store, registries and archives alike.
#: Registries should accept 4 MiB (distribution-spec, "Pushing Manifests").
MAX_DOCUMENT_BYTES = 4 * 1024 * 1024

_GO_ESCAPES = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
)
_SURROGATE = re.compile("[\ud800-\udfff]")
# RFC 3339 as Go's time.Time parses it, except for fractions beyond nine digits, which Go drops.
_TIME = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])\Z"
)


def encode(value: Any) -> bytes:
    """Return the bytes that Go's `json.Marshal` gives for `value`.

    Dicts keep their order (Go structs); sort the keys first for a Go map. Undecodable bytes of a
    file name (surrogates of the `surrogateescape` handler) become ``\\ufffd``.
    """
    return encode_text(value).encode()


def encode_text(value: Any) -> str:
    """Return `encode(value)` as text, for JSON inside a string of other JSON."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _SURROGATE.sub(r"\\ufffd", text.translate(_GO_ESCAPES))


def sorted_map(values: dict[str, str]) -> dict[str, str]:
    """Return `values` in the order of a Go map: sorted by the UTF-8 bytes of the keys."""
    return dict(sorted(values.items(), key=lambda item: item[0].encode(errors="surrogateescape")))


def check_document_size(size: int, what: str, *, limit: int = MAX_DOCUMENT_BYTES) -> None:
    """Raise `ManifestError` if the document `what` has more than `limit` bytes."""
    if size > limit:
        raise ManifestError(f"is {size} bytes, more than the limit of {limit}", path=what)


def decode(raw: bytes, what: str, *, limit: int = MAX_DOCUMENT_BYTES) -> Any:
    """Return the value of the JSON text `raw`; `what` names it in errors.

    Stricter than `json.loads`: raises `ManifestError` for more than `limit` bytes, a byte order
    mark, duplicate keys (readers could disagree on them), half of a surrogate pair (it has no
    UTF-8), NaN, numbers beyond the range of a float, and too deep nesting.
    """
    check_document_size(len(raw), what, limit=limit)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            again = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ManifestError(f"has the key {again!r} twice in one object", path=what)
        return value

    def refuse(constant: str) -> NoReturn:
        raise ManifestError(f"holds {constant}, which is not JSON", path=what)

    def finite(text: str) -> float:
        number = float(text)
        if math.isinf(number):  # JSON has no infinity, so the value could not be encoded again
            raise ManifestError(f"holds {text[:40]}, a number out of range", path=what)
        return number

    try:
        value = json.loads(
            raw.decode(), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite
        )
        if b"\\u" in raw:  # only an escape can be half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        raise ManifestError("is not UTF-8", path=what, offset=error.start) from None
    except json.JSONDecodeError as error:
        raise ManifestError(f"is not JSON: {error.msg}", path=what, offset=error.pos) from None
    except RecursionError:
        raise ManifestError("is nested too deeply", path=what) from None
    except UnicodeEncodeError:
        raise ManifestError(
            "holds half of a surrogate pair, which is not text", path=what
        ) from None
    except ManifestError:
        raise
    except ValueError as error:  # Python rejects integers of thousands of digits
        raise ManifestError(f"holds a number out of range: {error}", path=what) from None


def decode_object(raw: bytes, what: str, *, limit: int = MAX_DOCUMENT_BYTES) -> dict[str, Any]:
    """Return the JSON object `raw`; as `decode`, but raise `ManifestError` for other values."""
    value = decode(raw, what, limit=limit)
    if not isinstance(value, dict):
        raise ManifestError(f"is {kind_of(value)}, expected an object", path=what)
    return value


def check_spelling(value: Mapping[str, Any], known: Mapping[str, str], what: str) -> None:
    """Raise `ManifestError` if a key differs from one of `known` (by case-folded name) in case.

    Go's decoder ignores case: it would read `Layers` as `layers`.
    """
    for key in value:
        meant = known.get(key.casefold(), key)
        if meant != key:
            message = f"has the key {key[:80]!r}, which some readers take for {meant!r}"
            raise ManifestError(message, path=what)


def kind_of(value: object) -> str:
    """Return the JSON type of `value` with its article, for error messages."""
    names: dict[type, str] = {dict: "an object", list: "an array", str: "a string"}
    names |= {bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def checked_time(value: Any, where: str) -> str:
    """Return `value` if it is a time (RFC 3339) that Go's decoder accepts."""
    if not isinstance(value, str):
        raise ManifestError(f"is {kind_of(value)}, expected a time", path=where)
    match = _TIME.match(value)
    try:
        if match and date.fromisoformat(match[1]):
            return value
    except ValueError:  # the month does not have this day
        pass
    raise ManifestError(f"{value[:200]!r} is not a time (RFC 3339)", path=where)
