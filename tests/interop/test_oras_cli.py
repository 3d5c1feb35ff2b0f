"""The real oras command line and ours, attaching and discovering each other's work."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import modelpack
from modelpack.operations.referrers import attach, detach, referrers
from modelpack.testing import registry
from tests.conftest import ROOT
from tests.interop.go_tool import build_go_tool
from tests.models import FIXTURES, tiny_gguf
from tests.peers import docker_registry, require

pytestmark = pytest.mark.peer("go")

SBOM = "application/spdx+json"


@pytest.fixture(scope="module")
def binary() -> Path:
    require("go")
    return build_go_tool(Path(__file__).parent / "oras_cli", ROOT / ".cache")


@pytest.fixture(params=["embedded", "docker-registry"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A registry with the referrers API, and one without."""
    if request.param == "embedded":
        with registry(tmp_path / "registry") as server:
            yield server.host
    else:
        with docker_registry(tmp_path / "registry") as running:
            yield running


class Oras:
    """Runs the program in a directory of its own."""

    def __init__(self, binary: Path, directory: Path) -> None:
        self.binary = binary
        self.directory = directory

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            [self.binary, *arguments], cwd=self.directory, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def discovered(self, reference: str) -> list[Any]:
        output = self("discover", "--plain-http", "--format", "json", reference)
        found: list[Any] = json.loads(output)["manifests"]
        return found


def test_oras_and_modelpack_see_the_same(binary: Path, host: str, tmp_path: Path) -> None:
    oras = Oras(binary, tmp_path)
    reference = f"{host}/team/model:v1"
    request = modelpack.PackageRequest(gguf=tiny_gguf(tmp_path))
    modelpack.package(reference, request, push=True, store=modelpack.Store(tmp_path / "store"))
    report = tmp_path / "sbom.json"
    report.write_text("{}\n")

    ours = attach(reference, [report], artifact_type=SBOM, annotations={"by": "modelpack"})
    [seen] = oras.discovered(reference)
    assert seen["digest"] == str(ours.digest)
    assert seen["artifactType"] == SBOM
    pulled = f"{host}/team/model@{ours.digest}"
    oras("pull", "--plain-http", "--output", "out", pulled)
    assert (tmp_path / "out" / "sbom.json").read_text() == "{}\n"

    oras("attach", "--plain-http", "--artifact-type", "application/x-note", reference, "sbom.json")
    both = referrers(reference)
    assert {one.artifact_type for one in both} == {SBOM, "application/x-note"}
    assert {one["digest"] for one in oras.discovered(reference)} == {str(x.digest) for x in both}

    # What oras attached is detached here, and stays gone for both.
    [theirs] = referrers(reference, artifact_type="application/x-note")
    detach(f"{host}/team/model@{theirs.digest}")
    assert [one["digest"] for one in oras.discovered(reference)] == [str(ours.digest)]

    # A copy by oras brings it along, as one by us does.
    target = f"{host}/copied/model"
    oras("cp", "-r", "--from-plain-http", "--to-plain-http", reference, f"{target}:v1")
    assert [one.digest for one in referrers(f"{target}:v1")] == [ours.digest]
    modelpack.copy(reference, f"{target}:v2", with_referrers=True)
    assert len(referrers(f"{target}:v2")) == 1


def test_oras_pull_names_the_files_of_a_model(binary: Path, host: str, tmp_path: Path) -> None:
    oras = Oras(binary, tmp_path)
    files = {
        "config.json": b"{}",
        "model.safetensors": (FIXTURES / "models/tiny-safetensors/model.safetensors").read_bytes(),
        "sub/README.md": b"# tiny\n",
    }
    for name, content in files.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)
    for form in ("cncf", "docker"):
        request = modelpack.PackageRequest(safetensors_dir=tmp_path / "model", format=form)  # type: ignore[arg-type]
        store = modelpack.Store(tmp_path / "store")
        modelpack.package(f"{host}/team/model:{form}", request, push=True, store=store)
    oras("pull", "--plain-http", "--output", "out", f"{host}/team/model:cncf")
    found = tmp_path / "out"
    assert {
        str(path.relative_to(found)): path.read_bytes()
        for path in found.rglob("*")
        if path.is_file()
    } == files
    # Docker's bytes have no titles, so oras skips the layers and names nothing.
    oras("pull", "--plain-http", "--output", "none", f"{host}/team/model:docker")
    assert not [path for path in (tmp_path / "none").rglob("*") if path.is_file()]
