"""`sign --keyless`, by a private Fulcio and Rekor on loopback."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.reference import Reference
from modelpack.cli.main import run
from modelpack.operations import signatures as signing
from modelpack.operations.index import NamedVariant, create_index
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.storage import watching
from modelpack.trust.keyless import CertifiedSigner, Identity, KeylessSigner, TrustedRoot
from modelpack.trust.signatures import SignatureKind
from tests.models import tiny_safetensors
from tests.supply.conftest import Published, publishing
from tests.supply.private_sigstore import (
    CERTIFICATES,
    ENTRIES,
    ENTRIES_2,
    IDENTITY,
    ISSUER,
    STAMPS,
    PrivateSigstore,
    Served,
    new_key,
    serving,
    token,
)

ME = "me@team.example"


@pytest.fixture(scope="module")
def sigstore() -> PrivateSigstore:
    return PrivateSigstore()


@pytest.fixture
def served(sigstore: PrivateSigstore) -> Iterator[Served]:
    with serving(sigstore) as made:
        yield made


@pytest.fixture
def config(served: Served, tmp_path: Path) -> Path:
    return served.write_config(tmp_path / "config.json")


@pytest.fixture
def root(sigstore: PrivateSigstore, tmp_path: Path) -> Path:
    return sigstore.write_root(tmp_path / "trusted_root.json")


@pytest.fixture(scope="module")
def unsigned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """A model for the tests that sign nothing."""
    directory = tmp_path_factory.mktemp("unsigned")
    with publishing(directory, tiny_safetensors(directory)) as made:
        yield made


def verified(root: Path, identity: str = ME) -> list[str]:
    return [
        "--certificate-identity", identity, "--certificate-oidc-issuer", ISSUER,
        "--trusted-root", str(root),
    ]  # fmt: skip


def attached(published: Published) -> int:
    """Return the number of referrers of the model in its registry."""
    where = Reference.parse(published.reference)
    with open_repository(where, RemoteOptions(), watching(None)) as repository:
        return len(list(repository.referrers(published.digest)))


def keyless(config: Path, given: str | None = None) -> list[str]:
    path = config.parent / "token"
    path.write_text(f"{given if given is not None else token(ME)}\n")
    return ["--keyless", "--trust-config", str(config), "--identity-token", str(path)]


def test_from_a_token_to_a_pull(
    published: Published, config: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, secret = published.reference, token(ME)
    assert run(["--debug", "sign", reference, *keyless(config, secret), "--json"]) == 0
    shown = capsys.readouterr()
    value = json.loads(shown.out)
    assert list(value["signatures"]) == ["bundle"]
    assert f"as {ME} (issuer {ISSUER}): bundle" in shown.err
    assert secret not in shown.out + shown.err
    assert run(["verify", reference, *verified(root)]) == 0
    assert run(["verify", reference, *verified(root, IDENTITY)]) == 5
    store = ["--store", str(published.store.root)]
    assert run([*store, "pull", reference, *verified(root)]) == 0


@pytest.mark.parametrize("kind", [SignatureKind.BUNDLE, SignatureKind.MODEL_SIGNING])
def test_in_a_store(published: Published, config: Path, root: Path, kind: SignatureKind) -> None:
    signer = KeylessSigner.open(config, token(ME))
    assert signer.certified is None
    signing.sign(published.reference, signer, kinds=[kind], store=published.origin)
    assert signer.certified == CertifiedSigner(ME, ISSUER)
    modelpack.push(published.reference, store=published.origin, with_referrers=True)
    wanted = Identity(ME, ISSUER, TrustedRoot.read(root))
    _, found = signing.verify(published.reference, [wanted])
    assert [one.kind for one in found.signatures] == [kind]


def test_an_index_and_its_variants_need_one_certificate(
    published: Published, served: Served, config: Path, root: Path
) -> None:
    index = f"{published.host}/team/index:v1"
    variants = [NamedVariant("one", published.reference)]
    create_index(index, variants, push=True, store=published.origin)
    assert run(["sign", index, *keyless(config)]) == 0
    assert served.requests == [CERTIFICATES, ENTRIES, ENTRIES]
    assert run(["verify", index, *verified(root)]) == 0
    store = ["--store", str(published.store.root)]
    assert run([*store, "pull", index, *verified(root)]) == 0


def test_with_rekor_2_and_time_stamps(
    published: Published, sigstore: PrivateSigstore, root: Path, tmp_path: Path
) -> None:
    with serving(sigstore, rekor=2) as served:
        config = served.write_config(tmp_path / "config.json")
        assert run(["sign", published.reference, *keyless(config)]) == 0
    assert served.requests == [CERTIFICATES, STAMPS, ENTRIES_2]
    assert run(["verify", published.reference, *verified(root)]) == 0
    assert run(["verify", published.reference, *verified(root, IDENTITY)]) == 5


def test_in_github_actions(
    published: Published,
    served: Served,
    config: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The token of a job is requested from the address in its environment."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.delenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", raising=False)
    sign = ["sign", published.reference, "--keyless", "--trust-config", str(config)]
    assert run(sign) == 4
    assert "set `permissions: id-token: write`" in capsys.readouterr().err
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "any")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{served.url}/token?version=2")
    assert run(sign) == 0
    assert served.requests[0] == "/token?version=2&audience=sigstore"
    assert run(["verify", published.reference, *verified(root, IDENTITY)]) == 0


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (token(ME, exp=1), 4, "identity token is not valid"),
        (token(ME, aud="other"), 4, "identity token is not valid"),
        ("a.b.c", 4, "identity token is not valid"),
        ("not a token", 1, "is not an identity token (a JWT)"),
        ("", 1, "is not an identity token (a JWT)"),
        ("ü.b.c", 1, "is not an identity token (a JWT)"),
    ],
    ids=["expired", "another audience", "no JWT", "text", "empty", "not ASCII"],
)
def test_tokens_that_are_wrong(
    unsigned: Published,
    served: Served,
    config: Path,
    given: str,
    code: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["--debug", "sign", unsigned.reference, *keyless(config, given)]) == code
    shown = capsys.readouterr().err
    assert says in shown
    assert not given or given not in shown
    assert served.requests == []
    assert attached(unsigned) == 0


def test_without_a_token(
    unsigned: Published,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sigstore.oidc.detect_credential", lambda: None)
    sign = ["sign", unsigned.reference, "--keyless", "--trust-config", str(config)]
    assert run(sign) == 4
    assert "no identity token: this is not a CI job that has one" in capsys.readouterr().err
    assert run([*sign, "--identity-token", str(config.parent / "none")]) == 3
    assert "none: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "status", "says", "code"),
    [
        (CERTIFICATES, 500, "did not sign: 500 Server Error", 6),
        (CERTIFICATES, 429, "did not sign: 429 Client Error", 6),
        (CERTIFICATES, 400, f"for the identity token of {ISSUER}: it fails: Bearer ***", 4),
        (CERTIFICATES, 401, f"for the identity token of {ISSUER}: it fails: Bearer ***", 4),
        (ENTRIES, 500, "did not sign", 6),
        (ENTRIES, 400, "did not sign", 6),
    ],
)
def test_services_that_fail(
    unsigned: Published,
    served: Served,
    config: Path,
    path: str,
    status: int,
    says: str,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret = token(ME)
    served.fails[path] = status
    assert run(["--debug", "sign", unsigned.reference, *keyless(config, secret)]) == code
    shown = capsys.readouterr().err
    assert says in shown
    assert secret not in shown
    assert attached(unsigned) == 0


@pytest.mark.parametrize("path", [CERTIFICATES, ENTRIES])
def test_services_that_do_not_respond(
    unsigned: Published,
    served: Served,
    config: Path,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("modelpack.trust.keyless._PATIENCE", 0.5)
    served.silent.add(path)
    assert run(["sign", unsigned.reference, *keyless(config)]) == 6
    assert "did not sign: no response within 0.5 seconds" in capsys.readouterr().err
    assert attached(unsigned) == 0


def test_services_that_are_gone(
    unsigned: Published, sigstore: PrivateSigstore, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = Served(sigstore, "http://127.0.0.1:1").write_config(tmp_path / "config.json")
    assert run(["sign", unsigned.reference, *keyless(config)]) == 6
    assert "did not sign: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("certificates", "is not valid: SCT verify failed"),
        ("rekor", "not verified by .*config.json: invalid log entry"),
        ("fulcio", "not verified by .*config.json: .*certificate chain|SCT verify failed"),
    ],
)
def test_services_that_are_not_those_of_the_root(
    unsigned: Published,
    sigstore: PrivateSigstore,
    part: str,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What would not verify is not published."""
    with serving(replace(sigstore, **{part: new_key(), "started": sigstore.started})) as served:
        config = replace(served, sigstore=sigstore).write_config(tmp_path / "config.json")
        assert run(["sign", unsigned.reference, *keyless(config)]) == 5
    shown = capsys.readouterr().err
    assert re.search(says, shown), shown
    assert attached(unsigned) == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is not a client trust configuration"),
        ("{}", "is not a client trust configuration"),
        ("ROOT", "is not a client trust configuration"),
        (None, "cannot be read"),
    ],
)
def test_configurations_that_are_wrong(
    unsigned: Published,
    root: Path,
    content: str | None,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "wrong.json"
    if content is not None:
        path.write_text(root.read_text() if content == "ROOT" else content)
    assert run(["sign", unsigned.reference, *keyless(path)]) == (1 if content is not None else 3)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "expected either --key or --keyless"),
        (["--key", "x.key", "--keyless"], "expected either --key or --keyless"),
        (["--key", "x.key", "--identity-token", "y"], "require --keyless"),
        (["--key", "x.key", "--trust-config", "y"], "require --keyless"),
    ],
)
def test_options_that_are_wrong(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sign", "registry.invalid/team/model", *words]) == 2
    assert says in capsys.readouterr().err


def test_cosigns_tag_has_no_certificates(
    unsigned: Published, served: Served, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sign", unsigned.reference, *keyless(config), "--format", "cosign"]
    assert run(words) == 2
    assert "keyless signatures cannot be written under cosign's tag" in capsys.readouterr().err
    assert served.requests == []
