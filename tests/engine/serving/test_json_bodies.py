"""Large request bodies are validated off the event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from pydantic import field_validator

from modelpack_server.api import errors
from modelpack_server.api.bodies import Body, BodyRoute, JsonRequest
from modelpack_server.gateway.families import Family

_LARGE = 40_000


class Words(Body):
    """A list of words, and the threads in which lists were validated."""

    words: list[str]
    threads: int = 0

    @field_validator("words")
    @classmethod
    def _count(cls, value: list[str]) -> list[str]:
        THREADS.append(threading.current_thread())
        return value


THREADS: list[threading.Thread] = []


@pytest.fixture
def client() -> TestClient:
    """A client of one route that returns the number of words and its thread."""
    routes = APIRouter(route_class=BodyRoute)

    @routes.post("/words")
    async def count(body: Words) -> dict[str, int]:
        THREADS.append(threading.current_thread())
        return {"count": len(body.words)}

    app = FastAPI()
    errors.install(app, lambda _, problem: problem.response(Family.OPENAI))
    app.include_router(routes)
    THREADS.clear()
    return TestClient(app)


@pytest.mark.parametrize(
    ("words", "on_the_loop"),
    [(["x"], True), (["x" * _LARGE], True), (["x" * 100] * (_LARGE // 100), False)],
    ids=["small", "of one word", "of many words"],
)
def test_large_bodies_of_many_values_are_validated_in_a_thread(
    client: TestClient, words: list[str], on_the_loop: bool
) -> None:
    reply = client.post("/words", json={"words": words})
    assert reply.json() == {"count": len(words)}
    *validated, loop = THREADS
    assert len(validated) == 1  # FastAPI does not validate again
    assert (validated[0] is loop) is on_the_loop


def test_a_body_in_one_piece_is_not_copied() -> None:
    body = bytes(_LARGE)
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return messages.pop()

    request = JsonRequest({"type": "http"}, receive)
    assert asyncio.run(request.body()) is body
    assert asyncio.run(request.body()) is body


@pytest.mark.parametrize("length", [1, _LARGE])
@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"words": [1]}, "words.0", "valid string"),
        ({"words": "a"}, "words", "valid list"),
        ({}, "words", "required"),
        ([], None, "JSON object"),
    ],
)
def test_errors_are_the_same(
    client: TestClient, length: int, body: Any, param: str | None, says: str
) -> None:
    sent = {**body, "more": "x" * length} if isinstance(body, dict) else ["x" * length]
    reply = client.post("/words", json=sent)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == param
    assert says in error["message"]


def test_a_large_body_of_another_type_is_refused_as_a_small_one(client: TestClient) -> None:
    for length in (1, _LARGE):
        reply = client.post(
            "/words", content=b'{"words": ["' + b"x" * length + b'"]}',
            headers={"Content-Type": "text/plain"},
        )  # fmt: skip
        assert reply.status_code == 400
        assert "Content-Type: application/json" in reply.json()["error"]["message"]
