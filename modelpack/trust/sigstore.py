"""The formats of sigstore: in-toto statements in signed bundles, and cosign's simple signatures.

A `Bundle` is a DSSE `Envelope` around a `Statement`; it is attached to the model as a referrer. A
`SimpleSignature` is a layer of the manifest under cosign's tag `sha256-<hex>.sig`.
Sources: in-toto/attestation, spec/v1/statement.md; sigstore/cosign, specs/SIGNATURE_SPEC.md;
containers/image, "simple signing".
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import ALGORITHMS, Digest
from modelpack.artifacts.json_document import decode_object, encode
from modelpack.artifacts.manifest import Manifest
from modelpack.errors import FormatError, InvalidDigestError
from modelpack.trust.keys import PrivateKey, PublicKey

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
#: The predicate of `cosign sign` in a bundle, which states only that the subject is signed.
COSIGN_SIGN: Final = "https://sigstore.dev/cosign/sign/v1"
#: The predicate of OpenSSF model signing 1.0, which lists the files of a model.
MODEL_SIGNING: Final = "https://model_signing/signature/v1.0"
#: The report of a smoke test (in-toto/attestation, spec/predicates/test-result.md).
TEST_RESULT: Final = "https://in-toto.io/attestation/test-result/v0.1"


@dataclass(frozen=True, slots=True)
class Subject:
    """The subject of a statement; its name may be empty."""

    digest: Digest
    name: str = ""
    annotations: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Statement:
    """An in-toto statement: a predicate about subjects."""

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
        """Return the bytes of the statement; equal statements give equal bytes."""
        value: dict[str, Any] = {
            "_type": STATEMENT_TYPE,
            "subject": [
                ({"name": one.name} if one.name else {})
                | {"digest": {one.digest.algorithm: one.digest.encoded}}
                | ({"annotations": dict(one.annotations)} if one.annotations else {})
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
    """Return the subject in decoded JSON, with its SHA-256 digest if it has several."""
    digests = value["digest"]
    algorithm = next((name for name in ALGORITHMS if name in digests), "sha256")
    digest = Digest.parse(f"{algorithm}:{digests[algorithm]}")
    annotations = value.get("annotations") or {}
    if not isinstance(annotations, dict):
        raise TypeError
    return Subject(digest, str(value.get("name", "")), annotations)


@dataclass(frozen=True, slots=True)
class Envelope:
    """A DSSE envelope: a payload with its type and its signatures."""

    payload: bytes
    payload_type: str
    signatures: tuple[bytes, ...]

    @classmethod
    def signed(cls, payload: bytes, payload_type: str, key: PrivateKey) -> Envelope:
        """Return the envelope of `payload` with a signature by `key`."""
        return cls(payload, payload_type, (key.sign(pre_authentication(payload_type, payload)),))

    @classmethod
    def parse(cls, value: Any, what: str) -> Envelope:
        """Return the envelope of a decoded JSON object; raise `FormatError`."""
        try:
            payload, *signatures = (
                base64.b64decode(text, validate=True)
                for text in (value["payload"], *(one["sig"] for one in value["signatures"]))
            )
            return cls(payload, str(value["payloadType"]), tuple(signatures))
        except (KeyError, TypeError, ValueError):
            raise FormatError("is not a DSSE envelope", path=what) from None

    def to_json(self) -> dict[str, Any]:
        """Return the envelope as a JSON object."""
        return {
            "payload": base64.b64encode(self.payload).decode(),
            "payloadType": self.payload_type,
            "signatures": [{"sig": base64.b64encode(one).decode()} for one in self.signatures],
        }

    def is_signed_by(self, key: PublicKey) -> bool:
        """Return whether one of the signatures is by `key`."""
        content = pre_authentication(self.payload_type, self.payload)
        return any(key.verifies(signature, content) for signature in self.signatures)


def pre_authentication(payload_type: str, payload: bytes) -> bytes:
    """Return the bytes that are signed (DSSE protocol, "Signature Definition")."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


