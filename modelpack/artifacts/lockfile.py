"""LockFile: `modelpack.lock`, the digests of the models that a project uses.

    version = 1

    [[model]]
    reference = "docker.io/ai/smollm2:latest"
    digest = "sha256:…"

It is TOML with one table per reference, sorted: two branches that lock different models merge, and
a change is one line in a review.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import Reference
from modelpack.errors import (
    FormatError,
    InvalidDigestError,
    InvalidReferenceError,
    NotFoundError,
    UnsupportedError,
)

#: The name of the file in a project's directory.
FILE_NAME: Final = "modelpack.lock"
MAX_BYTES: Final = 4 * 1024 * 1024
_VERSION: Final = 1
_HEAD: Final = """\
# Which models this project uses. `modelpack lock` writes it, `modelpack pull --locked` reads it;
# keep it in version control.
version = 1
"""


@dataclass(frozen=True, slots=True)
class LockFile:
    """Digests by reference; every reference has a tag and no digest."""

    digests: Mapping[Reference, Digest] = field(default_factory=dict, hash=False)

    @classmethod
    def parse(cls, raw: bytes, what: str = FILE_NAME) -> LockFile:
        """Return the lock file in `raw`; `what` names it in errors.

        Raises `UnsupportedError` for another version, and `FormatError` if it is invalid.
        """
        if len(raw) > MAX_BYTES:
            raise FormatError(
                f"has {len(raw)} bytes, more than the limit of {MAX_BYTES}", path=what
            )
        try:
            value = tomllib.loads(raw.decode())
        except (ValueError, RecursionError) as error:
            hint = "undo the last edit, or delete the file and run `modelpack lock REF...`"
            raise FormatError(f"is not TOML: {error}", path=what, hint=hint) from None
        version = value.get("version")
        if type(version) is not int or version != _VERSION:
            raise UnsupportedError(
                f"version is {version!r}, expected {_VERSION}",
                path=what,
                hint="use the version of Modelpack that wrote it",
            )
        models = value.get("model", [])
        if not isinstance(models, list):
            raise FormatError("'model' is not an array of tables ([[model]])", path=what)
        digests: dict[Reference, Digest] = {}
        for i, table in enumerate(models):
            reference, digest = _parsed(table, f"{what}: model[{i}]")
            if reference in digests:
                raise FormatError(f"duplicate reference {reference}", path=f"{what}: model[{i}]")
            digests[reference] = digest
        return cls(digests)

    def encode(self) -> bytes:
        """Return the bytes of the file; they do not depend on the order of the digests."""
        tables = [
            f'\n[[model]]\nreference = "{reference}"\ndigest = "{self.digests[reference]}"\n'
            for reference in sorted(self.digests, key=str)
        ]
        return (_HEAD + "".join(tables)).encode()

    def digest_of(self, reference: Reference, what: str = FILE_NAME) -> Digest:
        """Return the locked digest of a reference; raises `NotFoundError`."""
        digest = self.digests.get(reference)
        if digest is None:
            raise NotFoundError(
                f"{reference} is not in {what}", hint=f"run `modelpack lock {reference}`"
            )
        return digest

    def with_digests(self, digests: Mapping[Reference, Digest]) -> LockFile:
        """Return a lock file with these references added or changed."""
        return LockFile({**self.digests, **digests})

    def without(self, references: Iterable[Reference]) -> LockFile:
        """Return a lock file without these references."""
        gone = set(references)
        return LockFile({ref: digest for ref, digest in self.digests.items() if ref not in gone})


def lockable(text: str) -> Reference:
    """Return the reference in `text`; raise `InvalidReferenceError` if it has a digest."""
    reference = Reference.parse(text)
    if reference.digest is not None:
        raise InvalidReferenceError(
            f"{text} has a digest already: only tags can be locked", reference=text
        )
    return reference


def _parsed(table: Any, where: str) -> tuple[Reference, Digest]:
    if not isinstance(table, dict):
        raise FormatError("is not a table", path=where)
    unknown = sorted(table.keys() - {"reference", "digest"})
    if unknown:
        raise FormatError(f"has unknown keys: {', '.join(map(repr, unknown))[:200]}", path=where)
    texts = [table.get(key) for key in ("reference", "digest")]
    if not all(isinstance(text, str) for text in texts):
        raise FormatError("needs 'reference' and 'digest', both strings", path=where)
    try:
        reference, digest = lockable(str(texts[0])), Digest.parse(str(texts[1]))
    except (InvalidReferenceError, InvalidDigestError) as error:
        raise FormatError(str(error), path=where) from None
    if str(reference) != texts[0]:
        # A short name may mean different registries on different machines.
        raise FormatError(f"short reference {texts[0]!r}; write {str(reference)!r}", path=where)
    return reference, digest
