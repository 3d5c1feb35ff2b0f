"""Read, write and generate ECDSA keys for signatures, in the encrypted format of cosign.

An encrypted key is a PEM of type ENCRYPTED SIGSTORE PRIVATE KEY (formerly COSIGN). It contains a
JSON object with the parameters of scrypt, and the nonce and ciphertext of a NaCl secret box, which
contains the key in PKCS #8.
Sources: secure-systems-lab/go-securesystemslib, encrypted/encrypted.go; the algorithm registries of
Sigstore and OpenSSF model signing for curves and their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from modelpack.artifacts.json_document import decode_object, encode
from modelpack.errors import ConflictError, FormatError, ModelpackError, UnsupportedError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        EllipticCurve,
        EllipticCurvePublicKey,
        EllipticCurveSignatureAlgorithm,
    )

_PEM = re.compile(
    rb"-----BEGIN ENCRYPTED (SIGSTORE|COSIGN) PRIVATE KEY-----\s+([A-Za-z0-9+/=\s]+)"
    rb"-----END ENCRYPTED \1 PRIVATE KEY-----"
)
# N, r and p of scrypt, for new keys and all accepted ones. Other values in a file are rejected,
# since they would determine how long the derivation takes.
_PARAMETERS: Final = (65536, 8, 1)
_KNOWN: Final = {(32768, 8, 1), (65536, 8, 1), (131072, 8, 1)}
_SALT_BYTES: Final = 32
_NONCE_BYTES: Final = 24
_KEY_BYTES: Final = 32
_LINE: Final = 64
#: The supported curves, and the hash that signatures of their keys are made with.
_HASHES: Final = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}


def is_sealed(pem: bytes) -> bool:
    """Return whether `pem` is a private key in cosign's encrypted format."""
    return _PEM.search(pem) is not None


def sealed(der: bytes, password: bytes) -> bytes:
    """Return the PEM of a PKCS #8 key encrypted with `password`, which may be empty."""
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
            raise FormatError(
                "has an unknown encryption, expected scrypt and nacl/secretbox", path=name
            )
        parameters = tuple(kdf["params"][key] for key in ("N", "r", "p"))
        salt, nonce, ciphertext = (
            base64.b64decode(text, validate=True)
            for text in (kdf["salt"], cipher["nonce"], value["ciphertext"])
        )
    except FormatError:
        raise
    except (KeyError, TypeError, ValueError):
        raise FormatError("is not an encrypted key in cosign's format", path=name) from None
    if parameters not in _KNOWN or len(nonce) != _NONCE_BYTES:
        raise FormatError(f"has scrypt parameters that cosign never used: {parameters}", path=name)
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
            "encrypted keys need the package pynacl, which is not installed",
            hint="run pip install 'modelpack[signing]'",
        ) from None
    return SecretBox(key)


_MAX_BYTES: Final = 64 * 1024
_HINT = "generate a key with `modelpack keygen` or `cosign generate-key-pair`"


class PasswordNeededError(ModelpackError):
    """A private key is encrypted, and no password was given."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that verifies signatures; `name` is for messages."""

    key: EllipticCurvePublicKey
    name: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and self.der == other.der

    def __hash__(self) -> int:
        return hash(self.der)

    @property
    def der(self) -> bytes:
        """The SubjectPublicKeyInfo, as DER."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        return self.key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    @property
    def pem(self) -> bytes:
        """The SubjectPublicKeyInfo, as PEM."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        return self.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the SubjectPublicKeyInfo, in hexadecimal."""
        return hashlib.sha256(self.der).hexdigest()

    @property
    def hint(self) -> str:
        """The hint for the key in cosign's bundles: the fingerprint in base64."""
        return base64.b64encode(hashlib.sha256(self.der).digest()).decode()

    @property
    def pem_hint(self) -> str:
        """The hint for the key in OpenSSF bundles: the SHA-256 of the PEM, in hexadecimal."""
        return hashlib.sha256(self.pem).hexdigest()

    def verifies(self, signature: bytes, content: bytes) -> bool:
        """Return whether `signature` (ASN.1) is one of this key over `content`."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

        try:
            self.key.verify(signature, content, ECDSA(_hash_of(self.key)))
        except InvalidSignature:
            return False
        return True


class SigningKey(Protocol):
    """The part of cryptography's private keys that signs; `pkcs11` has another one."""

    @property
    def curve(self) -> EllipticCurve:
        """The curve of the key."""
        ...

    def public_key(self) -> EllipticCurvePublicKey:
        """Return the public key of the pair."""
        ...

    def sign(self, data: bytes, signature_algorithm: EllipticCurveSignatureAlgorithm) -> bytes:
        """Return the ASN.1 signature over `data`."""
        ...


