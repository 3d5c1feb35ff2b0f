"""Numbered scenarios of the OpenAI API, most with OpenAI's own client.

Real weights answer where the answer counts, scripted models where a family's format does.
"""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import numpy as np
import openai
import pytest
import requests

from modelpack_engine.engine import Engine
from modelpack_engine.models.chat_template import ChatTemplate
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from tests.engine.families.served import CALLER, Served, serving
from tests.engine.real_server import FAMILIAR, MINILM, SMOLLM2
from tests.engine.scripted import THINKING
from tests.engine.serving.metrics import Metrics
from tests.engine.serving.tiny import TinyCatalogue, chat_engine

pytestmark = [pytest.mark.weights, pytest.mark.long]

HELLO: Any = [{"role": "user", "content": "What is the capital of France?"}]
FRANCE: Any = {"model": SMOLLM2, "messages": HELLO, "temperature": 0, "max_tokens": 12}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
}
SCHEMA: Any = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["n"],
    "additionalProperties": False,
}
FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "number", "strict": True, "schema": SCHEMA},
}


@pytest.fixture(scope="module")
def scripted() -> Iterator[Served]:
    with serving() as served:
        yield served


def client_of(url: str, prefix: str = "/v1") -> openai.OpenAI:
    return openai.OpenAI(base_url=url + prefix, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(smollm2_url: str) -> Iterator[openai.OpenAI]:
    with client_of(smollm2_url) as client:
        yield client


@pytest.fixture(scope="module")
def tool_client(scripted: Served) -> Iterator[openai.OpenAI]:
    with client_of(scripted.url) as client:
        yield client


def events(url: str, **body: Any) -> list[dict[str, Any]]:
    """The JSON of a stream's events; it ends with [DONE]."""
    with requests.post(
        f"{url}/v1/chat/completions", json=body | {"stream": True}, stream=True, timeout=120
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.decode() for line in response.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_models_by_three_paths(smollm2_url: str) -> None:
    lists = [
        requests.get(f"{smollm2_url}{prefix}/models", timeout=60).json()
        for prefix in ("/engines/v1", "/v1", "/engines/vllm/v1")
    ]
    assert lists[0] == lists[1] == lists[2]
    assert lists[0]["object"] == "list"
    assert {model["id"] for model in lists[0]["data"]} == set(FAMILIAR.values())


def test_a_name_with_a_slash(client: openai.OpenAI) -> None:
    assert client.models.retrieve(f"{SMOLLM2}:latest").id == f"{SMOLLM2}:latest"


def test_the_same_text_alone_and_among_others(smollm2_url: str) -> None:
    async def run() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{smollm2_url}/v1", api_key="none") as client:

            async def ask(**changes: Any) -> str | None:
                answer = await client.chat.completions.create(**(FRANCE | changes))
                return answer.choices[0].message.content

            alone = [await ask(seed=1), await ask(seed=1)]
            others = [
                ask(messages=[{"role": "user", "content": f"Say {n}"}], temperature=1, max_tokens=5)
                for n in range(8)
            ]
            found, *_ = await asyncio.gather(ask(seed=1), *others)
            return [*alone, found]

    texts = asyncio.run(run())
    assert "Paris" in (texts[0] or "")
    assert len(set(texts)) == 1


def test_one_token(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**(FRANCE | {"max_tokens": 1}))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1


def test_a_stream_with_usage(client: openai.OpenAI, smollm2_url: str) -> None:
    chunks = events(smollm2_url, **FRANCE, stream_options={"include_usage": True})
    *most, last = chunks
    choices = [chunk["choices"][0] for chunk in most]
    assert [c["delta"].get("role") for c in choices] == ["assistant", *[None] * (len(most) - 1)]
    assert [c["finish_reason"] for c in choices] == [*[None] * (len(most) - 1), "stop"]
    assert choices[-1]["delta"] == {}
    assert all(chunk["usage"] is None for chunk in most)
    assert last["choices"] == []
    whole = client.chat.completions.create(**FRANCE)
    assert whole.usage is not None
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][name] == getattr(whole.usage, name)
    text = "".join(c["delta"].get("content") or "" for c in choices)
    assert text == whole.choices[0].message.content


def test_a_stream_by_the_asynchronous_client(smollm2_url: str) -> None:
    async def run() -> tuple[str, int]:
        async with openai.AsyncOpenAI(base_url=f"{smollm2_url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(
                **FRANCE, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        return text, chunks[-1].usage.completion_tokens

    text, tokens = asyncio.run(run())
    assert "Paris" in text
    assert tokens > 1


def test_a_stream_without_usage(smollm2_url: str) -> None:
    assert all("usage" not in chunk for chunk in events(smollm2_url, **FRANCE))


def test_a_stop_string_over_tokens(client: openai.OpenAI) -> None:
    """The string begins and ends within tokens of the reply."""
    text = client.chat.completions.create(**FRANCE).choices[0].message.content
    assert text is not None
    at = text.index("Paris")
    for stop in (text[at - 2 : at + 3], [text[at + 1 : at + 4], "never"]):
        first = stop if isinstance(stop, str) else stop[0]
        whole = client.chat.completions.create(**FRANCE, stop=stop).choices[0]
        assert whole.message.content == text[: text.index(first)]
        assert whole.finish_reason == "stop"
        stream = list(client.chat.completions.create(**FRANCE, stop=stop, stream=True))
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == whole.message.content
        assert stream[-1].choices[0].finish_reason == "stop"


def test_an_empty_line_that_comes_in_pieces(scripted: Served, tool_client: openai.OpenAI) -> None:
    name = scripted.says(CALLER, "One.\n", "\nTwo.")
    asked: Any = {"model": name, "messages": HELLO, "stop": "\n\n"}
    # With tools, the server parses the reply and finds stop strings instead of the engine.
    answer = tool_client.chat.completions.create(**asked, tools=[WEATHER])
    assert answer.choices[0].message.content == "One."
    assert answer.choices[0].finish_reason == "stop"


def test_three_choices_in_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(**(FRANCE | {"temperature": 1, "n": 3}), stream=True)
    finishes: dict[int, list[str]] = {0: [], 1: [], 2: []}
    texts = {0: "", 1: "", 2: ""}
    for chunk in stream:
        for choice in chunk.choices:
            assert not finishes[choice.index], "a choice goes on after its end"
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason is not None:
                finishes[choice.index].append(choice.finish_reason)
    assert all(len(found) == 1 for found in finishes.values())
    assert all(texts.values())


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, stream: bool) -> None:
    asked = FRANCE | {"logprobs": True, "top_logprobs": 5}
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        content = [
            token
            for chunk in chunks
            if (found := chunk.choices[0].logprobs) is not None
            for token in found.content or ()
        ]
    else:
        choice = client.chat.completions.create(**asked).choices[0]
        assert choice.logprobs is not None
        text, content = choice.message.content or "", choice.logprobs.content or []
    assert len(content) > 3
    assert b"".join(bytes(token.bytes or ()) for token in content).decode() == text
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 5
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)  # greedy


