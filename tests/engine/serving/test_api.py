"""The OpenAI API with a tiny model, over real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from modelpack_engine.async_engine import AsyncEngine, EngineClient
from modelpack_engine.process_engine import ProcessEngine
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from tests.engine.serving.tiny import EOS, TinyCatalogue, reference_tokens


def pinned(catalogue: TinyCatalogue) -> ModelPool:
    pool = ModelPool(catalogue, grace=5)
    pool.pin("tiny")
    return pool


def wait_until_ready(url: str) -> None:
    """Wait until /health returns 200; the test's timeout limits the wait."""
    done = threading.Event()
    for _ in range(3000):
        if requests.get(f"{url}/health", timeout=10).status_code == 200:
            return
        done.wait(0.01)
    pytest.fail("the server does not become ready")


@pytest.fixture(scope="module", params=[AsyncEngine, ProcessEngine])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, EngineClient]]:
    catalogue = TinyCatalogue(client=request.param)
    with ModelServer(lambda: pinned(catalogue), address="127.0.0.1:0") as server:
        wait_until_ready(server.url)
        yield server.url, catalogue.engines[0]


def post(served: tuple[str, EngineClient], path: str, **body: Any) -> requests.Response:
    return requests.post(f"{served[0]}{path}", json={"model": "tiny"} | body, timeout=60)


def events(response: requests.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "hello"}]} | GREEDY


@pytest.mark.sample(1)
def test_completion_is_what_mlx_lm_gives(served: tuple[str, EngineClient]) -> None:
    tokenizer = served[1].tokenizer
    answer = post(served, "/v1/completions", prompt="abc", **GREEDY).json()
    expected = reference_tokens(tokenizer.encode("abc"), 6)
    [choice] = answer["choices"]
    assert choice["text"] == tokenizer.decode(expected, skip_special_tokens=False)
    assert choice["finish_reason"] == "length"
    assert answer["object"] == "text_completion"
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 6


def test_a_stream_is_the_same_text(served: tuple[str, EngineClient]) -> None:
    whole = post(served, "/v1/completions", prompt="abc", **GREEDY).json()
    stream = events(
        post(
            served, "/v1/completions", prompt="abc", stream=True,
            stream_options={"include_usage": True}, **GREEDY,
        )
    )  # fmt: skip
    text = "".join(choice["text"] for event in stream for choice in event["choices"])
    assert text == whole["choices"][0]["text"]
    assert stream[-1]["choices"] == []
    assert stream[-1]["usage"]["total_tokens"] == 9
    assert all(event["usage"] is None for event in stream[:-1])


def test_chat_whole_and_streamed(served: tuple[str, EngineClient]) -> None:
    whole = post(served, "/v1/chat/completions", **CHAT).json()
    assert whole["object"] == "chat.completion"
    message = whole["choices"][0]["message"]
    assert message["role"] == "assistant"
    stream = events(post(served, "/v1/chat/completions", stream=True, **CHAT))
    assert stream[0]["choices"][0]["delta"] == {
        "role": "assistant", "content": "", "refusal": None,
    }  # fmt: skip
    deltas = [event["choices"][0]["delta"].get("content", "") for event in stream]
    assert "".join(deltas) == message["content"]
    assert stream[-1]["choices"][0]["finish_reason"] == "length"
    assert {event["object"] for event in stream} == {"chat.completion.chunk"}
    assert len({event["id"] for event in stream}) == 1
    assert all("usage" not in event for event in stream)


def test_choices_prompts_and_echo(served: tuple[str, EngineClient]) -> None:
    answer = post(
        served, "/v1/completions", prompt=["ab", "cd"], n=2, seed=3, max_tokens=2, echo=True
    ).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][:2] for choice in answer["choices"]] == ["ab", "ab", "cd", "cd"]
    assert answer["usage"]["prompt_tokens"] == 4


def test_echo_with_logprobs_covers_the_prompt(served: tuple[str, EngineClient]) -> None:
    answer = post(
        served, "/v1/completions", prompt="abcd", echo=True, logprobs=2, temperature=0,
        max_tokens=2, ignore_eos=True,
    ).json()  # fmt: skip
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"][:4] == ["a", "b", "c", "d"]
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["text_offset"][:5] == [0, 1, 2, 3, 4]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 6


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ends_at_once", [False, True])
def test_tokens_of_logprobs_join_to_the_text(
    served: tuple[str, EngineClient], stream: bool, ends_at_once: bool
) -> None:
    letters = served[1].tokenizer.encode("abcdef")
    bias = dict.fromkeys(letters, 60) | {EOS: 100 if ends_at_once else -100}
    stop = [letter * 2 for letter in "abcdef"]
    body = {"seed": 5, "max_tokens": 40, "stop": stop, "stream": stream, "logit_bias": bias}

    def choices(path: str, **fields: Any) -> list[dict[str, Any]]:
        response = post(served, path, **body, **fields)
        found = [each["choices"][0] for each in events(response)] if stream else []
        return found or response.json()["choices"]

    found = choices("/v1/completions", prompt="abcd", logprobs=0)
    tokens = [token for each in found if each["logprobs"] for token in each["logprobs"]["tokens"]]
    assert "".join(tokens) == "".join(each["text"] for each in found)
    assert (found[-1]["finish_reason"], not tokens) == ("stop", ends_at_once)
    found = choices("/v1/chat/completions", messages=CHAT["messages"], logprobs=True)
    entries = [entry for each in found if each["logprobs"] for entry in each["logprobs"]["content"]]
    messages = [each["delta" if stream else "message"] for each in found]
    text = "".join(message.get("content") or "" for message in messages)
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == text
    assert (found[-1]["finish_reason"], not text) == ("stop", ends_at_once)


