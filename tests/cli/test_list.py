"""The order and the times of `list`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.digest import Digest
from tests.cli.running import modelpack as command
from tests.cli.running import succeed
from tests.models import tiny_gguf, tiny_safetensors

DAY = 86_400


@pytest.fixture
def _models(tmp_path: Path) -> None:
    """Store b, the largest; a, created in 2020; and c, whose manifest is two days old."""
    succeed("package", "--safetensors-dir", tiny_safetensors(tmp_path), "team/b:v1")
    gguf = tiny_gguf(tmp_path)
    succeed("package", "--gguf", gguf, "--created", "2020-05-01T00:00:00Z", "team/a:v1")
    digest = succeed("package", "--gguf", gguf, "team/c:v1").out
    path = modelpack.Store().blob_path(Digest.parse(digest))
    then = path.stat().st_mtime - 2 * DAY - 60
    os.utime(path, (then, then))


@pytest.mark.usefixtures("_models")
@pytest.mark.parametrize(
    ("sort", "order"),
    [("name", "abc"), ("size", "bac"), ("created", "bca"), ("modified", "abc")],
)
def test_order(sort: str, order: str) -> None:
    store = modelpack.Store()
    for age, name in enumerate("ab"):
        path = store.blob_path(store.resolve(f"team/{name}:v1").digest)
        then = path.stat().st_mtime - age * 3600
        os.utime(path, (then, then))
    lines = succeed("list", "--sort", sort).out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [f"team/{name}:v1" for name in order]
    models = succeed("list", "--sort", sort, "--json").json["models"]
    assert [model["tags"][0] for model in models] == [f"docker.io/team/{n}:v1" for n in order]
    ids = succeed("list", "--sort", sort, "-q").out.split()
    assert ids == [model["digest"].removeprefix("sha256:")[:12] for model in models]


@pytest.mark.usefixtures("_models")
def test_times() -> None:
    shown = {line.split()[0]: line for line in succeed("list").out.splitlines()}
    assert "stored just now" in shown["team/b:v1"]
    assert "stored 2 days ago" in shown["team/c:v1"]
    assert "years ago" in shown["team/a:v1"]
    assert "stored" not in shown["team/a:v1"]
    for model in succeed("list", "--json").json["models"]:
        assert model["modified"].endswith("Z")


def test_no_such_order() -> None:
    assert command("list", "--sort", "colour").code == 2
