"""The Responses API with OpenAI's own client and a scripted model."""

from __future__ import annotations

import asyncio
import json
from itertools import groupby
from typing import Any

import openai
import pytest
import requests

from modelpack_engine.errors import EngineError
from modelpack_engine.outputs import FinishReason
from modelpack_server.api.openai.responses.requests import items_of, template_messages
from tests.engine.families.served import CALLER, PLAIN, THINKER, Served

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "how it is",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
PARIS = ('<tool_call>\n{"name": "weather", "arg', 'uments": {"city": ', '"Paris"}}\n</tool_call>')
ROME = ('<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}', "</tool_call>")


def create(client: openai.OpenAI, model: str, given: Any = "hello", **body: Any) -> Any:
    return client.responses.create(model=model, input=given, **body)


def events(client: openai.OpenAI, model: str, given: Any = "hello", **body: Any) -> list[Any]:
    return list(create(client, model, given, stream=True, **body))


def test_a_response(served: Served, client: openai.OpenAI) -> None:
    response = create(
        client, served.says(PLAIN, "Hello", " world"), instructions="Be brief.",
        metadata={"a": "b"}, temperature=0.5, max_output_tokens=64,
    )  # fmt: skip
    assert response.id.startswith("resp_")
    assert response.object == "response"
    assert response.status == "completed"
    assert response.output_text == "Hello world"
    assert response.model == PLAIN
    assert response.incomplete_details is None
    [message] = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert served.prompt(PLAIN) == "system: Be brief.\nuser: hello\nassistant:"
    assert response.metadata == {"a": "b"}
    assert response.temperature == 0.5
    assert served.engines[PLAIN].params.temperature == 0.5
    usage = response.usage
    assert usage.input_tokens == len(served.prompt(PLAIN).encode())
    assert usage.input_tokens_details.cached_tokens == 1
    assert (usage.output_tokens, usage.output_tokens_details.reasoning_tokens) == (2, 0)
    assert usage.total_tokens == usage.input_tokens + 2


def test_every_alias(served: Served) -> None:
    body = {"model": served.says(PLAIN, "a"), "input": "hello"}
    for prefix in ("/v1", "", "/engines", "/engines/v1", "/engines/llama.cpp/v1"):
        response = requests.post(f"{served.url}{prefix}/responses", json=body, timeout=60)
        assert response.status_code == 200
        url = f"{served.url}{prefix}/responses/{response.json()['id']}"
        assert requests.get(url, timeout=60).json() == response.json()
        assert requests.get(f"{url}/input_items", timeout=60).json()["object"] == "list"
        assert requests.post(f"{url}/cancel", timeout=60).status_code == 400
        assert requests.delete(url, timeout=60).json()["deleted"] is True
        assert requests.get(url, timeout=60).status_code == 404


def check_order(found: list[Any]) -> None:
    """Check the rules of the API's streams: sequence numbers, and the events of each item."""
    assert [event.sequence_number for event in found] == list(range(len(found)))
    assert [event.type for event in found[:2]] == ["response.created", "response.in_progress"]
    assert found[0].response.status == "in_progress"
    opened = [event for event in found if event.type == "response.output_item.added"]
    assert [event.output_index for event in opened] == list(range(len(opened)))
    for added in opened:
        index = added.output_index
        mine = [e for e in found if getattr(e, "output_index", None) == index]
        kinds = [kind for kind, _ in groupby(event.type for event in mine)]
        expected = {
            "message": ("response.output_text", True),
            "reasoning": ("response.reasoning_text", True),
            "function_call": ("response.function_call_arguments", False),
        }
        name, has_parts = expected[added.item.type]
        inner = [f"{name}.delta", f"{name}.done"]
        if has_parts:
            inner = ["response.content_part.added", *inner, "response.content_part.done"]
        assert kinds == ["response.output_item.added", *inner, "response.output_item.done"]
        assert {e.item_id for e in mine if hasattr(e, "item_id")} == {added.item.id}
        assert mine[-1].item.id == added.item.id
    last = found[-1]
    assert [item.id for item in last.response.output] == [event.item.id for event in opened]


