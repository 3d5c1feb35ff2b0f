"""Pictures over HTTP: official SDKs, clients that leave, and failures."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest

from modelpack_server.api.app import ModelServer
from modelpack_server.conversation import pictures
from modelpack_server.conversation.pictures import PDF
from modelpack_server.pool.pool import ModelPool
from tests.engine.serving.tiny import TinyCatalogue
from tests.engine.vision import tiny
from tests.engine.vision.media import file_of, url
from tests.engine.vision.test_documents import ONE as DOCUMENT
from tests.engine.vision.test_documents import page, rendered
from tests.engine.vision.tiny import picture
from tests.engine.worker.test_workers import until

ONE = file_of(picture(1))
CATALOGUES: list[TinyCatalogue] = []
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    def make_pool() -> ModelPool:
        catalogue = TinyCatalogue(lambda: tiny.tiny_engine("llava", max_num_batched_tokens=256))
        CATALOGUES.append(catalogue)
        return ModelPool(catalogue, memory=10_000, grace=0.0)

    with ModelServer(make_pool, address="127.0.0.1:0") as server:
        yield server.url


@pytest.fixture(scope="module")
def expected() -> str:
    tokens = tiny.expected("llava", "user: <image>What is it?\nassistant:", [picture(1)])
    return tiny.tiny_loaded("llava").tokenizer.decode(tokens)


def test_openai_chat(address: str, expected: str) -> None:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        content: Any = [
            {"type": "image_url", "image_url": {"url": url(ONE), "detail": "auto"}},
            {"type": "text", "text": "What is it?"},
        ]
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=8, **GREEDY
        )
        assert answer.choices[0].message.content == expected
        content[0]["image_url"]["url"] = url(b"bad")
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": content}], max_tokens=8
            )
        assert caught.value.param == "messages[0].content[0]"


def test_openai_responses(address: str, expected: str) -> None:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        content: Any = [
            {"type": "input_image", "image_url": url(ONE), "detail": "auto"},
            {"type": "input_text", "text": "What is it?"},
        ]
        answer = client.responses.create(
            model="tiny",
            input=[{"role": "user", "content": content}],
            max_output_tokens=8,
            **GREEDY,
        )
        assert answer.output_text == expected
        listed = client.responses.input_items.list(answer.id).data
        assert listed[0].model_dump()["content"][0]["image_url"] == url(ONE)


def test_anthropic(address: str, expected: str) -> None:
    with anthropic.Anthropic(base_url=address, api_key="none") as client:
        data = base64.b64encode(ONE).decode()
        content: Any = [
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/png", "data": data},
            },
            {"type": "text", "text": "What is it?"},
        ]
        answer = client.messages.create(
            model="tiny", max_tokens=8, messages=[{"role": "user", "content": content}],
            extra_body={"temperature": 0},
        )  # fmt: skip
        [block] = answer.content
        assert block.type == "text"
        tokens = tiny.expected("llava", "user: <image>What is it?\nassistant:", [picture(1)])
        text = tiny.tiny_loaded("llava").tokenizer.decode(tokens)
        assert block.text
        assert text.startswith(block.text)


def test_ollama(address: str, expected: str) -> None:
    with ollama.Client(address) as client:
        options = {"temperature": 0, "num_predict": 8}
        message = {"role": "user", "content": "What is it?", "images": [ONE]}
        found = client.chat("tiny", messages=[message], options=options).message.content
        assert found
        assert expected.startswith(found)
        made = client.generate("tiny", "What is it?", images=[ONE], options=options)
        assert made.response == found


def test_documents(address: str) -> None:
    """Anthropic's client and OpenAI's send a PDF."""
    tokens = tiny.expected("llava", "user: <image>What is it?\nassistant:", [rendered(DOCUMENT)])
    said = tiny.tiny_loaded("llava").tokenizer.decode(tokens)
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        file = {"filename": "a.pdf", "file_data": url(DOCUMENT, PDF)}
        content: Any = [{"type": "file", "file": file}, {"type": "text", "text": "What is it?"}]
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=8, **GREEDY
        )
        assert answer.choices[0].message.content == said
        content = [{"type": "input_file", **file}, {"type": "input_text", "text": "What is it?"}]
        response = client.responses.create(
            model="tiny",
            input=[{"role": "user", "content": content}],
            max_output_tokens=8,
            **GREEDY,
        )
        assert response.output_text == said
    with anthropic.Anthropic(base_url=address, api_key="none") as client:
        data = base64.b64encode(DOCUMENT).decode()
        block: Any = {
            "type": "document",
            "source": {"type": "base64", "media_type": PDF, "data": data},
        }
        count = client.messages.count_tokens(
            model="tiny", messages=[{"role": "user", "content": [block]}]
        )
        assert count.input_tokens == 16 + len("user: \nassistant:")


def test_a_client_that_leaves_ends_the_decoding(
    address: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MAX_SECONDS", 3600.0)
    slow = page("0 0 700 700", b"0 0 700 700 re f* " * 100_000)  # two minutes
    content = [{"type": "file", "file": {"file_data": url(slow, PDF)}}]
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": content}]})
    host, port = address.removeprefix("http://").split(":")
    workers = pictures.shared_workers("media")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        until(lambda: any(workers._busy.values()))
    until(lambda: not workers._busy)
    test_openai_chat(address, expected)


@pytest.mark.parametrize("stream", [False, True])
def test_a_picture_that_cannot_be_encoded(
    address: str,
    expected: str,
    stream: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client is told which one; why is for the log."""
    test_openai_chat(address, expected)  # the model is loaded

    def encode(*_: object) -> None:
        raise RuntimeError("[metal::malloc] out of memory at 0x7f")

    monkeypatch.setattr(CATALOGUES[-1].engines[-1]._ready().vision.encoder._model, "embed", encode)
    part = {"type": "image_url", "image_url": {"url": url(file_of(picture(77)))}}
    answer = httpx.post(
        f"{address}/v1/chat/completions",
        json={
            "model": "tiny", "stream": stream, "max_tokens": 4, "n": 2,
            "messages": [{"role": "user", "content": [part]}],
        },
    )  # fmt: skip
    message = "messages[0].content[0]: the model cannot encode this picture"
    assert message in answer.text
    assert "metal" not in answer.text
    assert answer.status_code == (200 if stream else 400)
    assert "[metal::malloc] out of memory" in caplog.text
