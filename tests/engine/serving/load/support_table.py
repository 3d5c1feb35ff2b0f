"""The tables of docs/api.md, as rows."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[4]
DOCUMENT = ROOT / "docs" / "api.md"
_NAMES = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class FieldRow:
    """A row about fields in the body of an operation ("POST /path")."""

    operation: str
    fields: tuple[str, ...]
    policy: str


def _cells() -> list[tuple[str, list[str]]]:
    """Return all rows with their headings, without the tables' header rows."""
    heading, rows = "", []
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|"):
            rows.append((heading, [cell.strip() for cell in line.strip("|").split("|")]))
    return [(heading, cells) for heading, cells in rows
            if set(cells[0]) != {"-"} and cells[-1] != "Test"]  # fmt: skip


def routes() -> set[tuple[str, str]]:
    """Return (METHOD, path) of each listed route, including aliases."""
    return {
        (method.strip(), path)
        for heading, cells in _cells()
        if heading == "Routes"
        for method in cells[0].split(",")
        for path in _NAMES.findall(cells[1] + cells[2])
    }


def field_rows() -> list[FieldRow]:
    """Return the rows about fields."""
    return [
        FieldRow(heading, tuple(_NAMES.findall(cells[0])), cells[1])
        for heading, cells in _cells()
        if "/" in heading
    ]


def named_tests() -> list[str]:
    """Return the test named in each row."""
    return [cells[-1].strip("`") for _, cells in _cells()]


@cache
def functions_in(path: Path) -> frozenset[str]:
    """Return the names of the functions in a file."""
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds))
