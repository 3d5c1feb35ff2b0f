"""Manual pages in roff, one for each command."""

from __future__ import annotations

from collections.abc import Iterable

from modelpack._version import __version__
from scripts.documents.commands import Command, Paragraph, Row


def manual(command: Command) -> str:
    """Return the manual page of a command; the same command gives the same bytes."""
    lines = [
        f'.TH "{escaped(command.page.upper())}" "1" "" "modelpack {__version__}" "Modelpack"',
        ".SH NAME",
        f"{escaped(command.page)} \\- {escaped(command.summary)}",
        ".SH SYNOPSIS",
        f"\\fB{escaped(command.name)}\\fP{escaped(command.usage.removeprefix(command.name))}",
        ".SH DESCRIPTION",
        *_text(command.paragraphs),
    ]
    if command.aliases:
        lines += [".PP", escaped(f"Also called {', '.join(command.aliases)}.")]
    sections: tuple[tuple[str, tuple[Row, ...]], ...] = (
        ("COMMANDS", command.subcommands),
        ("OPTIONS", command.options),
        ("OPTIONS FOR REGISTRIES", command.registry_options),
        ("COMMON OPTIONS", command.common_options),
    )
    for title, rows in sections:
        if rows:
            lines += [f".SH {title}", *_list(rows)]
    if command.epilog:
        lines += [".SH NOTES", *_text(command.epilog)]
    lines += [".SH SEE ALSO", *_see_also(command)]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Return `text` escaped for roff."""
    plain = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(f"\\&{line}" if line[:1] in (".", "'") else line for line in plain.split("\n"))


def _text(paragraphs: Iterable[Paragraph]) -> list[str]:
    lines: list[str] = []
    for paragraph in paragraphs:
        text = escaped(paragraph.text)
        lines += [".PP", ".nf", text, ".fi"] if paragraph.preformatted else [".PP", text]
    return lines


def _list(rows: Iterable[Row]) -> list[str]:
    lines: list[str] = []
    for term, meaning in rows:
        lines += [".TP", f"\\fB{escaped(term)}\\fP", escaped(meaning)]
    return lines


def _see_also(command: Command) -> list[str]:
    above = command.page.rpartition("-")[0]
    pages = [above] if above else []
    pages += [f"{command.page}-{name}" for name, _ in command.subcommands]
    return [", ".join(f"\\fB{escaped(page)}\\fP(1)" for page in pages)]
