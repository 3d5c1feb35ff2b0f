"""`modelpack help` and `version`."""

from __future__ import annotations

import pytest

from modelpack._version import __version__
from tests.cli.running import modelpack, succeed


@pytest.mark.parametrize(
    "words", [[], ["pull"], ["ls"], ["registry", "serve"], ["gateway", "key", "create"], ["help"]],
    ids=" ".join,
)  # fmt: skip
def test_help_is_that_of_the_option(words: list[str]) -> None:
    assert succeed("help", *words).out == succeed(*words, "--help").out


def test_help_as_json() -> None:
    value = succeed("help", "--json", "ls").json
    assert value["command"] == "modelpack list"
    assert value["help"].startswith("Usage: modelpack list ")


@pytest.mark.parametrize(
    ("words", "says"),
    [(["pul"], "Did you mean 'pull'"), (["pull", "it"], "modelpack pull has no command 'it'"),
     (["registry", "srve"], "srve")],
)  # fmt: skip
def test_help_of_what_is_no_command(words: list[str], says: str) -> None:
    failed = modelpack("help", *words)
    assert (failed.code, failed.out) == (2, "")
    assert says in failed.err


def test_version() -> None:
    assert succeed("version").out == succeed("--version").out
    assert succeed("version", "--json").json == {"schemaVersion": 1, "version": __version__}
