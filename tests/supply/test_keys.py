"""Keys: accepted and rejected files, and a `repr` without the private key."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from modelpack.errors import ConflictError, FormatError, UnsupportedError
from modelpack.trust.keys import (
    PasswordNeededError,
    generate_key_pair,
    parse_public_key,
    read_private_key,
    read_public_key,
)
from tests.supply.conftest import PASSWORD

# Made by `cosign generate-key-pair` v2.6.1 with the password "secret".
COSIGN = Path(__file__).parent / "cosign"


def test_a_pair_signs_and_verifies(keys: Path) -> None:
    private = read_private_key(keys / "ours.key", PASSWORD)
    public = read_public_key(keys / "ours.pub")
    assert public == private.public
    signature = private.sign(b"content")
    assert public.verifies(signature, b"content")
    assert not public.verifies(signature, b"another")
    assert not public.verifies(signature[:-1], b"content")
    assert not read_public_key(keys / "theirs.pub").verifies(signature, b"content")
    assert stat.S_IMODE((keys / "ours.key").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name
)
def test_the_curves_and_their_hashes(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    """Sigstore's algorithm registry: ECDSA on P-384 with SHA-384, on P-521 with SHA-512."""
    (tmp_path / "key").write_bytes(_pem(ec.generate_private_key(curve)))
    private = read_private_key(tmp_path / "key")
    signature = private.sign(b"content")
    assert private.public.verifies(signature, b"content")
    assert not private.public.verifies(signature, b"another")
    hashed = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}[curve.key_size]
    private.key.public_key().verify(signature, b"content", ec.ECDSA(hashed))


def test_a_key_of_the_real_cosign() -> None:
    private = read_private_key(COSIGN / "cosign.key", b"secret")
    assert private.public == read_public_key(COSIGN / "cosign.pub")


def test_no_key_is_overwritten(keys: Path) -> None:
    before = (keys / "ours.key").read_bytes()
    with pytest.raises(ConflictError, match=r"ours\.key already exists"):
        generate_key_pair(keys / "ours", b"")
    assert (keys / "ours.key").read_bytes() == before


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
@pytest.mark.parametrize("password", [None, b"word"])
def test_plain_pem(tmp_path: Path, form: PrivateFormat, password: bytes | None) -> None:
    lock: KeySerializationEncryption = (
        BestAvailableEncryption(password) if password else NoEncryption()
    )
    path = tmp_path / "key.pem"
    path.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, form, lock)
    )
    # A password for other keys has no effect on an unencrypted key.
    key = read_private_key(path, password or b"for another")
    assert key.public.verifies(key.sign(b"x"), b"x")


def _pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    ("content", "password", "error", "says"),
    [
        (lambda: b"no key", b"", FormatError, "is not a private key in PEM"),
        (lambda: _pem(ec.generate_private_key(ec.SECP256K1())), b"", UnsupportedError, "secp256k1"),
        (lambda: _pem(ed25519.Ed25519PrivateKey.generate()), b"", UnsupportedError, "Ed25519"),
        (lambda: (COSIGN / "cosign.key").read_bytes(), b"wrong", FormatError, "password is wrong"),
        (lambda: (COSIGN / "cosign.key").read_bytes(), None, PasswordNeededError, "is encrypted"),
        (lambda: _cosign_with(b'{"kdf": 1}'), b"", FormatError, "not an encrypted key"),
        (lambda: _cosign_with(b"[]"), b"", FormatError, "expected an object"),
        (lambda: _costly(), b"", FormatError, "scrypt parameters"),
    ],
)
def test_private_keys_that_are_refused(
    tmp_path: Path,
    content: Callable[[], bytes],
    password: bytes | None,
    error: type[Exception],
    says: str,
) -> None:
    path = tmp_path / "key"
    path.write_bytes(content())
    with pytest.raises(error, match=says):
        read_private_key(path, password)


def _cosign_with(value: bytes) -> bytes:
    import base64

    frame = b"-----%s ENCRYPTED SIGSTORE PRIVATE KEY-----\n"
    return frame % b"BEGIN" + base64.b64encode(value) + b"\n" + frame % b"END"


def _costly() -> bytes:
    """A key whose parameters would take hours to compute."""
    import base64

    word = base64.b64encode(bytes(24)).decode()
    return _cosign_with(
        b'{"kdf":{"name":"scrypt","params":{"N":1073741824,"r":8,"p":1},"salt":"%s"},'
        b'"cipher":{"name":"nacl/secretbox","nonce":"%s"},"ciphertext":"%s"}'
        % ((word.encode(),) * 3)
    )


def test_public_keys_that_are_refused(keys: Path) -> None:
    with pytest.raises(FormatError, match="is a private key"):
        read_public_key(keys / "ours.key")
    with pytest.raises(FormatError, match="is not a public key in PEM"):
        parse_public_key(b"-----BEGIN PUBLIC KEY-----\n", "it")
    with pytest.raises(FormatError, match="cannot be read"):
        read_public_key(keys / "none.pub")


def test_a_private_key_does_not_show_itself(keys: Path) -> None:
    key = read_private_key(keys / "ours.key", PASSWORD)
    assert isinstance(key.key, ec.EllipticCurvePrivateKey)
    number = key.key.private_numbers().private_value
    assert repr(key) == f"PrivateKey({str(keys / 'ours.key')!r})"
    assert str(number) not in f"{key!r} {key}"
