"""POST /v1/responses/input_tokens by OpenAI's own client: the size of the prompt of a response."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.engine.families.served import CALLER, PLAIN, Served

TOOL: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object"},
    "strict": True,
}


def count(client: openai.OpenAI, model: str, **body: Any) -> int:
    counted = client.responses.input_tokens.count(model=model, **body)
    assert counted.object == "response.input_tokens"
    return counted.input_tokens


@pytest.mark.parametrize(
    "body",
    [
        {"input": "hello"},
        {"input": "hello", "instructions": "Be brief."},
        {"input": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"input": "hello", "tools": [TOOL], "tool_choice": "auto", "reasoning": {"effort": "low"}},
    ],
)
def test_a_count_is_of_the_rendered_prompt(
    served: Served, client: openai.OpenAI, body: dict[str, Any]
) -> None:
    model = served.says(CALLER, "a")
    response = client.responses.create(model=model, **body)
    assert response.usage is not None
    assert count(client, model, **body) == response.usage.input_tokens


def test_earlier_turns_count(served: Served, client: openai.OpenAI) -> None:
    model = served.says(PLAIN, "a")
    first = client.responses.create(model=model, input="hello")
    alone = count(client, model, input="more")
    both = count(client, model, input="more", previous_response_id=first.id)
    second = client.responses.create(model=model, input="more", previous_response_id=first.id)
    assert second.usage is not None
    assert alone < both == second.usage.input_tokens
    assert count(client, model, previous_response_id=first.id) < both


def test_truncation_counts_what_is_left(client: openai.OpenAI) -> None:
    turns: Any = [{"role": ("user", "assistant")[i % 2], "content": "x" * 1500} for i in range(5)]
    assert 1500 < count(client, PLAIN, input=turns, truncation="auto") < 4096


@pytest.mark.parametrize("prefix", ["/v1", "", "/engines", "/engines/v1", "/engines/mlx/v1"])
def test_every_path(served: Served, prefix: str) -> None:
    body = {"model": PLAIN, "input": "hello"}
    reply = httpx.post(f"{served.url}{prefix}/responses/input_tokens", json=body)
    assert reply.json()["object"] == "response.input_tokens"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": "x" * 1_000_000}, "input"),
        ({"input": "a", "conversation": 1}, "conversation"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "a", "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
    ],
)
def test_refused(served: Served, body: dict[str, Any], param: str) -> None:
    reply = httpx.post(f"{served.url}/v1/responses/input_tokens", json={"model": PLAIN} | body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
