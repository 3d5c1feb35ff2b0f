"""The same model gives the same response from every source."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

import modelpack
from modelpack.operations.index import NamedVariant, create_index
from modelpack.operations.package import PackageRequest
from modelpack.store.layout import LayoutStore
from tests.cli.running import succeed
from tests.engine.serving.tiny import write_tiny
from tests.hub.conftest import hub as hub  # a fixture
from tests.hub.hub import FakeHub
from tests.models import tiny_gguf
from tests.operations.test_foreign import KIT, digest_of, keep, kit_of
from tests.unpacking.tars import END, file

SMALL = (
    "--device",
    "cpu",
    "--kv-cache-bytes",
    "50000000",
    "--max-tokens",
    "6",
    "--temperature",
    "0",
)


@pytest.mark.long
def test_wherever_it_comes_from_it_says_the_same(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    store = LayoutStore(tmp_path / "store")
    directory = write_tiny(tmp_path / "files", temperature=0.0)
    files = {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
    modelpack.package("x/st:v1", PackageRequest(safetensors_dir=directory), store=store)

    hub.large = {"model.safetensors"}
    hub.put("Org/Tiny", files)
    # On a CPU the GGUF variant would be chosen, and its weights cannot run.
    modelpack.package("x/gguf:v1", PackageRequest(gguf=tiny_gguf(tmp_path)), store=store)
    create_index(
        "x/all:v1", [NamedVariant("gguf", "x/gguf:v1"), NamedVariant("st", "x/st:v1")], store=store
    )
    archive = b"".join(file(name.encode(), content) for name, content in files.items()) + END
    layer = f"{KIT}model.v1.tar", archive
    keep(store, kit_of({"path": ".", **digest_of(layer)}), [layer], "x/kit:v1")

    answers = {
        name: succeed("run", name, "hi", *more, "--store", store.root, *SMALL).out
        for name, more in {
            "x/st:v1": (),
            "hf.co/Org/Tiny": (),
            "x/all:v1": ("--variant", "st"),
            "x/kit:v1": (),
        }.items()
    }
    assert len(set(answers.values())) == 1, answers
    assert answers["x/st:v1"]
