"""Signatures with certificates of an authority, by OpenSSF model signing: ours and its tool's."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.cli.main import run
from modelpack.errors import FormatError, IntegrityError, UntrustedError, UsageError
from modelpack.operations import signatures
from modelpack.operations.lookup import inspect
from modelpack.operations.remote import RemoteOptions
from modelpack.trust.certificates import Authority, CertifiedKey
from modelpack.trust.keys import PrivateKey
from modelpack.trust.model_signing import model_statement
from modelpack.trust.policy import Trust, read_policy
from modelpack.trust.signatures import SignatureKind
from modelpack.trust.sigstore import COSIGN_SIGN, Bundle, Statement, Subject
from tests.supply.conftest import PASSWORD, Published, publishing
from tests.supply.test_model_signing import attach, single_layer
from tests.supply.test_tampering import files_in

USAGE = x509.ExtendedKeyUsageOID
STATEMENT = Statement((Subject(Digest.of(b"a manifest")),), COSIGN_SIGN)
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def certificate(
    name: str,
    key: Key,
    issuer: tuple[x509.Certificate, Key] | None = None,
    *,
    authority: bool = False,
    usage: x509.ObjectIdentifier | None = None,
    signs: bool = True,
    ends: timedelta = timedelta(days=1),
) -> x509.Certificate:
    """Return a certificate for `key`, self-signed without an issuer; it began two days ago."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    by, signing = (issuer[0].subject, issuer[1]) if issuer is not None else (subject, key)
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder(by, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + ends)
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(
            x509.KeyUsage(
                signs and not authority, False, False, False, False, authority, authority, False,
                False,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), False
        )
    )  # fmt: skip
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return builder.sign(signing, hashes.SHA256())


