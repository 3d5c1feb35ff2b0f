"""Cancelling a request by its id."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import requests

from modelpack_engine.engine import Engine
from modelpack_engine.outputs import RequestEvent
from modelpack_server.api.app import ModelServer
from modelpack_server.api.traces import RunningRequests
from modelpack_server.gateway.protection import Protection, protect
from modelpack_server.pool.pool import ModelPool
from tests.engine.serving.tiny import TinyCatalogue, chat_engine

ENDLESS = {"messages": [{"role": "user", "content": "x"}], "model": "tiny", "ignore_eos": True,
           "max_tokens": 230}  # fmt: skip


class HeldCatalogue(TinyCatalogue):
    """An engine that pauses after some steps until `going` is set."""

    def __init__(self) -> None:
        super().__init__(self._make)
        self.going = threading.Event()
        self.free_steps = 0

    def hold(self) -> None:
        self.free_steps = 8
        self.going.clear()

    def _make(self) -> Engine:
        engine = chat_engine()
        step = engine.step

        def held() -> list[RequestEvent]:
            self.free_steps -= 1
            assert self.free_steps >= 0 or self.going.wait(60)
            return step()

        engine.step = held  # type: ignore[method-assign]
        return engine


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, HeldCatalogue]]:
    catalogue = HeldCatalogue()
    with ModelServer(
        lambda: ModelPool(catalogue),
        address="127.0.0.1:0",
        wrap=lambda app: protect(app, Protection()),
    ) as server:
        catalogue.going.set()
        requests.post(f"{server.url}/v1/chat/completions", json=ENDLESS | {"max_tokens": 1})
        yield server.url, catalogue


@pytest.mark.parametrize("method", ["POST", "DELETE"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_ends_with_what_it_has(
    served: tuple[str, HeldCatalogue], method: str, path: str
) -> None:
    url, catalogue = served
    body: dict[str, Any] = ENDLESS | {"stream": True, "n": 2, "prompt": "x"}
    catalogue.hold()
    with requests.post(url + path, json=body, stream=True, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        name = response.headers["x-request-id"]
        tail = "/cancel" if method == "POST" else ""
        answer = requests.request(method, f"{url}/v1/requests/{name}{tail}", timeout=60)
        catalogue.going.set()
        rest = [line for line in lines if line]
    assert answer.json() == {
        "object": "request.cancel", "id": name, "cancelled": True, "model": "tiny",
    }  # fmt: skip
    assert rest[-1] == b"data: [DONE]"
    assert sum(b'"finish_reason":"stop"' in line.replace(b": ", b":") for line in rest) == 2
    again = requests.delete(f"{url}/v1/requests/{name}", timeout=60)
    assert (again.status_code, again.json()["error"]["type"]) == (404, "invalid_request_error")
    assert catalogue.engines[0].stats().num_running == 0


def test_a_whole_answer_ends_by_an_id_of_the_clients_own(
    served: tuple[str, HeldCatalogue],
) -> None:
    url, catalogue = served
    answers = []
    catalogue.hold()

    def ask() -> None:
        answers.append(
            requests.post(f"{url}/v1/chat/completions", json=ENDLESS, timeout=60,
                          headers={"X-Request-ID": "mine"}).json()
        )  # fmt: skip

    asking = threading.Thread(target=ask)
    asking.start()
    while not requests.delete(f"{url}/v1/requests/mine", timeout=60).ok:
        assert not answers, "it ended before it was cancelled"
    catalogue.going.set()
    asking.join()
    assert answers[0]["choices"][0]["finish_reason"] == "stop"
    assert answers[0]["usage"]["completion_tokens"] < 230


def test_nothing_to_cancel(served: tuple[str, HeldCatalogue]) -> None:
    url, _ = served
    assert requests.post(f"{url}/v1/requests/none/cancel", timeout=60).status_code == 404


def test_a_request_is_its_keys_own() -> None:
    running = RunningRequests()
    mine = running.begin("same", "alice")
    running.begin("same", "bob").streams.append(Mock())
    assert running.find("same", "alice") == []  # it has not reached an engine yet
    mine.submitted("m", Mock())
    assert running.find("same", "alice") == [mine]
    assert running.find("same") == []
    mine.cancel()
    late = Mock()
    mine.submitted("m", late)  # a further prompt of the same request
    late.cancel.assert_called_once_with()
    running.end("same", mine)
    assert running.find("same", "alice") == []
    assert len(running.find("same", "bob")) == 1
