"""Signatures as `cosign sign` keeps them under a tag: `sha256-<hex>.sig` beside the model.

Each layer is a payload (containers/image, "simple signing") with its signature in an annotation.
Source: sigstore/cosign, specs/SIGNATURE_SPEC.md.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import decode_object, encode
from modelpack.artifacts.manifest import Manifest
from modelpack.errors import FormatError
from modelpack.trust.keys import PrivateKey, PublicKey
from modelpack.trust.sigstore_bundle import decoded

PAYLOAD: Final = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE: Final = "dev.cosignproject.cosign/signature"
_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
_TYPE: Final = "cosign container image signature"
# The second is what newer releases of cosign write into the same payload.
_TYPES: Final = (_TYPE, "https://sigstore.dev/cosign/sign/v1")


@dataclass(frozen=True, slots=True)
class SimpleSignature:
    """A payload and its signature; `digest` is the manifest that the payload is about."""

    payload: bytes
    signature: bytes
    digest: Digest

    @classmethod
    def parse(cls, payload: bytes, layer: Descriptor, what: str) -> SimpleSignature:
        """Return what a layer of the tag's manifest holds, not verified; raise `FormatError`."""
        value = decode_object(payload, what)
        try:
            signature = decoded(layer.annotations.get(SIGNATURE))
            critical = value["critical"]
            kind, image = critical["type"], critical["image"]["docker-manifest-digest"]
            if kind not in _TYPES:
                raise FormatError(f"is a {kind!r}, expected {_TYPE!r}", path=what)
            return cls(payload, signature, Digest.parse(image))
        except FormatError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError):
            raise FormatError("is not a signature as cosign writes it", path=what) from None

    def is_signed_by(self, key: PublicKey) -> bool:
        """Return whether the signature is by `key`."""
        return key.verifies(self.signature, self.payload)


def signature_tag(digest: Digest) -> str:
    """Return the tag under which the signatures of a manifest are."""
    return f"{digest.algorithm}-{digest.encoded}.sig"


def sign_simply(name: str, digest: Digest, key: PrivateKey) -> tuple[Descriptor, bytes]:
    """Return the layer and the payload by which `key` signs the manifest of `name`.

    `name` is registry and repository: what a reader is told, and nobody checks.
    """
    payload = encode(
        {
            "critical": {
                "identity": {"docker-reference": name},
                "image": {"docker-manifest-digest": str(digest)},
                "type": _TYPE,
            },
            "optional": None,
        }
    )
    signature = base64.b64encode(key.sign(payload)).decode()
    return Descriptor(PAYLOAD, Digest.of(payload), len(payload), {SIGNATURE: signature}), payload


def signatures_manifest(
    layers: Sequence[Descriptor],
) -> tuple[Manifest, Mapping[Descriptor, bytes]]:
    """Return the manifest for the tag, and its config: of an image whose layers are `layers`."""
    value: dict[str, Any] = {
        "architecture": "",
        "created": "0001-01-01T00:00:00Z",
        "history": [{"created": "0001-01-01T00:00:00Z"} for _ in layers],
        "os": "",
        "rootfs": {"type": "layers", "diff_ids": [str(layer.digest) for layer in layers]},
        "config": {},
    }
    raw = encode(value)
    config = Descriptor(_CONFIG, Digest.of(raw), len(raw))
    return Manifest.build(config, layers), {config: raw}
