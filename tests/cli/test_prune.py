"""`modelpack prune`: it asks on a terminal, and says what it removed."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from tests.cli.running import modelpack, succeed
from tests.models import tiny_gguf


class Terminal(io.StringIO):
    """What a person types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def untagged(tmp_path: Path) -> str:
    """Return the digest of a model that lost its name to another."""
    digest = succeed("package", "--gguf", tiny_gguf(tmp_path), "team/tiny:v1").out
    (tmp_path / "LICENSE").write_text("MIT")
    succeed("package", "--gguf", tiny_gguf(tmp_path), "--license", tmp_path / "LICENSE",
            "team/tiny:v1")  # fmt: skip
    return digest


def test_it_removes_models_without_a_name(untagged: str) -> None:
    before = succeed("list", "-q").out.splitlines()
    planned = succeed("prune", "--dry-run")
    assert planned.out == f"Would delete: {untagged}"
    assert "would free " in planned.err
    assert succeed("list", "-q").out.splitlines() == before
    done = succeed("prune", "--force")
    assert done.out == f"Deleted: {untagged}"
    assert done.err.startswith("freed ")
    assert "freed 0 B" not in done.err
    assert succeed("list", "-q").out.splitlines() == [
        digest for digest in before if digest != untagged[7:19]
    ]
    nothing = succeed("prune", "--json").json
    assert nothing == {"schemaVersion": 1, "deleted": [], "bytesFreed": 0, "dryRun": False}


@pytest.mark.parametrize(("typed", "code"), [("y\n", 0), ("n\n", 1), ("\n", 1), ("", 130)])
def test_it_asks_on_a_terminal(
    untagged: str, monkeypatch: pytest.MonkeyPatch, typed: str, code: int
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    result = modelpack("prune")
    assert result.code == code
    assert f"{untagged}\nRemove 1 manifest without a name" in result.err
    assert result.out == (f"Deleted: {untagged}" if code == 0 else "")


def test_without_a_terminal_it_needs_force(untagged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    result = modelpack("prune")
    assert result.code == 2
    assert "--force" in result.err
    assert untagged in succeed("prune", "--dry-run").out
