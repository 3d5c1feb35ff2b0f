"""`docker model`'s own distribution code, built from its Go module, agrees with ours."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import modelpack
from modelpack.testing import registry
from tests.interop.go_tool import build_go_tool
from tests.models import FIXTURES, tiny_gguf, tiny_safetensors
from tests.peers import require

pytestmark = pytest.mark.peer("go")

ROOT = Path(__file__).resolve().parents[2]
CREATED = "2025-01-02T03:04:05Z"
TIME = 1735787045


@pytest.fixture(scope="module")
def peer() -> Path:
    require("go")
    return build_go_tool(Path(__file__).parent / "modelrunner", ROOT / ".cache")


def run(peer: Path, command: str, *arguments: str | Path) -> Any:
    done = subprocess.run(
        [peer, command, *arguments],
        env={"TZ": "UTC", "HOME": os.environ["HOME"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def settle(path: Path) -> None:
    """Give the file, or all files below, the mode and time of the vectors."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
            os.utime(file, (TIME, TIME))


@pytest.mark.parametrize("format_name", ["docker", "cncf"])
@pytest.mark.parametrize(
    "flag_and_model",
    [
        ("gguf", "tiny-gguf/tiny.gguf"),
        ("gguf", "tiny-gguf-sharded"),
        ("safetensors-dir", "tiny-safetensors"),
        ("dduf", "tiny-dduf"),
    ],
    ids=lambda pair: pair[1],
)
def test_the_same_files_give_the_same_digest(
    peer: Path,
    flag_and_model: tuple[str, str],
    format_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    flag, model = flag_and_model
    source = tmp_path / "model"
    shutil.copytree(FIXTURES / "models" / model.partition("/")[0], source)
    license_file = tmp_path / "LICENSE.txt"
    license_file.write_text("MIT\n")
    settle(source)
    settle(license_file)
    if flag != "safetensors-dir":
        source = min(path for path in source.iterdir() if path.suffix == f".{flag}")

    theirs = run(
        peer, "package", f"--{flag}", source, "--license", license_file,
        "--format", format_name, "--created", CREATED,
    )  # fmt: skip
    request = modelpack.PackageRequest(
        **{flag.replace("-", "_"): source},
        licenses=(license_file,),
        format=format_name,
        created=CREATED,
        preserve=True,
    )
    ours = modelpack.package("team/m:v1", request, dry_run=True)
    assert ours.config.encode() == base64.b64decode(theirs["config"])
    assert ours.manifest.raw == base64.b64decode(theirs["manifest"])
    assert str(ours.digest) == theirs["digest"]


@pytest.mark.parametrize("format_name", ["docker", "cncf"])
def test_it_pulls_ours_from_the_embedded_registry(
    peer: Path, format_name: str, tmp_path: Path
) -> None:
    request = modelpack.PackageRequest(
        safetensors_dir=tiny_safetensors(tmp_path),
        format=format_name,
    )
    with registry() as server:
        reference = f"{server.host}/team/tiny:v1"
        ours = modelpack.package(reference, request, push=True)
        theirs = run(peer, "pull", "--plain-http", "--store", tmp_path / "docker", reference)
    assert theirs["digest"] == str(ours.digest)
    [listed] = run(peer, "list", "--store", tmp_path / "docker")["models"]
    assert listed["digest"] == str(ours.digest)


def test_we_pull_theirs_from_the_embedded_registry(peer: Path, tmp_path: Path) -> None:
    with registry() as server:
        reference = f"{server.host}/team/tiny:v1"
        theirs = run(
            peer, "package", "--gguf", tiny_gguf(tmp_path), "--push", reference, "--plain-http"
        )
        ours = modelpack.pull(reference)
    assert str(ours.digest) == theirs["digest"]
    [weight] = modelpack.resolve(reference).files
    assert weight.path.read_bytes() == (tmp_path / "tiny.gguf").read_bytes()


def test_its_store_is_imported_and_exported(peer: Path, tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    theirs = run(
        peer, "package", "--gguf", tiny_gguf(tmp_path), "--store", docker, "--tag", "team/tiny:v1"
    )
    [taken] = modelpack.import_from_docker(docker=modelpack.DockerStore(docker))
    assert str(taken.digest) == theirs["digest"]
    assert taken.references == ("docker.io/team/tiny:v1",)

    request = modelpack.PackageRequest(safetensors_dir=tiny_safetensors(tmp_path))
    ours = modelpack.package("team/other:v2", request)
    modelpack.export_to_docker(["team/other:v2"], docker=modelpack.DockerStore(docker))
    listed = {
        model["digest"]: model["tags"] for model in run(peer, "list", "--store", docker)["models"]
    }
    assert listed == {
        theirs["digest"]: ["docker.io/team/tiny:v1"],
        str(ours.digest): ["docker.io/team/other:v2"],
    }
    files = run(peer, "bundle", "--store", docker, "team/other:v2")["files"]
    assert "model/model.safetensors" in files
