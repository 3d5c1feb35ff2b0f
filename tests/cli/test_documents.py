"""`inspect --template`, `--license`, `--card` and `--files`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import modelpack, succeed
from tests.models import tiny_gguf
from tests.operations.conftest import Published
from tests.operations.conftest import published as published


@pytest.mark.parametrize("where", ["stored", "remote"])
def test_texts(published: Published, tmp_path: Path, where: str) -> None:
    root = tmp_path / "tiny-safetensors"
    (root / "README.md").write_text("# A card\x1b[2J\n")
    name = f"{published.server.host}/team/card:v1"
    succeed("package", "--safetensors-dir", root, "--push", name)
    words = ["inspect", name]
    if where == "remote":
        succeed("rm", name)
        words += ["--remote"]
    assert succeed(*words, "--license").out == (root / "LICENSE").read_text().rstrip("\n")
    template = (root / "chat_template.jinja").read_text()
    assert succeed(*words, "--template").out == template.rstrip("\n")
    assert succeed(*words, "--card").out == "# A card\ufffd[2J"
    [text] = succeed(*words, "--template", "--json").json["texts"]
    assert text == {"file": "chat_template.jinja", "text": template}


def test_files(published: Published) -> None:
    succeed("pull", "--exclude", "LICENSE", published.reference)
    listed = succeed("inspect", "--files", published.reference).out.splitlines()
    assert listed[0].split() == ["FILE", "ROLE", "SIZE", "DIGEST"]
    assert len(listed) == 1 + len(published.manifest.layers)
    [line] = [line for line in listed if line.startswith("LICENSE")]
    assert line.split()[-2:] == [published.path_digest("LICENSE"), "missing"]
    value = succeed("inspect", "--files", "--json", published.reference).json
    assert value["digest"] == str(published.digest)
    assert {one["file"] for one in value["files"]} >= {"LICENSE", "model.safetensors"}


def test_what_a_model_does_not_have(tmp_path: Path) -> None:
    succeed("package", "--gguf", tiny_gguf(tmp_path), "x:v1")
    for option, name in (("--license", "licence"), ("--card", "model card")):
        failed = modelpack("inspect", "x:v1", option)
        assert failed.code == 3
        assert f"x:v1: the model has no {name}" in failed.err
    for notice in ("one", "two"):
        (tmp_path / notice).write_text(f"{notice}\n")
    words = ["--license", tmp_path / "one", "--license", tmp_path / "two"]
    succeed("package", "--from", "x:v1", *words, "x:v2")
    assert succeed("inspect", "x:v2", "--license").out == "one\n\ntwo"


@pytest.mark.parametrize("other", ["--license", "--header", "--files"])
def test_one_at_a_time(other: str) -> None:
    assert modelpack("inspect", "x:v1", "--template", other).code == 2
