"""Sigstore bundles v0.3, made with a key: a DSSE envelope and which key signed it.

A bundle is attached to a model as cosign does it: a manifest whose artifact type and one layer are
the bundle's type, and whose subject is the model.
Source: sigstore/protobuf-specs, protos/sigstore_bundle.proto; cosign, pkg/oci/remote/write.go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from modelpack import mediatypes
from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.errors import FormatError
from modelpack.gojson import decode_object, encode
from modelpack.manifest import Manifest
from modelpack.supply.dsse import Envelope
from modelpack.supply.keys import PrivateKey
from modelpack.supply.statements import MODEL_SIGNING, PAYLOAD_TYPE, Statement

BUNDLE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
#: How others write the same type.
BUNDLE_TYPES: Final = (
    BUNDLE,
    "application/vnd.dev.sigstore.bundle+json;version=0.3",
    "application/vnd.dev.sigstore.bundle+json;version=0.2",
    "application/vnd.dev.sigstore.bundle+json;version=0.1",
)
CONTENT: Final = "dev.sigstore.bundle.content"
PREDICATE_TYPE: Final = "dev.sigstore.bundle.predicateType"
_EMPTY: Final = b"{}"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A signed statement. Certificates and logs in it are not looked at: keys are what counts."""

    envelope: Envelope
    statement: Statement

    @classmethod
    def parse(cls, raw: bytes, what: str) -> Bundle:
        """Return the bundle in `raw`, not verified; raise `FormatError`."""
        value = decode_object(raw, what)
        if value.get("mediaType") not in BUNDLE_TYPES:
            raise FormatError(f"is a {value.get('mediaType')!r}, expected {BUNDLE}", path=what)
        if "dsseEnvelope" not in value:
            raise FormatError("holds no DSSE envelope", path=what)
        envelope = Envelope.parse(value["dsseEnvelope"], what)
        if len(envelope.signatures) != 1:  # the format demands it, and checking many takes long
            count = len(envelope.signatures)
            raise FormatError(f"has {count} signatures, expected 1", path=what)
        if envelope.payload_type != PAYLOAD_TYPE:
            raise FormatError(
                f"its payload is {envelope.payload_type!r}, expected {PAYLOAD_TYPE}", path=what
            )
        return cls(envelope, Statement.parse(envelope.payload, what))


def signed_bundle(statement: Statement, key: PrivateKey) -> bytes:
    """Return the bytes of a bundle in which `key` signs the statement."""
    public = key.public
    hint = public.pem_hint if statement.predicate_type == MODEL_SIGNING else public.hint
    envelope = Envelope.signed(statement.encode(), PAYLOAD_TYPE, key)
    material: Mapping[str, Any] = {"publicKey": {"hint": hint}, "tlogEntries": []}
    return encode(
        {
            "mediaType": BUNDLE,
            "verificationMaterial": material,
            "dsseEnvelope": envelope.to_json(),
        }
    )


def bundle_manifest(
    bundle: bytes, predicate_type: str, subject: Descriptor
) -> tuple[Manifest, Mapping[Descriptor, bytes]]:
    """Return the manifest that attaches a bundle to `subject`, and its blobs."""
    layer = Descriptor(BUNDLE, Digest.of(bundle), len(bundle))
    config = Descriptor(mediatypes.OCI_EMPTY, Digest.of(_EMPTY), len(_EMPTY))
    manifest = Manifest.build(
        config,
        (layer,),
        artifact_type=BUNDLE,
        subject=Descriptor(subject.media_type, subject.digest, subject.size),
        annotations={CONTENT: "dsse-envelope", PREDICATE_TYPE: predicate_type},
    )
    return manifest, {layer: bundle, config: _EMPTY}