def test_a_stream_and_what_follows(served: Served, client: openai.OpenAI) -> None:
    found = events(client, served.says(PLAIN, "Hello", " world"), "my first question")
    check_order(found)
    assert found[-1].type == "response.completed"
    response = found[-1].response
    assert response.usage.output_tokens == 2
    text = "".join(e.delta for e in found if e.type == "response.output_text.delta")
    [done] = [e for e in found if e.type == "response.output_text.done"]
    assert text == done.text == response.output_text == "Hello world"
    after = events(client, PLAIN, "what did I ask?", previous_response_id=response.id)
    assert after[-1].response.previous_response_id == response.id
    assert served.prompt(PLAIN) == (
        "user: my first question\nassistant: Hello world\nuser: what did I ask?\nassistant:"
    )


def test_a_stream_is_the_same_response(served: Served, client: openai.OpenAI) -> None:
    model = served.says(THINKER, "I wonder", ".\n</think>\n\nSo: ", *PARIS, "\n", *ROME)
    whole = create(client, model, tools=[WEATHER])
    found = events(client, model, tools=[WEATHER])
    check_order(found)
    streamed = found[-1].response
    assert [item.type for item in whole.output] == [
        "reasoning", "message", "function_call", "function_call",
    ]  # fmt: skip
    for one, other in zip(whole.output, streamed.output, strict=True):
        ours = {"id", "call_id"}
        assert one.model_dump(exclude=ours) == other.model_dump(exclude=ours)
    assert streamed.usage == whole.usage
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    assert whole.output[0].content[0].text == "I wonder."
    assert whole.output_text == "So:"
    with client.responses.stream(model=model, input="hello", tools=[WEATHER]) as stream:
        final = stream.get_final_response()
    assert final.output_text == "So:"


def test_peer_5_calls_that_are_sent_back_keep_name_and_arguments(
    served: Served, client: openai.OpenAI
) -> None:
    first = create(client, served.says(CALLER, "See. ", *PARIS), tools=[WEATHER])
    [call] = [item for item in first.output if item.type == "function_call"]
    assert json.loads(call.arguments) == {"city": "Paris"}
    history = [
        {"role": "user", "content": "hello"},
        *[item.model_dump(exclude_none=True) for item in first.output],
        {"type": "function_call_output", "call_id": call.call_id,
         "output": [{"type": "input_text", "text": "sun"}, {"type": "input_text", "text": "ny"}]},
    ]  # fmt: skip
    served.engines[CALLER].pieces = ["Sunny."]
    create(client, CALLER, history, tools=[WEATHER])
    assert "tool: sunny" in served.prompt(CALLER)
    messages = template_messages(None, items_of(history, lambda name: None))
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    [told] = messages[1]["tool_calls"]
    assert told["function"] == {"name": "weather", "arguments": call.arguments}
    assert messages[1]["content"] == "See."
    assert messages[2]["tool_call_id"] == told["id"]


def test_peer_6_user_turns_are_remembered_and_listed(served: Served, client: openai.OpenAI) -> None:
    first = create(client, served.says(PLAIN, "One."), "a", instructions="not inherited")
    second = create(client, PLAIN, "b", previous_response_id=first.id)
    third = create(client, PLAIN, "c", previous_response_id=second.id)
    assert served.prompt(PLAIN) == (
        "user: a\nassistant: One.\nuser: b\nassistant: One.\nuser: c\nassistant:"
    )
    items = list(client.responses.input_items.list(third.id, order="asc", limit=2))
    assert [item.content[0].text for item in items] == ["a", "One.", "b", "One.", "c"]  # type: ignore[union-attr]
    page = client.responses.input_items.list(third.id, limit=1)
    assert page.data[0].content[0].text == "c"  # type: ignore[union-attr]
    assert page.has_more


def test_peers_7_and_8_fragments_of_calls_and_counts_in_streams(
    served: Served, client: openai.OpenAI
) -> None:
    found = events(client, served.says(CALLER, *PARIS, *ROME), tools=[WEATHER])
    check_order(found)
    assert [item.type for item in found[-1].response.output] == ["function_call"] * 2
    for index, city in enumerate(("Paris", "Rome")):
        mine = [e for e in found if getattr(e, "output_index", None) == index]
        deltas = [e.delta for e in mine if e.type == "response.function_call_arguments.delta"]
        [done] = [e for e in mine if e.type == "response.function_call_arguments.done"]
        assert json.loads("".join(deltas)) == {"city": city}
        assert done.arguments == "".join(deltas)
    usage = found[-1].response.usage
    assert usage.input_tokens > 0
    assert usage.output_tokens == 5


