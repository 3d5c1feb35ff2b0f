"""Every response has the fields of the official API: none missing, no optional field as null."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic.types as claude
import httpx
import ollama
import pytest
from openai.pagination import SyncPage
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from modelpack_engine.outputs import FinishReason
from tests.engine.families.served import CALLER, PLAIN, THINKER, Served

HELLO = [{"role": "user", "content": "hello"}]
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
TOOLS = {
    "/v1/chat/completions": [{"type": "function", "function": FUNCTION}],
    "/v1/responses": [{"type": "function", **FUNCTION}],
    "/v1/messages": [{"name": "weather", "input_schema": {"type": "object"}}],
    "/api/chat": [{"type": "function", "function": FUNCTION}],
}
# What the model says, by a name of the case.
SPEECH = {
    "text": (PLAIN, ["Hello", " world"], FinishReason.STOP),
    "cut": (PLAIN, ["Hello", " world"], FinishReason.LENGTH),
    "thoughts": (THINKER, ["hm", "</think>", "Hello"], FinishReason.STOP),
    "call": (CALLER, ['<tool_call>{"name": "weather", "arguments": {}}</tool_call>'],
             FinishReason.STOP),
}  # fmt: skip
# The optional fields that the official APIs send as null.
NULLS = {
    "/v1/chat/completions": {"refusal", "logprobs", "content", "finish_reason", "usage"},
    "/v1/completions": {"logprobs", "finish_reason", "usage"},
    "/v1/responses": {
        "completed_at", "error", "incomplete_details", "instructions", "max_output_tokens",
        "max_tool_calls", "previous_response_id", "effort", "summary", "usage", "user",
        "description",
    },
    "/v1/messages": {"stop_reason", "stop_sequence"},
    "/api/ps": {"families"},
}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO, "stream_options": {"include_usage": True}},
    "/v1/completions": {"prompt": "hello", "stream_options": {"include_usage": True}},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 64},
    "/api/chat": {"messages": HELLO},
    "/api/generate": {"prompt": "hello"},
}
THINKING: dict[str, dict[str, Any]] = {
    "/v1/messages": {"thinking": {"type": "enabled", "budget_tokens": 9}},
    "/api/chat": {"think": True},
    "/api/generate": {"think": True},
}
WHOLE: dict[str, Any] = {
    "/v1/chat/completions": ChatCompletion,
    "/v1/completions": Completion,
    "/v1/responses": Response,
    "/v1/messages": claude.Message,
    "/api/chat": ollama.ChatResponse,
    "/api/generate": ollama.GenerateResponse,
}
PIECES: dict[str, Any] = WHOLE | {
    "/v1/chat/completions": ChatCompletionChunk,
    "/v1/responses": ResponseStreamEvent,
    "/v1/messages": claude.RawMessageStreamEvent,
}
LISTS: dict[str, Any] = {
    "/v1/models": SyncPage[Model],
    "/v1/models/" + PLAIN: Model,
    "/anthropic/v1/models": None,
    "/anthropic/v1/models/" + PLAIN: claude.ModelInfo,
    "/api/ps": ollama.ProcessResponse,
}


def nulls(value: Any, name: str = "") -> Iterator[str]:
    """Yield the name of each field within `value` that is null."""
    if value is None:
        yield name
    for key, part in value.items() if isinstance(value, dict) else ():
        yield from nulls(part, key)
    for part in value if isinstance(value, list) else ():
        yield from nulls(part, name)


def answer(served: Served, path: str, case: str, **body: Any) -> httpx.Response:
    name, pieces, ends = SPEECH[case]
    given = BODIES[path] | {"model": served.says(name, *pieces, ends=ends)} | body
    if case == "call":
        given["tools"] = TOOLS[path]
    if case == "thoughts":
        given |= THINKING.get(path, {})
    if not body["stream"]:
        given.pop("stream_options", None)
    reply = httpx.post(served.url + path, json=given)
    assert reply.status_code == 200, reply.text
    return reply


CASES = [(path, case) for path in BODIES for case in SPEECH if case != "call" or path in TOOLS]


@pytest.mark.sample(7)
@pytest.mark.parametrize(("path", "case"), CASES)
def test_a_whole_response(served: Served, path: str, case: str) -> None:
    body = answer(served, path, case, stream=False).json()
    WHOLE[path].model_validate(body)
    assert set(nulls(body)) <= NULLS.get(path, set())


@pytest.mark.sample(2)
@pytest.mark.parametrize(("path", "case"), CASES)
def test_each_event_of_a_stream(served: Served, path: str, case: str) -> None:
    lines = answer(served, path, case, stream=True).text.splitlines()
    texts = [line.removeprefix("data: ") for line in lines if line.startswith(("data: ", "{"))]
    events = [json.loads(text) for text in texts if text != "[DONE]"]
    assert len(events) > 1
    for event in events:
        if event.get("type") != "ping":
            TypeAdapter(PIECES[path]).validate_python(event)
        assert set(nulls(event)) <= NULLS.get(path, set()), event


@pytest.mark.parametrize("path", LISTS)
def test_a_list_of_models(served: Served, path: str) -> None:
    body = httpx.get(served.url + path).json()
    for each in body["data"] if path == "/anthropic/v1/models" else ():
        claude.ModelInfo.model_validate(each)
    if LISTS[path] is not None:
        LISTS[path].model_validate(body)
    assert set(nulls(body)) <= NULLS.get(path, set())
