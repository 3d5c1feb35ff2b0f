"""Keyless signatures by sigstore's own Fulcio, CT log, Rekor 2 and timestamp authority.

cosign 3 signs and verifies with them too. All of them run on loopback and are built from their Go
modules, in two to four minutes of two cores, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from modelpack.cli.main import run
from tests.interop.sigstore_stack import Issuer, Stack, issuing, running, sigstore_tool
from tests.interop.test_cosign_cli import Cosign
from tests.models import tiny_safetensors
from tests.supply.conftest import Published, publishing
from tests.supply.private_sigstore import IDENTITY

pytestmark = [pytest.mark.peer("go"), pytest.mark.long]

ME, SOMEBODY = "me@team.example", "somebody@team.example"


@pytest.fixture(scope="module")
def sigstore(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("sigstore")) as stack:
        yield stack


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Published]:
    with publishing(tmp_path, tiny_safetensors(tmp_path)) as made:
        yield made


@pytest.fixture
def cosign(sigstore: Stack, tmp_path: Path) -> Cosign:
    sigstore.write(tmp_path)
    return Cosign(sigstore_tool("cosign"), tmp_path)


def keyless(directory: Path, token: str) -> list[str]:
    (directory / "token").write_text(token)
    return [
        "--keyless", "--trust-config", str(directory / "config.json"),
        "--identity-token", str(directory / "token"),
    ]  # fmt: skip


def wanted(email: str, issuer: str) -> list[str]:
    return ["--certificate-identity", email, "--certificate-oidc-issuer", issuer]


def verify(published: Published, directory: Path, email: str, issuer: str) -> int:
    root = ["--trusted-root", str(directory / "root.json")]
    return run(["verify", published.reference, *wanted(email, issuer), *root])


def by_digest(published: Published) -> str:
    return f"{published.host}/team/model@{published.digest}"


def cosign_verifies(cosign: Cosign, published: Published, email: str, issuer: str) -> bool:
    done = cosign(
        "verify", "--allow-http-registry", "--trusted-root", "root.json", "--use-signed-timestamps",
        *wanted(email, issuer), by_digest(published),
    )  # fmt: skip
    return done.returncode == 0


def test_what_ours_signs(
    sigstore: Stack,
    published: Published,
    cosign: Cosign,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    issuer = sigstore.issuer.url
    assert not cosign_verifies(cosign, published, ME, issuer)
    assert run(["sign", published.reference, *keyless(tmp_path, sigstore.issuer.token(ME))]) == 0
    assert f"as {ME} (issuer {issuer}): bundle" in capsys.readouterr().err
    assert verify(published, tmp_path, ME, issuer) == 0
    for identity in ((SOMEBODY, issuer), (ME, "http://127.0.0.1:1")):
        capsys.readouterr()
        assert verify(published, tmp_path, *identity) == 5
        assert f"its certificate is for {ME} (issuer {issuer})" in capsys.readouterr().err
    assert cosign_verifies(cosign, published, ME, issuer)
    assert not cosign_verifies(cosign, published, SOMEBODY, issuer)


def test_what_cosign_signs(
    sigstore: Stack, published: Published, cosign: Cosign, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(sigstore.issuer.token(ME))
    done = cosign(
        "sign", "--allow-http-registry", "--trusted-root", "root.json", "--signing-config",
        "signing.json", "--identity-token", "token", "-y", by_digest(published),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert verify(published, tmp_path, ME, sigstore.issuer.url) == 0
    assert verify(published, tmp_path, SOMEBODY, sigstore.issuer.url) == 5


def test_a_job_of_github_actions(
    sigstore: Stack,
    published: Published,
    cosign: Cosign,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    issuer = sigstore.jobs.url
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "any")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{issuer}/job?version=2")
    config = str(tmp_path / "config.json")
    assert run(["sign", published.reference, "--keyless", "--trust-config", config]) == 0
    assert verify(published, tmp_path, IDENTITY, issuer) == 0
    assert verify(published, tmp_path, IDENTITY.replace("main", "other"), issuer) == 5
    assert cosign_verifies(cosign, published, IDENTITY, issuer)


def test_fulcio_refuses_a_token(
    sigstore: Stack, published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sigstore.write(tmp_path)
    ours = sigstore.issuer
    with issuing() as other:
        for token, issuer in (
            (other.token(ME), other.url),
            (Issuer(ours.url).token(ME), ours.url),  # by another key
            (ours.token(ME, verified=False), ours.url),
        ):
            assert run(["sign", published.reference, *keyless(tmp_path, token)]) == 4
            shown = capsys.readouterr().err
            refused = "There was an error processing the identity token"
            assert f"refused a certificate for the identity token of {issuer}: {refused}" in shown
            assert token not in shown
    assert verify(published, tmp_path, ME, ours.url) == 5
    assert "has no signature" in capsys.readouterr().err