def test_peer_9_indexes_at_zero_names_of_fields_and_incomplete(served: Served) -> None:
    model = served.says(PLAIN, "a", "b", ends=FinishReason.LENGTH)
    body = {"model": model, "input": "hello", "stream": True, "max_output_tokens": 2}
    text = requests.post(f"{served.url}/v1/responses", json=body, timeout=60).text
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    for one in found:
        if one["type"].startswith(("response.content_part", "response.output_text")):
            assert (one["output_index"], one["content_index"]) == (0, 0)
    by_kind = {one["type"]: one for one in found}
    assert by_kind["response.output_text.done"]["text"] == "ab"
    assert "delta" not in by_kind["response.output_text.done"]
    response = by_kind["response.incomplete"]["response"]
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    assert "response.completed" not in by_kind


def test_peer_10_what_is_wrong_has_a_status_before_the_stream(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        events(client, PLAIN, "x" * 5000)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "input"
    with pytest.raises(openai.NotFoundError):
        events(client, "nope")


def test_a_failure_in_the_stream_ends_it(served: Served, client: openai.OpenAI) -> None:
    served.says(PLAIN, "Hello", " world")
    found = []
    with served.held(PLAIN) as fail:
        for event in create(client, PLAIN, stream=True):
            found.append(event)
            if event.type == "response.output_text.delta":
                fail(EngineError("it broke"))
    assert [event.type for event in found[-2:]] == ["error", "response.failed"]
    assert found[-2].message == "it broke"
    response = found[-1].response
    assert (response.status, response.error.code) == ("failed", "server_error")
    assert response.output[0].status == "incomplete"
    assert [event.sequence_number for event in found] == list(range(len(found)))
    assert client.responses.retrieve(response.id).status == "failed"


def test_thoughts_travel_with_clients_that_store_nothing_here(
    served: Served, client: openai.OpenAI
) -> None:
    model = served.says(THINKER, "I wonder.</think>", "Yes.")
    response = create(
        client, model, store=False, include=["reasoning.encrypted_content"],
        reasoning={"effort": "low", "summary": "auto"},
    )  # fmt: skip
    thought, _ = response.output
    assert thought.encrypted_content
    assert served.prompt(THINKER).endswith("<think>\n")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    sent = [{"type": "reasoning", "summary": [], "encrypted_content": thought.encrypted_content},
            {"role": "assistant", "content": "Yes."}]  # fmt: skip
    [turn] = template_messages(None, items_of(sent, lambda name: None))
    assert turn == {"role": "assistant", "content": "Yes.", "reasoning_content": "I wonder."}


def test_no_thoughts_without_effort(served: Served, client: openai.OpenAI) -> None:
    create(client, served.says(THINKER, "Yes."), reasoning={"effort": "none"})
    assert not served.prompt(THINKER).endswith("<think>\n")


def test_an_item_that_is_referred_to(served: Served, client: openai.OpenAI) -> None:
    first = create(client, served.says(PLAIN, "One."), "a")
    sent: Any = [{"type": "item_reference", "id": first.output[0].id},
                 {"role": "user", "content": "b"}]  # fmt: skip
    create(client, PLAIN, sent)
    assert served.prompt(PLAIN) == "assistant: One.\nuser: b\nassistant:"


@pytest.mark.parametrize(
    ("choice", "offered", "is_forced"),
    [
        ("auto", True, False),
        ("none", False, False),
        ("required", True, True),
        ({"type": "function", "name": "weather"}, True, True),
        ({"type": "allowed_tools", "mode": "required",
          "tools": [{"type": "function", "name": "weather"}]}, True, True),
    ],
)  # fmt: skip
def test_the_choice_of_tools(
    served: Served, client: openai.OpenAI, choice: Any, offered: bool, is_forced: bool
) -> None:
    model = served.says(CALLER, *PARIS, *ROME)
    response = create(client, model, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)
    assert ("how it is" in served.prompt(CALLER)) == offered
    assert (served.engines[CALLER].params.mask is not None) == is_forced
    assert [item.type for item in response.output].count("function_call") == int(offered)
    assert response.parallel_tool_calls is False


def test_a_schema_for_the_text(served: Served, client: openai.OpenAI) -> None:
    wanted = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    response = create(client, served.says(PLAIN, "{}"), text={"format": wanted})
    assert served.engines[PLAIN].params.mask is not None
    assert response.text.format.type == "json_schema"
    bad = wanted | {"schema": {"type": "nothing"}}
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, PLAIN, text={"format": bad})
    assert str(caught.value.param).startswith("text.format")


