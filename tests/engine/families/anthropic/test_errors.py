"""Errors in Anthropic's form, and the list of models."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import anthropic
import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpack_engine.errors import (
    EngineError,
    LoadingError,
    OutOfMemoryError,
    QueueFullError,
    RequestError,
)
from modelpack_server.api.anthropic.requests import MessageFields, template_messages
from modelpack_server.api.errors import problem_of
from modelpack_server.api.sse import error_event
from modelpack_server.gateway.families import Family
from tests.engine.families.served import CALLER, PLAIN, THINKER, Served

HELLO: Any = [{"role": "user", "content": "hello"}]
TOOL = {"name": "t", "input_schema": {"type": "object"}}


def post(served: Served, **body: Any) -> requests.Response:
    given = {"model": PLAIN, "max_tokens": 9, "messages": HELLO} | body
    return requests.post(f"{served.url}/v1/messages", json=given, timeout=60)


def with_block(*blocks: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_k": "x"}, "top_k"),
        ({"stream": "yes"}, "stream"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        (with_block({"type": "image", "source": {}}), "'image'"),
        (with_block({"type": "hologram"}), "'hologram'"),
        (with_block({"type": "text"}), "messages.0.content.0.text"),
        (with_block({"type": "document", "source": {"type": "base64"}}), "'base64'"),
        (with_block({"type": "tool_result", "content": "x"}), "tool_use_id"),
        (with_block({"type": "tool_use", "id": "1", "name": "t", "input": "x"}, role="assistant"),
         "input"),
        ({"system": [{"type": "image"}]}, "'image'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"name": "t"}]}, "tools.0.input_schema"),
        ({"tools": [{"name": "t", "input_schema": {"type": "string"}}]}, "tools.0.input_schema"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"tools": [TOOL, TOOL]}, "same name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "u"}}, "'u'"),
        ({"tool_choice": {"type": "any"}}, "tools is empty"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "less than max_tokens"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "schema"),
    ],
)  # fmt: skip
def test_what_is_refused(served: Served, body: dict[str, Any], words: str) -> None:
    response = post(served, **body)
    assert response.status_code == 400
    error = response.json()
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert words in error["error"]["message"]


def test_the_clients_exceptions(served: Served, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="nope", max_tokens=9, messages=HELLO)
    assert caught.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError):
        client.messages.count_tokens(model=PLAIN, messages=[])


def test_no_json(served: Served) -> None:
    response = requests.post(f"{served.url}/anthropic/v1/messages", data="{", timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    unknown = requests.get(f"{served.url}/anthropic/v1/nothing", timeout=60)
    assert unknown.status_code == 404
    assert unknown.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (QueueFullError("full", retry_after=2), 529, "overloaded_error"),
        (LoadingError("loading", retry_after=2), 529, "overloaded_error"),
        (OutOfMemoryError("too large"), 503, "api_error"),
        (EngineError("broken"), 500, "api_error"),
        (ValueError("broken"), 500, "api_error"),
        (RuntimeError("broken"), 500, "api_error"),
    ],
)
def test_the_servers_own_failures(error: Exception, status: int, kind: str) -> None:
    response = problem_of(error).response(Family.ANTHROPIC)
    assert response.status_code == status
    assert json.loads(bytes(response.body))["error"]["type"] == kind
    if status == 529:
        assert response.headers["retry-after"] == "2"


def test_a_server_without_memory_for_a_thread_is_overloaded() -> None:
    """The threads that start take all the address space that a process may have."""
    code = (
        "import resource, threading\n"
        "resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))\n"
        "try:\n"
        "    while True: threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "except RuntimeError as error: print(error, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    response = problem_of(RuntimeError(done.stdout.strip())).response(Family.ANTHROPIC)
    assert response.status_code == 529
    assert int(response.headers["retry-after"]) >= 1


def test_a_failure_in_the_stream_is_an_event(served: Served, client: anthropic.Anthropic) -> None:
    served.says(PLAIN, "Hello", " world")

    def read(fail: Callable[[Exception], None]) -> None:
        with client.messages.stream(model=PLAIN, max_tokens=9, messages=HELLO) as stream:
            for text in stream.text_stream:
                assert text == "Hello"
                fail(EngineError("it broke"))

    with served.held(PLAIN) as fail, pytest.raises(anthropic.APIStatusError, match="it broke"):
        read(fail)
    full = QueueFullError("full", retry_after=1)
    assert error_event(Family.ANTHROPIC)(full).startswith("event: error\ndata: {")


def test_bodies_that_are_too_large(served: Served) -> None:
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/v1/messages")
    connection.putheader("Content-Length", str(1 << 40))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert json.load(response)["error"]["type"] == "request_too_large"
    connection.close()


def test_models(served: Served, client: anthropic.Anthropic) -> None:
    ids = [model.id for model in client.models.list(limit=2)]
    assert ids == [PLAIN, CALLER, THINKER]
    page = client.models.list(limit=2)
    assert (page.first_id, page.last_id, page.has_more) == (PLAIN, CALLER, True)
    assert [m.id for m in client.models.list(before_id=THINKER, limit=1)] == [CALLER, PLAIN]
    model = client.models.retrieve(PLAIN)
    assert (model.type, model.id, model.lifecycle) == ("model", PLAIN, "active")
    assert model.created_at.year == 2023
    assert model.max_input_tokens == 4096
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.models.retrieve("nope")
    assert caught.value.type == "not_found_error"


def test_models_for_other_clients(served: Served) -> None:
    listed = requests.get(f"{served.url}/v1/models", timeout=60).json()
    assert listed["object"] == "list"
    ours = requests.get(f"{served.url}/anthropic/v1/models", timeout=60).json()
    assert [model["type"] for model in ours["data"]] == ["model"] * 3


def test_errors_in_the_document(served: Served) -> None:
    document = requests.get(f"{served.url}/openapi.json", timeout=60).json()
    refused = document["paths"]["/v1/messages"]["post"]["responses"]["400"]
    schema = refused["content"]["application/json"]["schema"]["$ref"]
    assert schema.endswith("/AnthropicError")


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_KINDS = st.sampled_from(
    ["text", "document", "search_result", "tool_use", "tool_result", "thinking", "content", "x"]
)
_KEYS = st.sampled_from(
    ["type", "text", "content", "source", "data", "title", "id", "name", "input", "tool_use_id",
     "is_error", "thinking", "signature"]
)  # fmt: skip
_JSON = st.recursive(
    _SCALARS | _KINDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=6),
    max_leaves=12,
)
_BLOCKS = st.lists(st.dictionaries(_KEYS, _JSON | _KINDS, max_size=8), max_size=3)


@pytest.mark.long
@given(st.sampled_from(["user", "assistant", "system"]), _BLOCKS)
@settings(max_examples=100, deadline=None)
def test_any_blocks_are_taken_or_refused(role: Any, blocks: list[dict[str, Any]]) -> None:
    try:
        messages = template_messages(None, [MessageFields(role=role, content=blocks)])
    except RequestError:
        return
    for message in messages:
        assert isinstance(message["content"], str)