class Company:
    """An authority with an intermediate one, and the key of an employee."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root_key, self.middle_key, self.key = new_key(), new_key(), new_key()
        self.root = certificate("root", self.root_key, authority=True)
        middle = self.root, self.root_key
        self.middle = certificate("middle", self.middle_key, middle, authority=True)
        self.leaf = self.issue()
        self.authority = Authority.read(self.write("ca.pem", self.root))

    def issue(self, key: Key | None = None, **options: Any) -> x509.Certificate:
        options = {"usage": USAGE.CODE_SIGNING, **options}
        return certificate("me", key or self.key, (self.middle, self.middle_key), **options)

    def write(self, name: str, *certificates: x509.Certificate) -> Path:
        path = self.directory / name
        path.write_bytes(b"".join(one.public_bytes(Encoding.PEM) for one in certificates))
        return path

    def signer(self, *chain: x509.Certificate) -> CertifiedKey:
        return CertifiedKey(PrivateKey(self.key, "me"), chain or (self.leaf, self.middle))


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Company:
    return Company(tmp_path_factory.mktemp("company"))


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Published]:
    """A model whose config follows from its files."""
    with publishing(tmp_path, files_in(tmp_path)) as made:
        yield made


def has_signed(company: Company, bundle: bytes) -> bool:
    return company.authority.has_signed(Bundle.parse(bundle, "it"), "it")


@pytest.mark.parametrize("usage", [USAGE.CODE_SIGNING, None], ids=["code signing", "signatures"])
def test_a_certificate_of_the_authority(
    company: Company, usage: x509.ObjectIdentifier | None
) -> None:
    leaf = company.issue(usage=usage)
    assert has_signed(company, company.signer(leaf, company.middle).bundle(STATEMENT))
    assert has_signed(company, company.signer(leaf, company.middle, company.root).bundle(STATEMENT))


def _other_key(company: Company) -> bytes:
    """The certificates are good, and the signature is by another key."""
    other = CertifiedKey(PrivateKey(new_key(), "other"), (company.leaf, company.middle))
    return other.bundle(STATEMENT)


def _with(**options: Any) -> Callable[[Company], bytes]:
    def make(company: Company) -> bytes:
        return company.signer(company.issue(**options), company.middle).bundle(STATEMENT)

    return make


def _changed(change: Callable[[dict[str, Any]], None]) -> Callable[[Company], bytes]:
    def make(company: Company) -> bytes:
        value = json.loads(company.signer().bundle(STATEMENT))
        change(value["verificationMaterial"])
        return json.dumps(value).encode()

    return make


def _of_another(company: Company) -> bytes:
    other = Company(company.directory / "..")
    return other.signer().bundle(STATEMENT)


def _by_a_leaf(company: Company) -> bytes:
    """A holder of a certificate for signing is no authority."""
    key = new_key()
    leaf = certificate("evil", key, (company.leaf, company.key), usage=USAGE.CODE_SIGNING)
    chain = (leaf, company.leaf, company.middle)
    return CertifiedKey(PrivateKey(key, "evil"), chain).bundle(STATEMENT)


def _expired_authority(company: Company) -> bytes:
    issuer = company.root, company.root_key
    ended = timedelta(hours=-1)
    middle = certificate("middle", company.middle_key, issuer, authority=True, ends=ended)
    return company.signer(company.leaf, middle).bundle(STATEMENT)


REFUSED: dict[str, tuple[Callable[[Company], bytes], str]] = {
    "expired": (_with(ends=timedelta(hours=-1)), "not certified by .*ca.pem"),
    "for servers": (_with(usage=USAGE.SERVER_AUTH), "its certificate is not for signing"),
    "not for signatures": (_with(usage=None, signs=False), "its certificate is not for signing"),
    "of another authority": (_of_another, "not certified by .*ca.pem"),
    "by a certificate that is no authority": (_by_a_leaf, "not certified by .*ca.pem"),
    "of an expired authority": (_expired_authority, "not certified by .*ca.pem"),
    "without the one between": (
        lambda company: company.signer(company.leaf).bundle(STATEMENT),
        "not certified by .*ca.pem",
    ),
    "no certificates": (
        _changed(lambda material: material["x509CertificateChain"].update(certificates=[])),
        "has 0 certificates",
    ),
    "too many certificates": (
        lambda company: company.signer(*[company.leaf] * 9).bundle(STATEMENT),
        "has 9 certificates, expected 1 to 8",
    ),
    "bytes of no certificate": (
        _changed(
            lambda material: material["x509CertificateChain"].update(
                certificates=[{"rawBytes": base64.b64encode(b"none").decode()}]
            )
        ),
        "has an invalid certificate",
    ),
    "no base64": (
        _changed(
            lambda material: material["x509CertificateChain"].update(
                certificates=[{"rawBytes": "!"}]
            )
        ),
        "has an invalid certificate",
    ),
    "no chain": (
        _changed(lambda material: material.update(x509CertificateChain=[1])),
        "has no chain of certificates",
    ),
    "a key": (
        _changed(lambda material: material.pop("x509CertificateChain")),
        "has no chain of certificates",
    ),
    "of an RSA key": (
        _with(key=rsa.generate_private_key(65537, 2048)),
        "is a RSAPublicKey, expected ECDSA",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_certificates_that_do_not_count(company: Company, name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises((IntegrityError, FormatError), match=reason):
        has_signed(company, make(company))


def test_a_signature_by_another_key_does_not_count(company: Company) -> None:
    assert not has_signed(company, _other_key(company))


@pytest.mark.long
def test_a_policy(published: Published, company: Company, ours: PrivateKey) -> None:
    policy = company.directory / "policy.toml"
    policy.write_text(
        '[publishers.company]\nauthorities = ["ca.pem"]\n'
        '[[rules]]\nmodels = ["*"]\npublishers = ["company"]\n'
    )
    remote = RemoteOptions(trust=Trust.of(policy=policy))
    signatures.sign(published.reference, ours)
    other = Company(published.store.root)
    signatures.sign(published.reference, other.signer())
    with pytest.raises(UntrustedError, match=r"is not signed by company: .*not certified by"):
        modelpack.pull(published.reference, store=published.store, remote=remote)
    signatures.sign(published.reference, company.signer())
    modelpack.pull(published.reference, store=published.store, remote=remote)
    _, found = signatures.verify(published.reference, [company.authority, ours.public])
    assert found.signers == {company.authority, ours.public}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('authorities = ["none.pem"]', "none.pem: cannot be read"),
        ('authorities = ["policy.toml"]', "policy.toml: contains no certificates in PEM"),
        ("authorities = []", "authorities is not an array of at least one string"),
        ('authorities = ["ca.pem"]', "has an authority, which may certify the key of another one"),
    ],
)
def test_policies_that_are_wrong(company: Company, text: str, says: str) -> None:
    policy = company.directory / "policy.toml"
    company.write("other.pem", company.middle)
    policy.write_text(
        f'[publishers.a]\n{text}\n[publishers.b]\nauthorities = ["other.pem"]\n'
        '[[rules]]\nmodels = ["*"]\npublishers = ["a", "b"]\nthreshold = 2\n'
    )
    with pytest.raises(FormatError) as raised:
        read_policy(policy)
    assert says in str(raised.value)


@pytest.mark.long
def test_the_command_line(
    published: Published,
    company: Company,
    keys: Path,
    ours: PrivateKey,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COSIGN_PASSWORD", PASSWORD.decode())
    chain = company.write("chain.pem", company.issue(ours.key), company.middle)
    sign = ["sign", published.reference, "--key", str(keys / "ours.key")]
    authority = ["--certificate-authority", str(company.directory / "ca.pem")]
    assert run(["verify", published.reference, *authority]) == 5
    assert run([*sign, "--certificate-chain", str(chain)]) == 0
    capsys.readouterr()
    assert run(["verify", published.reference, *authority, "--json"]) == 0
    [shown] = json.loads(capsys.readouterr().out)["signatures"]
    assert (shown["authority"], shown["format"]) == (authority[1], "model-signing")
    store = ["--store", str(published.store.root)]
    assert run([*store, "pull", published.reference, *authority]) == 0
    for words, code, says in (
        ([*sign, "--certificate-chain", str(chain), "--format", "bundle"], 2, "only be written"),
        ([*sign, "--certificate-chain", authority[1]], 2, "is not for the key"),
        ([*sign, "--certificate-chain", str(keys / "ours.pub")], 1, "contains no certificates"),
        (["sign", published.reference, "--keyless", "--certificate-chain", "x"], 2, "requires"),
        (["verify", published.reference, "--certificate-authority", "x"], 3, "x: cannot be read"),
    ):
        assert run(words) == code
        assert says in capsys.readouterr().err


def test_a_key_without_its_certificate(company: Company) -> None:
    path, key = company.write("chain.pem", company.leaf), PrivateKey(new_key(), "other")
    with pytest.raises(UsageError, match=r"the first certificate in .* is not for the key other"):
        CertifiedKey.of(key, path)


@pytest.mark.long
def test_openssfs_tool_both_ways(published: Published, company: Company, tmp_path: Path) -> None:
    laid_out = modelpack.bundle(
        published.reference, tmp_path / "bundle", store=published.origin, links="copy"
    )
    files, signature, key = laid_out.directory / "model", tmp_path / "m.sig", tmp_path / "key.pem"
    key.write_bytes(
        company.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )  # fmt: skip
    own = company.write("leaf.pem", company.leaf)
    chain = company.write("middle.pem", company.middle)

    def theirs(verb: str, *options: str) -> int:
        command = [sys.executable, "-m", "model_signing", verb, "certificate", str(files)]
        words = [*command, f"--signature={signature}", *options]
        return subprocess.run(words, capture_output=True).returncode

    signing = f"--private_key={key}", f"--signing_certificate={own}", f"--certificate_chain={chain}"
    assert theirs("sign", *signing) == 0
    attach(published.reference, signature.read_bytes())
    formats = [SignatureKind.FILES]
    _, found = signatures.verify(published.reference, [company.authority], formats=formats)
    assert [one.kind for one in found.signatures] == formats
    other = Company(tmp_path)
    with pytest.raises(UntrustedError, match="not certified by"):
        signatures.verify(published.reference, [other.authority], formats=formats)
    done = signatures.sign(published.reference, company.signer())
    signature.write_bytes(single_layer(published.reference, done.manifests))
    roots = company.write("roots.pem", company.root)
    assert theirs("verify", f"--certificate_chain={roots}") == 0
    assert theirs("verify", f"--certificate_chain={other.directory / 'ca.pem'}") != 0
    model = inspect(published.reference, store=published.origin)
    wrong = CertifiedKey(PrivateKey(new_key(), "x"), (company.leaf, company.middle))
    signature.write_bytes(wrong.bundle(model_statement(model, "model")))
    assert theirs("verify", f"--certificate_chain={roots}") != 0
