"""`modelpack help` and `version`, and the groups of commands and options in help."""

from __future__ import annotations

import re

import pytest

from modelpack import plugins
from modelpack._version import __version__
from modelpack.cli.main import COMMANDS, GROUPS
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


def sections(text: str) -> dict[str, list[str]]:
    """Return the first words of the lines below each heading."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if re.match(r"[A-Z][\w ]+:$", line):
            words = found.setdefault(line.removesuffix(":"), [])
        elif re.match(r"  \S", line) and found:
            words.append(line.split()[0].rstrip(","))
    return found


def test_commands_are_grouped_by_task() -> None:
    shown = sections(succeed("--help").out)
    assert list(shown) == ["Options", *GROUPS]
    for heading, names in list(GROUPS.items())[:-1]:
        assert shown[heading] == list(names)
    named = [name for names in GROUPS.values() for name in names]
    assert sorted(named) == sorted({*COMMANDS, *plugins.command_names()})


def test_options_of_serve_are_grouped_and_shared_ones_last() -> None:
    shown = sections(succeed("serve", "--help").out)
    assert list(shown) == [
        "Server", "Access", "Models and requests", "Engine", "Speculative decoding", "Registries",
        "Signatures and variants", "All commands",
    ]  # fmt: skip
    for heading, option in {
        "Server": "--log-format", "Access": "--tls-key", "Models and requests": "--memory",
        "Engine": "--kv-cache-bytes", "Speculative decoding": "--draft-model",
        "Registries": "--ca-file", "Signatures and variants": "--variant", "All commands": "-q",
    }.items():  # fmt: skip
        assert option in shown[heading]
