"""in-toto statements: what is said (a predicate) about what (subjects, by digest).

Source: in-toto/attestation, spec/v1/statement.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from modelpack.digest import Digest
from modelpack.errors import FormatError, InvalidDigestError
from modelpack.gojson import decode_object, encode

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
#: "This is signed", nothing more: what `cosign sign` says in a bundle.
COSIGN_SIGN: Final = "https://sigstore.dev/cosign/sign/v1"
#: The files of a model, by OpenSSF model signing 1.0.
MODEL_SIGNING: Final = "https://model_signing/signature/v1.0"
#: The report of a smoke test (in-toto/attestation, spec/predicates/test-result.md).
TEST_RESULT: Final = "https://in-toto.io/attestation/test-result/v0.1"


@dataclass(frozen=True, slots=True)
class Subject:
    """What a statement is about; its name may be empty."""

    digest: Digest
    name: str = ""


@dataclass(frozen=True, slots=True)
class Statement:
    """A predicate of a type about subjects."""

    subjects: tuple[Subject, ...]
    predicate_type: str
    predicate: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def parse(cls, raw: bytes, what: str) -> Statement:
        """Return the statement in `raw`; raise `FormatError`."""
        value = decode_object(raw, what)
        if value.get("_type") != STATEMENT_TYPE:
            raise FormatError(f"is a {value.get('_type')!r}, expected {STATEMENT_TYPE}", path=what)
        try:
            subjects = tuple(_subject(one) for one in value["subject"])
            kind, predicate = value["predicateType"], value.get("predicate") or {}
        except (KeyError, TypeError, AttributeError, InvalidDigestError):
            raise FormatError("is not an in-toto statement", path=what) from None
        if not subjects or not isinstance(kind, str) or not isinstance(predicate, dict):
            raise FormatError("is not an in-toto statement", path=what)
        return cls(subjects, kind, predicate)

    def encode(self) -> bytes:
        """Return the statement's bytes; the same statement gives the same bytes."""
        value: dict[str, Any] = {
            "_type": STATEMENT_TYPE,
            "subject": [
                ({"name": one.name} if one.name else {})
                | {"digest": {one.digest.algorithm: one.digest.encoded}}
                for one in self.subjects
            ],
            "predicateType": self.predicate_type,
            "predicate": dict(self.predicate),
        }
        return encode(value)

    def is_about(self, digest: Digest) -> bool:
        """Return whether one of the subjects has this digest."""
        return any(one.digest == digest for one in self.subjects)


def _subject(value: Any) -> Subject:
    """Return the subject; of several digests, SHA-256 is the one that registries use."""
    digests = value["digest"]
    algorithm = "sha256" if "sha256" in digests else "sha512"
    return Subject(Digest.parse(f"{algorithm}:{digests[algorithm]}"), str(value.get("name", "")))
