"""Commands on partial models."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpack.errors import PartialModelError
from tests.cli.running import modelpack, succeed
from tests.operations.conftest import Published
from tests.operations.conftest import published as published


def test_a_part_shows_everywhere(published: Published, tmp_path: Path) -> None:
    reference = published.reference
    done = succeed("pull", "--only", "config", "--exclude", "*.jinja", reference)
    assert done.out == str(published.digest)
    assert "left out" in done.err
    total = published.manifest.total_size
    [model] = succeed("list", "--json").json["models"]
    assert model["size"] == total
    assert 0 < model["missingSize"] < total
    assert str(published.path_digest("model.safetensors")) in model["missing"]
    assert " of " in succeed("list").out.splitlines()[1]
    [line] = [x for x in succeed("inspect", reference).out.splitlines() if "model.safeten" in x]
    assert line.endswith("(missing)")
    checked = succeed("fsck", "--json")
    assert checked.json["partial"] == [reference]
    assert checked.json["problems"] == []
    assert "partial models" in checked.err
    refused = modelpack("bundle", reference, tmp_path / "run")
    assert refused.code == 3
    assert f"modelpack pull {published.by_digest}" in refused.err
    again = succeed("pull", "--json", reference).json
    assert again["missing"] == []
    assert again["blobsExisted"] == 2
    assert "missing" not in succeed("list", "--json").json["models"][0]


def test_a_part_is_not_served(published: Published) -> None:
    opening = pytest.importorskip("modelpack_server.stored_models")
    pull_config(published)
    with pytest.raises(PartialModelError, match="is stored in part"):
        opening.open_model(published.reference, pull=False, store=published.store)
    # Commands that pull at start, like `serve MODEL`, complete the model first.
    opening.open_model(published.reference, store=published.store)
    assert published.store.missing(published.reference) == ()


def pull_config(published: Published) -> None:
    succeed("pull", "--store", published.store.root, "--only", "config", published.reference)


@pytest.mark.parametrize("options", [["--only", "templates"], ["--include"]])
def test_wrong_options(options: list[str]) -> None:
    assert modelpack("pull", "m:v1", *options).code == 2
