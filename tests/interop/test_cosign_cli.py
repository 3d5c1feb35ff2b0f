"""The real cosign verifies what we sign, and we what it signs; keys of both serve both.

It is cosign 3, in the formats of 2 and of 3. Building it takes some minutes of two cores, once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import modelpack
from modelpack.errors import UntrustedError
from modelpack.operations import signatures
from modelpack.operations.lookup import inspect
from modelpack.operations.provenance import ProvenanceOptions
from modelpack.operations.signatures import attest
from modelpack.testing import registry
from modelpack.trust.keys import (
    PrivateKey,
    PublicKey,
    generate_key_pair,
    read_private_key,
    read_public_key,
)
from modelpack.trust.signatures import SignatureKind
from modelpack.trust.sigstore import TEST_RESULT
from tests.interop.sigstore_stack import sigstore_tool
from tests.models import tiny_gguf
from tests.peers import docker_registry
from tests.supply.softhsm import make_token

pytestmark = [pytest.mark.peer("go"), pytest.mark.long]

PASSWORD = "secret"
# Nothing is to be asked on the network: no transparency log, and no root of anybody's.
OFFLINE = ("--allow-http-registry", "--insecure-ignore-tlog=true")
KINDS = {SignatureKind.COSIGN: (), SignatureKind.BUNDLE: ("--new-bundle-format",)}


@pytest.fixture(scope="module")
def binary() -> Path:
    return sigstore_tool("cosign")


@dataclass
class Cosign:
    """Runs the program in a directory with a pair of each: cosign.key and ours.key."""

    binary: Path
    directory: Path

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.binary, *arguments],
            cwd=self.directory,
            env={"HOME": str(self.directory), "COSIGN_PASSWORD": PASSWORD},
            capture_output=True,
            text=True,
        )

    def sign(self, key: str, reference: str, *more: str) -> None:
        done = self(
            "sign", "--key", key, "--tlog-upload=false", "--use-signing-config=false",
            "--allow-http-registry", "-y", *(more or ("--new-bundle-format=false",)), reference,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def verifies(self, key: str, reference: str, *more: str) -> bool:
        root = ("--trusted-root", "root.json") if more else ()
        return self("verify", "--key", key, *OFFLINE, *more, *root, reference).returncode == 0

    def private(self, name: str) -> PrivateKey:
        return read_private_key(self.directory / f"{name}.key", PASSWORD.encode())

    def public(self, name: str) -> PublicKey:
        return read_public_key(self.directory / f"{name}.pub")


@pytest.fixture
def cosign(binary: Path, tmp_path: Path) -> Cosign:
    made = Cosign(binary, tmp_path)
    done = made("generate-key-pair")
    assert done.returncode == 0, done.stderr
    generate_key_pair(tmp_path / "ours", PASSWORD.encode())
    root = '{"mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1"}'
    (tmp_path / "root.json").write_text(root)
    return made


@pytest.fixture(params=["embedded", "docker-registry"])
def reference(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A model, by digest, in a registry with the referrers API, and in one without."""

    def package(host: str) -> str:
        made = modelpack.package(
            f"{host}/team/model:v1",
            modelpack.PackageRequest(gguf=tiny_gguf(tmp_path)),
            push=True,
        )
        return f"{host}/team/model@{made.digest}"

    if request.param == "embedded":
        with registry(tmp_path / "registry") as server:
            yield package(server.host)
    else:
        with docker_registry(tmp_path / "registry") as running:
            yield package(running)


