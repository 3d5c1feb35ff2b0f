"""GET /engines/requests: the latest requests, and new ones as they arrive."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from modelpack_server.api.model_runner.records import Record, Records, joined, without_media
from tests.engine.families.runner.conftest import Runner


def kept(runner: Runner, query: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = runner.http.get(f"/engines/requests{query}").json()
    return found


def test_requests_and_replies_are_kept(runner: Runner) -> None:
    assert kept(runner) == []
    runner.http.post("/engines/_configure", json={"model": "tiny", "context-size": 64})
    runner.chat()
    runner.chat(model="ai/tiny:latest", stream=True)
    runner.chat(temperature=9)
    [group] = kept(runner, "?model=tiny")
    assert [group] == kept(runner)
    assert (group["count"], group["model"]) == (3, str(runner.store.get("tiny").digest))
    assert group["config"] == {"context-size": 64}
    whole, streamed, refused = group["records"]
    assert (whole["model"], whole["method"], whole["url"], whole["status_code"]) == (
        "tiny", "POST", "/engines/v1/chat/completions", 200,
    )  # fmt: skip
    assert whole["user_agent"] == "testclient"
    assert json.loads(whole["request"])["messages"] == [{"role": "user", "content": "hi"}]
    for record in (whole, streamed):
        reply = json.loads(record["response"])
        assert reply["object"] == "chat.completion"
        assert reply["choices"][0]["message"]["content"] == "Hello world"
        assert reply["choices"][0]["finish_reason"] == "stop"
    assert refused["status_code"] == 400
    assert "temperature" in json.loads(refused["error"])["error"]["message"]
    assert "response" not in refused


def test_ten_are_kept_of_a_model_and_none_of_others(runner: Runner) -> None:
    for number in range(12):
        runner.chat(user=str(number))
    runner.chat(model="none")
    runner.http.post("/engines/v1/chat/completions", content=b"{")
    body = {"model": "tiny", "messages": []}
    runner.http.post("/v1/chat/completions", json=body, headers={"X-Preload-Only": "true"})
    [group] = kept(runner)
    users = [json.loads(record["request"])["user"] for record in group["records"]]
    assert users == [str(number) for number in range(2, 12)]
    assert runner.http.get("/engines/requests?model=none").status_code == 404


@pytest.mark.parametrize(
    ("path", "origin"),
    [
        ("/v1/completions", ""),
        ("/anthropic/v1/messages", "anthropic/messages"),
        ("/api/generate", "ollama/completion"),
    ],
)
def test_all_families_are_kept(runner: Runner, path: str, origin: str) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 5}
    if "messages" in path:
        body["messages"] = [{"role": "user", "content": "hi"}]
        del body["prompt"]
    assert runner.http.post(path, json=body).status_code == 200
    [group] = kept(runner)
    [record] = group["records"]
    assert record.get("origin", "") == origin
    assert "Hello world" in record["response"]


def record(number: int, key: str = "a", owner: str | None = None) -> Record:
    return Record(f"r{number}", key, "m", "POST", "/", "{}", "{}", "", 1, 200, "", "", owner)


def test_followers_hear_what_is_theirs() -> None:
    async def run() -> None:
        records = Records()
        coming = records.follow("a", "me")
        waiting = asyncio.ensure_future(anext(coming))
        await asyncio.sleep(0)
        for number, (key, owner) in enumerate([("b", "me"), ("a", "you"), ("a", "me")]):
            records.add(record(number, key, owner))
        assert (await waiting).id == "r2"
        await coming.aclose()
        records.add(record(4, "a", "me"))
        assert set(records.kept(None, "me")) == {"a", "b"}
        assert set(records.kept(None, "you")) == {"a"}
        assert records.kept("b", "you") == {}
        assert records.kept(None, None) == {}

    asyncio.run(run())


def sse(*events: dict[str, Any]) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


def chunk(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "choices": [choice]}


def test_chunks_are_joined() -> None:
    call = {"index": 0, "id": "x", "function": {"name": "f", "arguments": '{"a"'}}
    more = {"index": 0, "function": {"arguments": ": 1}"}}
    reply = sse(
        chunk({"role": "assistant", "reasoning_content": "hm"}),
        chunk({"content": "Hel"}),
        chunk({"content": "other"}, "stop", index=1),
        chunk({"content": "lo", "tool_calls": [call]}),
        chunk({"tool_calls": [more]}, "tool_calls"),
        {"choices": [], "usage": {"total_tokens": 3}},
    )
    whole, error = joined(": keepalive\n\n" + reply)
    assert error == ""
    value = json.loads(whole)
    assert value["object"] == "chat.completion"
    assert value["usage"] == {"total_tokens": 3}
    first, second = value["choices"]
    assert first["message"] == {
        "role": "assistant", "content": "Hello", "reasoning_content": "hm",
        "tool_calls": [
            {"type": "function", "id": "x", "function": {"name": "f", "arguments": '{"a": 1}'}}
        ],
    }  # fmt: skip
    assert (first["finish_reason"], second["message"]["content"]) == ("tool_calls", "other")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (sse({"choices": [{"index": 0, "text": "a"}]}, {"choices": [{"index": 0, "text": "b"}]}),
         {"object": "", "choices": [{"index": 0, "finish_reason": None, "text": "ab"}]}),
        (sse({"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 2}}},
             {"type": "content_block_start", "index": 0, "content_block": {"type": "text"}},
             {"type": "content_block_delta", "index": 0,
              "delta": {"type": "text_delta", "text": "a"}},
             {"type": "content_block_delta", "index": 0,
              "delta": {"type": "text_delta", "text": "b"}},
             {"type": "message_delta", "delta": {"stop_reason": "end_turn"},
              "usage": {"output_tokens": 3}}),
         {"id": "m", "usage": {"input_tokens": 2, "output_tokens": 3}, "stop_reason": "end_turn",
          "content": [{"type": "text", "text": "ab"}]}),
        (sse({"type": "response.created", "response": {"status": "queued"}},
             {"type": "response.completed", "response": {"status": "completed"}}),
         {"status": "completed"}),
        ('{"response":"a","done":false}\n{"response":"b","done":true}\n',
         {"response": "ab", "done": True}),
        ('{"message":{"role":"assistant","content":"a"}}\n{"message":{"content":"b"},"done":true}\n',
         {"message": {"content": "ab"}, "done": True}),
    ],
    ids=["text", "anthropic", "responses", "generate", "chat"],
)  # fmt: skip
def test_every_kind_of_stream_is_joined(reply: str, expected: dict[str, Any]) -> None:
    whole, error = joined(reply)
    assert (json.loads(whole), error) == (expected, "")


@pytest.mark.parametrize("reply", ["", "plain", '{"a": 1}', '{\n "a": 1\n}'])
def test_what_is_no_stream_stays(reply: str) -> None:
    assert joined(reply) == (reply, "")


def test_a_stream_that_failed_is_an_error() -> None:
    response, error = joined(sse(chunk({"content": "a"}), {"error": {"message": "boom"}}))
    assert response == ""
    assert "boom" in error


def test_images_are_cut() -> None:
    image = "data:image/png;base64," + "A" * 5000
    cut = without_media({"messages": [{"content": [{"image_url": {"url": image}}]}]})
    url = cut["messages"][0]["content"][0]["image_url"]["url"]
    assert url == f"data:image/png;base64,{'A' * 100}...[truncated 4900 chars]"
    assert without_media(["a " * 2000, 1, None]) == ["a " * 2000, 1, None]
