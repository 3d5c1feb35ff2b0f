"""Messages with Anthropic's own client and a scripted model."""

from __future__ import annotations

import asyncio
from itertools import groupby
from typing import Any

import anthropic
import pytest
import requests

from modelpack_engine.outputs import FinishReason
from modelpack_server.api.anthropic.requests import MessageFields, template_messages
from tests.engine.families.served import CALLER, PLAIN, THINKER, Served

HELLO: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "name": "weather",
    "description": "how it is",
    "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "cache_control": {"type": "ephemeral"},
}
CALL = ('<tool_call>\n{"name": "weather", "arg', 'uments": {"city": ', '"Paris"}}\n</tool_call>')


def create(client: anthropic.Anthropic, model: str, **body: Any) -> Any:
    given: Any = {"model": model, "max_tokens": 64, "messages": HELLO} | body
    return client.messages.create(**given)


def stream(client: anthropic.Anthropic, model: str, **body: Any) -> tuple[list[Any], Any]:
    given: Any = {"model": model, "max_tokens": 64, "messages": HELLO} | body
    with client.messages.stream(**given) as events:
        return list(events), events.get_final_message()


def test_a_message(served: Served, client: anthropic.Anthropic) -> None:
    message = create(client, served.says(PLAIN, "Hello", " world"))
    assert message.type == "message"
    assert message.role == "assistant"
    assert message.model == PLAIN
    assert message.id.startswith("msg_")
    [block] = message.content
    assert (block.type, block.text) == ("text", "Hello world")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    prompt = len(served.prompt(PLAIN).encode())
    assert message.usage.input_tokens == prompt - 1
    assert message.usage.cache_read_input_tokens == 1
    assert message.usage.cache_creation_input_tokens == 0
    assert message.usage.output_tokens == 2


def test_a_stream_in_the_apis_order(served: Served) -> None:
    model = served.says(PLAIN, "Hello", " world")
    body = {"model": model, "max_tokens": 64, "messages": HELLO, "stream": True}
    response = requests.post(f"{served.url}/v1/messages?beta=true", json=body, timeout=60)
    assert response.headers["content-type"].startswith("text/event-stream")
    names = [line.split(": ")[1] for line in response.text.split("\n") if line[:7] == "event: "]
    assert [name for name, _ in groupby(names)] == [  # waiting pieces are sent together
        "message_start", "ping", "content_block_start", "content_block_delta",
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert "[DONE]" not in response.text


def test_a_stream_is_the_same_message(served: Served, client: anthropic.Anthropic) -> None:
    model = served.says(THINKER, "I wonder", ".\n</think>\n\nSo: ", *CALL)
    asked: Any = {"tools": [WEATHER], "thinking": {"type": "adaptive"}}
    whole = create(client, model, **asked)
    _, streamed = stream(client, model, **asked)
    ignored = {"id": True, "content": {"__all__": {"id"}}}
    assert streamed.model_dump(exclude=ignored) | {"parsed_output": 0} == (
        whole.model_dump(exclude=ignored) | {"parsed_output": 0}
    )
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]


def test_system_array_cache_control_and_tools(served: Served, client: anthropic.Anthropic) -> None:
    model = served.says(CALLER, "Let me see. ", *CALL)
    events, message = stream(
        client, model, tools=[WEATHER],
        system=[
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "Be kind."},
        ],
    )  # fmt: skip
    kinds = [event.type for event in events if event.type not in ("text", "input_json")]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    opened = [e.content_block.type for e in events if e.type == "content_block_start"]
    assert opened == ["text", "tool_use"]
    indexes = [e.index for e in events if e.type.startswith("content_block")]
    assert indexes == sorted(indexes)
    text, call = message.content
    assert text.text == "Let me see."
    assert call.name == "weather"
    assert call.input == {"city": "Paris"}
    assert message.stop_reason == "tool_use"
    assert message.usage.input_tokens > 0
    assert served.prompt(CALLER).startswith("system: Be brief.\n\nBe kind.\nuser: hello")


def test_limits_and_stops(served: Served, client: anthropic.Anthropic) -> None:
    model = served.says(PLAIN, *"abcdefgh", ends=FinishReason.LENGTH)
    cut = create(client, model, max_tokens=5)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 5)
    model = served.says(CALLER, "one ", "two X", " three")
    for message in (
        create(client, model, stop_sequences=["X"], tools=[WEATHER]),
        stream(client, model, stop_sequences=["X"], tools=[WEATHER])[1],
    ):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "X")
        assert message.content[0].text == "one two "


