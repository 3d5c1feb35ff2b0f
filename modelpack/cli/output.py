"""The one sink of results: text for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from modelpack.cli.options import Settings
from modelpack.reference import Reference

#: Grows when a field of `--json` output changes its meaning or goes away.
SCHEMA_VERSION = 1


def show(settings: Settings, value: dict[str, Any], text: str) -> None:
    """Print a result on stdout: `value` with --json, else `text`."""
    if settings.json:
        show_json(value)
    elif text:
        click.echo(text)


def show_json(value: dict[str, Any]) -> None:
    """Print a JSON result, with the version of its schema."""
    click.echo(json.dumps({"schemaVersion": SCHEMA_VERSION} | value, indent=2))


def note(settings: Settings, message: str) -> None:
    """Tell the user something on stderr."""
    if not settings.quiet:
        click.echo(message, err=True)


def note_reference(settings: Settings, typed: str, reference: Reference) -> None:
    """Say which registry a name stands for, where the user did not write it."""
    if typed.strip() not in (str(reference), reference.name):
        note(settings, f"{typed.strip()} is {reference}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return left-aligned columns, two spaces apart, as `docker model list` prints them."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join(lines)


def human_size(size: int) -> str:
    """Return a size in decimal units, as registries and `docker model` show it."""
    value, units = float(size), iter(("B", "kB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    while value >= 1000 and unit != "PB":
        value, unit = value / 1000, next(units)
    return f"{size} B" if unit == "B" else f"{value:.2f} {unit}"


def plural(count: int, noun: str) -> str:
    """Return `count` with its noun: 1 blob, 2 blobs."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
