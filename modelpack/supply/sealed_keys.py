"""Private keys under a password, in the form of `cosign generate-key-pair`.

A PEM of type ENCRYPTED SIGSTORE PRIVATE KEY (before: COSIGN) around JSON: the parameters of scrypt,
the nonce and the ciphertext of a NaCl secret box, whose content is the key in PKCS #8.
Source: secure-systems-lab/go-securesystemslib, encrypted/encrypted.go.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from typing import Any, Final

from modelpack.errors import FormatError, ModelpackError
from modelpack.gojson import decode_object, encode

_PEM = re.compile(
    rb"-----BEGIN ENCRYPTED (SIGSTORE|COSIGN) PRIVATE KEY-----\s+([A-Za-z0-9+/=\s]+)"
    rb"-----END ENCRYPTED \1 PRIVATE KEY-----"
)
# N, r, p: what is written, and all that is read: a file must not say how long we compute.
_PARAMETERS: Final = (65536, 8, 1)
_KNOWN: Final = {(32768, 8, 1), (65536, 8, 1), (131072, 8, 1)}
_SALT_BYTES: Final = 32
_NONCE_BYTES: Final = 24
_KEY_BYTES: Final = 32
_LINE: Final = 64


def is_sealed(pem: bytes) -> bool:
    """Return whether this is such a key."""
    return _PEM.search(pem) is not None


def sealed(der: bytes, password: bytes) -> bytes:
    """Return the PEM of a PKCS #8 key under `password`, which may be empty."""
    salt, nonce = os.urandom(_SALT_BYTES), os.urandom(_NONCE_BYTES)
    box = _secret_box(_derived(password, salt, _PARAMETERS))
    cost, block, parallel = _PARAMETERS
    value = {
        "kdf": {
            "name": "scrypt",
            "params": {"N": cost, "r": block, "p": parallel},
            "salt": base64.b64encode(salt).decode(),
        },
        "cipher": {"name": "nacl/secretbox", "nonce": base64.b64encode(nonce).decode()},
        "ciphertext": base64.b64encode(box.encrypt(der, nonce).ciphertext).decode(),
    }
    text = base64.b64encode(encode(value)).decode()
    lines = [text[at : at + _LINE] for at in range(0, len(text), _LINE)]
    frame = "-----{} ENCRYPTED SIGSTORE PRIVATE KEY-----"
    return "\n".join((frame.format("BEGIN"), *lines, frame.format("END"), "")).encode()


def opened(pem: bytes, password: bytes, name: str) -> bytes:
    """Return the PKCS #8 key in `pem`; raise `FormatError` if it or the password is wrong."""
    match = _PEM.search(pem)
    assert match is not None
    try:
        value = decode_object(base64.b64decode(match[2]), name)
        kdf, cipher = value["kdf"], value["cipher"]
        if (kdf["name"], cipher["name"]) != ("scrypt", "nacl/secretbox"):
            raise FormatError("is encrypted in a way that is not known here", path=name)
        parameters = tuple(kdf["params"][key] for key in ("N", "r", "p"))
        salt, nonce = _bytes(kdf["salt"]), _bytes(cipher["nonce"])
        ciphertext = _bytes(value["ciphertext"])
    except FormatError:
        raise
    except (KeyError, TypeError, ValueError):
        raise FormatError("is not an encrypted key as cosign writes it", path=name) from None
    if parameters not in _KNOWN or len(nonce) != _NONCE_BYTES:
        raise FormatError(
            f"has parameters of scrypt that cosign never had: {parameters}", path=name
        )
    box = _secret_box(_derived(password, salt, parameters))
    from nacl.exceptions import CryptoError

    try:
        return bytes(box.decrypt(ciphertext, nonce))
    except CryptoError:
        raise FormatError("the password is wrong", path=name) from None


def _derived(password: bytes, salt: bytes, parameters: tuple[int, int, int]) -> bytes:
    cost, block, parallel = parameters
    room = 128 * block * (cost + parallel + 2)
    return hashlib.scrypt(
        password, salt=salt, n=cost, r=block, p=parallel, maxmem=room, dklen=_KEY_BYTES
    )


def _secret_box(key: bytes) -> Any:
    try:
        from nacl.secret import SecretBox
    except ImportError:
        raise ModelpackError(
            "keys under a password need the package pynacl, which is not installed",
            hint="pip install 'modelpack[signing]'",
        ) from None
    return SecretBox(key)


def _bytes(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
