"""Pages of the site that are made of the code: commands, errors, the Python library."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

import modelpack
from modelpack import errors as tree
from scripts.documents.commands import Command, Paragraph, Row, commands


def all_commands() -> str:
    """The page of all commands with their options, as `--help` has them."""
    found = list(commands())
    registry = next(command.registry_options for command in found if command.registry_options)
    common = next(command.common_options for command in found if len(command.common_options) > 2)
    lines = ["# All commands", "", "Made of the code: what `--help` says, on one page.", ""]
    lines += ["## Common options", "", "Every command has them, before or after its name.", ""]
    lines += _table(common)
    lines += ["## Options for registries", "", "Commands that talk to a registry have them.", ""]
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
    if command.registry_options:
        lines += ["With the [options for registries](#options-for-registries).", ""]
    for paragraph in command.epilog:
        lines += _text(paragraph)
    return lines


def _text(paragraph: Paragraph) -> list[str]:
    if paragraph.preformatted:
        return ["```text", paragraph.text, "```", ""]
    return [_escaped(paragraph.text), ""]


def _table(rows: Iterable[Row], what: str = "Option") -> list[str]:
    # A | between ticks is no border for mkdocs, which has no way to escape one there.
    lines = [f"| {what} | |", "|---|---|"]
    lines += [f"| `{name}` | {_escaped(meaning)} |" for name, meaning in rows]
    return [*lines, ""]


def _escaped(text: str) -> str:
    """Return plain text that is the same as markdown, but for what is between ticks."""
    pieces = text.split("`")
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"([\\*_\[\]|])", r"\\\1", html.escape(pieces[i], quote=False))
    return "`".join(pieces)


def errors() -> str:
    """The page of the exception tree, and what a command ends with."""
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
    """The page of what `import modelpack` gives; mkdocstrings fills it from the docstrings."""
    kinds: dict[str, list[str]] = {"Functions": [], "Values, stores and registries": []}
    for name, (module, attribute) in sorted(modelpack._EXPORTS.items()):
        kind = "Functions" if name[0].islower() else "Values, stores and registries"
        kinds[kind].append(f"::: {module}.{attribute}")
    lines = [
        "# Python", "",
        "What `import modelpack` gives. Names are loaded when they are first used. Every failure",
        "is a `ModelpackError` of [the tree](errors.md); the library prints nothing.", "",
        "`modelpack.testing` has a registry for tests of your own:", "",
        "::: modelpack.testing.registry", "",
    ]  # fmt: skip
    for kind, members in kinds.items():
        lines += [f"## {kind}", "", *(line for member in members for line in (member, ""))]
    return "\n".join(lines)
