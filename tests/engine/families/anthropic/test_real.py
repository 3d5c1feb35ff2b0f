"""SmolLM2 with Anthropic's own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

pytestmark = [pytest.mark.weights, pytest.mark.long]

MODEL = "ai/smollm2"
FRANCE: Any = [{"role": "user", "content": "What is the capital of France? One word."}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "Say how the weather is in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(smollm2_url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=smollm2_url, api_key="none", max_retries=0) as made:
        yield made


def given(**body: Any) -> Any:
    return {"model": MODEL, "max_tokens": 16, "messages": FRANCE,
            "extra_body": {"temperature": 0}} | body  # fmt: skip


def test_a_round(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**given())
    [block] = message.content
    assert block.type == "text"
    assert "Paris" in block.text
    assert message.stop_reason == "end_turn"
    with client.messages.stream(**given()) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == block.text
    assert len(pieces) > 1
    assert final.usage.output_tokens == message.usage.output_tokens
    counted = client.messages.count_tokens(model=MODEL, messages=FRANCE).input_tokens
    for usage in (message.usage, final.usage):
        assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    cut = client.messages.create(**given(max_tokens=1))
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 1)


def test_an_answer_that_was_begun(client: anthropic.Anthropic) -> None:
    begun = [*FRANCE, {"role": "assistant", "content": "The capital of France is"}]
    message = client.messages.create(**given(messages=begun, stop_sequences=["."]))
    [block] = message.content
    assert block.type == "text"
    assert block.text.startswith(" Paris")
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ".")


def test_a_call_that_has_to_be_made(client: anthropic.Anthropic) -> None:
    choice: Any = {"type": "tool", "name": "get_weather"}
    with client.messages.stream(
        **given(tools=[WEATHER], tool_choice=choice, max_tokens=64)
    ) as stream:
        message = stream.get_final_message()
    [call] = message.content
    assert call.type == "tool_use"
    assert call.name == "get_weather"
    assert isinstance(call.input, dict)
    assert list(call.input) == ["city"]
    assert message.stop_reason == "tool_use"
