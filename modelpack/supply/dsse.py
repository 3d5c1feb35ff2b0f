"""DSSE: a signature over a payload and its type. Source: secure-systems-lab/dsse, v1.0."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

from modelpack.errors import FormatError
from modelpack.supply.keys import PrivateKey, PublicKey


@dataclass(frozen=True, slots=True)
class Envelope:
    """A payload with its type and its signatures."""

    payload: bytes
    payload_type: str
    signatures: tuple[bytes, ...]

    @classmethod
    def signed(cls, payload: bytes, payload_type: str, key: PrivateKey) -> Envelope:
        """Return the envelope of a payload that `key` signs."""
        return cls(payload, payload_type, (key.sign(pre_authentication(payload_type, payload)),))

    @classmethod
    def parse(cls, value: Any, what: str) -> Envelope:
        """Return the envelope of a decoded JSON object; raise `FormatError`."""
        try:
            signatures = tuple(decoded(one["sig"]) for one in value["signatures"])
            envelope = cls(decoded(value["payload"]), str(value["payloadType"]), signatures)
        except (KeyError, TypeError, ValueError):
            raise FormatError("is not a DSSE envelope", path=what) from None
        return envelope

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
    """Return the bytes that a signature is over (DSSE protocol, "Signature Definition")."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def decoded(text: Any) -> bytes:
    """Return what base64 `text` stands for; raise `ValueError` for anything else."""
    if not isinstance(text, str):
        raise ValueError("is not a string")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
