"""Differences of two models, and the output about them."""

from __future__ import annotations

from pathlib import Path

import pytest

import modelpack
from modelpack.errors import NotFoundError
from modelpack.operations.diff import Change, ModelDiff, diff
from tests.cli.running import modelpack as command
from tests.models import tiny_gguf, tiny_safetensors
from tests.operations.conftest import Published


@pytest.fixture
def store(tmp_path: Path) -> modelpack.Store:
    return modelpack.Store()


def package(store: modelpack.Store, name: str, directory: Path, **options: object) -> None:
    request = modelpack.PackageRequest(safetensors_dir=directory, **options)  # type: ignore[arg-type]
    modelpack.package(name, request, store=store)


def changes(found: ModelDiff) -> list[tuple[Change, str | None, str | None]]:
    return [
        (c.kind, c.before.filepath if c.before else None, c.after.filepath if c.after else None)
        for c in found.layers
    ]


def test_the_same_model(store: modelpack.Store, tmp_path: Path) -> None:
    package(store, "a:v1", tiny_safetensors(tmp_path))
    found = diff("a:v1", str(store.resolve("a:v1").digest))
    assert found.identical
    assert (found.layers, found.config, found.manifest, found.bytes_new) == ((), (), (), 0)
    assert found.unchanged == len(found.before.manifest.layers)
    result = command("diff", "a:v1", "a:v1")
    assert (result.code, result.out) == (0, "")


def test_layers_of_every_kind(store: modelpack.Store, tmp_path: Path) -> None:
    directory = tiny_safetensors(tmp_path)
    package(store, "a:v1", directory)
    (directory / "LICENSE").write_text("other terms")
    (directory / "chat_template.jinja").unlink()
    (directory / "sub" / "README.md").rename(directory / "NOTES.md")
    (directory / "vocab.txt").write_text("a b c")
    package(store, "b:v1", directory, context_size=123, annotations={"team": "x"})
    found = diff("a:v1", "b:v1")
    assert changes(found) == [
        (Change.CHANGED, "LICENSE", "LICENSE"),
        (Change.REMOVED, "chat_template.jinja", None),
        (Change.RENAMED, "sub/README.md", "NOTES.md"),
        (Change.ADDED, None, "vocab.txt"),
    ]
    assert found.unchanged == 2
    assert ("contextSize", 123) in [(field.name, field.after) for field in found.config]
    assert [(f.name, f.before, f.after) for f in found.manifest] == [
        ("annotations.team", None, "x")
    ]
    new = len("other terms") + len("a b c") + found.after.manifest.config.size
    assert found.bytes_new == new
    back = diff("b:v1", "a:v1")
    kinds = {Change.ADDED: Change.REMOVED, Change.REMOVED: Change.ADDED}
    assert sorted(kinds.get(c.kind, c.kind) for c in back.layers) == sorted(
        c.kind for c in found.layers
    )
    assert sum(c.growth for c in back.layers) == -sum(c.growth for c in found.layers)


def test_the_same_content_in_other_generations(store: modelpack.Store, tmp_path: Path) -> None:
    modelpack.package("a:v1", modelpack.PackageRequest(gguf=tiny_gguf(tmp_path)))
    modelpack.package("a:cncf", modelpack.PackageRequest(format="cncf"), from_model="a:v1")
    found = diff("a:v1", "a:cncf")
    [change] = found.layers
    assert change.kind is Change.CHANGED
    assert change.growth == 0
    assert found.bytes_new == found.after.manifest.config.size
    assert "config.mediaType" in [field.name for field in found.manifest]


def test_local_and_remote(published: Published, tmp_path: Path) -> None:
    name, store = published.reference, modelpack.Store()
    # Stored or not, only manifests and configs are read.
    copied = f"{published.server.host}/other/m:v1"
    modelpack.copy(name, copied)
    published.records.settled(published.server)
    published.records.forget(published.server)
    assert diff(name, copied).identical
    assert published.blobs_fetched() == {str(published.manifest.config.digest)}
    modelpack.pull(name, store=store)
    assert diff(name).identical
    request = modelpack.PackageRequest(context_size=77)
    modelpack.package(name, request, from_model=name, push=True, store=published.origin)
    moved = diff(name)
    assert not moved.identical
    assert [field.after for field in moved.config if field.name == "contextSize"] == [77]
    assert diff(name, from_registry=True).identical
    assert not diff(name, copied, from_registry=True).identical
    with pytest.raises(NotFoundError):
        diff("0123456789ab", name)


def test_the_command(store: modelpack.Store, tmp_path: Path) -> None:
    directory = tiny_safetensors(tmp_path)
    package(store, "a:v1", directory)
    (directory / "LICENSE").write_text("other terms")
    package(store, "b:v1", directory, annotations={"line": "two\nlines\x1b[2J"})
    result = command("diff", "a:v1", "b:v1")
    assert result.code == 1
    lines = result.out.splitlines()
    assert lines[0].startswith("--- docker.io/ai/a:v1 sha256:")
    assert any(line.startswith("~ LICENSE ") and line.endswith("(11 B)") for line in lines)
    assert "\x1b" not in result.out
    assert "4 layers unchanged" in lines[-1]
    value = command("diff", "--json", "a:v1", "b:v1").json
    assert value["identical"] is False
    assert [layer["change"] for layer in value["layers"]] == ["changed"]
    assert value["layers"][0]["after"]["size"] == 11
    # Errors never have exit code 1, which means a difference.
    assert command("diff", "a:v1", "0123456789ab").code == 3
    (store.root / "index.json").write_text("damaged")
    assert command("diff", "a:v1", "b:v1").code == 2
