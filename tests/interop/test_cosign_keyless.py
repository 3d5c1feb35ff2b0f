"""The real cosign verifies our keyless signatures, and we its; both by a private Sigstore.

Neither asks anything on the network: Fulcio and Rekor are on loopback, the trusted root is a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.errors import UntrustedError
from modelpack.operations import signatures
from modelpack.testing import registry
from modelpack.trust.keyless import CertifiedSigner, Identity, KeylessSigner, TrustedRoot
from modelpack.trust.signatures import SignatureKind
from modelpack.trust.sigstore import COSIGN_SIGN, Statement, Subject
from tests.interop.test_cosign_cli import Cosign, binary, reference  # noqa: F401 - fixtures
from tests.models import tiny_gguf
from tests.supply.private_sigstore import (
    IDENTITY,
    ISSUER,
    PrivateSigstore,
    Served,
    serving,
    token,
)
from tests.supply.test_keyless import CERTIFICATES, STAMPED, TAMPERED, attach

pytestmark = [pytest.mark.peer("go"), pytest.mark.long]

ME = "me@team.example"
#: What cosign accepts and we do not: Fulcio writes one name and one issuer into a certificate,
#: sigstore's library does not count a time stamp twice, and compares an entry of Rekor 2 with the
#: signature.
STRICTER = {
    "two names", "two issuers", "the same stamp twice", "stamped entry of another signature",
}  # fmt: skip


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(PrivateSigstore()) as made:
        yield made


@pytest.fixture
def cosign(binary: Path, served: Served, tmp_path: Path) -> Cosign:  # noqa: F811
    served.sigstore.write_root(tmp_path / "root.json")
    (tmp_path / "signing.json").write_text(json.dumps(served.signing_config()))
    (tmp_path / "token").write_text(token(ME))
    return Cosign(binary, tmp_path)


STAMPS = "--use-signed-timestamps"


def verifies(cosign: Cosign, reference: str, identity: str, *more: str) -> bool:  # noqa: F811
    return (
        cosign(
            "verify", "--new-bundle-format", "--allow-http-registry", "--trusted-root", "root.json",
            "--certificate-oidc-issuer", ISSUER, "--certificate-identity", identity, *more,
            reference,
        ).returncode
        == 0
    )  # fmt: skip


def test_theirs_verifies_ours(
    cosign: Cosign, served: Served, reference: str, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    assert not verifies(cosign, reference, ME)
    signer = KeylessSigner.open(served.write_config(tmp_path / "config.json"), token(ME))
    signatures.sign(reference, signer)
    assert verifies(cosign, reference, ME)
    assert not verifies(cosign, reference, IDENTITY)


def test_theirs_verifies_ours_with_time_stamps(
    cosign: Cosign, served: Served, reference: str, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    config = replace(served, rekor=2).write_config(tmp_path / "config.json")
    signatures.sign(reference, KeylessSigner.open(config, token(ME)))
    assert verifies(cosign, reference, ME, STAMPS)
    assert not verifies(cosign, reference, IDENTITY, STAMPS)


def test_ours_verifies_theirs(cosign: Cosign, reference: str) -> None:  # noqa: F811
    done = cosign(
        "sign", "--new-bundle-format", "--allow-http-registry", "--trusted-root", "root.json",
        "--signing-config", "signing.json", "--identity-token", "token", "-y", reference,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    root = TrustedRoot.read(cosign.directory / "root.json")
    _, found = signatures.verify(reference, [Identity(ME, ISSUER, root)])
    [signature] = found.signatures
    assert signature.kind is SignatureKind.BUNDLE
    assert signature.certified == CertifiedSigner(ME, ISSUER)
    with pytest.raises(UntrustedError, match=f"its certificate is for {ME} "):
        signatures.verify(reference, [Identity(IDENTITY, ISSUER, root)])


def test_theirs_refuses_what_ours_refuses(cosign: Cosign, served: Served, tmp_path: Path) -> None:
    """The table of test_keyless.py, once more, by another implementation."""
    root = TrustedRoot.read(tmp_path / "root.json")
    wanted = Identity(IDENTITY, ISSUER, root)
    accepted = {}
    with registry(tmp_path / "registry") as server:
        request = modelpack.PackageRequest(gguf=tiny_gguf(tmp_path))

        def publish(name: str, bundle: dict[str, object]) -> str:
            where = f"{server.host}/team/{name}:v1"
            modelpack.package(where, request, push=True)
            attach(where, bundle)
            return where

        digest = modelpack.package(f"{server.host}/team/m:v1", request, push=True).digest
        statement = Statement((Subject(Digest.parse(str(digest)), "m"),), COSIGN_SIGN)
        good = publish("good", served.sigstore.bundle(statement))
        assert verifies(cosign, good, IDENTITY)
        signatures.verify(good, [wanted])
        good = publish("stamped", served.sigstore.bundle(statement, rekor=2))
        assert verifies(cosign, good, IDENTITY, STAMPS)
        for at, name in enumerate((*TAMPERED, *STAMPED, *CERTIFICATES)):
            if name not in CERTIFICATES:
                rekor = 2 if name in STAMPED else 1
                bundle = served.sigstore.bundle(statement, rekor=rekor)
                (TAMPERED | STAMPED)[name][0](served.sigstore, bundle)
            else:
                bundle = served.sigstore.bundle(statement, **CERTIFICATES[name][0])
            where = publish(f"m{at}", bundle)
            with pytest.raises(UntrustedError):
                signatures.verify(where, [wanted])
            more = (STAMPS,) if name in STAMPED else ()
            accepted[name] = verifies(cosign, where, IDENTITY, *more)
    assert {name for name, done in accepted.items() if done} == STRICTER
