"""Keys in tokens (PKCS #11): their URIs, and signatures by SoftHSM."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from model_signing import verifying

import modelpack
from modelpack.cli.main import run
from modelpack.errors import (
    ModelpackError,
    NotFoundError,
    UnsupportedError,
    UntrustedError,
    UsageError,
)
from modelpack.operations import signatures
from modelpack.operations.lookup import inspect
from modelpack.trust.certificates import CertifiedKey
from modelpack.trust.keys import PrivateKey, PublicKey
from modelpack.trust.model_signing import model_statement
from modelpack.trust.pkcs11 import KeyURI, _TokenKey, read_token_key, read_token_public_key
from modelpack.trust.signatures import MANIFEST_FORMATS
from modelpack.trust.sigstore import Bundle, signed_bundle
from tests.supply.conftest import Published
from tests.supply.softhsm import PIN, SoftHSM, make_token
from tests.supply.test_certificates import Company

URIS = {
    "pkcs11:object=a": ({}, None, "a", None),
    "pkcs11:token=the%20team;object=a%3Bb": ({"token": "the team"}, None, "a;b", None),
    "pkcs11:id=%01%FF": ({}, None, None, b"\x01\xff"),
    "pkcs11:id=1%20;type=private": ({}, None, None, b"1 "),
    "pkcs11:slot-id=7;object=a;id=%00": ({}, 7, "a", b"\0"),
    "pkcs11:serial=1f;manufacturer=S;model=v2;object=%C3%A9": (
        {"serial": "1f", "manufacturer": "S", "model": "v2"}, None, "é", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", URIS)
def test_uris(text: str) -> None:
    token, slot, label, identifier = URIS[text]
    for query in ("", "?module-path=/lib/a%26b.so&pin-source=file:/run/pin"):
        uri = KeyURI.parse(text + query)
        assert (uri.token, uri.slot, uri.label, uri.id) == (token, slot, label, identifier)
        assert uri.name == text
    assert (uri.module, uri.pin_file) == (Path("/lib/a&b.so"), Path("/run/pin"))


@pytest.mark.parametrize(
    "source", ["/run/pin", "file:/run/pin", "file:///run/pin", "file:%2Frun%2Fpin"]
)
def test_files_of_a_pin(source: str) -> None:
    assert KeyURI.parse(f"pkcs11:object=a?pin-source={source}").pin_file == Path("/run/pin")


def test_a_number_sign_belongs_to_the_path_of_a_pin() -> None:
    uri = KeyURI.parse("pkcs11:object=a?pin-source=file:/run/a%23b%3Fc")
    assert uri.pin_file == Path("/run/a#b?c")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pkcs11:", "has neither object nor id"),
        ("pkcs11:token=team", "has neither object nor id"),
        ("pkcs11:release", "is not a PKCS #11 URI"),
        ("pkcs11:object=a b", "is not a PKCS #11 URI"),
        ("pkcs11:object=%4", "is not a PKCS #11 URI"),
        ("pkcs11:object=a;", "is not a PKCS #11 URI"),
        ("pkcs11:object=a;object=b", "has the attribute object twice"),
        ("pkcs11:object=a;library-version=3", "the attribute library-version is not supported"),
        ("pkcs11:object=a?module-name=p11", "the attribute module-name is not supported"),
        ("pkcs11:object=a;slot-id=x", "slot-id is not a number"),
        ("pkcs11:object=a;type=cert", "has the type cert, expected private or public"),
        ("pkcs11:object=a?pin-value=2468", "can be read by other processes"),
        ("pkcs11:object=a;pin-value=2468", "can be read by other processes"),
        ("pkcs11:object=a&pin-value=2468", "can be read by other processes"),
        ("pkcs11:object=a;PIN%2Dvalue=2468", "can be read by other processes"),
        (f"pkcs11:object=a;slot-id={'9' * 5000}", "slot-id is not a number"),
        ("pkcs11:object=a?pin-source=file://[x", "pin-source is not a file"),
        ("pkcs11:object=a?pin-source=file:/run/a?b", "pin-source is not a file"),
        ("pkcs11:object=a?pin-source=file:/run/a%00b", "a path contains a null character"),
        ("pkcs11:object=a?module-path=/lib/a%00b", "a path contains a null character"),
        ("pkcs11:object=a?pin-source=pin", "pin-source is not a file"),
        ("pkcs11:object=a?pin-source=https://pins.example/", "pin-source is not a file"),
        ("pkcs11:object=a?pin-source=file://host/pin", "pin-source is not a file"),
        ("pkcs11:object=a?pin-source=%7Ccat", "pin-source is not a file"),
    ],
)
def test_invalid_uris(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        KeyURI.parse(text)
    assert says in str(caught.value)
    assert "2468" not in f"{caught.value} {caught.value.hint}"


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a library of the token nor the package is there."""
    monkeypatch.delenv("COSIGN_PKCS11_MODULE_PATH", raising=False)
    with pytest.raises(UsageError, match="the library of the token is not known"):
        read_token_key("pkcs11:object=a", "1234")
    (tmp_path / "module.so").write_text("no library")
    for name in ("module.so", "none.so"):
        with pytest.raises(ModelpackError, match=f"{name} is not a PKCS #11 library"):
            read_token_key(f"pkcs11:object=a?module-path={tmp_path / name}", "1234")
    monkeypatch.setitem(sys.modules, "pkcs11", None)
    with pytest.raises(ModelpackError, match="python-pkcs11, which is not installed") as caught:
        read_token_public_key("pkcs11:object=a")
    assert caught.value.hint == "run pip install 'modelpack[pkcs11]'"


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftHSM]:
    """A token for this process: the library reads its configuration once."""
    made = make_token(tmp_path_factory.mktemp("softhsm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", made.environment["SOFTHSM2_CONF"])
        yield made


@pytest.mark.long
@pytest.mark.parametrize("name", ["p256", "p384", "p521"])
def test_signatures_of_a_token(published: Published, token: SoftHSM, name: str) -> None:
    """All formats, verified by the key that was imported and by that of the token."""
    imported = token.keys[name]
    assert isinstance(imported, ec.EllipticCurvePrivateKey)
    known = PublicKey(imported.public_key(), "known")
    key = read_token_key(token.uri(name), PIN)
    signatures.sign(published.reference, key, kinds=MANIFEST_FORMATS)
    for public in (known, key.public, read_token_public_key(token.uri(name))):
        _, found = signatures.verify(published.reference, [public])
        assert {one.kind for one in found.signatures} == {*MANIFEST_FORMATS}
    other = read_token_public_key(token.uri("p256" if name != "p256" else "p384"))
    with pytest.raises(UntrustedError, match="made by none of the keys"):
        signatures.verify(published.reference, [other])


@pytest.mark.long
def test_openssfs_tool_verifies_them(published: Published, token: SoftHSM, tmp_path: Path) -> None:
    files = modelpack.bundle(published.reference, tmp_path / "b", store=published.origin).directory
    key = read_token_key(token.uri("p384"), PIN)
    signature, public = tmp_path / "model.sig", tmp_path / "key.pub"
    public.write_bytes(key.public.pem)
    model = inspect(published.reference, store=published.origin)
    signature.write_bytes(signed_bundle(model_statement(model, "model"), key))
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=public)
    verifier.verify(files / "model", signature)
    (files / "model" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        verifier.verify(files / "model", signature)


@pytest.mark.long
def test_with_a_certificate(published: Published, token: SoftHSM, tmp_path: Path) -> None:
    company, key = Company(tmp_path), read_token_key(token.uri(), PIN)
    imported = token.keys["p256"]
    assert isinstance(imported, ec.EllipticCurvePrivateKey)
    chain = company.write("me.pem", company.issue(imported), company.middle)
    model = inspect(published.reference, store=published.origin)
    signed = CertifiedKey.of(key, chain).bundle(model_statement(model, "model"))
    assert company.authority.has_signed(Bundle.parse(signed, "bundle"), "bundle")
    with pytest.raises(UsageError, match="is not for the key pkcs11:"):
        CertifiedKey.of(read_token_key(token.uri("p384"), PIN), chain)


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (("object=p256", "object=p257"), NotFoundError, "no such private key"),
        (("object=p256", "object=p256;id=%09"), NotFoundError, "no such private key"),
        (("the%20team", "the%20other"), NotFoundError, "no such token"),
        (("token=the%20team", "slot-id=3"), NotFoundError, "no such token"),
        (("token=the%20team", "manufacturer=SoftHSM%20project"), NotFoundError, "several tokens"),
        (("the%20team", "another"), NotFoundError, "no such private key"),
        (("object=p256", "object=rsa"), UnsupportedError, "is of type RSA, expected ECDSA"),
        (("object=p256", "object=k256"), UnsupportedError, "is a key on secp256k1"),
    ],
)
def test_keys_that_are_not_there(
    token: SoftHSM, change: tuple[str, str], error: type[ModelpackError], says: str
) -> None:
    with pytest.raises(error, match=says):
        read_token_key(token.uri().replace(*change), PIN)
    read_token_key(token.uri(), PIN)  # the token still works


