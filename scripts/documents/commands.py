"""Descriptions of all commands, read from click, for the manual pages and the reference.

The build of the wheel imports this, so it must need no package except click.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from modelpack.cli.main import ALIASES, cli
from modelpack.cli.options import ALL_COMMANDS, REGISTRIES, SharedOption

Row = tuple[str, str]


@dataclass(frozen=True)
class Paragraph:
    """Text of a command's help; a preformatted one keeps its lines."""

    text: str
    preformatted: bool = False


@dataclass(frozen=True)
class Command:
    """One command: `name` is its full name, like "modelpack index create"."""

    name: str
    usage: str
    paragraphs: tuple[Paragraph, ...]
    options: tuple[Row, ...]
    registry_options: tuple[Row, ...]
    common_options: tuple[Row, ...]
    subcommands: tuple[Row, ...]
    aliases: tuple[str, ...]
    epilog: tuple[Paragraph, ...]

    @property
    def summary(self) -> str:
        """The first sentence of the help, without its full stop."""
        return self.paragraphs[0].text.partition(". ")[0].rstrip(".")

    @property
    def page(self) -> str:
        """The name of its manual page."""
        return self.name.replace(" ", "-")


def commands() -> Iterator[Command]:
    """Yield all commands by name, each group before its subcommands."""
    _add_entry_points()
    yield from _walk(cli, click.Context(cli, info_name="modelpack", **cli.context_settings))


def _add_entry_points() -> None:
    """Add the commands of the entry points in pyproject.toml, which are not installed at build."""
    root = Path(__file__).parents[2]
    sys.path.append(str(root / "engine"))
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for name, target in project["entry-points"]["modelpack.commands"].items():
        module, _, attribute = target.partition(":")
        cli.add_command(getattr(importlib.import_module(module), attribute), name)


def _walk(command: click.Command, context: click.Context) -> Iterator[Command]:
    context.max_content_width = context.terminal_width = 10_000  # do not wrap lines
    below = []
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            below.append((child, click.Context(child, info_name=name, parent=context)))
    yield _described(command, context, [(child, where.info_name or "") for child, where in below])
    for child, where in below:
        yield from _walk(child, where)


def _described(
    command: click.Command, context: click.Context, below: list[tuple[click.Command, str]]
) -> Command:
    name = context.command_path
    rows: dict[str, list[Row]] = {"own": [], "registry": [], "common": []}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and isinstance(parameter, click.Option):
            rows[_kind(parameter)].append((record[0], " ".join(record[1].split())))
    short = name.removeprefix("modelpack ")
    return Command(
        name,
        " ".join([name, *command.collect_usage_pieces(context)]),
        _paragraphs(command.help),
        tuple(rows["own"]),
        tuple(rows["registry"]),
        tuple(rows["common"]),
        tuple((part, child.get_short_help_str(10_000)) for child, part in below),
        tuple(sorted(alias for alias, meant in ALIASES.items() if meant == short)),
        _paragraphs(command.epilog),
    )


def _kind(option: click.Option) -> str:
    if "--help" in option.opts:
        return "common"
    heading = option.heading if isinstance(option, SharedOption) else None
    return {REGISTRIES: "registry", ALL_COMMANDS: "common"}.get(heading or "", "own")


def _paragraphs(text: str | None) -> tuple[Paragraph, ...]:
    found = []
    for part in inspect.cleandoc(text or "").split("\n\n"):
        if part.startswith("\b\n"):
            found.append(Paragraph(part.removeprefix("\b\n"), preformatted=True))
        elif part.strip():
            found.append(Paragraph(" ".join(part.split())))
    return tuple(found)
