"""`modelpack k8s --kustomize`: a base and an overlay, built by kustomize's own command."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelpack.deploy.manifests import kustomization
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from tests.cli.running import modelpack as run
from tests.cli.running import succeed
from tests.conftest import ROOT
from tests.interop.go_tool import build_go_tool
from tests.models import package, tiny_safetensors
from tests.peers import require

#: Options of `k8s`.
SHAPES = {
    "vllm": (),
    "own": ("--engine", "modelpack", "--replicas", "2", "--namespace", "models"),
    "autoscaled": ("--max-replicas", "3", "--monitor", "--pull-secret", "login"),
    "gateway": ("--gateway", "--engine", "modelpack", "--replicas", "2"),
    "nodes": ("--nodes", "2", "--gpus", "8"),
    "kserve": ("--kserve", "--engine", "modelpack"),
    "tags": ("--engine", "modelpack", "--tool-image", "hub.example:5000/modelpack:1", "--image",
             "hub.example:5000/modelpack:1-engine"),
    "pinned": ("--image", f"registry.example:5000/server@sha256:{'a' * 64}"),
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The reference of a model in a registry."""
    root = tmp_path_factory.mktemp("kustomize")
    with registry() as server:
        name = f"{server.host}/team/tiny:v1"
        package(name, tiny_safetensors(root), LayoutStore(root / "store"), push=True)
        yield name


def written(published: str, directory: Path, *options: str) -> Path:
    made = directory / "kustomize"
    assert succeed("k8s", published, "--kustomize", str(made), *options).out == str(made)
    return made


def build(directory: Path) -> list[dict[str, Any]]:
    require("go")
    kustomize = build_go_tool(ROOT / "tests" / "interop" / "kustomize_cli", ROOT / ".cache")
    done = subprocess.run([kustomize, "build", directory], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def by_kind(found: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    made = {(item["kind"], item["metadata"]["name"]): item for item in found}
    assert len(made) == len(found)
    return made


def printed(published: str, *options: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(succeed("k8s", published, *options).out))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_files_have_the_printed_objects(published: str, tmp_path: Path, shape: str) -> None:
    made = written(published, tmp_path, *SHAPES[shape])
    text = (made / "base" / "model.yaml").read_text()
    assert list(yaml.safe_load_all(text)) == printed(published, *SHAPES[shape])
    overlay = yaml.safe_load((made / "overlays/production/kustomization.yaml").read_text())
    names = [image["name"] for image in overlay.get("images", ())]
    assert "registry.example:5000/server" not in names
    assert ("modelpack" in names) == (shape != "tags")


@pytest.mark.parametrize(
    ("containers", "expected"),
    [
        (["hub/tool:1", "hub/tool:1", "server:v2"], {"hub/tool": "1", "server": "v2"}),
        (["hub:5000/tool:1", "hub:5000/tool:2"], {}),
        (["hub/tool:1", "hub/tool"], {}),
        (["hub:5000/tool", "hub:5000/tool:1", "server:v2"], {"server": "v2"}),
        ([f"tool@sha256:{'a' * 64}", "tool:1"], {}),
        ([f"tool:1@sha256:{'a' * 64}", "tool:1"], {}),
        ([f"tool@sha256:{'a' * 64}", "hub:5000/tool"], {}),
    ],
)
def test_an_overlay_has_the_images_with_one_tag(
    containers: list[str], expected: dict[str, str]
) -> None:
    """An entry for a name changes all tags of that name."""
    item = {"kind": "Pod", "spec": {"containers": [{"image": image} for image in containers]}}
    text = kustomization([item])["overlays/production/kustomization.yaml"]
    images = yaml.safe_load(text).get("images", ())
    assert {image["name"]: image["newTag"] for image in images} == expected


def test_directories_that_are_not_empty(published: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for directory in (tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        done = run("k8s", published, "--kustomize", str(directory))
        assert done.code == 2
        assert f"cannot write a base to {directory}" in done.err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.long  # kustomize is compiled, the first time
@pytest.mark.peer("go")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_base_has_the_printed_objects(published: str, tmp_path: Path, shape: str) -> None:
    made = written(published, tmp_path, *SHAPES[shape])
    assert by_kind(build(made / "base")) == by_kind(printed(published, *SHAPES[shape]))


@pytest.mark.long
@pytest.mark.peer("go")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_overlay_changes_the_namespace_only(published: str, tmp_path: Path, shape: str) -> None:
    made = written(published, tmp_path, *SHAPES[shape])
    found = by_kind(build(made / "overlays" / "production"))
    expected = by_kind(printed(published, *SHAPES[shape]))
    for item in expected.values():
        item["metadata"]["namespace"] = "production"
    assert found == expected


@pytest.mark.long
@pytest.mark.peer("go")
def test_an_edited_overlay_changes_pods_and_images(published: str, tmp_path: Path) -> None:
    made = written(published, tmp_path, "--engine", "modelpack", "--name", "tiny")
    file = made / "overlays" / "production" / "kustomization.yaml"
    overlay = yaml.safe_load(file.read_text())
    [replicas], [image] = overlay["replicas"], overlay["images"]
    replicas["count"], image["newTag"] = 4, "v9"
    overlay["labels"] = [{"pairs": {"team": "search"}}]
    file.write_text(yaml.safe_dump(overlay))
    found = by_kind(build(file.parent))
    assert {item["metadata"]["labels"]["team"] for item in found.values()} == {"search"}
    spec = found["Deployment", "tiny"]["spec"]
    assert spec["replicas"] == 4
    pod = spec["template"]["spec"]
    images = [item["image"] for item in (*pod["initContainers"], *pod["containers"])]
    assert images == ["modelpack:v9", "modelpack:v9"]