def test_logprobs(served: Served, client: openai.OpenAI) -> None:
    model = served.says(PLAIN, "a", "b")
    response = create(client, model, top_logprobs=2, include=["message.output_text.logprobs"])
    entries = response.output[0].content[0].logprobs
    assert len(entries) == 2
    assert len(entries[0].top_logprobs) == 2
    found = events(client, model, top_logprobs=2)
    streamed = [e for event in found if event.type == "response.output_text.delta"
                for e in event.logprobs]  # fmt: skip
    assert [entry.logprob for entry in streamed] == [entry.logprob for entry in entries]


def test_truncation_drops_the_oldest_turns(served: Served, client: openai.OpenAI) -> None:
    turns: Any = []
    for i in range(40):
        turns += [{"role": "user", "content": f"question {i} " + "x" * 100},
                  {"role": "assistant", "content": f"answer {i}"}]  # fmt: skip
    turns.append({"role": "user", "content": "and now?"})
    model = served.says(PLAIN, "a")
    with pytest.raises(openai.BadRequestError):
        create(client, model, turns)
    response = create(
        client, model, turns, truncation="auto", instructions="Be brief.", max_output_tokens=50
    )
    prompt = served.prompt(PLAIN)
    assert prompt.startswith("system: Be brief.\nuser: question ")
    assert prompt.endswith("user: and now?\nassistant:")
    assert 3700 < response.usage.input_tokens <= 4046


def test_what_has_no_effect_is_accepted(served: Served, client: openai.OpenAI) -> None:
    create(
        client, served.says(PLAIN, "a"), service_tier="auto", safety_identifier="me", user="me",
        prompt_cache_key="k", max_tool_calls=3, include=["reasoning.encrypted_content"],
        stream_options=None, extra_body={"prompt_cache_retention": "24h", "seed": 3, "top_k": 4},
    )  # fmt: skip
    assert served.engines[PLAIN].params.top_k == 4


def test_the_asynchronous_client(served: Served) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x") as client:
            model = served.says(PLAIN, "Hello", " world")
            response = await client.responses.create(model=model, input="hello")
            assert response.output_text == "Hello world"
            async with client.responses.stream(model=model, input="hello") as stream:
                texts = [e.delta async for e in stream if e.type == "response.output_text.delta"]
            assert "".join(texts) == "Hello world"
            assert (await client.responses.retrieve(response.id)).id == response.id
            await client.responses.delete(response.id)

    asyncio.run(run())


def test_developer_messages_are_the_systems(served: Served, client: openai.OpenAI) -> None:
    sent: Any = [
        {"type": "message", "role": "developer", "content": "D"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
    ]
    create(client, served.says(PLAIN, "x"), sent, instructions="I")
    assert served.prompt(PLAIN) == "system: I\n\nD\nuser: a\nassistant:"


def test_functions_in_a_namespace(served: Served, client: openai.OpenAI) -> None:
    group: Any = {"type": "namespace", "name": "crm", "description": "customers",
                  "tools": [WEATHER]}  # fmt: skip
    call = '<tool_call>{"name": "crm__weather", "arguments": {}}</tool_call>'
    found = events(client, served.says(CALLER, call), tools=[group])
    check_order(found)
    assert "customers" in served.prompt(CALLER)
    [item] = found[-1].response.output
    assert (item.name, item.namespace) == ("weather", "crm")
    [told] = template_messages(None, items_of([item.model_dump()], lambda name: None))
    assert told["tool_calls"][0]["function"]["name"] == "crm__weather"
    chosen: Any = {"type": "function", "name": "weather", "namespace": "crm"}
    create(client, CALLER, tools=[group], tool_choice=chosen)
    assert served.engines[CALLER].params.mask is not None
