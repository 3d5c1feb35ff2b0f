"""Imports go one way: the code keeps to the layers of scripts/documents/layers.toml."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from scripts.documents.diagram import TARGET, draw
from scripts.documents.layers import CONTRIBUTING, ROOT, contributing, packages

#: Packages that each package may import besides itself.
ALLOWED = {
    "modelpack": set(),
    "modelpack_engine": {"modelpack"},
    "modelpack_server": {"modelpack", "modelpack_engine"},
}
#: What the engine may use of the toolkit: neither a store nor a registry. `__init__`: the version.
ENGINE_MAY_USE = {"artifacts", "builder", "bundles", "errors", "formats", "__init__"}
HTTP = {"fastapi", "starlette", "uvicorn", "httpx", "requests"}
#: Packages of modelpack_server that know HTTP.
HTTP_SIDE = {"api", "bench", "cli", "gateway", "repl", "server_client"}
FAMILIES = ("openai", "anthropic", "ollama", "model_runner", "page")
RANKS = {
    package.name: {
        part: rank for rank, layer in enumerate(reversed(package.layers)) for part in layer.parts
    }
    for package in packages()
}
PATHS = {package.name: package.path for package in packages()}


def modules() -> dict[str, Path]:
    found = {}
    for name, root in PATHS.items():
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((name, *parts))] = path
    return found


MODULES = modules()


@cache
def imports(module: str) -> frozenset[str]:
    """Return the modules that a module imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return frozenset(found - {module})


def part_of(module: str) -> str:
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


@pytest.mark.parametrize("package", RANKS)
def test_all_parts_have_a_layer(package: str) -> None:
    parts = {part_of(name) for name in MODULES if name.split(".")[0] == package} - {"__init__"}
    assert parts - {"_spec"} == set(RANKS[package])


@pytest.mark.parametrize("package", RANKS)
def test_imports_go_down(package: str) -> None:
    wrong = []
    for name in MODULES:
        if name.split(".")[0] != package or part_of(name) == "__init__":
            continue  # a package's own names may come from anywhere in it
        own = RANKS[package][part_of(name)]
        for other in imports(name):
            top, part = other.split(".")[0], part_of(other)
            if top != package or part in {part_of(name), "__init__"}:
                continue
            if RANKS[package][part] >= own:
                wrong.append(f"{name} imports {other}, which is not below it")
    assert not wrong


@pytest.mark.parametrize("package", RANKS)
def test_packages_import_those_below(package: str) -> None:
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        if name.split(".")[0] == package
        for other in imports(name)
        if other.split(".")[0] in RANKS and other.split(".")[0] not in {package, *ALLOWED[package]}
    ]
    assert not wrong


def test_the_engine_knows_no_store_and_no_http() -> None:
    wrong = []
    for name in MODULES:
        if name.split(".")[0] == "modelpack_engine":
            for other in imports(name):
                top = other.split(".")[0]
                if top in HTTP or (top == "modelpack" and part_of(other) not in ENGINE_MAY_USE):
                    wrong.append(f"{name} imports {other}")
    assert not wrong


def test_only_the_http_side_of_the_server_knows_http() -> None:
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        if name.split(".")[0] == "modelpack_server" and part_of(name) not in HTTP_SIDE
        for other in imports(name)
        if other.split(".")[0] in HTTP
    ]
    assert not wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_families_do_not_know_each_other(family: str) -> None:
    own = {name for name in MODULES if name.startswith(f"modelpack_server.api.{family}")}
    assert own
    others = tuple(f"modelpack_server.api.{other}" for other in FAMILIES if other != family)
    assert not [
        (name, other) for name in own for other in imports(name) if other.startswith(others)
    ]


def test_no_module_is_in_a_cycle() -> None:
    """Packages that only export names from their modules do not count."""
    graph = {
        name: {other for other in imports(name) & MODULES.keys() if not _is_package(other)}
        for name in MODULES
        if not _is_package(name)
    }
    while free := {name for name, others in graph.items() if not others & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in free}
    assert not graph


def _is_package(module: str) -> bool:
    return MODULES[module].name == "__init__.py"


def test_what_is_made_of_the_list_is_up_to_date() -> None:
    command = "python -m scripts.documents.layers"
    assert CONTRIBUTING.read_text() == contributing(), command
    assert TARGET.read_text() == draw(), command
    assert TARGET.is_relative_to(ROOT)
