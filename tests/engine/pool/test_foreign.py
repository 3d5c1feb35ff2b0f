"""Models of other tools in the engine: their files and their settings."""

from __future__ import annotations

from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts import media_types
from modelpack.operations.convert import convert
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models.loader import gguf_tokenizer_of
from modelpack_server.pool.model_defaults import ModelDefaults
from modelpack_server.stored_models import stored_files
from tests.engine.loaders.vocabularies import Vocabulary, write_vocabulary
from tests.operations.test_foreign import GGUF, digest_of, keep, keep_ollama, kit_of, packed


@pytest.fixture
def store(tmp_path: Path) -> modelpack.Store:
    return modelpack.Store(tmp_path / "store")


def test_the_weights_of_a_modelkit_are_unpacked_once(store: modelpack.Store) -> None:
    layer = packed("weights/tiny.gguf")
    keep(store, kit_of({"path": "weights/tiny.gguf", **digest_of(layer)}), [layer])
    model = modelpack.inspect("x/m:v1", store=store)
    files = stored_files(model, store)
    assert files.format == "gguf"
    assert [path.read_bytes() for path in files.weights] == [GGUF]
    before = files.weights[0].stat()
    again = stored_files(model, store).weights[0].stat()
    assert (again.st_ino, again.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)


def test_how_a_model_of_ollama_is_to_be_used(store: modelpack.Store) -> None:
    keep_ollama(store)
    model = modelpack.inspect("x/m:v1", store=store)
    files = stored_files(model, store)
    assert files.weights == (store.blob_path(model.files()[0].descriptor.digest),)
    defaults = ModelDefaults.of_model(model, store)
    assert defaults.system == "Be brief."
    assert defaults.messages == ({"role": "user", "content": "Hi"},)
    assert defaults.sampling()["temperature"] == 0.5
    # The manifest after a conversion.
    convert("x/m:v1", "x/docker:v1", to="docker", store=store)
    converted = modelpack.inspect("x/docker:v1", store=store)
    assert ModelDefaults.of_model(converted, store) == defaults


def test_an_adapter_is_not_left_out_in_silence(store: modelpack.Store) -> None:
    adapter = (media_types.OLLAMA_ADAPTER, b"GGUF")
    keep_ollama(store, [(media_types.OLLAMA_MODEL, GGUF), adapter])
    files = stored_files(modelpack.inspect("x/m:v1", store=store), store)
    assert files.adapter is not None
    assert files.adapter.read_bytes() == b"GGUF"
    keep_ollama(store, [(media_types.OLLAMA_MODEL, GGUF), adapter, adapter])
    with pytest.raises(ModelLoadError, match="expected one adapter in GGUF"):
        stored_files(modelpack.inspect("x/m:v1", store=store), store)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("<|user|>{{ .Prompt }}<|end|>{{ .Response }}", "<|user|>Hi<|end|>"),
        ("{{ if }}{{ .Prompt }}", None),
    ],
)
def test_a_template_of_go_serves_weights_without_one(
    store: modelpack.Store, tmp_path: Path, template: str, prompt: str | None
) -> None:
    weights = write_vocabulary(tmp_path / "v.gguf", Vocabulary.read("spm"), pre="default")
    keep_ollama(
        store,
        [
            (media_types.OLLAMA_MODEL, weights.read_bytes()),
            (media_types.OLLAMA_TEMPLATE, template.encode()),
        ],
    )
    files = stored_files(modelpack.inspect("x/m:v1", store=store), store)
    tokenizer = gguf_tokenizer_of(files)
    messages = [{"role": "user", "content": "Hi"}]
    assert (tokenizer.render_chat(messages) if tokenizer.has_chat_template else None) == prompt
