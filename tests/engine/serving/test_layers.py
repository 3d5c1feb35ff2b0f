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
COMMANDS = ("chatting.py", "checkup.py", "smoking.py")
# The engine itself, which knows nothing of those; but what the command line runs stands above them.
ENGINE = [
    *(path for path in PACKAGE.glob("*.py") if path.name not in COMMANDS),
    *(
        path
        for part in (
            "adaptation",
            "attention",
            "benchmarking",
            "llama_cpp",
            "loaders",
            "parallel",
            "sampling",
            "speculation",
            "templates",
            "worker",
        )
        for path in (PACKAGE / part).rglob("*.py")
    ),
]
FAMILIES = ("openai", "anthropic", "ollama", "runner", "page")


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


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_engine_knows_nothing_of_serving(path: Path) -> None:
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in HTTP, f"{name} is HTTP"
        assert parts[0] != "modelpack_engine" or not set(parts[1:2]) & set(LAYERS), name


@pytest.mark.parametrize("family", FAMILIES)
def test_families_do_not_know_each_other(family: str) -> None:
    others = {f"modelpack_server.api.{other}" for other in FAMILIES if other != family}
    found = sorted((PACKAGE / "server" / family).rglob("*.py"))
    assert found
    for path in found:
        for name in imports(path):
            assert ".".join(name.split(".")[:3]) not in others, f"{path.name} imports {name}"


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) > 30
    assert len(ENGINE) > 60
    assert any("conversation" in name for name in imports(PACKAGE / "pool" / "pool.py"))
