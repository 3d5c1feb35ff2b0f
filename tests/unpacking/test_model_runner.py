"""Docker Model Runner lays out the same models equally, except for known differences."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.model import Model, Role
from modelpack.bundles.bundle import lay_out
from tests.interop.go_tool import build_go_tool
from tests.peers import require

ROOT = Path(__file__).resolve().parents[2]
VECTORS = {
    vector["name"]: vector
    for vector in json.loads((ROOT / "fixtures/vectors/model_runner.json").read_bytes())["vectors"]
    if vector["name"].partition("-")[0]
    in {"A", "B", "C", "D", "E", "F", "flags", "shards", "directory", "dduf"}
}
# Paths that we reject on purpose: see `artifacts.paths` and `bundles.directory`.
REFUSED = {
    "directory-order": "A.txt and a.txt are one file on macOS",
    "directory-names": "a backslash",
    "directory-names-cncf": "a backslash",
    "directory-names-control": "control characters",
}


@pytest.fixture(scope="module")
def peer() -> Path:
    require("go")
    return build_go_tool(ROOT / "tests/interop/modelrunner", ROOT / ".cache")


def run(peer: Path, where: Path, *arguments: str) -> Any:
    done = subprocess.run(
        [peer, *arguments],
        cwd=where,
        env={"TZ": "UTC", "HOME": str(where)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def write(vector: Any, root: Path) -> None:
    for described in vector["files"]:
        name = described.get("path_base64")
        path = base64.b64decode(name) if name else described["path"].encode()
        path = os.path.join(os.fsencode(root), path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if "link" in described:
            os.symlink(described["link"], path)
        else:
            with open(path, "wb") as file:
                file.write(base64.b64decode(described["content"]))


def files_of(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.mark.peer("go")
@pytest.mark.parametrize("name", sorted(VECTORS.keys() - REFUSED.keys()))
def test_the_same_bundle(peer: Path, tmp_path: Path, name: str) -> None:
    vector, source, store = VECTORS[name], tmp_path / "source", tmp_path / "store"
    source.mkdir()
    write(vector, source)
    made = run(
        peer, source, "package", "--store", str(store), "--tag", "team/m:v1", *vector["args"]
    )
    theirs = run(peer, source, "bundle", "--store", str(store), "team/m:v1")

    manifest = Manifest.parse(base64.b64decode(made["manifest"]))
    config = ModelConfig.parse(base64.b64decode(made["config"]), manifest.config.media_type)
    model = Model(None, manifest.descriptor, manifest, config)
    ours = lay_out(
        model,
        lambda blob: store / "blobs/sha256" / blob.digest.encoded,
        tmp_path / "bundle",
        runtime_names=False,  # it lays out no chat_template.jinja for vLLM
    )

    # It leaves out the licenses of a v0.1 model.
    licenses = {file.path for file in ours.files if file.role is Role.LICENSE}
    found = files_of(ours.directory)
    assert found.keys() - theirs["files"].keys() <= licenses
    assert {path: found[path] for path in theirs["files"]} == theirs["files"]

    def ours_and_theirs(path: Path | None, key: str) -> tuple[str, str]:
        their_path = theirs[key] and str(Path(theirs[key]).relative_to(theirs["dir"]))
        return (str(path.relative_to(ours.directory)) if path else "", their_path)

    kind = next(key for key in ("gguf", "safetensors", "dduf") if theirs[key])
    weight, their_weight = ours_and_theirs(ours.weight, kind)
    if "-of-" in weight:  # it returns the last shard of a v0.1 model, but runtimes need the first
        assert "-00001-of-" in weight
    else:
        assert weight == their_weight
    projector, their_projector = ours_and_theirs(ours.mmproj, "mmproj")
    assert projector == their_projector
    template, their_template = ours_and_theirs(ours.chat_template, "chat_template")
    if their_template or not manifest.is_cncf:  # it ignores the templates of CNCF models
        assert template == their_template
