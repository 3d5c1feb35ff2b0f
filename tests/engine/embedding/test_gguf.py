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
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.loaders import ModelFiles
from modelpack_engine.loaders.gguf_file import GGUFFile
from modelpack_engine.loaders.gguf_tokenizer import tokenizer_of
from tests.engine.embedding.gguf_models import convert
from tests.engine.embedding.models import golden
from tests.engine.loaders.tiny_models import PROMPT, TINY_MODELS

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


def test_half_precision_and_another_pooling(minilm: Path, tmp_path: Path) -> None:
    model = load(convert(minilm, tmp_path / "half.gguf", half=True))
    assert isinstance(model, Embedder)
    got = np.array(model.embed(SENTENCES).vectors)
    assert (got * WANTED).sum(axis=1).min() > 0.99999
    model = load(convert(minilm, tmp_path / "cls.gguf", half=True, pooling=2))
    assert isinstance(model, Embedder)
    assert model.config.pooling == ("cls",)
    assert (np.array(model.embed(SENTENCES).vectors) * WANTED).sum(axis=1).max() < 0.99


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
    ("pooling", "said"), [(4, r"cls\.output\.weight"), (3, None)], ids=["rank", "last"]
)
def test_pooling_types(minilm: Path, tmp_path: Path, pooling: int, said: str | None) -> None:
    path = convert(minilm, tmp_path / "m.gguf", half=True, pooling=pooling)
    if said is None:
        model = load(path)
        assert isinstance(model, Embedder)
        assert model.config.pooling == ("lasttoken",)
    else:
        assert purpose_of(ModelFiles.from_directory(path)) == "ranking"
        with pytest.raises(ModelLoadError, match=said):
            load(path)


def test_what_has_no_place_is_named(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = gguf.GGUFWriter.add_tensor

    def add_odd(self: gguf.GGUFWriter, name: str, values: np.ndarray) -> None:
        add(self, name.replace("blk.2.ffn_up.bias", "blk.2.adapter.bias"), values)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add_odd)
    path = convert(minilm, tmp_path / "m.gguf", half=True)
    with pytest.raises(ModelLoadError, match=r"missing layers\.2\.mlp\.up\.bias.*blk\.2\.adapter"):
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