BUNDLE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
#: All spellings and versions of the type that other tools write.
BUNDLE_TYPES: Final = (
    BUNDLE,
    "application/vnd.dev.sigstore.bundle+json;version=0.3",
    "application/vnd.dev.sigstore.bundle+json;version=0.2",
    "application/vnd.dev.sigstore.bundle+json;version=0.1",
)
CONTENT: Final = "dev.sigstore.bundle.content"
PREDICATE_TYPE: Final = "dev.sigstore.bundle.predicateType"
_CERTIFICATES: Final = frozenset(("certificate", "x509CertificateChain"))
_EMPTY: Final = b"{}"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A signed statement; `raw` are the bytes of the bundle.

    Its certificate and log entries, which `keyless` verifies, have no meaning for a key.
    """

    envelope: Envelope
    statement: Statement
    raw: bytes = field(repr=False)
    has_certificate: bool

    @classmethod
    def parse(cls, raw: bytes, what: str) -> Bundle:
        """Return the bundle in `raw`, not verified; raise `FormatError`."""
        value = decode_object(raw, what)
        if value.get("mediaType") not in BUNDLE_TYPES:
            raise FormatError(f"is a {value.get('mediaType')!r}, expected {BUNDLE}", path=what)
        if "dsseEnvelope" not in value:
            raise FormatError("has no DSSE envelope", path=what)
        envelope = Envelope.parse(value["dsseEnvelope"], what)
        count = len(envelope.signatures)
        if count != 1:  # required by the format; verifying many would be slow
            raise FormatError(f"has {count} signatures, expected 1", path=what)
        if envelope.payload_type != PAYLOAD_TYPE:
            raise FormatError(
                f"has a payload of type {envelope.payload_type!r}, expected {PAYLOAD_TYPE}",
                path=what,
            )
        statement = Statement.parse(envelope.payload, what)
        if statement.predicate_type == MODEL_SIGNING and not _has_material(value):
            raise FormatError(
                "has no verification material: expected a public key, a chain of certificates, or "
                "a certificate with log entries",
                path=what,
            )
        material = value.get("verificationMaterial")
        certified = isinstance(material, dict) and bool(material.keys() & _CERTIFICATES)
        return cls(envelope, statement, raw, certified)

    def is_signed_by(self, key: PublicKey) -> bool:
        """Return whether the signature is by `key`."""
        return self.envelope.is_signed_by(key)


def _has_material(bundle: Mapping[str, Any]) -> bool:
    """Return whether a bundle has the fields of a signing method (model signing 1.0, 4.1)."""
    material = bundle.get("verificationMaterial")
    if not isinstance(material, dict):
        return False
    key, chain = material.get("publicKey"), material.get("x509CertificateChain")
    if isinstance(key, dict) and key.keys() & {"hint", "rawBytes"}:
        return True
    if isinstance(chain, dict) and chain.get("certificates"):
        return True
    return bool(material.get("certificate") and material.get("tlogEntries"))


def signed_bundle(
    statement: Statement, key: PrivateKey, material: Mapping[str, Any] | None = None
) -> bytes:
    """Return the bytes of a bundle with the statement signed by `key`.

    `material` is what to verify it with, by default a hint for the public key.
    """
    public = key.public
    hint = public.pem_hint if statement.predicate_type == MODEL_SIGNING else public.hint
    envelope = Envelope.signed(statement.encode(), PAYLOAD_TYPE, key)
    value: dict[str, Any] = {
        "mediaType": BUNDLE,
        "verificationMaterial": dict(material or {"publicKey": {"hint": hint}, "tlogEntries": []}),
        "dsseEnvelope": envelope.to_json(),
    }
    return encode(value)


def bundle_manifest(
    bundle: bytes, predicate_type: str, subject: Descriptor
) -> tuple[Manifest, Mapping[Descriptor, bytes]]:
    """Return the manifest that attaches a bundle to `subject`, and its blobs."""
    layer = Descriptor(BUNDLE, Digest.of(bundle), len(bundle))
    config = Descriptor(media_types.OCI_EMPTY, Digest.of(_EMPTY), len(_EMPTY))
    manifest = Manifest.build(
        config,
        (layer,),
        artifact_type=BUNDLE,
        subject=Descriptor(subject.media_type, subject.digest, subject.size),
        annotations={CONTENT: "dsse-envelope", PREDICATE_TYPE: predicate_type},
    )
    return manifest, {layer: bundle, config: _EMPTY}


PAYLOAD: Final = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE: Final = "dev.cosignproject.cosign/signature"
_TYPE: Final = "cosign container image signature"
# Newer releases of cosign write the second type into the same payload.
_TYPES: Final = (_TYPE, COSIGN_SIGN)


@dataclass(frozen=True, slots=True)
class SimpleSignature:
    """A payload of cosign and its signature; `digest` is that of the signed manifest."""

    payload: bytes
    signature: bytes
    digest: Digest

    @classmethod
    def parse(cls, payload: bytes, layer: Descriptor, what: str) -> SimpleSignature:
        """Return the unverified signature in a layer of cosign's tag; raise `FormatError`."""
        value = decode_object(payload, what)
        try:
            signature = base64.b64decode(layer.annotations[SIGNATURE], validate=True)
            critical = value["critical"]
            kind, image = critical["type"], critical["image"]["docker-manifest-digest"]
            if kind not in _TYPES:
                raise FormatError(f"is a {kind!r}, expected {_TYPE!r}", path=what)
            return cls(payload, signature, Digest.parse(image))
        except FormatError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError):
            raise FormatError("is not a signature in cosign's format", path=what) from None

    def is_signed_by(self, key: PublicKey) -> bool:
        """Return whether the signature is by `key`."""
        return key.verifies(self.signature, self.payload)


def signature_tag(digest: Digest) -> str:
    """Return cosign's tag for the signatures of the manifest with this digest."""
    return f"{digest.algorithm}-{digest.encoded}.sig"


def sign_simply(name: str, digest: Digest, key: PrivateKey) -> tuple[Descriptor, bytes]:
    """Return the layer and the payload of a signature by `key` over the manifest `digest`.

    `name` is its `registry/repository`, which is information for readers and is not verified.
    """
    critical = {
        "identity": {"docker-reference": name},
        "image": {"docker-manifest-digest": str(digest)},
        "type": _TYPE,
    }
    payload = encode({"critical": critical, "optional": None})
    signature = base64.b64encode(key.sign(payload)).decode()
    return Descriptor(PAYLOAD, Digest.of(payload), len(payload), {SIGNATURE: signature}), payload


def signatures_manifest(
    layers: Sequence[Descriptor],
) -> tuple[Manifest, Mapping[Descriptor, bytes]]:
    """Return the manifest for cosign's tag, an image of these layers, and its config."""
    value: dict[str, Any] = {
        "architecture": "",
        "created": "0001-01-01T00:00:00Z",
        "history": [{"created": "0001-01-01T00:00:00Z"} for _ in layers],
        "os": "",
        "rootfs": {"type": "layers", "diff_ids": [str(layer.digest) for layer in layers]},
        "config": {},
    }
    raw = encode(value)
    config = Descriptor(media_types.OCI_IMAGE_CONFIG, Digest.of(raw), len(raw))
    return Manifest.build(config, layers), {config: raw}
