"""Embeddings and ranking over HTTP: real MiniLM, by OpenAI's own client and by plain requests."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

import modelpack
from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_engine.embedding import CrossEncoder, Embedder, load_embedder, sigmoid
from modelpack_engine.models import ModelFiles
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.embedding.models import golden, write_model
from tests.engine.embedding.test_decoders import write as write_decoder

SENTENCES = golden("minilm")["sentences"]
WANTED = np.array(golden("minilm")["vectors"])
CATS = ["The stock market fell.", "A feline rested on a rug.", "It rains in Spain."]
CAT_QUERY = "Where did the cat sit?"


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("ranker"), "rank-bert")


@pytest.fixture(scope="module")
def url(
    minilm_store: LayoutStore, ranker: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    generator = tmp_path_factory.mktemp("generator")
    write_decoder(generator, "llama")
    for name, directory in (("ranker", ranker), ("generator", generator)):
        request = modelpack.PackageRequest(safetensors_dir=directory)
        modelpack.package(name, request, store=minilm_store)
    config = EngineConfig(device="cpu", kv_cache_bytes=1 << 20, warm_up=False)
    catalogue = StoreCatalogue(minilm_store, config)
    with ModelServer(lambda: ModelPool(catalogue), address="127.0.0.1:0") as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(url: str, path: str, **body: Any) -> requests.Response:
    return requests.post(f"{url}{path}", json=body, timeout=120)


def refusal(response: requests.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.long
def test_openais_client(client: openai.OpenAI) -> None:
    """OpenAI's client requests base64 and decodes it."""
    reply = client.embeddings.create(model="minilm", input=SENTENCES, user="me")
    assert reply.object == "list"
    assert reply.model == "minilm"
    assert [item.index for item in reply.data] == list(range(len(SENTENCES)))
    assert np.abs(np.array([item.embedding for item in reply.data]) - WANTED).max() < 2e-6
    assert reply.usage.prompt_tokens == reply.usage.total_tokens == 180


@pytest.mark.parametrize("dimensions", [1, 32, 384])
def test_dimensions(client: openai.OpenAI, dimensions: int) -> None:
    reply = client.embeddings.create(model="minilm", input=SENTENCES[0], dimensions=dimensions)
    cut = WANTED[0][:dimensions] / np.linalg.norm(WANTED[0][:dimensions])
    assert np.abs(np.array(reply.data[0].embedding) - cut).max() < 1e-5


def test_both_encodings_are_the_same_numbers(url: str) -> None:
    plain = post(url, "/v1/embeddings", model="minilm", input=SENTENCES[0]).json()
    coded = post(
        url, "/v1/embeddings", model="minilm", input=[SENTENCES[0]], encoding_format="base64"
    ).json()
    raw = base64.b64decode(coded["data"][0]["embedding"], validate=True)
    assert len(raw) == 4 * 384
    floats = plain["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(raw, "<f4"), np.array(floats, np.float32))
    assert plain["data"][0]["object"] == "embedding"
    assert plain["usage"] == {"prompt_tokens": 9, "total_tokens": 9}


def test_kinds_of_input(url: str, embedder: Embedder) -> None:
    ids = embedder.tokenizer.encode(SENTENCES[0])
    for given, count in ((SENTENCES[0], 1), ([SENTENCES[0]] * 2, 2), (ids, 1), ([ids, ids], 2)):
        data = post(url, "/v1/embeddings", model="minilm", input=given).json()["data"]
        assert len(data) == count
        for item in data:
            assert np.abs(np.array(item["embedding"]) - WANTED[0]).max() < 2e-6


@pytest.mark.parametrize(
    "path",
    ["/v1", "/engines/v1", "/engines/llama.cpp/v1", "/engines/vllm/v1", ""],
)
def test_paths(url: str, path: str) -> None:
    assert post(url, f"{path}/embeddings", model="minilm", input="x").status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"input": ""}, "input", "input 0 is empty"),
        ({"input": []}, "input", "input is empty"),
        ({"input": ["a", ""]}, "input", "input 1 is empty"),
        ({"input": [[]]}, "input", "no tokens"),
        ({"input": [1, "a"]}, "input", "expected input to be"),
        ({"input": {"text": "a"}}, "input", "expected input to be"),
        ({"input": [True]}, "input", "expected input to be"),
        ({"input": None}, "input", "expected input to be"),
        ({"input": [30522]}, "input", "the vocabulary has 30522"),
        ({"input": ["a"] * 2049}, "input", "2049 items, the limit is 2048"),
        ({"input": ["a", "word " * 300]}, "input", "input 1 has 302 tokens, but .* 256"),
        ({"input": "a", "dimensions": 385}, "dimensions", "385"),
        ({"input": "a", "dimensions": 0}, "dimensions", "0"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "float"),
        ({"input": "a", "prompt_name": "query"}, "prompt", "it has none"),
        ({}, "input", "required"),
    ],
)
def test_refused(url: str, body: dict[str, Any], param: str, said: str) -> None:
    error = refusal(post(url, "/v1/embeddings", model="minilm", **body))
    assert error["param"] == param
    assert re.search(said, error["message"]), error["message"]


