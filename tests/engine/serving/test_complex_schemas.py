"""Schemas that are too complex: refused before the first token, or named in the error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from modelpack_engine.engine import Engine
from modelpack_engine.models.chat_template import ChatTemplate
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from modelpack_server.structured_output.grammar import MAX_OPTIONAL
from tests.engine.serving.tiny import TEMPLATE, TinyCatalogue, chat_engine

Json = dict[str, Any]
#: Names its format of calls, and no tools: their schemas do not fit the context.
CALLING = TEMPLATE + "{% if tools %}<tool_call>{% endif %}"
HELLO = [{"role": "user", "content": "hi"}]


def calling_engine() -> Engine:
    engine = chat_engine()
    engine.tokenizer._chat_template = ChatTemplate(CALLING)
    return engine


def options(count: int, prefix: str = "p") -> Json:
    """An object with many optional properties."""
    properties = {f"{prefix}{number}": {"type": "integer"} for number in range(count)}
    return {"type": "object", "properties": properties, "additionalProperties": False}


#: One property of an object in a list is too many.
LARGE = {"type": "array", "items": options(MAX_OPTIONAL + 1), "minItems": 1}
#: Two small objects, of which the text may begin either: together too many items for the parser.
EITHER = {
    "type": "object",
    "properties": {"a": {"anyOf": [options(300, "p"), options(300, "q")]}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    def pool() -> ModelPool:
        return ModelPool(TinyCatalogue(calling_engine), memory=10_000, grace=0.0)

    with (
        ModelServer(pool, address="127.0.0.1:0") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def bodies(schema: Json) -> dict[str, tuple[str, Json, str | None]]:
    """The path, the body and the name of the schema's field, for each API."""
    common: Json = {"model": "tiny"}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    function = {"name": "f", "parameters": {"type": "object", "properties": {"x": schema},
                                            "required": ["x"]}}  # fmt: skip
    flat = {"type": "json_schema", "name": "x", "schema": schema}
    return {
        "chat": (
            "/v1/chat/completions",
            common | {"messages": HELLO, "response_format": wanted},
            "response_format",
        ),
        "tools": (
            "/v1/chat/completions",
            common | {"messages": HELLO, "tools": [{"type": "function", "function": function}],
                      "tool_choice": "required"},
            "tools",
        ),
        "completions": (
            "/v1/completions",
            common | {"prompt": "hi", "max_tokens": 99, "response_format": wanted},
            "response_format",
        ),
        "responses": (
            "/v1/responses",
            common | {"input": "hi", "text": {"format": flat}},
            "text.format",
        ),
        "anthropic": (
            "/v1/messages",
            common | {"messages": HELLO, "max_tokens": 99,
                      "output_config": {"format": {"type": "json_schema", "schema": schema}}},
            None,
        ),
        "ollama": ("/api/chat", common | {"messages": HELLO, "format": schema}, None),
    }  # fmt: skip


APIS = list(bodies({}))


def told(body: Json) -> Json:
    """Return the error in a body or an event; Ollama's becomes a message."""
    error = body["error"]
    return {"message": error} if isinstance(error, str) else error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", APIS)
def test_an_object_with_too_many_optional_properties_is_refused(
    http: httpx.Client, api: str, stream: bool
) -> None:
    path, body, param = bodies(LARGE)[api]
    response = http.post(path, json=body | {"stream": stream})
    assert response.status_code == 400, response.text
    error = told(response.json())
    assert f"an object has {MAX_OPTIONAL + 1} optional properties" in error["message"]
    assert "`required`" in error["message"]
    assert error.get("param") == param
    assert error.get("type") in (None, "invalid_request_error")


@pytest.mark.sample(2)
@pytest.mark.parametrize("api", APIS)
def test_a_schema_that_becomes_too_complex_in_an_answer_is_a_bad_request(
    http: httpx.Client, api: str
) -> None:
    path, body, param = bodies(EITHER)[api]
    response = http.post(path, json=body | {"stream": False})
    assert response.status_code == 400, response.text
    error = told(response.json())
    assert "too complex to continue the answer" in error["message"]
    assert "schema" in error["message"]
    assert error.get("param") == param
    assert error.get("type") in (None, "invalid_request_error")


@pytest.mark.sample(2)
@pytest.mark.parametrize("api", APIS)
def test_a_stream_names_the_schema_in_its_last_event(http: httpx.Client, api: str) -> None:
    path, body, param = bodies(EITHER)[api]
    response = http.post(path, json=body | {"stream": True})
    assert response.status_code == 200
    lines = [line.removeprefix("data: ") for line in response.text.splitlines()]
    events = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(events) > 1  # the reply had begun
    last = events[-1]
    if api == "responses":
        assert last["type"] == "response.failed"
        assert last["response"]["error"]["code"] == "invalid_prompt"
        error = events[-2]
        assert error["code"] == "invalid_prompt"
    else:
        error = told(last)
        assert error.get("type") in (None, "invalid_request_error")
    assert "schema" in error["message"]
    assert "too complex to continue the answer" in error["message"]
    assert error.get("param") == param


def test_others_go_on_beside_such_a_schema(http: httpx.Client) -> None:
    path, body, _ = bodies(EITHER)["chat"]
    assert http.post(path, json=body).status_code == 400
    plain = {"model": "tiny", "messages": HELLO, "max_tokens": 5}
    assert http.post(path, json=plain).status_code == 200
