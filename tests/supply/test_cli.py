"""`keygen`, `sign`, `verify`, and the options of other commands that say who is trusted."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from modelpack.cli.main import run
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


def test_without_a_password(
    published: Published, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sign", published.reference, "--key", str(keys / "ours.key")]) == 1
    assert "put it into the environment as COSIGN_PASSWORD" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["pull", "resolve", "bundle", "smoke", "serve", "run", "convert", "package"]
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
    }
    assert run([command, published.reference, *arguments.get(command, [])]) == 5
    assert "is not signed by us: it has no signatures" in capsys.readouterr().err


def test_a_key_needs_a_password_that_somebody_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COSIGN_PASSWORD", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert run(["keygen", str(tmp_path / "pair")]) == 2
    assert "COSIGN_PASSWORD" in capsys.readouterr().err
    assert not list(tmp_path.glob("pair*"))