def test_chat_logprobs(served: tuple[str, EngineClient]) -> None:
    answer = post(
        served, "/v1/chat/completions", logprobs=True, top_logprobs=2, **CHAT
    ).json()  # fmt: skip
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 6
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert all(entry["token"] == entry["top_logprobs"][0]["token"] for entry in content)


def test_models_health_and_metrics(served: tuple[str, EngineClient]) -> None:
    url = served[0]
    [model] = requests.get(f"{url}/v1/models", timeout=10).json()["data"]
    assert model["id"] == "tiny"
    for name in ("tiny", "docker.io%2Fai%2Ftiny:latest", "docker.io/ai/tiny:latest"):
        assert requests.get(f"{url}/v1/models/{name}", timeout=10).status_code == 200
    assert requests.get(f"{url}/v1/models/other", timeout=10).status_code == 404
    assert requests.get(f"{url}/health", timeout=10).json() == {"status": "ok"}
    post(served, "/v1/completions", prompt="abc", **GREEDY)
    text = requests.get(f"{url}/metrics", timeout=10).text
    assert 'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0' in text
    assert "vllm:generation_tokens_total" in text


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
        ("/v1/completions", {"prompt": "a", "temperature": 3}, 400, "temperature"),
        ("/v1/completions", {"prompt": "a", "n": 0}, 400, "n"),
        ("/v1/completions", {"prompt": "a", "max_tokens": "9"}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "stop": [""]}, 400, "stop"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ("/v1/completions", {"prompt": [99999]}, 400, "prompt"),
        ("/v1/completions", {"prompt": ""}, 400, "prompt"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("/v1/completions", {}, 400, "prompt"),
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404, None),
        ("/v1/completions", {"prompt": "a" * 300}, 400, "prompt"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", CHAT | {"top_logprobs": 2}, 400, "top_logprobs"),
        (
            "/v1/chat/completions",
            CHAT | {"stream_options": {"include_usage": True}},
            400,
            "stream_options",
        ),
    ],
)
def test_bad_requests(
    served: tuple[str, EngineClient],
    path: str,
    body: dict[str, Any],
    status: int,
    param: str | None,
) -> None:
    response = post(served, path, **body)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert param in (error["param"] or "")


def test_a_body_that_is_no_json(served: tuple[str, EngineClient]) -> None:
    response = requests.post(f"{served[0]}/v1/completions", data=b"{", timeout=10)
    assert response.status_code == 400
    assert "error" in response.json()


def test_many_clients_at_once(served: tuple[str, EngineClient]) -> None:
    def ask(i: int) -> str:
        answer = post(served, "/v1/completions", prompt=f"p{i % 3}", **GREEDY)
        return str(answer.json()["choices"][0]["text"])

    with ThreadPoolExecutor(4) as clients:
        texts = list(clients.map(ask, range(12)))
    assert len(set(texts)) <= 3
    assert texts[:3] * 4 == texts


def test_a_full_queue_is_429(served: tuple[str, EngineClient]) -> None:
    response = post(served, "/v1/completions", prompt=["a"] * 9, n=4, max_tokens=50)
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) >= 1
    wait_until_idle(served[1])


def test_a_client_that_leaves_frees_its_blocks(served: tuple[str, EngineClient]) -> None:
    with requests.post(
        f"{served[0]}/v1/completions",
        json={"model": "tiny", "prompt": "abc", "max_tokens": 250, "stream": True,
              "ignore_eos": True},
        stream=True, timeout=60,
    ) as response:  # fmt: skip
        next(response.iter_content(16))
    wait_until_idle(served[1])


def wait_until_idle(engine: EngineClient) -> None:
    """Wait until no request runs; the fixture's timeout limits the wait."""
    done = threading.Event()
    for _ in range(3000):
        if engine.stats().num_running == engine.stats().num_waiting == 0:
            assert engine.stats().blocks_used == 0
            return
        done.wait(0.01)
    pytest.fail("requests still run")


@pytest.mark.long
def test_health_while_loading_and_after_a_failure() -> None:
    go = threading.Event()

    def never_loads() -> Any:
        go.wait(30)
        raise RuntimeError("no such weights")

    with ModelServer(lambda: pinned(TinyCatalogue(never_loads)), address="127.0.0.1:0") as server:
        loading = requests.get(f"{server.url}/health", timeout=10)
        assert loading.status_code == 503
        assert "being loaded" in loading.json()["error"]["message"]
        go.set()
        asked = requests.post(
            f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "a"}, timeout=10
        )
        assert asked.status_code == 500
        assert "no such weights" in asked.json()["error"]["message"]
        failed = requests.get(f"{server.url}/health", timeout=10)
        assert failed.status_code == 503
        assert "no such weights" in failed.json()["error"]["message"]