def test_twenty_answers_follow_a_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=SMOLLM2, messages=[{"role": "user", "content": "A number, as JSON."}],
        response_format=FORMAT, temperature=1.5, n=20, max_tokens=64, seed=3,
    )  # fmt: skip
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 20
    found = {choice.message.content for choice in answer.choices}
    assert len(found) > 5
    for text in found:
        jsonschema.validate(json.loads(text or ""), SCHEMA)


@pytest.fixture(scope="module")
def thinker() -> Iterator[openai.OpenAI]:
    """A tiny model whose prompt opens a block of reasoning."""

    def make() -> Engine:
        engine = chat_engine()
        engine.tokenizer._chat_template = ChatTemplate(THINKING)
        return engine

    catalogue = TinyCatalogue(make)
    with (
        ModelServer(lambda: ModelPool(catalogue), address="127.0.0.1:0") as server,
        client_of(server.url) as client,
    ):
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_after_reasoning(thinker: openai.OpenAI, stream: bool) -> None:
    """Random weights reason until the budget is used up."""
    asked: Any = {
        "model": "tiny", "messages": HELLO, "response_format": FORMAT, "temperature": 1, "seed": 5,
        "extra_body": {"thinking_token_budget": 20}, "max_tokens": 200,
    }  # fmt: skip
    if stream:
        chunks = list(thinker.chat.completions.create(**asked, stream=True))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        text = "".join(delta.content or "" for delta in deltas)
        reasoning = "".join(getattr(delta, "reasoning_content", "") for delta in deltas)
    else:
        message = thinker.chat.completions.create(**asked).choices[0].message
        text, reasoning = message.content or "", getattr(message, "reasoning_content", "")
    assert reasoning
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(reasoning)
    jsonschema.validate(json.loads(text), SCHEMA)


def test_two_calls_in_a_stream(scripted: Served, tool_client: openai.OpenAI) -> None:
    calls = "".join(
        f'<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>\n'
        for city in ("Paris", "São Paulo")
    )
    name = scripted.says(CALLER, *calls)  # a piece for each character
    stream = tool_client.chat.completions.create(
        model=name, messages=HELLO, tools=[WEATHER], parallel_tool_calls=True, stream=True
    )
    arguments: dict[int, str] = {}
    finish = None
    for chunk in stream:
        choice = chunk.choices[0]
        assert not (choice.delta.content or "").strip()
        for call in choice.delta.tool_calls or ():
            assert call.function is not None
            if call.index not in arguments:
                assert call.index == len(arguments)
                assert (call.function.name, call.function.arguments) == ("get_weather", "")
                assert call.id
            arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
        finish = choice.finish_reason or finish
    assert [json.loads(text) for _, text in sorted(arguments.items())] == [
        {"city": "Paris"}, {"city": "São Paulo"},
    ]  # fmt: skip
    assert finish == "tool_calls"


NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", [NAMED, "required"])
def test_a_call_that_has_to_be_made(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    """The grammar has priority over the prompt, which asks for something else."""
    asked: Any = FRANCE | {
        "messages": [{"role": "user", "content": "Tell me a joke."}], "max_tokens": 64,
        "tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False,
    }  # fmt: skip
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        deltas = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
        functions = [call.function for call in deltas if call.function is not None]
        name = functions[0].name
        arguments = "".join(function.arguments or "" for function in functions)
        finish, text = chunks[-1].choices[0].finish_reason, ""
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        whole = client.chat.completions.create(**asked).choices[0]
        [call] = whole.message.tool_calls or ()
        name, arguments = call.function.name, call.function.arguments
        finish, text = whole.finish_reason, whole.message.content
    assert name == "get_weather"
    jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])
    assert finish == "tool_calls"
    assert not text


def test_an_unknown_function(client: openai.OpenAI) -> None:
    unknown: Any = {"type": "function", "function": {"name": "get_lost"}}
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**FRANCE, tools=[WEATHER], tool_choice=unknown)
    assert raised.value.param == "tool_choice"
    assert "get_lost" in raised.value.message


def test_a_result_is_used(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}  # fmt: skip
    answer = client.chat.completions.create(
        **(
            FRANCE
            | {
                "messages": [
                    {"role": "user", "content": "What is the weather in Paris?"},
                    {"role": "assistant", "content": None, "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": "call_1", "content": "cloudy"},
                ],
                "tools": [WEATHER],
                "max_tokens": 24,
            }
        )
    )
    text = answer.choices[0].message.content or ""
    assert "cloudy" in text
    assert "<" not in text
    assert answer.choices[0].message.tool_calls is None


def test_an_unknown_model(client: openai.OpenAI, smollm2_url: str) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(**(FRANCE | {"model": "nope"}))
    assert raised.value.code == "model_not_found"
    reply = requests.post(
        f"{smollm2_url}/v1/chat/completions", json=FRANCE | {"model": "nope"}, timeout=60
    )
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"


def test_wrong_requests_leave_the_connection_usable(smollm2_url: str) -> None:
    parts = urlsplit(smollm2_url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    connection.connect()
    socket = connection.sock
    bodies = (
        json.dumps(FRANCE | {"temperature": 9}), '{"model": ', json.dumps({"model": SMOLLM2}),
        json.dumps(FRANCE | {"temperature": "warm"}),
    )  # fmt: skip
    for body, param in zip(bodies, ("temperature", None, "messages", "temperature"), strict=True):
        connection.request(
            "POST", "/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        reply = connection.getresponse()
        error = json.loads(reply.read())["error"]
        assert reply.status == 400
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert connection.sock is socket
    connection.close()


def test_a_prompt_over_the_context(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "word " * 9000}]
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**(FRANCE | {"messages": long}))
    assert raised.value.code == "context_length_exceeded"
    assert "Paris" in (client.chat.completions.create(**FRANCE).choices[0].message.content or "")


def test_a_body_over_the_limit(smollm2_url: str) -> None:
    parts = urlsplit(smollm2_url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(65 * 1024 * 1024))
    connection.endheaders(b"{")
    reply = connection.getresponse()
    assert reply.status == 413
    assert json.loads(reply.read())["error"]["code"] == "body_too_large"
    connection.close()


def test_a_client_that_leaves(client: openai.OpenAI, smollm2_url: str) -> None:
    metrics = Metrics(smollm2_url, FAMILIAR[SMOLLM2])
    aborted = metrics.value("request_success_total", finished_reason="abort")
    story: Any = [{"role": "user", "content": "Tell me a long story about a fox."}]
    asked = FRANCE | {"messages": story, "max_tokens": 1500}
    stream = client.chat.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
    for _, _chunk in zip(range(4), stream, strict=False):
        pass
    assert metrics.value("num_requests_running") == 1
    assert metrics.value("kv_cache_usage_perc") > 0
    stream.close()
    metrics.wait(1.0, "num_requests_running", 0)
    assert metrics.value("kv_cache_usage_perc") == 0
    assert metrics.value("request_success_total", finished_reason="abort") == aborted + 1


def test_embeddings_in_both_encodings(client: openai.OpenAI) -> None:
    """The client requests base64 by default."""
    coded = client.embeddings.create(model=MINILM, input=["a", "b"])
    plain = client.embeddings.create(model=MINILM, input=["a", "b"], encoding_format="float")
    assert [item.index for item in coded.data] == [0, 1]
    for one, other in zip(coded.data, plain.data, strict=True):
        assert np.abs(np.array(one.embedding) - np.array(other.embedding)).max() < 1e-6
    first, second = (np.array(item.embedding) for item in plain.data)
    assert first @ second < 0.99


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_choices_and_echo(client: openai.OpenAI, stream: bool) -> None:
    asked: Any = {"model": SMOLLM2, "prompt": ["a", "b"], "n": 2, "echo": True, "max_tokens": 4}
    texts = dict.fromkeys(range(4), "")
    if stream:
        for chunk in client.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    else:
        choices = client.completions.create(**asked).choices
        assert [choice.index for choice in choices] == [0, 1, 2, 3]
        texts = {choice.index: choice.text for choice in choices}
    assert [text[0] for _, text in sorted(texts.items())] == ["a", "a", "b", "b"]
    assert all(len(text) > 1 for text in texts.values())
