"""The Go program itself, and that the vectors are still what it makes."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fixtures.vectors.model_runner import make, packages
from fixtures.vectors.model_runner.case import Case
from tests.interop.go_tool import GoMissingError, GoToolError, build_go_tool
from tests.peers import require

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[3]
VECTORS = json.loads((ROOT / "fixtures" / "vectors" / "model_runner.json").read_bytes())
BY_NAME = {made["name"]: made for made in (*VECTORS["vectors"], *VECTORS["refusals"])}


@pytest.fixture(scope="module")
def peer() -> Path:
    require("go")
    return build_go_tool(Path(__file__).parent, ROOT / ".cache")


def run(peer: Path, *arguments: str | Path) -> Any:
    environment = {"TZ": "UTC", "HOME": os.devnull}
    done = subprocess.run([peer, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.peer("go")
def test_the_vectors_are_what_the_peer_makes(peer: Path) -> None:
    stale = [c.name for c in make.cases() if make.vector(peer, c) != BY_NAME[c.name]]
    stale += [c.name for c in packages.refused() if make.refusal(peer, c) != BY_NAME[c.name]]
    assert not stale, "run python -m fixtures.vectors.model_runner.make"
    real = {case.name for case in packages.real()}
    assert set(BY_NAME) - real == {c.name for c in (*make.cases(), *packages.refused())}


@pytest.mark.peer("go")
@pytest.mark.weights
@pytest.mark.parametrize("case", packages.real(), ids=lambda case: case.name)
def test_the_vectors_of_real_weights_are_too(peer: Path, case: Case) -> None:
    assert make.vector(peer, case) == BY_NAME[case.name]


@pytest.mark.peer("go")
def test_a_model_goes_through_stores_and_archives_unchanged(peer: Path, tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    model.write_bytes(base64.b64decode(BY_NAME["A"]["files"][0]["content"]))
    first, second, archive = tmp_path / "first", tmp_path / "second", tmp_path / "model.tar"
    made = run(peer, "package", "--gguf", model, "--store", first, "--tag", "tiny")
    run(peer, "export", "--store", first, "tiny", archive)
    run(peer, "load", "--store", second, "--tag", "other:v1", archive)
    (listed,) = run(peer, "list", "--store", second)["models"]
    assert listed == {**made, "tags": ["docker.io/ai/other:v1"]}
    bundle = run(peer, "bundle", "--store", second, "other:v1")
    weight = json.loads(base64.b64decode(made["manifest"]))["layers"][0]["digest"]
    assert bundle["files"]["model/model.gguf"] == weight


@pytest.mark.peer("go")
def test_a_panic_of_the_reader_is_an_error(peer: Path, tmp_path: Path) -> None:
    # A wrong type of general.alignment.
    content = base64.b64decode(BY_NAME["gguf-alignment"]["files"][0]["content"])
    key = b"general.alignment"
    at = content.index(key) + len(key)
    (tmp_path / "m.gguf").write_bytes(content[:at] + b"\5" + content[at + 1 :])
    command = [str(peer), "package", "--gguf", str(tmp_path / "m.gguf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("modelrunner-peer: panic: key")


def test_a_machine_without_go_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GoMissingError, match="no `go` on PATH"):
        build_go_tool(Path(__file__).parent, tmp_path)


@pytest.mark.peer("go")
def test_a_build_that_fails_shows_what_go_says(tmp_path: Path) -> None:
    require("go")
    (tmp_path / "go.mod").write_text("module broken.invalid\n\ngo 1.25\n")
    (tmp_path / "main.go").write_text("package main\n\nfunc main() { missing() }\n")
    with pytest.raises(GoToolError, match="undefined: missing"):
        build_go_tool(tmp_path, tmp_path / "cache")


@pytest.mark.peer("go")
def test_a_module_with_another_sum_is_refused(tmp_path: Path) -> None:
    require("go")
    source = Path(__file__).parent
    module = (source / "go.mod").read_text().replace("// h1:", "// h1:not")
    for name in ("main.go", "package.go", "store.go", "go.sum"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "go.mod").write_text(module)
    with pytest.raises(GoToolError, match="expected the sum h1:not"):
        build_go_tool(tmp_path, tmp_path / "cache")
