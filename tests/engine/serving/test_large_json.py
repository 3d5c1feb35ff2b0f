"""Thousands of log-probabilities are encoded off the event loop."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from modelpack_server.api.app import ModelServer
from modelpack_server.api.bodies import written
from modelpack_server.api.vocabulary import Vocabulary
from modelpack_server.conversation.spec import ChatSpec
from modelpack_server.gateway.json_bodies import INLINE
from tests.engine.serving.test_api import pinned, wait_until_ready
from tests.engine.serving.tiny import TinyCatalogue

_SAID = [{"role": "user", "content": "hello"}]
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
)  # fmt: skip


@given(_JSON)
def test_it_is_the_same_value(value: Any) -> None:
    assert json.loads(written(value)) == value


@pytest.mark.parametrize("value", [float("nan"), [[float("inf")]], {"a": [-float("inf")]}])
def test_numbers_that_json_does_not_have(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        written(value)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    catalogue = TinyCatalogue()
    with ModelServer(lambda: pinned(catalogue), address="127.0.0.1:0") as server:
        wait_until_ready(server.url)
        yield server.url


@pytest.mark.long
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": _SAID, "logprobs": True, "top_logprobs": 3}),
        ("/v1/completions", {"prompt": "hello", "logprobs": 3, "echo": True}),
        ("/v1/responses", {"input": "hello", "top_logprobs": 3}),
        ("/api/chat", {"messages": _SAID, "logprobs": True, "top_logprobs": 3}),
    ],
)
def test_no_route_makes_them_on_the_event_loop(
    url: str, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], stream: bool
) -> None:
    threads = set()
    shown = Vocabulary.shown

    def noted(*arguments: Any) -> tuple[str, list[int]]:
        threads.add(threading.current_thread().name)
        return shown(*arguments)

    monkeypatch.setattr(Vocabulary, "shown", noted)
    reply = requests.post(url + path, json={"model": "tiny", "stream": stream, **body}, timeout=60)
    assert reply.status_code == 200, reply.text
    assert '"logprob' in reply.text
    assert threads
    assert all(name.startswith("modelpack-large-json") for name in threads), threads


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": _SAID}),
        ("/v1/messages", {"messages": _SAID, "max_tokens": 1}),
        ("/v1/responses", {"input": "hello"}),
        ("/api/chat", {"messages": _SAID}),
    ],
)
def test_requests_with_large_bodies_share_a_thread(
    url: str, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    threads = []
    make = ChatSpec.__init__

    def noted(spec: ChatSpec, *arguments: Any, **fields: Any) -> None:
        threads.append(threading.current_thread().name.rpartition("_")[0])
        make(spec, *arguments, **fields)

    monkeypatch.setattr(ChatSpec, "__init__", noted)
    for padding, thread in (("", "rendering"), ("x" * INLINE, "large-bodies")):
        threads.clear()
        fields = {"model": "tiny", "unknown": padding, "stream": False, **body}
        reply = requests.post(url + path, json=fields, timeout=60)
        assert reply.status_code == 200, reply.text
        assert threads[0] == f"modelpack-{thread}"
