"""/api/generate and /api/chat with Ollama's own client: streamed or not, sync and async."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import ollama
import pytest
import requests

from modelpack_engine.outputs import FinishReason
from tests.engine.families.served import CALLER, PLAIN, THINKER, Served

HELLO = [{"role": "user", "content": "hello"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: Where.
    """
    return f"sunny in {city}"


def test_chat_whole(served: Served, client: ollama.Client) -> None:
    answer = client.chat(served.says(PLAIN, "Hi", "!"), HELLO)
    assert (answer.model, answer.message.role, answer.message.content) == (
        PLAIN,
        "assistant",
        "Hi!",
    )
    assert (answer.done, answer.done_reason) == (True, "stop")
    assert (answer.eval_count, answer.prompt_eval_count) == (2, len("user: hello\nassistant:"))
    # The scripted engine reports: scheduled at 1 s, first token at 2 s, finished at 3 s.
    assert (answer.prompt_eval_duration, answer.eval_duration) == (10**9, 10**9)
    assert answer.total_duration is not None
    assert answer.load_duration is not None
    assert 0 < answer.load_duration <= answer.total_duration < 60 * 10**9


def test_chat_streamed(served: Served, client: ollama.Client) -> None:
    lines = list(client.chat(served.says(PLAIN, "Hi", "!"), HELLO, stream=True))
    assert "".join(line.message.content or "" for line in lines) == "Hi!"
    assert {line.message.role for line in lines} == {"assistant"}
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert (lines[-1].done_reason, lines[-1].eval_count) == ("stop", 2)
    assert lines[-1].total_duration


def test_generate_whole_and_streamed(served: Served, client: ollama.Client) -> None:
    name = served.says(PLAIN, "Hi", "!", ends=FinishReason.LENGTH)
    answer = client.generate(name, "hello")
    assert (answer.response, answer.done_reason) == ("Hi!", "length")
    lines = list(client.generate(name, "hello", stream=True))
    assert "".join(line.response or "" for line in lines) == "Hi!"
    assert lines[-1].context == answer.context
    assert lines[-1].done_reason == "length"
    assert all(line.done_reason is None for line in lines[:-1])


def test_by_the_asynchronous_client(served: Served) -> None:
    async def run() -> list[str]:
        async with ollama.AsyncClient(served.url) as client:
            name = served.says(PLAIN, "Hi", "!")
            whole = await client.chat(name, HELLO)
            lines = [line async for line in await client.chat(name, HELLO, stream=True)]
            text = await client.generate(name, "hello")
            parts = [part async for part in await client.generate(name, "hello", stream=True)]
            return [
                whole.message.content or "",
                "".join(line.message.content or "" for line in lines),
                text.response or "",
                "".join(part.response or "" for part in parts),
            ]

    assert asyncio.run(run()) == ["Hi!"] * 4


def test_the_lines_are_ndjson_and_stream_by_default(served: Served) -> None:
    name = served.says(PLAIN, "Hi", "!")
    answer = requests.post(
        f"{served.url}/api/generate", data=json.dumps({"model": name, "prompt": "x"}), timeout=30
    )
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.text.endswith("\n")
    lines = answer.text.removesuffix("\n").split("\n")
    assert all(json.loads(line)["model"] == name for line in lines)
    done = [json.loads(line)["done"] for line in lines]
    assert done == [False] * (len(lines) - 1) + [True]
    assert len(lines) > 1


def test_curl_calls_its_json_a_form(served: Served) -> None:
    name = served.says(PLAIN, "Hi")
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        answer = requests.post(
            f"{served.url}/api/generate",
            data=json.dumps({"model": name, "prompt": "x", "stream": False}),
            headers={"Content-Type": kind},
            timeout=30,
        )
        assert answer.json()["response"] == "Hi"


