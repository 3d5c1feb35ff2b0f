"""The official clients raise the right exceptions for a gateway's refusals."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anthropic
import ollama
import openai
import pytest
from starlette.types import Receive, Send

from modelpack_server.gateway import KeyFile, add_key
from modelpack_server.gateway.limits import Limits
from tests.gateway.servers import (
    COMPLETION,
    Asked,
    Upstream,
    answering,
    gateway,
    piece,
    serving,
    start_stream,
    wait_for,
)

MESSAGE = {
    "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn",
    "stop_sequence": None, "content": [{"type": "text", "text": "Hi", "citations": None}],
    "usage": {"input_tokens": 3, "output_tokens": 2, "cache_read_input_tokens": 4},
}  # fmt: skip
OLLAMA = {
    "model": "m", "created_at": "2026-01-01T00:00:00Z", "done": True, "done_reason": "stop",
    "message": {"role": "assistant", "content": "Hi"}, "prompt_eval_count": 7, "eval_count": 2,
}  # fmt: skip


@dataclass
class House:
    url: str
    upstream: Upstream
    secrets: dict[str, str]
    traces: Any


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    file = tmp_path / "keys.toml"
    secrets = {
        "free": add_key(file, "free"),
        "narrow": add_key(file, "narrow", models=("other",)),
        "slow": add_key(file, "slow", limits=Limits(requests_per_minute=1)),
        "wrong": "mp_wrong",
    }

    async def reply(asked: Asked, receive: Receive, send: Send) -> None:
        path = asked.target.decode()
        body = MESSAGE if "messages" in path else OLLAMA if "/api/" in path else COMPLETION
        await answering(body)(asked, receive, send)

    upstream = Upstream(reply)
    protection = {"keys": KeyFile(file), "max_body": 50_000}
    with serving(upstream) as url, gateway(url, protection=protection) as served:
        yield House(served.url, upstream, secrets, served.traces)


def ask_openai(house: House, key: str, text: str = "Hi") -> Any:
    with openai.OpenAI(
        base_url=f"{house.url}/v1", api_key=house.secrets[key], max_retries=0
    ) as client:
        return client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": text}]
        )


def ask_anthropic(house: House, key: str, text: str = "Hi") -> Any:
    with anthropic.Anthropic(
        base_url=f"{house.url}/anthropic", api_key=house.secrets[key], max_retries=0
    ) as client:
        return client.messages.create(
            model="m", max_tokens=9, messages=[{"role": "user", "content": text}]
        )


def ask_ollama(house: House, key: str, text: str = "Hi") -> Any:
    client = ollama.Client(
        house.url, headers={"Authorization": f"Bearer {house.secrets[key]}"}, trust_env=False
    )
    try:
        return client.chat("m", [{"role": "user", "content": text}])
    finally:
        client._client.close()


def test_they_get_their_answers(house: House) -> None:
    assert ask_openai(house, "free").choices[0].message.content == "Hi"
    assert ask_anthropic(house, "free").content[0].text == "Hi"
    assert ask_ollama(house, "free").message.content == "Hi"
    assert [
        (t.family, t.prompt_tokens, t.cached_tokens, t.completion_tokens, t.finish)
        for t in house.traces.wait(3)
    ] == [
        ("openai", 7, None, 3, "stop"),
        ("anthropic", 7, 4, 2, "end_turn"),
        ("ollama", 7, None, 2, "stop"),
    ]
    for asked in house.upstream.asked:  # the gateway's keys are not forwarded
        assert asked.header("authorization") is None
        assert asked.header("x-api-key") is None


@pytest.mark.parametrize(
    ("key", "raised", "status"),
    [
        ("wrong", openai.AuthenticationError, 401),
        ("narrow", openai.PermissionDeniedError, 403),
        ("slow", openai.RateLimitError, 429),
        ("long", openai.APIStatusError, 413),
    ],
)
def test_openai(house: House, key: str, raised: type[openai.APIStatusError], status: int) -> None:
    text = "x" * 60_000 if key == "long" else "Hi"
    key = "free" if key == "long" else key
    if key == "slow":
        ask_openai(house, key)
    with pytest.raises(raised) as caught:
        ask_openai(house, key, text)
    assert caught.value.status_code == status
    assert caught.value.type
    [trace] = [t for t in house.traces.wait(2 if key == "slow" else 1) if t.status == status]
    assert caught.value.request_id == trace.id


@pytest.mark.parametrize(
    ("key", "raised", "kind"),
    [
        ("wrong", anthropic.AuthenticationError, "authentication_error"),
        ("narrow", anthropic.PermissionDeniedError, "permission_error"),
        ("slow", anthropic.RateLimitError, "rate_limit_error"),
        ("long", anthropic.APIStatusError, "request_too_large"),
    ],
)
def test_anthropic(
    house: House, key: str, raised: type[anthropic.APIStatusError], kind: str
) -> None:
    text = "x" * 60_000 if key == "long" else "Hi"
    key = "free" if key == "long" else key
    if key == "slow":
        ask_anthropic(house, key)
    with pytest.raises(raised) as caught:
        ask_anthropic(house, key, text)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == kind
    assert caught.value.request_id == caught.value.body["request_id"]


@pytest.mark.parametrize(
    ("key", "status"), [("wrong", 401), ("narrow", 403), ("slow", 429), ("long", 413)]
)
def test_ollama(house: House, key: str, status: int) -> None:
    text = "x" * 60_000 if key == "long" else "Hi"
    key = "free" if key == "long" else key
    if key == "slow":
        ask_ollama(house, key)
    with pytest.raises(ollama.ResponseError) as caught:
        ask_ollama(house, key, text)
    assert caught.value.status_code == status
    assert caught.value.error
    assert "{" not in caught.value.error


def test_a_client_told_to_wait_waits_and_succeeds(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openai._base_client as base

    waits: list[float] = []
    monkeypatch.setattr(base, "time", SimpleNamespace(**vars(time) | {"sleep": waits.append}))
    ask_openai(house, "slow")
    with (
        openai.OpenAI(
            base_url=f"{house.url}/v1", api_key=house.secrets["slow"], max_retries=1
        ) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
    assert [59 < wait <= 60 for wait in waits] == [True]


def test_a_stream_through_the_openai_client_is_not_held_back(house: House) -> None:
    seen = threading.Event()

    async def reply(_: Asked, __: Receive, send: Send) -> None:
        start = (
            b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m","choices"'
        )
        await start_stream(send)
        await send(
            piece(start + b':[{"index":0,"delta":{"content":"A"},"finish_reason":null}]}\n\n')
        )
        await wait_for(seen)
        await send(piece(start + b':[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'))
        await send(piece(start + b':[],"usage":{"prompt_tokens":5,"completion_tokens":1,'))
        await send(piece(b'"total_tokens":6}}\n\ndata: [DONE]\n\n', more=False))

    house.upstream.reply = reply
    with (
        openai.OpenAI(base_url=f"{house.url}/v1", api_key=house.secrets["free"]) as client,
        client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Hi"}], stream=True
        ) as stream,
    ):
        chunks = iter(stream)
        assert next(chunks).choices[0].delta.content == "A"
        seen.set()
        assert [len(chunk.choices) for chunk in chunks] == [1, 0]
    [trace] = house.traces.wait()
    assert (trace.prompt_tokens, trace.completion_tokens, trace.finish) == (5, 1, "stop")
