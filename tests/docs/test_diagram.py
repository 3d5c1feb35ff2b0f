"""docs/architecture.svg shows the packages that there are, in an order that their imports keep."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import modelpack
import modelpack_engine
from scripts.documents.diagram import BESIDE, ENGINE, MODELPACK, SERVING, TARGET, Layer, draw

LIBRARY = Path(modelpack.__file__).parent
SERVER = Path(next(iter(modelpack_engine.__path__)))


def packages(root: Path) -> set[str]:
    return {path.parent.name for path in root.glob("*/__init__.py")} - {"_spec"}


def parts(*columns: tuple[Layer, ...]) -> set[str]:
    return {part for column in columns for layer in column for part in layer.parts}


def imported(root: Path, part: str) -> set[str]:
    """The parts of the package at `root` that `part` of it imports."""
    place = root / part
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    found = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = node.module.split(".")
                if names == [root.name]:
                    found |= {alias.name for alias in node.names}
                elif names[0] == root.name:
                    found.add(names[1])
    return found - {part}


def test_the_picture_is_what_its_source_draws() -> None:
    assert TARGET.read_text() == draw(), "python -m scripts.documents.diagram"


def test_all_packages_are_there() -> None:
    assert packages(LIBRARY) <= parts(MODELPACK)
    assert packages(SERVER) == (packages(SERVER) & parts(SERVING, ENGINE)) | set(BESIDE)


@pytest.mark.parametrize(
    ("root", "column"), [(LIBRARY, MODELPACK), (SERVER, SERVING)], ids=["library", "serving"]
)
def test_imports_go_down(root: Path, column: tuple[Layer, ...]) -> None:
    level = {part: i for i, layer in enumerate(column) for part in layer.parts}
    for part, at in level.items():
        others = imported(root, part)
        for other in others & level.keys():
            assert level[other] > at, f"{part} imports {other}, which is not below it"


def test_the_engine_itself_knows_nothing_above() -> None:
    for part in parts(ENGINE):
        assert not imported(SERVER, part) & parts(SERVING), part