def test_tools_are_called_whole(served: Served, client: ollama.Client) -> None:
    name = served.says(CALLER, *CALL, "\n", *CALL.replace("Paris", "Rome"))
    whole = client.chat(name, HELLO, tools=[weather])
    assert whole.done_reason == "stop"
    calls = [call.function for call in whole.message.tool_calls or ()]
    assert [(call.name, call.arguments) for call in calls] == [
        ("weather", {"city": "Paris"}),
        ("weather", {"city": "Rome"}),
    ]
    lines = list(client.chat(name, HELLO, tools=[weather], stream=True))
    found = [call.function for line in lines for call in line.message.tool_calls or ()]
    assert found == calls
    assert '"city"' in served.prompt(CALLER)


def test_results_of_tools_find_their_calls(served: Served, client: ollama.Client) -> None:
    calls = [{"function": {"name": name, "arguments": {"city": "Paris"}}} for name in ("a", "b")]
    client.chat(
        served.says(CALLER, "ok"),
        [
            *HELLO,
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "content": "second", "tool_name": "b"},
            {"role": "tool", "content": "first"},
        ],
        tools=[weather],
    )
    assert "second" in served.prompt(CALLER)
    assert "first" in served.prompt(CALLER)


def test_thinking_is_told_apart(served: Served, client: ollama.Client) -> None:
    name = served.says(THINKER, "I think", "</think>", "so")
    whole = client.chat(name, HELLO, think=True)
    assert (whole.message.thinking or "").strip() == "I think"
    assert (whole.message.content or "").strip() == "so"
    lines = list(client.generate(name, "hello", stream=True))
    assert "".join(line.thinking or "" for line in lines).strip() == "I think"
    assert "".join(line.response or "" for line in lines).strip() == "so"
    served.says(THINKER, "so")
    assert client.chat(name, HELLO, think=False).message.content == "so"
    assert "<think>" not in served.prompt(THINKER)
    with pytest.raises(ollama.ResponseError, match="does not support thinking") as caught:
        client.chat(served.says(PLAIN, "x"), HELLO, think="high")
    assert caught.value.status_code == 400


def test_log_probabilities(served: Served, client: ollama.Client) -> None:
    name = served.says(PLAIN, "a", "b")
    whole = client.generate(name, "hello", logprobs=True, top_logprobs=2)
    assert [len(item.top_logprobs or ()) for item in whole.logprobs or ()] == [2, 2]
    lines = client.chat(name, HELLO, logprobs=True, stream=True)
    assert sum(len(line.logprobs or ()) for line in lines) == 2
    assert client.generate(name, "hello").logprobs is None


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({"temperature": 3.5}, "temperature", 3.5),
        ({"top_k": 7}, "top_k", 7),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"top_p": 0}, "top_k", 1),
        ({"min_p": 0.1}, "min_p", 0.1),
        ({"seed": 42}, "seed", 42),
        ({"seed": -1}, "seed", None),
        ({"repeat_penalty": 1.3}, "repetition_penalty", 1.3),
        ({"repeat_penalty": 1.3, "repeat_last_n": 0}, "repetition_penalty", 1.0),
        ({"presence_penalty": 0.5}, "presence_penalty", 0.5),
        ({"frequency_penalty": 0.5}, "frequency_penalty", 0.5),
        ({"stop": ["END"]}, "stop", ("END",)),
        ({"stop": "END"}, "stop", ("END",)),
        ({"num_predict": 3}, "max_tokens", 3),
        ({"num_predict": -1}, "max_tokens", 4096 - len("user: hello\nassistant:")),
        ({"num_predict": -2}, "max_tokens", 4096 - len("user: hello\nassistant:")),
        ({"mirostat": 2, "num_gpu": 99, "num_ctx": 64, "tfs_z": 1.0, "x": 1}, "temperature", 1.0),
        ({"temperature": None}, "temperature", 1.0),
    ],
)
def test_options(
    served: Served, client: ollama.Client, options: dict[str, Any], field: str, value: Any
) -> None:
    client.generate(served.says(PLAIN, "x"), "hello", options=options)
    assert getattr(served.engines[PLAIN].params, field) == value


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"options": {"temperature": "warm"}}, "temperature"),
        ({"options": {"num_predict": 1.5}}, "num_predict"),
        ({"options": {"stop": [1]}}, "stop"),
        ({"options": {"typical_p": 0.5}}, "typical_p"),
        ({"options": {"repeat_penalty": 0}}, "repetition_penalty"),
        ({"options": []}, "options"),
        ({"format": "yaml"}, "yaml"),
        ({"format": {"type": "nothing"}}, "nothing"),
        ({"think": "hard"}, "hard"),
        ({"images": ["aGk="]}, "images"),
        ({"suffix": "end"}, "does not support insert"),
        ({"raw": True, "system": "x"}, "system"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"template": "{% if %}"}, "template"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_what_is_refused(served: Served, body: dict[str, Any], message: str) -> None:
    given = {"model": served.says(PLAIN, "x"), "prompt": "hello"} | body
    answer = requests.post(f"{served.url}/api/generate", json=given, timeout=30)
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}
    assert message in answer.json()["error"]