@pytest.mark.long
@pytest.mark.parametrize("pin", ["wrong", "1", "", PIN + "0", "\0\n", "é" * 100])
def test_wrong_pins(token: SoftHSM, pin: str) -> None:
    with pytest.raises(ModelpackError, match="the PIN is wrong"):
        read_token_key(token.uri(), pin)
    read_token_key(token.uri(), PIN)


#: Changes of a token that keep its key from signing.
UNUSABLE = {
    "no public key": (
        "session.get_key(pkcs11.ObjectClass.PUBLIC_KEY, label='p256').destroy()",
        "pkcs11:token=the%20team;object=p256: no such public key",
    ),
    "another use": (
        "session.get_key(pkcs11.ObjectClass.PRIVATE_KEY, label='p256')"
        "[pkcs11.Attribute.SIGN] = False",
        "pkcs11:token=the%20team;object=p256: may not sign (CKA_SIGN is false)",
    ),
    "two keys": (
        "session.get_key(pkcs11.ObjectClass.PRIVATE_KEY, label='p384')"
        "[pkcs11.Attribute.LABEL] = 'p256'",
        "pkcs11:token=the%20team;object=p256: several private keys match",
    ),
    "no ECDSA": (
        "",
        "pkcs11:token=the%20team;object=p256: is in a token that does not sign with ECDSA",
    ),
}
CHANGE = """
import sys
import pkcs11

module, pin = sys.argv[1:]
with pkcs11.lib(module).get_token(token_label="the team").open(rw=True, user_pin=pin) as session:
    {}
"""


