"""Two API keys on one server: neither can see, cancel or guess the other's requests."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from modelpack_engine.engine import Engine
from modelpack_engine.outputs import RequestEvent
from modelpack_server.api.app import ModelServer
from modelpack_server.gateway import KeyFile, Protection, add_key, protect
from modelpack_server.gateway.app import GatewayServer, GatewaySettings
from modelpack_server.pool.pool import ModelPool
from tests.engine.serving.tiny import TinyCatalogue, chat_engine
from tests.scenarios.processes import wait_until

SECRET = "the plan of alice, which nobody else is to learn about: " + "0123456789" * 6


class PairingCatalogue(TinyCatalogue):
    """An engine that, while `going` is cleared, waits for two requests and does eight steps."""

    def __init__(self) -> None:
        super().__init__(self._make)
        self.going = threading.Event()
        self.going.set()
        self._steps = 0

    def pair(self) -> None:
        self._steps = 8
        self.going.clear()

    def _make(self) -> Engine:
        engine = chat_engine()
        step = engine.step

        def paired() -> list[RequestEvent]:
            if not self.going.is_set():
                stats = engine.stats()
                if stats.num_running + stats.num_waiting < 2 or not self._steps:
                    self.going.wait(0.01)
                    return []  # the engine accepts calls between steps
                self._steps -= 1
            return step()

        engine.step = paired  # type: ignore[method-assign]
        return engine


@dataclass
class House:
    """Clients of one server, each with its own key, and the server's models."""

    alice: httpx.Client
    bob: httpx.Client
    catalogue: PairingCatalogue


@contextmanager
def model_server(catalogue: TinyCatalogue, protection: Protection, **more: Any) -> Iterator[str]:
    with ModelServer(
        lambda: ModelPool(catalogue),
        address="127.0.0.1:0",
        wrap=lambda app: protect(app, protection),
        **more,
    ) as server:
        yield server.url


