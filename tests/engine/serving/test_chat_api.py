"""Chat completions: each field by its policy, streamed or not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from modelpack_engine.models.chat_template import ChatTemplate
from modelpack_engine.outputs import FinishReason
from tests.engine.scripted import HERMES, THINKING
from tests.engine.serving.conftest import Scripted

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip


def use(api: Scripted, template: str) -> None:
    api.engine.tokenizer._chat_template = ChatTemplate(template)


def chunks(response: Any) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def deltas(response: Any) -> list[dict[str, Any]]:
    return [choice for chunk in chunks(response) for choice in chunk["choices"]]


def test_the_shape_of_an_answer(api: Scripted) -> None:
    answer = api.chat("Hi", "!").json()
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "m")
    [choice] = answer["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "Hi!", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert answer["usage"]["completion_tokens"] == 2
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


def test_the_order_of_a_stream(api: Scripted) -> None:
    response = api.chat("Hi", "!", stream=True, stream_options={"include_usage": True}, n=2)
    found = chunks(response)
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in found}) == 1
    assert [c["choices"][0]["delta"].get("role") for c in found[:2]] == ["assistant"] * 2
    assert all("role" not in c["choices"][0]["delta"] for c in found[2:-1])
    assert [c["usage"] for c in found[:-1]] == [None] * (len(found) - 1)
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == 4
    for index in (0, 1):
        mine = [c["choices"][0] for c in found[:-1] if c["choices"][0]["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in mine) == "Hi!"
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert (mine[-1]["delta"], mine[-1]["finish_reason"]) == ({}, "stop")


def test_tool_calls_whole(api: Scripted) -> None:
    use(api, HERMES)
    [choice] = api.chat(CALL, tools=[TOOL]).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}


def test_tool_calls_streamed(api: Scripted) -> None:
    use(api, HERMES)
    second = CALL.replace("Paris", "Rome")
    found = deltas(api.chat(*CALL, "\n", *second, tools=[TOOL], stream=True))
    calls = [call for choice in found for call in choice["delta"].get("tool_calls", [])]
    for index, city in enumerate(("Paris", "Rome")):
        mine = [call for call in calls if call["index"] == index]
        first = mine[0]
        assert first["id"]
        assert (first["type"], first["function"]["name"]) == ("function", "weather")
        assert first["function"]["arguments"] == ""
        assert all(set(call) == {"index", "function"} for call in mine[1:])
        arguments = "".join(call["function"]["arguments"] for call in mine)
        assert json.loads(arguments) == {"city": city}
    assert found[-1]["finish_reason"] == "tool_calls"


def test_one_call_where_several_may_not_be(api: Scripted) -> None:
    use(api, HERMES)
    answer = api.chat(CALL, CALL, "x", tools=[TOOL], parallel_tool_calls=False).json()
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1


def test_functions_of_before(api: Scripted) -> None:
    use(api, HERMES)
    legacy = {"functions": [TOOL["function"]], "function_call": "auto"}
    [choice] = api.chat(CALL, **legacy).json()["choices"]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"]["name"] == "weather"
    found = deltas(api.chat(CALL, stream=True, **legacy))
    pieces = [c["delta"]["function_call"] for c in found if "function_call" in c["delta"]]
    assert pieces[0] == {"name": "weather", "arguments": ""}
    assert json.loads("".join(p["arguments"] for p in pieces)) == {"city": "Paris"}
    assert found[-1]["finish_reason"] == "function_call"
    history = [
        {"role": "assistant", "content": None,
         "function_call": {"name": "weather", "arguments": "{}"}},
        {"role": "function", "name": "weather", "content": "sunny"},
    ]  # fmt: skip
    assert api.chat("ok", messages=history, **legacy).status_code == 200
    assert "sunny" in api.engine.prompt


def test_reasoning_out_and_in(api: Scripted) -> None:
    use(api, THINKING)
    pieces = ("I think", "</think>", "so")
    answer = api.chat(*pieces).json()
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"].strip() == "I think"
    assert message["content"].strip() == "so"
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] >= 1
    found = deltas(api.chat(*pieces, stream=True))
    thought = "".join(c["delta"].get("reasoning_content", "") for c in found)
    assert thought.strip() == "I think"
    use(api, "{% for m in messages %}{{ m.reasoning_content }}|{% endfor %}")
    for name in ("reasoning_content", "reasoning"):
        api.chat("x", messages=[{"role": "assistant", "content": "a", name: "because"}])
        assert api.engine.prompt == "because|"


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({"reasoning_effort": "none"}, "off none"),
        ({"reasoning_effort": "high"}, "on high"),
        ({"enable_thinking": False}, "off "),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "off "),
        ({}, "on "),
    ],
)
def test_reasoning_is_switched(api: Scripted, body: dict[str, Any], prompt: str) -> None:
    use(api, "{% if enable_thinking is false %}off{% else %}on{% endif %} {{ reasoning_effort }}")
    api.chat("x", **body)
    assert api.engine.prompt == prompt


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["template", "tools", "messages", "self", "variables"])
def test_template_options_are_no_arguments_of_ours(api: Scripted, name: str) -> None:
    use(api, "{% for m in messages %}{{ m.content }}{% endfor %}{{ self is defined }}")
    reply = api.chat("x", chat_template_kwargs={name: "y"})
    assert reply.status_code == 200, reply.text
    assert api.engine.prompt is not None
    assert "y" not in api.engine.prompt


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_is_passed_on_as_it_came(api: Scripted, stream: bool) -> None:
    use(api, HERMES)
    api.engine.ends = FinishReason.LENGTH
    response = api.chat(CALL[: CALL.index("ris")], tools=[TOOL], stream=stream)
    found = deltas(response) if stream else response.json()["choices"]
    messages = [each["delta" if stream else "message"] for each in found]
    calls = [call["function"] for each in messages for call in each.get("tool_calls", ())]
    assert "".join(call["arguments"] for call in calls) == '{"city": "Pa'
    assert calls[0]["name"] == "weather"
    assert found[-1]["finish_reason"] == "length"
    assert not any(message.get("content") for message in messages)


def test_a_thought_that_is_cut(api: Scripted) -> None:
    use(api, THINKING)
    api.engine.ends = FinishReason.LENGTH
    [choice] = api.chat("still thinking").json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"]


def test_logprobs_in_chunks(api: Scripted) -> None:
    found = deltas(api.chat("a", "b", stream=True, logprobs=True, top_logprobs=2))
    entries = [e for c in found if c["logprobs"] for e in c["logprobs"]["content"]]
    assert len(entries) == 2
    assert set(entries[0]) == {"token", "logprob", "bytes", "top_logprobs"}
    assert len(entries[0]["top_logprobs"]) == 2


def test_sampling_fields_reach_the_engine(api: Scripted) -> None:
    api.chat(
        "x", temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=3, presence_penalty=1,
        frequency_penalty=-1, repetition_penalty=1.2, logit_bias={"5": -100}, stop="END",
        stop_token_ids=[7], max_completion_tokens=9, max_tokens=4, min_tokens=2, n=3,
    )  # fmt: skip
    _, params, n = api.engine.submitted[-1]
    assert n == 3
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 5, 0.1)
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert (params.repetition_penalty, params.seed) == (1.2, 3)
    assert (params.logit_bias, params.stop, params.stop_token_ids) == ({5: -100}, ("END",), (7,))
    assert (params.max_tokens, params.min_tokens) == (9, 2)


def test_presets_by_field_and_by_header(api: Scripted) -> None:
    api.chat("x", preset="creative", top_p=0.3)
    assert (api.engine.params.temperature, api.engine.params.top_p) == (1.0, 0.3)
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    headers = {"X-Modelpack-Preset": "code"}
    assert api.http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
    assert api.engine.params.temperature == 0.2
    refused = api.chat("x", preset="loud").json()["error"]
    assert refused["param"] == "preset"
    assert "creative" in refused["message"]


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "body",
    [
        {"prediction": {"type": "content", "content": "x"}},
        {"store": True, "metadata": {"a": "b"}, "user": "me", "service_tier": "auto"},
        {"verbosity": "low", "prompt_cache_key": "k", "safety_identifier": "s"},
        {"modalities": ["text"], "response_format": {"type": "text"}},
        {"stream_options": None, "temperature": None, "tools": None, "stop": None, "n": None},
        {"something_else": [1, 2]},
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}]},
    ],
)
def test_what_is_accepted_and_changes_nothing(api: Scripted, body: dict[str, Any]) -> None:
    assert api.chat("x", **body).status_code == 200


PAST = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
ASSISTANT = {"role": "assistant", "content": None, "tool_calls": [PAST]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


OF_ARRAYS = {"type": "function", "function": {"name": "x", "parameters": {"type": "array"}}}


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": ""}, "model"),
        ({"model": 7}, "model"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "x"}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": True}, "top_p"),
        ({"keep_alive": True}, "keep_alive"),
        ({"logit_bias": {"5": "1"}}, "logit_bias"),
        ({"tools": [OF_ARRAYS]}, "tools.0.function.parameters"),
        ({"top_p": 0}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"n": 0}, "n"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {}}, "stream_options"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": "some"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "functions": [TOOL["function"]]}, "functions"),
        ({"functions": [TOOL["function"]], "function_call": {"name": "x"}}, "function_call"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "nothing"}}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True,
            "schema": {"type": "object", "additionalProperties": True}}}},
         "response_format.json_schema.schema"),
        ({"tools": [{"type": "function", "function": {"name": "x", "strict": True,
            "parameters": {"type": "object", "additionalProperties": {}}}}]}, "tools"),
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
        ({"messages": [ASSISTANT, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "system", "content": None}]}, "messages[0].content"),
        ({"messages": [ASSISTANT, {"role": "tool", "content": "x"}]},
         "messages[1].tool_call_id"),
        ({"keep_alive": "soon"}, "keep_alive"),
    ],
)  # fmt: skip
def test_what_is_refused(api: Scripted, body: dict[str, Any], param: str | None) -> None:
    response = api.chat("x", **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert (error["param"] or "").startswith(param)


def test_a_template_that_fails_says_so(api: Scripted) -> None:
    use(api, "{{ raise_exception('roles must alternate') }}")
    error = api.chat("x").json()["error"]
    assert "template" in error["message"]
    assert "roles must alternate" in error["message"]


def test_a_failure_within_a_stream_is_an_event(api: Scripted) -> None:
    api.engine.ends = FinishReason.ERROR
    response = api.chat("a", "b", stream=True)
    assert response.status_code == 200
    last = json.loads(response.text.split("data: ")[-1])
    assert last["error"]["type"] == "server_error"
    assert "[DONE]" not in response.text
    whole = api.chat("a", "b")
    assert whole.status_code == 500


def test_allowed_tools_and_named_ones_are_forced(api: Scripted) -> None:
    use(api, HERMES)
    other = {"type": "function", "function": {"name": "other"}}
    named = {"type": "function", "function": {"name": "weather"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    for choice in ("required", named, allowed):
        assert api.chat(CALL, tools=[TOOL, other], tool_choice=choice).status_code == 200
        assert api.engine.params.mask is not None
    api.chat(CALL, tools=[TOOL], tool_choice="none")
    assert api.engine.params.mask is None
