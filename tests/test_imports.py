"""What importing costs: heavy packages load when they are used. test_layers.py has the order."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import modelpack

PACKAGE = Path(modelpack.__file__).parent
HTTP = ("requests", "oras", "huggingface_hub", "starlette", "httpx")
HEAVY = ("numpy", "mlx", "click", "rich", *HTTP)


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join({{m.split('.')[0] for m in sys.modules}}))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(output.stdout.split())


def test_import_modelpack_is_light() -> None:
    loaded = loaded_after("import modelpack")
    assert "modelpack" in loaded
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "module", ["modelpack.operations.package", "modelpack.store.layout", "modelpack.cli.store"]
)
def test_working_locally_loads_no_http_client(module: str) -> None:
    assert loaded_after(f"import {module}").isdisjoint(set(HEAVY) - {"click"})


def test_the_gateways_checks_load_no_http_client() -> None:
    loaded = loaded_after("import modelpack_server.gateway")
    assert "modelpack" in loaded
    assert loaded.isdisjoint(set(HEAVY) - {"starlette"})


def test_the_client_of_registries_loads_no_jsonschema() -> None:
    """It would compile a grammar of IRIs where Jupyter has installed one: a second per command."""
    loaded = loaded_after("from modelpack import Registry; Registry('localhost').repository('a')")
    assert "oras" in loaded
    assert "jsonschema" not in loaded


def test_version_command_loads_click_and_nothing_heavy() -> None:
    loaded = loaded_after("import modelpack.cli.main")
    assert "click" in loaded
    assert loaded.isdisjoint(set(HEAVY) - {"click"})


def test_exports_are_what_the_type_checker_sees() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen: set[str] = set()
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            seen |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            seen |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    assert seen | {"__version__"} == set(modelpack.__all__)


@pytest.mark.parametrize("name", sorted(modelpack.__all__))
def test_every_export_loads(name: str) -> None:
    assert getattr(modelpack, name) is not None


def test_public_names_are_pinned() -> None:
    assert sorted(modelpack.__all__) == [
        "Descriptor",
        "Digest",
        "DockerStore",
        "Manifest",
        "Model",
        "ModelConfig",
        "ModelFile",
        "ModelpackError",
        "PackageRequest",
        "Progress",
        "Reference",
        "Registry",
        "RemoteOptions",
        "Repository",
        "Selection",
        "Stop",
        "Store",
        "__version__",
        "attach",
        "bundle",
        "copy",
        "detach",
        "diff",
        "errors",
        "export_to_docker",
        "import_from_docker",
        "inspect",
        "lock",
        "package",
        "pull",
        "pull_locked",
        "push",
        "read_headers",
        "referrers",
        "repair",
        "resolve",
        "testing",
    ]


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_it"):
        modelpack.nothing_like_it  # noqa: B018
