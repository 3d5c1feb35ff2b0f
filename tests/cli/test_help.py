"""`modelpack help` and `version`, and the groups of commands and options in help."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

from modelpack import plugins
from modelpack._version import __version__
from modelpack.cli.main import COMMANDS, GROUPS, cli
from scripts.documents.commands import commands
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


def test_no_command_is_described_by_half_a_phrase() -> None:
    """At 80 columns, each description ends where a phrase does."""
    groups = list(every_group(cli, "modelpack"))
    assert len(groups) > 5
    for name, group in groups:
        text = group.get_help(click.Context(group, info_name=name, terminal_width=80))
        assert "..." not in re.sub(r"\[.*?\]\.\.\.", "", text), name


def every_group(group: click.Group, name: str) -> Iterator[tuple[str, click.Group]]:
    yield name, group
    context = click.Context(group, info_name=name)
    for part in group.list_commands(context):
        command = group.get_command(context, part)
        if isinstance(command, click.Group):
            yield from every_group(command, f"{name} {part}")


_GROUPS_OF_SERVE = {
    "Server": "--log-format", "Access": "--tls-key", "Models and requests": "--memory",
    "Engine": "--kv-cache-bytes",
}  # fmt: skip
_MORE = {
    "Scheduling and caches": "--kv-offload-dir", "Speculative decoding": "--draft-model",
    "Registries": "--ca-file", "Signatures and variants": "--variant",
}  # fmt: skip
_MORE_OF_SERVE = {
    "LoRA adapters": "--max-adapters", "Devices and processes": "--engine-process", **_MORE,
}  # fmt: skip


def test_help_of_serve_fits_two_screens() -> None:
    """The groups that people need first; of the others one line each, with how to see them."""
    text = help_at_80_columns("serve")
    assert len(text.splitlines()) <= 100
    assert max(map(len, text.splitlines())) <= 80
    shown = sections(text)
    assert list(shown) == [*_GROUPS_OF_SERVE, "All commands", "More options"]
    for heading, option in (_GROUPS_OF_SERVE | {"All commands": "-h"}).items():
        assert option in shown[heading]
    for heading in _MORE_OF_SERVE:
        assert re.search(rf"^  {heading} +--\w.*", text, re.MULTILINE)
    assert text.endswith("Show these too: modelpack help serve --all\n")


@pytest.mark.parametrize("command", ["serve", "run", "smoke"])
def test_help_with_all_has_every_option(command: str) -> None:
    text = succeed("help", command, "--all").out
    shown = sections(text)
    assert "More options" not in shown
    for heading, option in (_MORE_OF_SERVE if command == "serve" else _MORE).items():
        assert option in shown[heading]
    documented = next(one for one in commands() if one.name == f"modelpack {command}")
    rows = (*documented.options, *documented.registry_options, *documented.common_options)
    assert all(row[0].split()[0].strip(",") in text for row in rows)


def test_shared_options_come_last() -> None:
    assert list(sections(succeed("pull", "--help").out)) == [
        "Options", "Registries", "Signatures and variants", "All commands",
    ]  # fmt: skip
    assert list(sections(succeed("logout", "--help").out)) == ["All commands"]


def help_at_80_columns(command: str) -> str:
    found = cli.get_command(click.Context(cli), command)
    assert found is not None
    parent = click.Context(cli, info_name="modelpack", **cli.context_settings)
    context = click.Context(found, parent, command, terminal_width=80)
    return found.get_help(context) + "\n"