@pytest.mark.parametrize("path", ["generate", "chat", "show", "embed", "embeddings", "push"])
@pytest.mark.parametrize(
    ("content", "status"),
    [(b"{", 400), (b"[]", 400), (b"{}", 400), (b'{"model": ""}', 400), (b'{"model": "no"}', 404)],
)
def test_bad_bodies(served: Served, path: str, content: bytes, status: int) -> None:
    answer = requests.post(f"{served.url}/api/{path}", data=content, timeout=30)
    assert answer.status_code == status
    assert isinstance(answer.json()["error"], str)
    if status == 404:
        assert "model 'no' not found" in answer.json()["error"]


def test_images_of_a_chat_are_refused(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="images") as caught:
        client.chat(PLAIN, [{"role": "user", "content": "what is it?", "images": [b"png"]}])
    assert caught.value.status_code == 400


def test_format(served: Served, client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for form in ("json", schema):
        client.chat(served.says(PLAIN, "{}"), HELLO, format=form)
        assert served.engines[PLAIN].params.mask is not None
        client.generate(PLAIN, "hello", raw=True, format=form)
        assert served.engines[PLAIN].params.mask is not None
    client.chat(PLAIN, HELLO, format="")
    assert served.engines[PLAIN].params.mask is None


def test_system_template_raw_and_context(served: Served, client: ollama.Client) -> None:
    name = served.says(PLAIN, "Hi")
    client.generate(name, "hello", system="be brief")
    assert served.prompt(PLAIN) == "system: be brief\nuser: hello\nassistant:"
    client.generate(name, "hello", template="{{ messages[0].content }}?")
    assert served.prompt(PLAIN) == "hello?"
    client.generate(name, "hello", template="Q: {{ .Prompt }}\nA: {{ .Response }}")
    assert served.prompt(PLAIN) == "Q: hello\nA: "
    client.generate(name, "hello", raw=True)
    assert served.prompt(PLAIN) == "hello"
    first = client.generate(name, "one")
    client.generate(name, "two", context=first.context)
    token_ids = served.engines[PLAIN].submitted[-1][0]
    assert token_ids[: len(first.context or ())] == first.context
    assert served.prompt(PLAIN).endswith("user: two\nassistant:")
    assert served.prompt(PLAIN).startswith("user: one\nassistant:")


def test_a_prompt_that_is_too_long(served: Served, client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="4096") as caught:
        client.generate(served.says(PLAIN, "x"), "x" * 5000)
    assert caught.value.status_code == 400
    assert client.generate(PLAIN, "x").response == "x"


def test_a_failure_in_the_middle_is_a_line(served: Served, client: ollama.Client) -> None:
    served.says(PLAIN, "a", "b", ends=FinishReason.ERROR)
    with pytest.raises(ollama.ResponseError, match="the request failed") as caught:
        list(client.chat(PLAIN, HELLO, stream=True))
    assert caught.value.status_code == -1
    with pytest.raises(ollama.ResponseError, match="the request failed") as caught:
        client.chat(PLAIN, HELLO)
    assert caught.value.status_code == 500


def test_the_server_is_there(served: Served) -> None:
    for path in ("/", "/api/version"):
        for method in ("GET", "HEAD"):
            assert requests.request(method, f"{served.url}{path}", timeout=30).status_code == 200
    version = requests.get(f"{served.url}/api/version", timeout=30).json()["version"]
    assert tuple(int(part) for part in version.split(".")) >= (0, 6, 4)