def test_too_long_unless_cut(url: str) -> None:
    body = {"model": "minilm", "input": "word " * 300}
    assert refusal(post(url, "/v1/embeddings", **body))["code"] == "context_length_exceeded"
    cut = post(url, "/v1/embeddings", **body, truncate=True)
    assert cut.json()["usage"]["total_tokens"] == 256


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "w5 " * 300}),
        ("/v1/rerank", {"query": "w5", "documents": ["w7 " * 300]}),
        ("/v1/score", {"text_1": "w5", "text_2": "w7 " * 300}),
    ],
)
def test_models_stay_as_asked_and_texts_are_cut(url: str, path: str, body: dict[str, Any]) -> None:
    assert refusal(post(url, path, model="minilm", **body))["code"] == "context_length_exceeded"
    for keep_alive in ("7m", "9m"):
        cut = post(url, path, model="minilm", **body, truncate=True, keep_alive=keep_alive)
        assert cut.status_code == 200
        models = requests.get(f"{url}/pool", timeout=120).json()["models"]
        [kept] = [model["keep_alive"] for model in models if "minilm" in model["name"]]
        assert kept == f"{keep_alive}0s"


def test_models_that_do_something_else(url: str) -> None:
    missing = refusal(post(url, "/v1/embeddings", model="other", input="a"), 404)
    assert missing["code"] == "model_not_found"
    for path, body in {
        "/v1/embeddings": {"input": "a"},
        "/rerank": {"query": "a", "documents": ["b"]},
    }.items():
        error = refusal(post(url, path, model="generator", **body))
        assert "generates text" in error["message"]
    assert (
        "no vectors" in refusal(post(url, "/v1/embeddings", model="ranker", input="w5"))["message"]
    )
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for path, body in {"/v1/completions": {"prompt": "a"}, "/v1/chat/completions": chat}.items():
        for model, instead in {"minilm": "/v1/embeddings", "ranker": "/v1/rerank"}.items():
            error = refusal(post(url, path, model=model, **body))
            assert error["param"] == "model"
            assert "generates no text" in error["message"]
            assert instead in error["message"]