def test_a_call_that_is_cut(served: Served, client: anthropic.Anthropic) -> None:
    model = served.says(CALLER, *CALL[:2], '"Par', ends=FinishReason.LENGTH)
    [block] = create(client, model, max_tokens=3, tools=[WEATHER]).content
    assert block.input == {"city": "Par"}  # a whole message has an object
    events, message = stream(client, model, max_tokens=3, tools=[WEATHER])
    pieces = [e.delta.partial_json for e in events if e.type == "content_block_delta"]
    assert "".join(pieces) == '{"city": "Par'
    assert message.stop_reason == "max_tokens"


def test_a_full_context_is_said(served: Served, client: anthropic.Anthropic) -> None:
    model = served.says(PLAIN, "a", "b", ends=FinishReason.LENGTH)
    message = create(client, model, max_tokens=10_000)
    assert message.stop_reason == "model_context_window_exceeded"


def test_a_prompt_that_is_too_long(served: Served, client: anthropic.Anthropic) -> None:
    long: Any = [{"role": "user", "content": "x" * 5000}]
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 4096"):
        create(client, PLAIN, messages=long)


def test_thoughts_have_a_block_of_their_own(served: Served, client: anthropic.Anthropic) -> None:
    model = served.says(THINKER, "I wonder", ".</think>", "Yes.")
    thinking: Any = {"type": "enabled", "budget_tokens": 30}
    events, message = stream(client, model, thinking=thinking)
    thought, text = message.content
    assert (thought.thinking, text.text) == ("I wonder.", "Yes.")
    assert thought.signature
    assert "signature" in [event.type for event in events]
    history: Any = [*HELLO, {"role": "assistant", "content": [thought, text]}, *HELLO]
    create(client, model, thinking=thinking, messages=history)
    assert message.usage.output_tokens_details.thinking_tokens > 0


def test_thoughts_that_are_not_shown_come_back_in_their_signature(
    served: Served, client: anthropic.Anthropic
) -> None:
    model = served.says(THINKER, "I wonder", ".</think>", "Yes.")
    asked: Any = {"thinking": {"type": "adaptive", "display": "omitted"}}
    message = create(client, model, **asked)
    assert message.content[0].thinking == ""
    turn = MessageFields(
        role="assistant", content=[block.model_dump() for block in message.content]
    )
    [shown] = template_messages(None, [turn])
    assert shown["reasoning_content"] == "I wonder."
    assert shown["content"] == "Yes."


@pytest.mark.parametrize("given", [{}, {"thinking": {"type": "disabled"}}])
def test_no_thoughts_unless_asked(
    served: Served, client: anthropic.Anthropic, given: dict[str, Any]
) -> None:
    message = create(client, served.says(THINKER, "Yes."), **given)
    assert [block.type for block in message.content] == ["text"]
    assert not served.prompt(THINKER).endswith("<think>\n")


def test_results_come_before_the_text_of_their_turn(
    served: Served, client: anthropic.Anthropic
) -> None:
    called = [
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}},
        {"type": "tool_use", "id": "toolu_2", "name": "weather", "input": {"city": "Rome"}},
    ]
    results = [
        {"type": "text", "text": "And now?"},
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"},
        {
            "type": "tool_result", "tool_use_id": "toolu_2", "is_error": True,
            "content": [{"type": "text", "text": "no such city"}],
        },
    ]  # fmt: skip
    messages = [*HELLO, {"role": "assistant", "content": called},
                {"role": "user", "content": results}]  # fmt: skip
    create(client, served.says(CALLER, "Sunny."), messages=messages, tools=[WEATHER])
    prompt = served.prompt(CALLER)
    told = prompt[prompt.index("Let me see.") :]
    assert told.startswith(
        "Let me see.\ntool: sunny\ntool: Error: no such city\nuser: And now?\nassistant:"
    )


def test_several_turns_and_later_instructions_stay_in_their_place(
    served: Served, client: anthropic.Anthropic
) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "user", "content": "b"},
        {"role": "system", "content": "You have 100 tokens left."},
    ]
    create(client, served.says(PLAIN, "c"), messages=messages, system="S")
    assert served.prompt(PLAIN) == (
        "system: S\nuser: a\n\nb\nsystem: You have 100 tokens left.\nassistant:"
    )


