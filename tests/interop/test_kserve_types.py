"""InferenceServices against the types that KServe publishes: its Python package, not installed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import modelpack
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from tests.cli.running import succeed
from tests.models import tiny_safetensors

pytestmark = pytest.mark.long  # the package is fetched
VERSION = "0.21.0"
IMAGE = "registry.example/team/tiny-image@sha256:" + "a" * 64


@pytest.fixture(scope="module")
def types(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Each type of KServe -> its fields, as they are in JSON, and their types."""
    scratch = tmp_path_factory.mktemp("kserve")
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps",
         f"kserve=={VERSION}", "-d", str(scratch)],
        check=True,
    )  # fmt: skip
    [wheel] = scratch.glob("*.whl")
    found: dict[str, dict[str, str]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not re.match(r"kserve/models/v1beta1_\w+\.py\Z", name):
                continue
            for node in ast.parse(archive.read(name)).body:
                if isinstance(node, ast.ClassDef):
                    found[node.name] = _fields(node)
    return found


def _fields(node: ast.ClassDef) -> dict[str, str]:
    tables = {
        target.id: ast.literal_eval(statement.value)
        for statement in node.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name) and target.id in ("openapi_types", "attribute_map")
    }
    return {tables["attribute_map"][key]: kind for key, kind in tables["openapi_types"].items()}


_PLAIN = {"str": str, "int": int, "bool": bool}


def check(value: Any, kind: str, types: dict[str, dict[str, str]], where: str = "") -> None:
    """Raise AssertionError where `value` is not of a type of KServe; others are Kubernetes' own."""
    if kind in _PLAIN:
        assert type(value) is _PLAIN[kind], f"{where}: expected {kind}, got {value!r}"
    elif listed := re.match(r"list\[(\w+)\]", kind):
        assert isinstance(value, list), f"{where}: expected a list, got {value!r}"
        for index, item in enumerate(value):
            check(item, listed[1], types, f"{where}[{index}]")
    elif kind in types:
        assert isinstance(value, dict), f"{where}: expected {kind}, got {value!r}"
        for key, item in value.items():
            assert key in types[kind], f"{where}: {kind} has no {key}"
            check(item, types[kind][key], types, f"{where}.{key}")


@pytest.mark.parametrize(
    "arguments",
    [(), ("--engine", "modelpack"), ("--model-image", IMAGE, "--pull-secret", "login")],
    ids=["vllm", "modelpack", "image"],
)
def test_an_inference_service_is_of_kserves_types(
    types: dict[str, dict[str, str]], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    request = modelpack.PackageRequest(safetensors_dir=tiny_safetensors(tmp_path))
    with registry() as server:
        name = f"{server.host}/team/tiny:v1"
        modelpack.package(name, request, push=True, store=LayoutStore(tmp_path / "store"))
        service = yaml.safe_load(succeed("k8s", name, "--kserve", *arguments).out)
    check(service, "V1beta1InferenceService", types)
    service["spec"]["predictor"]["modle"] = {}
    with pytest.raises(AssertionError, match="modle"):
        check(service, "V1beta1InferenceService", types)
