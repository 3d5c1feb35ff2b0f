"""Limits of requests, some of which apply before tokenization."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from modelpack_engine.models.tokenizer import TextTooLongError, Tokenizer, TokenText
from modelpack_server.api.app import create_app
from modelpack_server.api.bodies import Body
from modelpack_server.pool.pool import ModelPool
from tests.engine.scripted import ScriptedEngine
from tests.engine.serving.conftest import Scripted, ScriptedCatalogue
from tests.engine.serving.tiny import tiny_tokenizer

CHAT, LONGEST = "/v1/chat/completions", 64


def subclasses(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from subclasses(sub)


def lists_in(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            yield schema
        for part in schema.values():
            yield from lists_in(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            yield from lists_in(part)


def test_every_list_of_a_body_is_validated_up_to_its_first_error() -> None:
    create_app(ModelPool(ScriptedCatalogue(ScriptedEngine()), memory=100))
    kinds = list(subclasses(Body))
    found = [one for kind in kinds for one in lists_in(kind.__pydantic_core_schema__)]
    assert len(found) > 20
    assert all(one.get("fail_fast") for one in found)


def test_every_route_that_takes_json_parses_it_within_limits(api: Scripted) -> None:
    document = api.http.get("/openapi.json").json()
    paths = [
        path
        for path, methods in document["paths"].items()
        if "application/json" in methods.get("post", {}).get("requestBody", {}).get("content", {})
    ]
    assert len(paths) > 20
    for path in paths:
        url = re.sub(r"\{[^}]*\}", "x", path)
        headers = {"content-type": "application/json"}
        response = api.http.post(url, content=b"[" * 1000, headers=headers)
        assert response.status_code == 400, path
        assert "nested deeper than 128" in response.text, path


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"stop": ["x"] * 17}),
        (CHAT, {"stop": "x" * 5000}),
        (CHAT, {"stop_token_ids": [1] * 1025}),
        (CHAT, {"logit_bias": {str(i): 0 for i in range(1025)}}),
        (CHAT, {"n": 129}),
        ("/v1/completions", {"prompt": ["x"] * 129}),
        ("/v1/completions", {"prompt": [[1]] * 129}),
        ("/v1/completions", {"prompt": [1] * 5000}),
        ("/v1/completions", {"prompt": [1] * 4096}),
        ("/v1/embeddings", {"input": ["x"] * 2049}),
        ("/api/embed", {"input": ["x"] * 2049}),
        ("/v1/rerank", {"query": "x", "documents": ["x"] * 2049}),
        (CHAT, {"preset": "x" * 15_000}),
        (CHAT, {"tool_choice": "x" * 15_000}),
    ],
)
def test_refused(api: Scripted, path: str, fields: dict[str, Any]) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]} | fields
    response = api.http.post(path, json=body)
    assert response.status_code == 400
    assert len(response.content) < 2000  # the error does not echo the request
    assert api.http.get("/health").status_code == 200


@pytest.mark.long
@pytest.mark.parametrize("raw", [b'{"model":' + b"[" * 1000, b"[" * 15_000])
@pytest.mark.parametrize(
    "path", [CHAT, "/v1/messages", "/api/chat", "/engines/unload", "/pool/unload"]
)
def test_nesting_is_a_400_of_every_family(api: Scripted, path: str, raw: bytes) -> None:
    response = api.http.post(path, content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "nested deeper than 128" in response.text


@pytest.mark.parametrize(
    "path",
    [CHAT, "/v1/messages", "/v1/messages/count_tokens", "/v1/responses",
     "/v1/responses/input_tokens", "/api/chat", "/api/generate", "/v1/completions"],
)  # fmt: skip
def test_prompts_are_refused_by_their_bytes(path: str) -> None:
    from starlette.testclient import TestClient

    engine = ScriptedEngine()
    app = create_app(ModelPool(ScriptedCatalogue(engine), memory=100))
    size = engine.max_model_len * 128 + 1
    text = "7" * size
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "prompt": text,
            "input": text, "max_tokens": 5}  # fmt: skip
    if path == "/v1/responses":
        del body["prompt"]
    with TestClient(app, raise_server_exceptions=False) as http:
        response = http.post(path, json=body)
    assert response.status_code == 400, response.text
    assert "tokens" in response.text
    if path == CHAT:
        assert response.json()["error"]["code"] == "context_length_exceeded"
    if path == "/v1/messages":
        assert "prompt is too long: " in response.json()["error"]["message"]


def long_tokens() -> Tokenizer:
    """A tokenizer with a token for each byte, and one for each run of up to `LONGEST` a."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    merges = []
    size = 1
    while size < LONGEST:
        merges.append(("a" * size, "a" * size))
        size *= 2
        vocabulary["a" * size] = len(vocabulary)
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, text=TokenText.BYTE_LEVEL, eos_token_ids=[0])


@pytest.mark.parametrize(
    "text",
    ["a" * (LONGEST * 8000), "é" * 4000, "\U0001f600" * 2000, "word " * 1600, "\ud800" * 7000],
)
def test_what_fits_into_a_context_is_not_refused(text: str) -> None:
    tokenizer = long_tokens()
    assert tokenizer.longest_token == LONGEST
    tokenizer.check_length(text, 8000)
    assert len(tokenizer.encode(text)) <= 8000


@pytest.mark.parametrize("text", ["7" * 100_000, "é" * 100_000, "\U0001f600" * 50_000,
                                  "a" * (LONGEST * 12_000), "x" * 10_000_000])  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_number(text: str) -> None:
    tokenizer = long_tokens()
    with pytest.raises(TextTooLongError) as caught:
        tokenizer.check_length(text, 8000)
    assert 8000 < caught.value.at_least <= len(text.encode())


def test_counting_stops_once_the_context_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    counted = []
    backend = tokenizer._backend

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(backend, name)

        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            counted.append(len(texts[0]))
            return backend.encode_batch_fast(texts, **options)

    monkeypatch.setattr(tokenizer, "_backend", Counting())
    with pytest.raises(TextTooLongError):
        tokenizer.check_length("7" * 1_000_000, 20_000)
    assert sum(counted) < 40_000


def test_a_million_bad_items_make_one_error(api: Scripted) -> None:
    raw = json.dumps({"model": "m", "stop": [1] * 5000}).encode()
    response = api.http.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(("messages", "stop"))
