"""The Python API takes names as text or references, and paths as text or `Path`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import modelpack
from modelpack.bundles.links import LinkMode
from modelpack.errors import NotFoundError
from tests.models import tiny_gguf
from tests.operations.conftest import Published
from tests.operations.conftest import published as published


def test_names_are_texts_or_references(published: Published, tmp_path: Path) -> None:
    reference = modelpack.Reference.parse(published.reference)
    store = published.store
    modelpack.pull(reference, store=store)
    for name in (reference, str(reference)):
        assert modelpack.inspect(name, store=store).digest == published.digest
        assert modelpack.inspect(name, from_registry=True).reference == reference
        assert modelpack.resolve(name, store=store).model.digest == published.digest
        assert modelpack.read_headers(name, store=store)
        assert modelpack.read_headers(name, from_registry=True)
        assert modelpack.diff(name, name, store=store).identical
        assert modelpack.diff(name, store=store).identical
        made = modelpack.bundle(name, tmp_path / type(name).__name__, store=store)
        assert made.weight.exists()
    with pytest.raises(NotFoundError):
        modelpack.resolve(reference.with_tag("gone"), store=store, pull=True)
    again = modelpack.bundle(reference, str(tmp_path / "text"), links=LinkMode.COPY, store=store)
    assert again.directory == tmp_path / "text"


def test_paths_are_texts_or_paths(tmp_path: Path) -> None:
    gguf, notice = tiny_gguf(tmp_path), tmp_path / "LICENSE"
    notice.write_text("free")
    request = modelpack.PackageRequest(gguf=str(gguf), licenses=[str(notice)])
    assert request == modelpack.PackageRequest(gguf=gguf, licenses=(notice,))
    assert request == modelpack.PackageRequest(gguf, licenses=[notice])
    assert request.licenses == (notice,)
    assert replace(request, licenses=str(notice), context_size=9).licenses == (notice,)
    assert hash(request) == hash(replace(request))
    assert "PackageRequest(gguf=" in repr(request)
    made = modelpack.package("x:v1", request)
    assert [layer.filepath for layer in made.manifest.layers] == ["tiny.gguf", "LICENSE"]


def test_the_registry_for_tests_needs_no_import_of_its_own() -> None:
    code = "import modelpack\nwith modelpack.testing.registry() as r: print(r.host)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("127.0.0.1:")


USER = """
from pathlib import Path

import modelpack

request = modelpack.PackageRequest(gguf="m.gguf", licenses=["LICENSE", Path("NOTICE")])
made = modelpack.package("x:v1", request, store=modelpack.Store("store"))
reference = modelpack.Reference.parse("x:v1")
model: modelpack.Model = modelpack.inspect(reference)
for name in ("x:v1", reference):
    paths: list[Path] = [one.path for one in modelpack.resolve(name).files]
modelpack.diff(reference, "x:v2")
weight: Path = modelpack.bundle(reference, "out").weight
with modelpack.testing.registry() as server:
    host: str = server.host
modelpack.PackageRequest(gguf=3)  # type: ignore[arg-type]
modelpack.inspect(3)  # type: ignore[arg-type]
"""


@pytest.mark.long
def test_a_users_type_checker_accepts_them(tmp_path: Path) -> None:
    user = tmp_path / "user.py"
    user.write_text(USER)
    command = ["-m", "mypy", "--strict", "--config-file=", "--cache-dir", tmp_path / "cache", user]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
