"""Which way imports go on the serving side: nothing below the server knows HTTP."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import modelpack_engine

PACKAGE = Path(next(iter(modelpack_engine.__path__)))
# Each may import what stands before it, and the engine itself.
LAYERS = ("output", "structured", "embedding", "conversation", "pool", "server")
HTTP = {"fastapi", "starlette", "uvicorn", "httpx", "requests"}
MODULES = [path for layer in LAYERS[:-1] for path in sorted((PACKAGE / layer).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_http_and_nothing_from_above(path: Path) -> None:
    layer = LAYERS.index(path.relative_to(PACKAGE).parts[0])
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in HTTP, f"{name} is HTTP"
        if parts[0] == "modelpack_engine" and len(parts) > 1 and parts[1] in LAYERS:
            assert LAYERS.index(parts[1]) <= layer, f"{name} is above"


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) > 30
    assert any("conversation" in name for name in imports(PACKAGE / "pool" / "pool.py"))
