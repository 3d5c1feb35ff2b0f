"""A model that Ollama's own code wrote, read and converted here."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts import media_types as mediatypes
from modelpack.artifacts.manifest import Manifest
from modelpack.operations.convert import convert
from modelpack.storage import watching
from modelpack.testing import registry
from tests.conftest import ROOT
from tests.interop.go_tool import build_go_tool
from tests.models import tiny_gguf
from tests.peers import require

pytestmark = pytest.mark.peer("go")


@pytest.fixture(scope="module")
def binary() -> Path:
    require("go")
    return build_go_tool(Path(__file__).parent / "ollama_manifest", ROOT / ".cache")


def test_what_ollama_writes_is_pulled(binary: Path, tmp_path: Path) -> None:
    gguf = tiny_gguf(tmp_path)
    texts = {"system": "Be brief.", "params": '{"temperature":0.5}', "template": "{{ .Prompt }}",
             "license": "MIT License"}  # fmt: skip
    arguments = [f"model={gguf}"]
    for kind, text in texts.items():
        (tmp_path / kind).write_text(text)
        arguments.append(f"{kind}={tmp_path / kind}")
    models = tmp_path / "models"
    environment = {**os.environ, "OLLAMA_MODELS": str(models)}
    command = [binary, "registry.ollama.ai/library/tiny:1b", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    raw = Path(done.stdout.strip()).read_bytes()

    theirs = modelpack.Store(tmp_path / "theirs")
    manifest = Manifest.parse(raw)
    watch = watching(None)
    for blob in manifest.unique_blobs:
        theirs.import_file(models / "blobs" / str(blob.digest).replace(":", "-"), watch)
    with registry(tmp_path / "registry") as server:
        name = f"{server.host}/library/tiny:1b"
        theirs.write_manifest(manifest.descriptor, raw, name)
        modelpack.push(name, store=theirs)
        store = modelpack.Store(tmp_path / "store")
        assert modelpack.pull(name, store=store).digest == manifest.digest
    model = modelpack.inspect(name, store=store)
    assert (model.config.format, model.config.parameters) == ("gguf", "1.2B")
    [weight] = modelpack.resolve(name, media_types=["gguf"], store=store).files
    assert weight.path.read_bytes() == gguf.read_bytes()
    convert(name, "x/tiny:v1", to="docker", store=store)
    converted = modelpack.inspect("x/tiny:v1", store=store)
    assert [str(file.role) for file in converted.files()] == ["weight", "license"]
    assert json.loads(converted.manifest.annotations[mediatypes.DEFAULTS]) == {
        "parameters": {"temperature": 0.5},
        "system": "Be brief.",
    }
