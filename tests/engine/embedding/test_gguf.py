"""Embedding models in GGUF: real MiniLM, converted as llama.cpp does, and decoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.embedding import CrossEncoder, Embedder, load_embedder, purpose_of
from modelpack_engine.embedding.encoder import Encoder
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import ModelFiles
from modelpack_engine.models.gguf_file import GGUFFile
from modelpack_engine.models.gguf_tokenizer import tokenizer_of
from tests.engine.embedding.gguf_models import convert
from tests.engine.embedding.models import golden, write_model, write_nomic
from tests.engine.loaders.llama_cpp_peer import ask
from tests.engine.loaders.tiny_models import PROMPT, TINY_MODELS
from tests.engine.loaders.vocabularies import Vocabulary

SENTENCES = golden("minilm")["sentences"]
WANTED = np.array(golden("minilm")["vectors"])


@pytest.fixture(scope="module")
def converted(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(minilm, tmp_path_factory.mktemp("gguf") / "minilm.gguf")


def load(path: Path) -> Embedder | CrossEncoder:
    return load_embedder(ModelFiles.from_directory(path), device="cpu")


def test_the_same_vectors(converted: Path) -> None:
    assert purpose_of(ModelFiles.from_directory(converted)) == "embedding"
    model = load(converted)
    assert isinstance(model, Embedder)
    assert (model.config.dimension, model.config.max_length) == (384, 512)
    assert model.config.pooling == ("mean",)
    got = np.array(model.embed(SENTENCES).vectors)
    assert np.abs(got - WANTED).max() < 2e-6


def test_half_precision(tmp_path: Path) -> None:
    source = write_model(tmp_path, "bert")
    whole, half = (
        load(convert(source, tmp_path / f"{half}.gguf", half=half)) for half in (False, True)
    )
    assert isinstance(whole, Embedder)
    assert isinstance(half, Embedder)
    texts = ["w5 w6 w40", "w9"]
    difference = np.array(whole.embed(texts).vectors) - np.array(half.embed(texts).vectors)
    assert 0 < np.abs(difference).max() < 1e-2


def tiny_texts() -> list[str]:
    return ["w5 w6 w40", "w9", " ".join(f"w{4 + (at * at) % 90}" for at in range(60))]


def test_nomic_bert(tmp_path: Path) -> None:
    """The file has fused attention weights, a gate and a rope base, but no positions."""
    source = write_nomic(tmp_path)
    path = convert(source, tmp_path / "nomic.gguf")
    assert purpose_of(ModelFiles.from_directory(path)) == "embedding"
    model, wanted = load(path), load(source)
    assert isinstance(model, Embedder)
    assert isinstance(wanted, Embedder)
    assert model.config.architecture == wanted.config.architecture == "nomic_bert"
    assert (model.config.dimension, model.config.max_length) == (32, 160)
    assert isinstance(model.backbone, Encoder)
    assert isinstance(wanted.backbone, Encoder)
    assert model.backbone.config == wanted.backbone.config
    got = np.array(model.embed(tiny_texts()).vectors)
    assert np.abs(got - np.array(wanted.embed(tiny_texts()).vectors)).max() < 1e-6


@pytest.mark.long
@pytest.mark.peer("llama-cpp-python")
@pytest.mark.parametrize("name", ["bert", "nomic_bert"])
def test_the_vectors_of_llama_cpp(name: str, tmp_path: Path) -> None:
    source = write_nomic(tmp_path) if name == "nomic_bert" else write_model(tmp_path, name)
    path = convert(source, tmp_path / "m.gguf")
    (answer,) = ask([{"task": "embed", "model": str(path), "texts": tiny_texts()}], tmp_path)
    model = load(path)
    assert isinstance(model, Embedder)
    got = np.array(model.embed(tiny_texts()).vectors)
    assert np.abs(got - np.array(answer["vectors"])).max() < 1e-3


@pytest.mark.long
@pytest.mark.peer("llama-cpp-python")
def test_the_vectors_of_llama_cpp_with_robertas_tokenizer(tmp_path: Path) -> None:
    vocabulary = Vocabulary.read("bpe")
    count, name = len(vocabulary.tokens), "embeddings.word_embeddings.weight"
    rows = np.random.default_rng(0).normal(size=(count, 32)).astype(np.float32)
    source = write_model(tmp_path, "bert", config={"vocab_size": count}, extra={name: rows})
    path = convert(source, tmp_path / "m.gguf", byte_level=vocabulary)
    texts = ["Hello world", " I've 12  dogs", "naïve 東京"]
    (answer,) = ask([{"task": "embed", "model": str(path), "texts": texts}], tmp_path)
    model = load(path)
    assert isinstance(model, Embedder)
    assert np.abs(np.array(model.embed(texts).vectors) - np.array(answer["vectors"])).max() < 1e-3


def test_nomic_bert_needs_a_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = gguf.GGUFWriter.add_tensor

    def add_without(self: gguf.GGUFWriter, name: str, values: np.ndarray) -> None:
        if not name.endswith("ffn_gate.weight"):
            add(self, name, values)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add_without)
    path = convert(write_nomic(tmp_path), tmp_path / "nomic.gguf")
    with pytest.raises(ModelLoadError, match="an MLP without a gate, or with experts"):
        load(path)


def test_wordpiece(converted: Path, embedder: Embedder) -> None:
    tokenizer = tokenizer_of(GGUFFile.open([converted]).metadata)
    texts = [
        *SENTENCES,
        "Ünïcödé façade",
        "unbelievable!!! (really) co-op",
        "中文和English",
        "\x00a\u200b",
    ]
    for text in texts:
        assert tokenizer.encode(text) == embedder.tokenizer.encode(text), text
        assert tokenizer.encode_typed(text, "b")[1] == embedder.tokenizer.encode_typed(text, "b")[1]


@pytest.mark.parametrize(
    ("pooling", "mode"), [(0, "mean"), (1, "mean"), (2, "cls"), (3, "lasttoken")]
)
def test_pooling_types(pooling: int, mode: str, tmp_path: Path) -> None:
    path = convert(write_model(tmp_path, "bert"), tmp_path / "m.gguf", pooling=pooling)
    assert purpose_of(ModelFiles.from_directory(path)) == "embedding"
    model = load(path)
    assert isinstance(model, Embedder)
    assert model.config.pooling == (mode,)


def test_a_ranker_needs_its_head(tmp_path: Path) -> None:
    path = convert(write_model(tmp_path, "bert"), tmp_path / "m.gguf", pooling=4)
    assert purpose_of(ModelFiles.from_directory(path)) == "ranking"
    with pytest.raises(ModelLoadError, match=r"cls\.output\.weight"):
        load(path)


def test_what_has_no_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = gguf.GGUFWriter.add_tensor

    def add_odd(self: gguf.GGUFWriter, name: str, values: np.ndarray) -> None:
        add(self, name.replace("blk.1.ffn_up.bias", "blk.1.adapter.bias"), values)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add_odd)
    path = convert(write_model(tmp_path, "bert"), tmp_path / "m.gguf")
    with pytest.raises(ModelLoadError, match=r"missing layers\.1\.mlp\.up\.bias.*blk\.1\.adapter"):
        load(path)


def test_decoders_that_say_how_they_are_pooled(tmp_path: Path) -> None:
    tiny = TINY_MODELS["qwen3"]

    def keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
        tiny.keys(writer, config)
        writer.add_pooling_type(gguf.PoolingType.LAST)

    path = replace(tiny, keys=keys).write(tmp_path / "pooled.gguf")
    assert purpose_of(ModelFiles.from_directory(path)) == "embedding"
    model = load(path)
    assert isinstance(model, Embedder)
    assert model.config.pooling == ("lasttoken",)
    prompts = [PROMPT, PROMPT[:3], PROMPT[2:9]]
    for prompt, vector in zip(prompts, model.embed(prompts).vectors, strict=True):
        hidden = np.array(tiny.build().model(mx.array([prompt]))[0, -1])
        assert np.abs(vector - hidden / np.linalg.norm(hidden)).max() < 1e-5
    plain = tiny.write(tmp_path / "plain.gguf")
    assert purpose_of(ModelFiles.from_directory(plain)) == "generation"
