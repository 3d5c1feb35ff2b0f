"""`keygen`, `sign`, `verify`, and the trust options of other commands."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from modelpack.cli.main import run
from modelpack.operations import signatures as signing
from modelpack.operations.index import NamedVariant, create_index
from modelpack.operations.lock import lock
from modelpack.trust.keys import PrivateKey
from tests.supply.conftest import Published


def test_from_keys_to_a_pull(
    published: Published,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret = "of nobody's business"
    monkeypatch.setenv("COSIGN_PASSWORD", secret)
    pair, reference = tmp_path / "pair", published.reference
    assert run(["keygen", str(pair)]) == 0
    assert run(["--store", str(published.store.root), "pull", reference, "--verify-key",
                f"{pair}.pub"]) == 5  # fmt: skip
    assert run(["sign", reference, "--key", f"{pair}.key"]) == 0
    assert run(["pull", reference, "--verify-key", f"{pair}.pub"]) == 0
    capsys.readouterr()
    assert run(["verify", reference, "--key", f"{pair}.pub", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["digest"] == str(published.digest)
    assert {one["format"] for one in value["signatures"]} == {"cosign", "bundle"}
    assert run(["verify", reference, "--local", "--key", f"{pair}.pub"]) == 0
    monkeypatch.setenv("COSIGN_PASSWORD", "wrong " + secret)
    assert run(["--debug", "sign", reference, "--key", f"{pair}.key"]) == 1
    shown = capsys.readouterr()
    assert "the password is wrong" in shown.err
    assert secret not in shown.out + shown.err


def test_an_id_is_verified_in_the_store(
    published: Published, keys: Path, ours: PrivateKey, capsys: pytest.CaptureFixture[str]
) -> None:
    store, encoded = ["--store", str(published.origin.root)], published.digest.encoded
    key, other = (["--key", str(keys / f"{name}.pub")] for name in ("ours", "theirs"))
    assert run([*store, "verify", encoded[:8], *key]) == 5
    signing.sign(published.reference, ours, store=published.origin)
    capsys.readouterr()
    for name in (encoded[:8], encoded[:12], str(published.digest)):
        for local in ([], ["--local"]):
            assert run([*store, "verify", name, *key, *local, "--json"]) == 0
            value = json.loads(capsys.readouterr().out)
            assert (value["reference"], value["digest"]) == (None, str(published.digest))
    assert run([*store, "verify", encoded[:8], *other]) == 5


def test_without_a_password(
    published: Published, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sign", published.reference, "--key", str(keys / "ours.key")]) == 1
    assert "set COSIGN_PASSWORD in the environment" in capsys.readouterr().err


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "command",
    [
        "pull",
        "resolve",
        "bundle",
        "smoke",
        "serve",
        "run",
        "convert",
        "package",
        "bench",
        "k8s",
        "transcribe",
    ],
)
def test_a_policy_keeps_models_out(
    published: Published,
    keys: Path,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = keys / "cli.toml"
    policy.write_text(
        '[publishers.us]\nkeys = ["ours.pub"]\n[[rules]]\nmodels = ["*"]\npublishers = ["us"]\n'
    )
    monkeypatch.setenv("MODELPACK_POLICY", str(policy))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    arguments = {
        "bundle": [str(tmp_path / "out"), "--pull"],
        "convert": ["--to", "docker"],
        "package": ["--from", published.reference],
        "resolve": ["--pull"],
        "run": ["prompt"],
        "serve": ["--port", "0"],
        "transcribe": [str(Path("fixtures/sounds/tone.flac").absolute())],
    }
    assert run([command, published.reference, *arguments.get(command, [])]) == 5
    assert "is not signed by us: it has no signatures" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "run"])
def test_a_policy_keeps_files_on_disk_out(
    keys: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("prompt"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert run([command, str(tmp_path), "--verify-key", str(keys / "ours.pub")]) == 5
    assert "files on disk have no signatures" in capsys.readouterr().err


def test_files_of_another_image_are_not_signed(
    published: Published, keys: Path, ours: PrivateKey, capsys: pytest.CaptureFixture[str]
) -> None:
    signing.sign(published.reference, ours)
    words = ["k8s", published.reference, "--model-image", "registry.example/any:v1"]
    assert run(words) == 0
    assert "registry.example/any:v1" in capsys.readouterr().out
    assert run([*words, "--verify-key", str(keys / "ours.pub")]) == 2
    shown = capsys.readouterr()
    assert "--model-image registry.example/any:v1" in shown.err
    assert not shown.out


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "{model}", "-o", "{path}/out.tar"],
        ["export", "--all", "-o", "{path}/out.tar"],
        ["export", "{index}", "-o", "{path}/out.tar"],
        ["export", "{model}", "--docker-store", "{path}/docker"],
        ["export", "--all", "--docker-store", "{path}/docker"],
        ["resolve", "{model}"],
        ["resolve", "{digest}"],
        ["bundle", "{model}", "{path}/out"],
        ["package", "x/new:v1", "--from", "{model}"],
        ["pull", "--locked", "--lock-file", "{path}/models.lock"],
    ],
)
def test_what_is_stored_stays_in(
    published: Published,
    keys: Path,
    tmp_path: Path,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An older unsigned model cannot be copied to a place where it could be run."""
    store, index = published.origin, f"{published.host}/team/any:v1"
    create_index(index, [NamedVariant("one", published.reference)], store=store)
    lock([published.reference], path=tmp_path / "models.lock")
    (tmp_path / "docker").mkdir()
    given = {
        "model": published.reference,
        "digest": published.digest,
        "index": index,
        "path": tmp_path,
    }
    words = [word.format(**given) for word in arguments]
    common = ["--store", str(store.root), "--verify-key", str(keys / "ours.pub")]
    assert run([*words, *common]) == 5
    assert "is not signed by" in capsys.readouterr().err
    assert not (tmp_path / "out.tar").exists()
    assert not (tmp_path / "out").exists()
    assert not [path for path in (tmp_path / "docker").rglob("*") if path.is_file()]


@pytest.mark.parametrize("source", ["archive", "docker"])
def test_an_import_asks_for_signatures(
    published: Published, keys: Path, ours: PrivateKey, tmp_path: Path, source: str
) -> None:
    store = ["--store", str(published.origin.root)]
    archive, docker = tmp_path / "out.tar", tmp_path / "docker"
    if source == "archive":
        assert run(["export", published.reference, "-o", str(archive), *store]) == 0
        given = [str(archive)]
    else:
        docker.mkdir()
        assert run(["export", "--all", "--docker-store", str(docker), *store]) == 0
        given = ["--all", "--docker-store", str(docker)]
    given += ["--store", str(published.store.root), "--verify-key", str(keys / "ours.pub")]
    assert run(["import", *given]) == 5
    assert published.store.models() == ()
    signing.sign(published.reference, ours)
    assert run(["import", *given]) == 0
    assert [model.digest for model in published.store.models()] == [published.digest]


def test_a_format_needs_a_key(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pull", published.reference, "--verify-format", "cosign"]) == 2
    assert "--verify-format requires --verify-key" in capsys.readouterr().err


def test_a_key_needs_a_password_that_somebody_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COSIGN_PASSWORD", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert run(["keygen", str(tmp_path / "pair")]) == 2
    assert "COSIGN_PASSWORD" in capsys.readouterr().err
    assert not list(tmp_path.glob("pair*"))
