"""all-MiniLM-L6-v2 from the store, compared with sentence-transformers; options of `embed`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from modelpack.errors import NotFoundError
from modelpack.store.layout import LayoutStore
from modelpack_engine.embedding import Embedder
from modelpack_engine.embedding.request import BatchLimits, next_batch, split_batches
from modelpack_engine.embedding.sentence_transformers import Steps
from modelpack_engine.errors import ContextLengthError, EngineError, ModelLoadError, RequestError
from modelpack_server import open_cross_encoder, open_embedder
from tests.engine.embedding.models import golden

SENTENCES = golden("minilm")["sentences"]
WANTED = np.array(golden("minilm")["vectors"])


def test_as_its_own_package(embedder: Embedder) -> None:
    got = np.array(embedder.embed(SENTENCES).vectors, np.float64)
    cosines = (got * WANTED).sum(axis=1)
    cosines /= np.linalg.norm(got, axis=1) * np.linalg.norm(WANTED, axis=1)
    assert cosines.min() >= 0.999999
    assert np.abs(got - WANTED).max() < 2e-6


def test_its_config_is_that_of_its_files(embedder: Embedder) -> None:
    config = embedder.config
    assert (config.architecture, config.dimension, config.max_length) == ("bert", 384, 256)
    assert (config.pooling, config.normalize, config.prompts) == (("mean",), True, {})
    assert embedder.weight_bytes == 90_261_504
    assert embedder.notes == ()


def test_together_as_alone_and_in_order(embedder: Embedder) -> None:
    together = embedder.embed(SENTENCES)
    backwards = embedder.embed(SENTENCES[::-1])
    assert together.token_counts == backwards.token_counts[::-1]
    for sentence, vector, other in zip(
        SENTENCES, together.vectors, backwards.vectors[::-1], strict=True
    ):
        [alone] = embedder.embed([sentence]).vectors
        assert alone.dtype == np.float32
        assert np.abs(alone - vector).max() < 1e-6
        assert np.abs(other - vector).max() < 1e-6


def test_token_ids_are_taken_as_they_are(embedder: Embedder) -> None:
    ids = embedder.tokenizer.encode(SENTENCES[0])
    by_ids, by_text = embedder.embed([ids, SENTENCES[0]]).vectors
    # Not bit for bit: rows of one matmul may be computed by different instructions.
    assert np.abs(by_ids - by_text).max() < 1e-6
    bare = embedder.embed([ids[1:-1]])
    assert bare.num_tokens == len(ids) - 2
    assert np.abs(bare.vectors[0] - by_ids).max() > 1e-3


@pytest.mark.parametrize("dimensions", [1, 64, 383, 384])
def test_dimensions(embedder: Embedder, dimensions: int) -> None:
    for vector, whole in zip(
        embedder.embed(SENTENCES[:3], dimensions=dimensions).vectors, WANTED[:3], strict=True
    ):
        cut = whole[:dimensions] / np.linalg.norm(whole[:dimensions])
        assert vector.shape == (dimensions,)
        assert np.abs(vector - cut).max() < 1e-5


LONG = "word " * 300


@pytest.mark.parametrize(
    ("inputs", "options", "said", "param"),
    [
        (["a", ""], {}, "input 1 is empty", "input"),
        ([[]], {}, "input 0 has no tokens", "input"),
        (
            ["a", [1, 30522]],
            {},
            "input 1 contains the token 30522, but the vocabulary has 30522",
            "input",
        ),
        ([[-1]], {}, "the token -1", "input"),
        (
            ["a", LONG],
            {},
            "input 1 has 302 tokens, but this model's maximum context length is 256",
            "input",
        ),
        ([[7] * 257], {}, "input 0 has 257 tokens", "input"),
        (["a"], {"dimensions": 0}, "dimensions is 0", "dimensions"),
        (["a"], {"dimensions": 385}, "dimensions is 385.* 384", "dimensions"),
        (["a"], {"prompt": "query"}, "it has none", "prompt"),
        (["a"], {"normalize": False}, "length 1", "normalize"),
    ],
)
def test_refused(
    embedder: Embedder, inputs: Any, options: dict[str, Any], said: str, param: str
) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        embedder.embed(inputs, **options)
    assert caught.value.param == param
    too_long = said.startswith(("input 1 has", "input 0 has 257"))
    assert isinstance(caught.value, ContextLengthError) == too_long


def test_cut_where_asked(embedder: Embedder) -> None:
    cut = embedder.embed([LONG, [7] * 300], truncate=True)
    assert cut.token_counts == (256, 256)
    for vector, short in zip(cut.vectors, ("word " * 254, [7] * 256), strict=True):
        assert np.abs(vector - embedder.embed([short]).vectors[0]).max() < 1e-6


def test_nothing_gives_nothing(embedder: Embedder) -> None:
    assert embedder.embed([]).vectors == ()


def test_what_is_no_number_is_an_error(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Steps, "__call__", lambda self, vectors: vectors * float("nan"))
    with pytest.raises(EngineError, match="input 0"):
        embedder.embed(["a"])


def test_opening(minilm_store: LayoutStore) -> None:
    with pytest.raises(ModelLoadError, match="no cross-encoder"):
        open_cross_encoder("minilm", store=minilm_store, pull=False, device="cpu")
    with pytest.raises(NotFoundError):
        open_embedder("other", store=minilm_store, pull=False)


def test_batches_hold_what_is_alike() -> None:
    limits = BatchLimits(max_texts=3, max_tokens=100)
    lengths = [5, 90, 7, 40, 30, 6, 8, 55]
    batches = split_batches(lengths, limits)
    assert sorted(place for batch in batches for place in batch) == list(range(8))
    for batch in batches:
        sizes = [lengths[place] for place in batch]
        assert len(batch) <= 3
        assert len(batch) == 1 or max(sizes) * len(batch) <= 100
        assert max(sizes) <= max(16, 2 * min(sizes))
    assert next_batch([40, 90, 41, 39, 5], limits) == [0, 2]
    assert next_batch([200], limits) == [0]
    assert next_batch([5, 6, 7, 8], limits) == [0, 1, 2]