def client_of(opened: ExitStack, url: str, key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"}
    return opened.enter_context(httpx.Client(base_url=url, headers=headers, timeout=60))


@contextmanager
def direct(directory: Path, **more: Any) -> Iterator[House]:
    """Two clients with keys of the server."""
    file, catalogue = directory / "keys.toml", PairingCatalogue()
    keys = [add_key(file, name) for name in ("alice", "bob")]
    with ExitStack() as opened:
        url = opened.enter_context(model_server(catalogue, Protection(keys=KeyFile(file)), **more))
        yield House(*(client_of(opened, url, key) for key in keys), catalogue=catalogue)


@contextmanager
def behind_a_gateway(directory: Path, *, server_has_keys: bool) -> Iterator[House]:
    """Two clients with keys of a gateway, which has a key of the server."""
    file, servers, catalogue = directory / "g.toml", directory / "s.toml", PairingCatalogue()
    keys = [add_key(file, name) for name in ("alice", "bob")]
    upstream_key = add_key(servers, "gateway", gateway=True) if server_has_keys else None
    protection = Protection(keys=KeyFile(servers) if server_has_keys else None)
    with ExitStack() as opened:
        url = opened.enter_context(model_server(catalogue, protection))
        settings = GatewaySettings(
            (url,), Protection(keys=KeyFile(file)), upstream_key=upstream_key
        )
        gateway = opened.enter_context(GatewayServer(settings, grace=1))
        yield House(*(client_of(opened, gateway.url, key) for key in keys), catalogue=catalogue)


HOUSES: dict[str, Callable[[Path], Any]] = {
    "direct": direct,
    "gateway with a key": lambda path: behind_a_gateway(path, server_has_keys=True),
    "gateway on this machine": lambda path: behind_a_gateway(path, server_has_keys=False),
}


@pytest.fixture(scope="module", params=HOUSES)
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with HOUSES[request.param](tmp_path_factory.mktemp("owners")) as opened:
        yield opened


def respond(client: httpx.Client, given: Any, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "input": given, "max_output_tokens": 2} | more
    return client.post("/v1/responses", json=body)


def message(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": text} | more


@pytest.mark.sample(1)
def test_responses_of_another_key_are_as_good_as_none(house: House) -> None:
    mine = respond(house.alice, [message("secret", id="msg_alice")]).json()["id"]

    def told(client: httpx.Client, name: str) -> list[Any]:
        path = f"/v1/responses/{name}"
        answers = [
            client.get(path), client.get(f"{path}/input_items"), client.post(f"{path}/cancel"),
            client.get(path, params={"stream": "true"}), client.delete(path),
            client.get(f"/engines{path}"), client.get(path.removeprefix("/v1")),
            respond(client, "go on", previous_response_id=name),
        ]  # fmt: skip
        return [(a.status_code, a.text.replace(name, "NAME")) for a in answers]

    nothing = told(house.bob, "resp_none")
    assert [status for status, _ in nothing] == [404] * 7 + [400]
    assert told(house.bob, mine) == nothing
    assert house.alice.get(f"/v1/responses/{mine}").json()["id"] == mine
    assert respond(house.alice, "go on", previous_response_id=mine).status_code == 200


def test_running_responses_of_another_key_are_as_good_as_none(house: House) -> None:
    """Hold the engine, so that the response of alice runs while bob asks for it."""
    assert respond(house.alice, "load the model").status_code == 200
    house.catalogue.going.clear()
    try:
        mine = respond(house.alice, "secret", background=True).json()["id"]
        path = f"/v1/responses/{mine}"

        def told(client: httpx.Client, name: str) -> list[Any]:
            path = f"/v1/responses/{name}"
            answers = [
                client.get(path), client.get(path, params={"stream": "true"}),
                client.get(f"{path}/input_items"), client.post(f"{path}/cancel"),
                client.delete(path), respond(client, "go on", previous_response_id=name),
            ]  # fmt: skip
            return [(a.status_code, a.text.replace(name, "NAME")) for a in answers]

        nothing = told(house.bob, "resp_none")
        assert [status for status, _ in nothing] == [404] * 5 + [400]
        assert told(house.bob, mine) == nothing
        assert house.alice.get(path).json()["status"] in ("queued", "in_progress")
        assert house.alice.post(f"{path}/cancel").json()["status"] == "cancelled"
        assert told(house.bob, mine) == nothing
    finally:
        house.catalogue.going.set()


def test_conversations_of_another_key_are_as_good_as_none(house: House) -> None:
    body = {"items": [message("secret", id="msg_of_alice")], "metadata": {"of": "alice"}}
    mine = house.alice.post("/v1/conversations", json=body).json()["id"]

    def told(client: httpx.Client, name: str) -> list[Any]:
        path = f"/v1/conversations/{name}"
        answers = [
            client.get(path), client.get(f"{path}/items"),
            client.get(f"{path}/items/msg_of_alice"),
            client.post(path, json={"metadata": {}}),
            client.post(f"{path}/items", json={"items": [message("of bob")]}),
            client.delete(f"{path}/items/msg_of_alice"), client.delete(path),
            client.get(f"/engines{path}"), client.get(path.removeprefix("/v1")),
            client.get(f"/v1/responses/{name}"), client.delete(f"/v1/responses/{name}"),
            respond(client, "go on", conversation=name),
            respond(client, "go on", conversation={"id": name}),
        ]  # fmt: skip
        return [(a.status_code, a.text.replace(name, "NAME")) for a in answers]

    nothing = told(house.bob, "conv_none")
    assert [status for status, _ in nothing] == [404] * 13
    assert told(house.bob, mine) == nothing
    kept = house.alice.get(f"/v1/conversations/{mine}").json()
    assert kept["metadata"] == {"of": "alice"}
    assert respond(house.alice, "go on", conversation=mine).status_code == 200
    items = house.alice.get(f"/v1/conversations/{mine}/items").json()["data"]
    assert len(items) == 3
    reference = [{"type": "item_reference", "id": items[0]["id"]}]
    assert respond(house.bob, reference).status_code == 400
    assert respond(house.alice, reference).status_code == 200


def test_item_ids_that_two_keys_choose_do_not_collide(house: House) -> None:
    reference = [{"type": "item_reference", "id": "msg_same"}]
    assert respond(house.bob, reference).status_code == 400
    first = respond(house.alice, [message("of alice", id="msg_same")]).json()["id"]
    assert respond(house.bob, reference).status_code == 400
    assert "of alice" not in respond(house.bob, reference).text
    theirs = respond(house.bob, [message("of bob", id="msg_same")]).json()["id"]

    def items(client: httpx.Client) -> str:
        name = respond(client, reference).json()["id"]
        return client.get(f"/v1/responses/{name}/input_items").text

    assert "of alice" in items(house.alice)
    assert "of bob" in items(house.bob)
    assert house.bob.delete(f"/v1/responses/{theirs}").status_code == 200
    assert "of alice" in items(house.alice)
    assert house.alice.delete(f"/v1/responses/{first}").status_code == 200


@pytest.mark.long
@pytest.mark.parametrize("method", ["POST", "DELETE"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_request_is_cancelled_by_its_owner_only(house: House, method: str, shared: bool) -> None:
    """Start streams of both clients, possibly with the same id."""
    tail = "/cancel" if method == "POST" else ""
    mine = f"alice-{method}-{shared}"
    names = [mine, mine if shared else f"bob-{method}"]
    body = {"model": "tiny", "prompt": "x", "max_tokens": 230, "ignore_eos": True, "stream": True}
    assert respond(house.alice, "load the model").status_code == 200

    def begin(client: httpx.Client, name: str) -> Iterator[str]:
        headers = {"X-Request-ID": name}
        streamed = client.stream("POST", "/v1/completions", json=body, headers=headers)
        lines = opened.enter_context(streamed).iter_lines()
        return itertools.chain([next(lines)], lines)

    def cancel(client: httpx.Client, name: str) -> tuple[int, str]:
        answer = client.request(method, f"/v1/requests/{name}{tail}")
        return answer.status_code, answer.text.replace(name, "NAME")

    house.catalogue.pair()
    try:
        with ExitStack() as opened, ThreadPoolExecutor(2) as threads:
            streams = list(threads.map(begin, (house.alice, house.bob), names))
            if not shared:
                nothing = cancel(house.bob, "nothing")
                assert nothing[0] == 404
                assert cancel(house.bob, mine) == nothing
            assert cancel(house.alice, mine)[0] == 200
            house.catalogue.going.set()
            ended = ["".join(lines).replace(" ", "") for lines in streams]
    finally:
        house.catalogue.going.set()
    assert [re.findall('"finish_reason":"([a-z]+)"', text) for text in ended] == [
        ["stop"], ["length"],
    ]  # fmt: skip


def cached_tokens(client: httpx.Client, path: str, body: Any) -> int:
    answer = client.post(path, json={"model": "tiny", "max_tokens": 1} | body).json()
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET}]})
COMPLETION = ("/v1/completions", {"prompt": SECRET})