def test_requests_are_counted(url: str) -> None:
    def counted(name: str) -> float:
        text = requests.get(f"{url}/metrics", timeout=60).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"vllm:{name}" and sample.labels["model_name"] == "minilm"
        )

    names = ("request_success_total", "prompt_tokens_total", "request_prompt_tokens_count",
             "e2e_request_latency_seconds_count")  # fmt: skip
    before = [counted(name) for name in names]
    tokens = post(url, "/v1/embeddings", model="minilm", input="a b").json()["usage"]
    after = [counted(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, tokens["total_tokens"], 1, 1]
    assert counted("num_requests_running") == 0


def test_no_kv_cache_is_allowed_for(minilm_store: LayoutStore, url: str) -> None:
    catalogue = StoreCatalogue(minilm_store, EngineConfig(device="cpu"))
    sizes = {name: catalogue.find(name) for name in ("minilm", "ranker", "generator")}
    needs = {name: catalogue.needs(model, ModelSettings()) for name, model in sizes.items()}
    assert needs["minilm"] < sizes["minilm"].size
    assert needs["ranker"] < sizes["ranker"].size
    assert needs["generator"] > 500 * 1024**2
    embedding = ModelSettings(mode="embedding")
    assert catalogue.needs(sizes["generator"], embedding) < sizes["generator"].size


@pytest.mark.parametrize(
    "path",
    ["/rerank", "/v1/rerank", "/v2/rerank", "/engines/rerank", "/engines/v1/rerank",
     "/engines/vllm/rerank", "/engines/vllm/v1/rerank"],
)  # fmt: skip
def test_rerank_by_cosine(url: str, embedder: Embedder, path: str) -> None:
    reply = post(url, path, model="minilm", query=CAT_QUERY, documents=CATS).json()
    vectors = np.array(embedder.embed([CAT_QUERY, *CATS]).vectors)
    cosines = vectors[1:] @ vectors[0]
    order = [int(at) for at in np.argsort(-cosines)]
    assert order[0] == 1
    assert [result["index"] for result in reply["results"]] == order
    for result in reply["results"]:
        assert abs(result["relevance_score"] - cosines[result["index"]]) < 1e-5
        assert result["document"] == {"text": CATS[result["index"]]}
    assert reply["model"] == "minilm"
    assert reply["usage"]["total_tokens"] == embedder.embed([CAT_QUERY, *CATS]).num_tokens


def test_rerank_by_a_cross_encoder(url: str, ranker: Path) -> None:
    model = load_embedder(ModelFiles.from_directory(ranker), device="cpu")
    assert isinstance(model, CrossEncoder)
    documents = ["w5 w9", "w40", "w7 w7 w70"]
    logits = model.score([("w5 w6", document) for document in documents])
    reply = post(
        url, "/rerank", model="ranker", query="w5 w6", documents=documents, return_documents=False
    ).json()
    want = sorted(((sigmoid(logit), at) for at, logit in enumerate(logits.values)), reverse=True)
    assert [result["index"] for result in reply["results"]] == [at for _, at in want]
    for result, (score, _) in zip(reply["results"], want, strict=True):
        assert abs(result["relevance_score"] - score) < 1e-5
        assert "document" not in result
    assert reply["usage"]["total_tokens"] == logits.num_tokens


@pytest.mark.parametrize(("top_n", "count"), [(1, 1), (2, 2), (99, 3), (None, 3)])
def test_top_n(url: str, top_n: int | None, count: int) -> None:
    documents = [CATS[0], {"text": CATS[1]}, {"text": CATS[2], "id": 7}]
    body = {"model": "minilm", "query": CAT_QUERY, "documents": documents, "top_n": top_n}
    results = post(url, "/rerank", **body).json()["results"]
    assert len(results) == count
    assert results[0]["index"] == 1


@pytest.mark.parametrize("path", ["/score", "/v1/score", "/engines/score", "/engines/mlx/score"])
def test_score(url: str, path: str) -> None:
    one = post(url, path, model="minilm", text_1=CATS[1], text_2=CATS).json()
    assert one["object"] == "list"
    assert [item["index"] for item in one["data"]] == [0, 1, 2]
    assert {item["object"] for item in one["data"]} == {"score"}
    scores = [item["score"] for item in one["data"]]
    assert abs(scores[1] - 1) < 1e-5
    assert max(scores[0], scores[2]) < 0.5
    each = post(url, path, model="minilm", text_1=CATS, text_2=CATS).json()
    assert all(abs(item["score"] - 1) < 1e-5 for item in each["data"])
    both = post(url, path, model="minilm", text_1=CATS[0], text_2=CATS[0]).json()
    assert len(both["data"]) == 1


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/rerank", {"query": "", "documents": ["a"]}, "query"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a", "documents": ["a", ""]}, "documents"),
        ("/rerank", {"query": "a", "documents": ["a", "word " * 300]}, "documents"),
        ("/rerank", {"query": "word " * 300, "documents": ["a"]}, "query"),
        ("/rerank", {"query": "a", "documents": ["a"] * 2049}, "documents"),
        ("/rerank", {"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
        ("/rerank", {"documents": ["a"]}, "query"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/score", {"text_1": "a", "text_2": []}, "text_2"),
        ("/score", {"text_1": "", "text_2": "a"}, "text_1"),
    ],
)
def test_ranking_refused(url: str, path: str, body: dict[str, Any], param: str) -> None:
    assert refusal(post(url, path, model="minilm", **body))["param"] == param


def test_an_unknown_backend(url: str) -> None:
    body = {"model": "minilm", "query": "a", "documents": ["a"]}
    assert post(url, "/engines/nonsense/rerank", **body).status_code == 404