def test_an_answer_that_was_begun_goes_on(served: Served, client: anthropic.Anthropic) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The answer is ("}]
    message = create(client, served.says(PLAIN, "B)"), messages=messages)
    assert message.content[0].text == "B)"
    assert served.prompt(PLAIN).endswith("assistant:The answer is (")


@pytest.mark.parametrize(
    ("choice", "offered", "is_forced"),
    [
        ({"type": "auto"}, True, False),
        ({"type": "none"}, False, False),
        ({"type": "any"}, True, True),
        ({"type": "tool", "name": "weather"}, True, True),
    ],
)
def test_the_choice_of_tools(
    served: Served, client: anthropic.Anthropic, choice: Any, offered: bool, is_forced: bool
) -> None:
    model = served.says(CALLER, *CALL)
    message = create(client, model, tools=[WEATHER], tool_choice=choice)
    assert ("how it is" in served.prompt(CALLER)) == offered
    assert (served.engines[CALLER].params.mask is not None) == is_forced
    assert (message.stop_reason == "tool_use") == offered


def test_one_call_if_not_in_parallel(served: Served, client: anthropic.Anthropic) -> None:
    model = served.says(CALLER, *CALL, "\n", *CALL)
    both = create(client, model, tools=[WEATHER])
    assert [block.type for block in both.content] == ["tool_use", "tool_use"]
    assert len({block.id for block in both.content}) == 2
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
    one = create(client, model, tools=[WEATHER], tool_choice=choice)
    assert [block.type for block in one.content] == ["tool_use"]


def test_a_schema_for_the_answer(served: Served, client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    model = served.says(PLAIN, '{"a": 1}')
    create(client, model, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert served.engines[PLAIN].params.mask is not None
    create(client, model)
    assert served.engines[PLAIN].params.mask is None


def test_sampling_is_as_given_and_nothing_is_invented(
    served: Served, client: anthropic.Anthropic
) -> None:
    model = served.says(PLAIN, "a")
    extra = {"temperature": 0.5, "top_p": 0.9, "top_k": 5}
    create(client, model, extra_body=extra)
    params = served.engines[PLAIN].params
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 5)
    create(client, model)
    default = type(params)()
    params = served.engines[PLAIN].params
    assert (params.temperature, params.top_p) == (default.temperature, default.top_p)


def test_what_has_no_effect_is_accepted(served: Served, client: anthropic.Anthropic) -> None:
    create(
        client, served.says(PLAIN, "a"), metadata={"user_id": "me"}, service_tier="auto",
        extra_headers={"anthropic-beta": "nobody-knows-2031-01-01"},
        extra_body={"context_management": {"edits": []}, "speed": "fast", "container": None,
                    "cache_control": {"type": "ephemeral"}},
    )  # fmt: skip


def test_the_asynchronous_client(served: Served) -> None:
    async def run() -> None:
        async with anthropic.AsyncAnthropic(base_url=f"{served.url}/anthropic", api_key="x") as c:
            model = served.says(PLAIN, "Hello", " world")
            given: Any = {"model": model, "max_tokens": 9, "messages": HELLO}
            message = await c.messages.create(**given)
            assert message.content[0].text == "Hello world"  # type: ignore[union-attr]
            async with c.messages.stream(**given) as events:
                assert "".join([text async for text in events.text_stream]) == "Hello world"
            counted = await c.messages.count_tokens(model=model, messages=HELLO)
            assert counted.input_tokens == len(served.prompt(PLAIN).encode())

    asyncio.run(run())


@pytest.mark.parametrize(
    "prefix", ["/v1", "/anthropic/v1", "/engines/v1", "/engines/llama.cpp/v1", "/engines/mlx/v1"]
)
def test_every_prefix(served: Served, prefix: str) -> None:
    body = {"model": served.says(PLAIN, "a"), "max_tokens": 9, "messages": HELLO}
    for tail in ("/messages", "/messages/count_tokens"):
        response = requests.post(f"{served.url}{prefix}{tail}", json=body, timeout=60)
        assert response.status_code == 200


def test_counting_is_of_the_rendered_prompt(served: Served, client: anthropic.Anthropic) -> None:
    model = served.says(CALLER, "a")
    given: Any = {"messages": HELLO, "tools": [WEATHER], "system": "Be brief."}
    counted = client.messages.count_tokens(model=model, **given).input_tokens
    usage = create(client, model, **given).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    assert counted > client.messages.count_tokens(model=model, messages=HELLO).input_tokens