@pytest.mark.parametrize("asked", [CHAT, COMPLETION])
def test_the_prefix_cache_is_no_oracle(house: House, asked: tuple[str, Any]) -> None:
    assert cached_tokens(house.alice, *asked) == 0
    assert cached_tokens(house.bob, *asked) == 0
    assert cached_tokens(house.alice, *asked) > 0
    assert cached_tokens(house.bob, *asked) > 0


def test_the_prefix_cache_is_no_oracle_for_background_responses(house: House) -> None:
    def cached(client: httpx.Client) -> int:
        name = respond(client, f"background: {SECRET}", background=True).json()["id"]
        path = f"/v1/responses/{name}"
        wait_until(lambda: client.get(path).json()["usage"] is not None, "the response")
        usage = client.get(path).json()["usage"]
        return int(usage["input_tokens_details"]["cached_tokens"])

    # The beginning of the prompt is that of other tests.
    first, bobs = cached(house.alice), cached(house.bob)
    assert max(first, bobs) < len(SECRET) // 2
    assert cached(house.alice) > len(SECRET) // 2
    assert cached(house.bob) > len(SECRET) // 2


@pytest.mark.long
def test_the_prefix_cache_may_be_shared(tmp_path: Path) -> None:
    with direct(tmp_path, share_prefix_cache=True) as house:
        assert cached_tokens(house.alice, *CHAT) == 0
        assert cached_tokens(house.bob, *CHAT) > 0


@pytest.mark.sample(1)
def test_recorded_requests_are_shown_to_their_owner(house: House) -> None:
    """Wait for a record: a request is recorded after its reply was sent."""

    def recorded(client: httpx.Client) -> str:
        return client.get("/engines/requests").text

    respond(house.alice, "records of alice")
    wait_until(lambda: "records of alice" in recorded(house.alice), "the record of alice")
    assert "records of alice" not in recorded(house.bob)
    for number in range(12):  # more than the records kept for an owner
        respond(house.bob, f"number {number}")
    wait_until(lambda: "number 11" in recorded(house.bob), "the last record of bob")
    assert "records of alice" in recorded(house.alice)
    assert sum(group["count"] for group in json.loads(recorded(house.bob))) == 10