@pytest.mark.long
@pytest.mark.parametrize("name", UNUSABLE)
def test_keys_that_cannot_sign(published: Published, tmp_path: Path, name: str) -> None:
    change, says = UNUSABLE[name]
    token = make_token(tmp_path / "softhsm")

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **token.environment}
        return subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True
        )

    if change:
        done = python("-c", CHANGE.format(change), str(token.module), PIN)
        assert done.returncode == 0, done.stderr
    else:
        token.configure("slots.mechanisms = CKM_RSA_PKCS,CKM_SHA256")
    done = python("-m", "modelpack", "sign", published.reference, "--key", token.uri())
    assert done.returncode in (1, 3)
    assert done.stderr.splitlines()[0] == f"error: {says}"


@pytest.mark.long
def test_the_pin_of_commands(
    published: Published,
    token: SoftHSM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It comes from the environment or a file, and no output shows it."""
    monkeypatch.setenv("COSIGN_PASSWORD", "of another key")
    monkeypatch.delenv("COSIGN_PKCS11_PIN", raising=False)
    sign = ["--debug", "sign", published.reference, "--key"]
    assert run([*sign, token.uri()]) == 1
    assert "set COSIGN_PKCS11_PIN" in capsys.readouterr().err
    pin = tmp_path / "pin"
    for content, code in (("24680", 1), (PIN + "\n", 0)):
        pin.write_text(content)
        assert run([*sign, token.uri(**{"pin-source": f"file:{pin}"})]) == code
    pin.unlink()
    assert run([*sign, token.uri(**{"pin-source": f"file:{pin}"})]) == 3
    assert run([*sign, token.uri(**{"pin-value": PIN})]) == 2
    for value, code in (("24680", 1), (PIN, 0)):
        monkeypatch.setenv("COSIGN_PKCS11_PIN", value)
        assert run([*sign, token.uri()]) == code
    assert run(["verify", published.reference, "--key", token.uri()]) == 0
    assert run(["verify", published.reference, "--key", token.uri("p384")]) == 5
    store = ["--store", str(published.store.root)]
    assert run([*store, "pull", published.reference, "--verify-key", token.uri("p384")]) == 5
    assert run([*store, "pull", published.reference, "--verify-key", token.uri()]) == 0
    shown = capsys.readouterr()
    assert "the PIN is wrong" in shown.err
    for secret in (PIN, "24680"):
        assert secret not in shown.out + shown.err


def test_a_key_of_a_token_does_not_show_its_pin() -> None:
    where = KeyURI.parse("pkcs11:object=a")
    key = PrivateKey(_TokenKey(where, "24680"), where.name)
    assert "24680" not in f"{key!r} {key.key!r}"
    assert repr(key) == "PrivateKey('pkcs11:object=a')"
