"""docs/api.md is correct: its tests exist, and its routes and fields match the server."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from modelpack.operations.remote import RemoteOptions
from modelpack.store.layout import LayoutStore
from modelpack_server.api.app import create_app
from modelpack_server.pool.adapters import AdapterLoading, Adapters
from modelpack_server.pool.file_store import FileStore
from modelpack_server.pool.pool import ModelPool
from tests.engine.scripted import ScriptedEngine
from tests.engine.serving.load.served import StoringCatalogue
from tests.engine.serving.load.support_table import (
    ROOT,
    field_rows,
    functions_in,
    named_tests,
    routes,
)

HELLO = [{"role": "user", "content": "hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "POST /v1/chat/completions": {"model": "m", "messages": HELLO},
    "POST /v1/completions": {"model": "m", "prompt": "hello"},
    "POST /v1/responses": {"model": "m", "input": "hello"},
    "POST /v1/messages": {"model": "m", "messages": HELLO, "max_tokens": 9},
}
#: Values of fields that take no text.
VALUES: dict[str, Any] = {
    "metadata": {"a": "b"}, "store": True, "max_tool_calls": 3, "modalities": ["audio"],
    "audio": {"voice": "x"}, "web_search_options": {}, "best_of": 3, "n": 2,
    "cache_control": {"type": "ephemeral"},
}  # fmt: skip
SAMPLING: dict[str, Any] = {
    "temperature": 0.5, "top_p": 0.4, "top_k": 3, "min_p": 0.2, "repetition_penalty": 1.5,
    "presence_penalty": 0.3, "frequency_penalty": 0.1, "logit_bias": {"5": 1}, "seed": 9,
    "stop_token_ids": [7], "min_tokens": 1, "ignore_eos": True, "stop": "end",
}  # fmt: skip
#: What the documents of the API themselves are, and a page; a path that is none.
UNLISTED = re.compile(r"/openapi.json|/docs.*|/redoc|/|/models/\{ref\}/export")


class App:
    """The application, its engine and its client."""

    def __init__(self, app: FastAPI, engine: ScriptedEngine, http: TestClient, pool: ModelPool):
        self.app, self.engine, self.http, self.pool = app, engine, http, pool

    def ask(self, operation: str, **fields: Any) -> Any:
        method, path = operation.split()
        return self.http.request(method, path, json=BODIES[operation] | fields)

    def asked(self, operation: str, **fields: Any) -> tuple[list[int], dict[str, Any], int]:
        """Return the engine's request: prompt, parameters, number of choices."""
        response = self.ask(operation, **fields)
        assert response.status_code == 200, (operation, fields, response.text)
        prompt, params, n = self.engine.submitted[-1]
        return prompt, asdict(params), n


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    engine = ScriptedEngine()
    directory = tmp_path_factory.mktemp("store")
    store = LayoutStore(directory / "models")
    loading = AdapterLoading(Adapters(), store, RemoteOptions(), FileStore(directory / "files"))
    pool = ModelPool(
        StoringCatalogue(engine, store), memory=100, grace=0.0, adapter_loading=loading
    )
    made = create_app(pool)
    with TestClient(made, raise_server_exceptions=False) as http:
        yield App(made, engine, http, pool)


def operations_with(policy: str) -> list[tuple[str, str]]:
    return [(row.operation, name) for row in field_rows()
            if row.policy == policy and row.operation in BODIES for name in row.fields]  # fmt: skip


def test_every_test_exists() -> None:
    named = named_tests()
    assert len(named) > 100
    for test in named:
        path, _, name = test.partition("::")
        assert (ROOT / "tests" / path).is_file(), test
        assert name.startswith("test_"), test
        assert name in functions_in(ROOT / "tests" / path), test


def test_every_route_is_listed_and_there(app: App) -> None:
    there = {
        (method, re.sub(r":path\b", "", route.path))
        for route in _routes(app.app.routes)
        for method in route.methods
    }
    listed = {(method, path) for method, path in routes() if not UNLISTED.fullmatch(path)}
    for method, path in there:
        known = UNLISTED.fullmatch(path) or (method, path) in listed
        # Each GET route also supports HEAD; the two lists of models share a path.
        assert known or (method == "HEAD" and ("GET", path) in listed), (method, path)
    assert listed <= there


def _routes(routes: Iterable[Any]) -> Iterator[Any]:
    for route in routes:
        if hasattr(route, "methods"):
            yield route
        else:  # an included router
            yield from _routes(getattr(route, "original_router", route).routes)


def test_every_field_is_listed(app: App) -> None:
    document = app.http.get("/openapi.json").json()
    listed: dict[str, set[str]] = {}
    for row in field_rows():
        assert row.policy in ("honoured", "ignored", "refused")
        assert row.fields
        listed.setdefault(row.operation, set()).update(row.fields)
    for path, item in document["paths"].items():
        for method, operation in item.items():
            fields = _fields(document, operation)
            assert fields <= listed.get(f"{method.upper()} {path}", set()), (method, path)


def _fields(document: Mapping[str, Any], operation: Mapping[str, Any]) -> set[str]:
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schema = schema.get("schema", {})
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return set(schema.get("properties", {}))


@pytest.mark.parametrize(("operation", "field"), operations_with("ignored"))
def test_ignored_fields_change_nothing(app: App, operation: str, field: str) -> None:
    without = app.asked(operation)
    assert app.asked(operation, **{field: VALUES.get(field, "x")}) == without


@pytest.mark.parametrize(("operation", "field"), operations_with("refused"))
def test_refused_fields_are_named(app: App, operation: str, field: str) -> None:
    response = app.ask(operation, **{field: VALUES.get(field, "x")})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


@pytest.mark.parametrize("operation", ["POST /v1/completions", "POST /v1/responses"])
def test_sampling_fields_of_completions(app: App, operation: str) -> None:
    _, params, _ = app.asked(operation, **SAMPLING)
    _, expected, _ = app.asked("POST /v1/chat/completions", **SAMPLING)
    for name in SAMPLING:
        assert params[name] == expected[name], name
        assert params[name] not in (None, (), False), name


def test_what_completions_share_with_chats(app: App) -> None:
    shares(app, "POST /v1/completions")
    schema = {"name": "x", "schema": {"type": "object"}}
    body = {"response_format": {"type": "json_schema", "json_schema": schema}}
    assert app.ask("POST /v1/completions", **body).status_code == 200
    assert app.engine.params.mask is not None


def test_what_messages_share_with_chats(app: App) -> None:
    shares(app, "POST /v1/messages")


def test_what_responses_share_with_chats(app: App) -> None:
    shares(app, "POST /v1/responses")
    _, params, _ = app.asked("POST /v1/responses", max_tokens=7)
    assert params["max_tokens"] == 7
    response = app.ask("POST /v1/responses", metadata={"a": "b"}, chat_template_kwargs={"c": 1})
    assert response.json()["metadata"] == {"a": "b"}
    streamed = {"stream": True, "stream_options": {"include_obfuscation": False}}
    assert app.ask("POST /v1/responses", **streamed).status_code == 200
    assert app.ask("POST /v1/responses", stream_options={}).status_code == 400


def shares(app: App, operation: str) -> None:
    """Presets and keep_alive work as in chats."""
    _, params, _ = app.asked(operation, preset="code")
    assert params["temperature"] == 0.2
    assert app.ask(operation, preset="nothing").status_code == 400
    app.asked(operation, keep_alive="7m")
    assert [model.keep_alive for model in app.pool.running()] == [420.0]