@pytest.mark.parametrize("name", ["cosign", "ours"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_theirs_verifies_ours(
    cosign: Cosign, reference: str, kind: SignatureKind, name: str
) -> None:
    other = "ours" if name == "cosign" else "cosign"
    assert not cosign.verifies(f"{name}.pub", reference, *KINDS[kind])
    signatures.sign(reference, cosign.private(name), kinds=[kind])
    assert cosign.verifies(f"{name}.pub", reference, *KINDS[kind])
    assert not cosign.verifies(f"{other}.pub", reference, *KINDS[kind])


@pytest.mark.parametrize("name", ["cosign", "ours"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_ours_verifies_theirs(
    cosign: Cosign, reference: str, kind: SignatureKind, name: str
) -> None:
    other = "ours" if name == "cosign" else "cosign"
    cosign.sign(f"{name}.key", reference, *KINDS[kind])
    _, found = signatures.verify(reference, [cosign.public(name)])
    assert [one.kind for one in found.signatures] == [kind]
    with pytest.raises(UntrustedError):
        signatures.verify(reference, [cosign.public(other)])


def test_theirs_verifies_our_attestation(cosign: Cosign, reference: str) -> None:
    model = inspect(reference, from_registry=True)
    attest(model, TEST_RESULT, {"result": "PASSED"}, cosign.private("ours"))
    command = ("verify-attestation", *OFFLINE, "--new-bundle-format", "--trusted-root", "root.json")
    for name, code in (("ours", 0), ("cosign", 1)):
        done = cosign(*command, "--type", TEST_RESULT, "--key", f"{name}.pub", reference)
        assert (done.returncode == 0) == (code == 0), done.stderr
    done = cosign(*command, "--type", "slsaprovenance1", "--key", "ours.pub", reference)
    assert done.returncode != 0


def test_theirs_verifies_our_provenance(cosign: Cosign, tmp_path: Path) -> None:
    with registry(tmp_path / "registry") as server:
        made = modelpack.package(
            f"{server.host}/team/model:v1",
            modelpack.PackageRequest(gguf=tiny_gguf(tmp_path)),
            provenance=ProvenanceOptions(cosign.private("ours")),
            push=True,
            store=modelpack.Store(tmp_path / "store"),
        )
        command = (
            "verify-attestation", *OFFLINE, "--new-bundle-format", "--trusted-root", "root.json",
            "--type", "slsaprovenance1",
        )  # fmt: skip
        for name, accepted in (("ours", True), ("cosign", False)):
            done = cosign(
                *command, "--key", f"{name}.pub", f"{server.host}/team/model@{made.digest}"
            )
            assert (done.returncode == 0) == accepted, done.stderr


def test_both_add_to_one_tag(cosign: Cosign, reference: str) -> None:
    cosign.sign("cosign.key", reference)
    signatures.sign(reference, cosign.private("ours"), kinds=[SignatureKind.COSIGN])
    signatures.verify(reference, [cosign.public("ours"), cosign.public("cosign")])
    assert cosign.verifies("cosign.pub", reference)
    assert cosign.verifies("ours.pub", reference)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", ["p256", "p384", "p521"])
def test_theirs_verifies_signatures_of_a_token(
    cosign: Cosign, reference: str, kind: SignatureKind, name: str, tmp_path: Path
) -> None:
    """`sign --key pkcs11:...`, by a process of its own: SoftHSM is configured once."""
    token = make_token(tmp_path / "softhsm")
    for file, key in (("token.pub", name), ("other.pub", "p384" if name != "p384" else "p256")):
        public = token.keys[key].public_key()
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / file).write_bytes(pem)
    done = subprocess.run(
        [sys.executable, "-m", "modelpack", "sign", reference, "--key", token.uri(name),
         "--format", kind],
        env={**os.environ, **token.environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # cosign signs with the hash of the curve as we do, and verifies with SHA-256 unless told.
    algorithm = {"p256": "sha256", "p384": "sha384", "p521": "sha512"}[name]
    options = (f"--signature-digest-algorithm={algorithm}", *KINDS[kind])
    root = ("--trusted-root", "root.json") if KINDS[kind] else ()
    for verifier, accepted in (("token.pub", True), ("other.pub", False)):
        done = cosign("verify", "--key", verifier, *OFFLINE, *options, *root, reference)
        assert (done.returncode == 0) == accepted, done.stderr
