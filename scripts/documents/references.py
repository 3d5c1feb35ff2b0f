"""Pages of the site that are generated from the code: commands, errors, the Python library."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

import modelpack
from modelpack import errors as tree
from scripts.documents.commands import Command, Paragraph, Row, commands


def all_commands() -> str:
    """Return the page of all commands and their options, with the texts of `--help`."""
    found = list(commands())
    registry = max((command.registry_options for command in found), key=len)
    common = max((command.common_options for command in found), key=len)
    lines = [
        "# All commands",
        "",
        "The output of `--help` of all commands, generated from the code.",
        "",
    ]
    lines += [
        "## Common options",
        "",
        "`modelpack` accepts these options before the name of a command. After the name, a",
        "command accepts those that have an effect.",
        "",
    ]
    lines += _table(common)
    lines += [
        "## Options for registries",
        "",
        "Commands that connect to a registry accept these options; those of transfers only if they",
        "transfer blobs.",
        "",
    ]
    lines += _table(registry)
    for command in found:
        lines += _section(command)
    return "\n".join(lines) + "\n"


def _section(command: Command) -> list[str]:
    lines = [f"## {command.name}", "", "```text", command.usage, "```", ""]
    for paragraph in command.paragraphs:
        lines += _text(paragraph)
    if command.aliases:
        lines += [f"Also called {', '.join(f'`{alias}`' for alias in command.aliases)}.", ""]
    if command.subcommands:
        lines += _table(command.subcommands, "Command")
    if command.options:
        lines += _table(command.options)
    for where, rows in (
        ("common options](#common-options)", command.common_options),
        ("options for registries](#options-for-registries)", command.registry_options),
    ):
        names = [f"`{name}`" for row in rows for name in re.findall(r"--[\w-]+", row[0])]
        if rows:
            lines += [f"With the [{where}: {', '.join(names)}.", ""]
    for paragraph in command.epilog:
        lines += _text(paragraph)
    return lines


def _text(paragraph: Paragraph) -> list[str]:
    if paragraph.preformatted:
        return ["```text", paragraph.text, "```", ""]
    return [_escaped(paragraph.text), ""]


def _table(rows: Iterable[Row], what: str = "Option") -> list[str]:
    # In mkdocs, a | between backticks does not end a cell and must not be escaped.
    lines = [f"| {what} | |", "|---|---|"]
    lines += [f"| `{name}` | {_escaped(meaning)} |" for name, meaning in rows]
    return [*lines, ""]


def _escaped(text: str) -> str:
    """Return plain text escaped for Markdown, except code between backticks."""
    pieces = text.split("`")
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"([\\*_\[\]|])", r"\\\1", html.escape(pieces[i], quote=False))
    return "`".join(pieces)


def errors() -> str:
    """Return the page of the exception tree and the exit codes."""
    text = tree.__doc__ or ""
    head, _, rest = text.partition("\n\n")
    drawing, _, foot = rest.partition("\n\n")
    return "\n".join([
        "# Errors", "",
        head, "",
        "```text", drawing, "```", "",
        foot, "",
        "With `--json`, a command prints its error as "
        '`{"error": {"type", "message", "hint", "exitCode"}}` on stderr.',
        "Errors of the HTTP APIs have the shape of each API: see [the tables](../api.md).", "",
    ])  # fmt: skip


def python() -> str:
    """Return the page of the Python library; mkdocstrings adds the docstrings."""
    kinds: dict[str, list[str]] = {"Functions": [], "Values, stores and registries": []}
    places = {name: f"{module}.{name}" for name, module in modelpack._MODULES.items()}
    places["Store"] = "modelpack.store.layout.LayoutStore"
    for name, place in sorted(places.items()):
        kind = "Functions" if name[0].islower() else "Values, stores and registries"
        kinds[kind].append(f"::: {place}")
    lines = [
        "# Python", "",
        "The names in `modelpack` are loaded on first use. Every failure is a `ModelpackError`",
        "of [the tree](errors.md); the library prints nothing.", "",
        "`modelpack.testing` has a registry for your tests:", "",
        "::: modelpack.testing.registry", "",
    ]  # fmt: skip
    for kind, members in kinds.items():
        lines += [f"## {kind}", "", *(line for member in members for line in (member, ""))]
    return "\n".join(lines)