@dataclass(frozen=True, slots=True, repr=False)
class PrivateKey:
    """A key that signs; its `repr` does not contain the key."""

    key: SigningKey
    name: str

    def __repr__(self) -> str:
        return f"PrivateKey({self.name!r})"

    @property
    def public(self) -> PublicKey:
        """The public key of the pair."""
        return PublicKey(self.key.public_key(), self.name)

    def sign(self, content: bytes) -> bytes:
        """Return the ASN.1 signature over `content`."""
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

        return self.key.sign(content, ECDSA(_hash_of(self.key)))


def read_public_key(path: Path | str) -> PublicKey:
    """Return the public key in the PEM file; raise `FormatError` or `UnsupportedError`."""
    return parse_public_key(read_file(Path(path)), str(path))


def parse_public_key(pem: bytes, name: str) -> PublicKey:
    """Return the public key in `pem`; `name` names it in errors."""
    need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if b"PRIVATE KEY" in pem:
        raise FormatError(
            "is a private key, expected a public key",
            path=name,
            hint="use the .pub file of the pair; keep the private key secret",
        )
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise FormatError("is not a public key in PEM", path=name, hint=_HINT) from None
    return PublicKey(supported(key, name), name)


def read_private_key(path: Path | str, password: bytes | None = None) -> PrivateKey:
    """Return the private key in the file, decrypted with `password` if it is encrypted.

    Raises `PasswordNeededError` if an encrypted key has no password, `FormatError` for a wrong
    password or a file that is not a key, and `UnsupportedError` for other kinds of keys.
    """
    need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_der_private_key as load_der
    from cryptography.hazmat.primitives.serialization import load_pem_private_key as load_pem

    name, pem = str(path), read_file(Path(path))
    encrypted = is_sealed(pem) or b"ENCRYPTED" in pem
    if encrypted and password is None:
        raise PasswordNeededError(
            f"{name} is encrypted, but no password was given",
            hint="set COSIGN_PASSWORD in the environment",
        )
    try:
        if is_sealed(pem):
            key = load_der(opened(pem, password or b"", name), None)
        else:
            key = load_pem(pem, password if encrypted else None)
    except FormatError:
        raise
    except (ValueError, TypeError, UnsupportedAlgorithm):
        what = "the password is wrong" if encrypted else "is not a private key in PEM"
        raise FormatError(what, path=name, hint=None if encrypted else _HINT) from None
    return PrivateKey(supported(key, name), name)


def generate_key_pair(prefix: Path | str, password: bytes) -> tuple[Path, Path]:
    """Write a new key pair to `prefix`.key, encrypted in cosign's format, and `prefix`.pub.

    Returns the two paths; raises `ConflictError` if one of the files exists.
    """
    need_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    private, public = Path(f"{prefix}.key"), Path(f"{prefix}.pub")
    for path in (private, public):
        if path.exists():
            raise ConflictError(f"{path} already exists", hint="choose another name")
    key = generate_private_key(SECP256R1())
    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    _create(private, sealed(der, password), 0o600)
    _create(public, PublicKey(key.public_key(), str(public)).pem, 0o644)
    return private, public


def supported(key: Any, name: str) -> Any:
    """Return a key of cryptography if its curve is supported; raise `UnsupportedError`."""
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in _HASHES:
        got = f"a key on {curve}" if curve else f"a {type(key).__name__.lstrip('_')}"
        raise UnsupportedError(
            f"is {got}, expected ECDSA on P-256, P-384 or P-521", path=name, hint=_HINT
        )
    return key


def _hash_of(key: Any) -> Any:
    """Return the hash that signatures of a key are made with."""
    from cryptography.hazmat.primitives import hashes

    return getattr(hashes, _HASHES[key.curve.name])()


def read_file(path: Path) -> bytes:
    """Return the first 64 KiB of a file of keys or certificates; raise `FormatError`."""
    try:
        with path.open("rb") as stream:
            return stream.read(_MAX_BYTES)
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", path=str(path)) from error


def _create(path: Path, content: bytes, mode: int) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(handle, "wb") as stream:
            stream.write(content)
    except FileExistsError:
        raise ConflictError(f"{path} already exists", hint="choose another name") from None
    except OSError as error:
        raise FormatError(f"cannot be written: {error.strerror}", path=str(path)) from error


def need_cryptography() -> None:
    """Raise `ModelpackError` if cryptography is not installed."""
    try:
        import cryptography  # noqa: F401 - only checks that it is installed
    except ImportError:
        raise ModelpackError(
            "signatures need the package cryptography, which is not installed",
            hint="run pip install 'modelpack[signing]'",
        ) from None
