"""The Responses API with SmolLM2 and OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

pytestmark = [pytest.mark.weights, pytest.mark.long]

MODEL = "ai/smollm2"
FRANCE = "What is the capital of France? One word."


@pytest.fixture(scope="module")
def client(smollm2_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{smollm2_url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_round(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": 24}
    first = client.responses.create(input=FRANCE, **asked)
    assert "Paris" in first.output_text
    with client.responses.stream(
        input="Say again what I asked you first.", previous_response_id=first.id, **asked
    ) as stream:
        events = list(stream)
        second = stream.get_final_response()
    assert [event.sequence_number for event in events] == sorted(
        event.sequence_number for event in events
    )
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.total_tokens
    assert second.usage.input_tokens_details.cached_tokens > 0  # from the first turn
    assert second.output_text.strip()


def test_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    }
    wanted: Any = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
    response = client.responses.create(
        model=MODEL, input=FRANCE, text=wanted, temperature=1.2, max_output_tokens=64
    )
    assert list(json.loads(response.output_text)) == ["city"]
