"""Digest: the algorithm and hash that identify content.

Grammar (OCI image-spec, descriptor.md "Digests"), restricted to the algorithms we can verify::

    digest  ::= ("sha256:" | "blake3:") 64*hex | "sha512:" 128*hex        hex ::= [0-9a-f]

BLAKE3 needs the package blake3, as soon as content is hashed.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from modelpack.errors import DigestMismatchError, InvalidDigestError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from hashlib import _Hash

_HEX_LENGTH = {"sha256": 64, "sha512": 128, "blake3": 64}
#: The algorithms of digests that `Digest.parse` accepts.
ALGORITHMS = tuple(_HEX_LENGTH)
_LOWER_HEX = re.compile(r"[0-9a-f]+\Z")

#: Hex digits of a model's short id, as Docker shows it.
SHORT_ID_LENGTH = 12


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """`algorithm:encoded`; a parsed digest is safe in a path or a URL."""

    algorithm: str
    encoded: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Return the digest in `text`; raise `InvalidDigestError` if it is not a digest."""
        algorithm, separator, encoded = text.partition(":")
        length = _HEX_LENGTH.get(algorithm)
        shown = text if len(text) <= 160 else text[:160] + "…"
        if not separator or length is None:
            raise InvalidDigestError(
                f"{shown!r} is not a digest: expected sha256:<64 hex>, sha512:<128 hex> or "
                "blake3:<64 hex>",
                got=shown,
            )
        if len(encoded) != length or not _LOWER_HEX.match(encoded):
            raise InvalidDigestError(
                f"{shown!r} is not a digest: {algorithm} needs exactly {length} lower-case "
                f"hexadecimal digits, got {len(encoded)} characters",
                got=shown,
            )
        return cls(algorithm, encoded)

    @classmethod
    def of(cls, content: bytes, algorithm: str = "sha256") -> Digest:
        """Return the digest of `content`."""
        hasher = new_hasher(algorithm)
        hasher.update(content)
        return cls(algorithm, hasher.hexdigest())

    @classmethod
    def of_hasher(cls, hasher: _Hash) -> Digest:
        """Return the digest of the bytes passed to `hasher`."""
        return cls(hasher.name, hasher.hexdigest())

    @property
    def short(self) -> str:
        """The first 12 hex digits, as `docker model list` shows them."""
        return self.encoded[:SHORT_ID_LENGTH]

    def hasher(self) -> _Hash:
        """Return a new hasher of this digest's algorithm."""
        return new_hasher(self.algorithm)

    def check(self, content: bytes, what: str) -> None:
        """Raise `DigestMismatchError` unless `content` hashes to this digest."""
        self.check_equal(Digest.of(content, self.algorithm), what)

    def check_equal(self, got: Digest, what: str) -> None:
        """Raise `DigestMismatchError`, naming `what`, unless `got` is this digest."""
        if got != self:
            raise DigestMismatchError(
                f"{what}: content does not match its digest: expected {self}, got {got}",
                expected=str(self),
                got=str(got),
            )

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.encoded}"


def new_hasher(algorithm: str = "sha256") -> _Hash:
    """Return an empty hasher; the algorithm is one that `Digest.parse` accepts.

    Raises `InvalidDigestError` for BLAKE3 if its package is not installed.
    """
    if algorithm == "blake3":
        return _blake3()
    return hashlib.new(algorithm, usedforsecurity=True)


def _blake3() -> _Hash:
    try:
        from blake3 import blake3
    except ImportError:
        raise InvalidDigestError(
            "blake3 digests cannot be verified: the package blake3 is not installed",
            hint="run pip install blake3",
            got="blake3",
        ) from None
    return cast("_Hash", blake3())


def digest_of_chunks(chunks: Iterable[bytes], algorithm: str = "sha256") -> tuple[Digest, int]:
    """Return the digest of the concatenated chunks and their length in bytes."""
    hasher, size = new_hasher(algorithm), 0
    for chunk in chunks:
        hasher.update(chunk)
        size += len(chunk)
    return Digest.of_hasher(hasher), size
