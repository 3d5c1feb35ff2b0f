"""Files and batches belong to the API key that made them, and its limits hold for batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from modelpack_server.gateway import KeyFile, Protection, add_key
from modelpack_server.gateway.app import GatewayServer, GatewaySettings
from modelpack_server.gateway.keys import remove_key
from modelpack_server.gateway.limits import Limits
from tests.engine.families.batches.served import CHAT, Desk, chat, client_of, desk, jsonl, row
from tests.scenarios.processes import wait_until


@dataclass
class House:
    """A server, and its address for clients with keys."""

    server: Desk
    url: str
    keys: dict[str, str]
    file: Path
    opened: ExitStack

    def desk(self, name: str) -> Desk:
        client = self.opened.enter_context(client_of(self.url, self.keys[name]))
        return Desk(client, self.url, self.server.engine)

    def http(self, name: str) -> httpx.Client:
        headers = {"x-api-key": self.keys[name]}
        return self.opened.enter_context(httpx.Client(base_url=self.url, headers=headers))


def make_keys(file: Path) -> dict[str, str]:
    narrow, slow = ("ai/other*",), Limits(requests_per_minute=60)
    return {
        "alice": add_key(file, "alice"),
        "bob": add_key(file, "bob"),
        "narrow": add_key(file, "narrow", models=narrow),
        "slow": add_key(file, "slow", limits=slow),
    }


@contextmanager
def direct(path: Path) -> Iterator[House]:
    keys = make_keys(path / "keys.toml")
    protection = Protection(keys=KeyFile(path / "keys.toml"))
    with ExitStack() as opened:
        server = opened.enter_context(desk(path / "state", protection=protection))
        yield House(server, server.url, keys, path / "keys.toml", opened)


@contextmanager
def behind_a_gateway(path: Path, *, server_has_keys: bool) -> Iterator[House]:
    keys, servers = make_keys(path / "keys.toml"), path / "servers.toml"
    key = add_key(servers, "gateway", gateway=True) if server_has_keys else None
    protection = Protection(keys=KeyFile(servers) if server_has_keys else None)
    with ExitStack() as opened:
        server = opened.enter_context(desk(path / "state", protection=protection))
        other = opened.enter_context(desk(path / "other", protection=protection))
        settings = GatewaySettings(
            (server.url, other.url), Protection(keys=KeyFile(path / "keys.toml")),
            upstream_key=key, policy="round-robin",
        )  # fmt: skip
        gateway = opened.enter_context(GatewayServer(settings, grace=1))
        yield House(server, gateway.url, keys, path / "keys.toml", opened)


HOUSES: dict[str, Callable[[Path], Any]] = {
    "direct": direct,
    "gateway with a key": lambda path: behind_a_gateway(path, server_has_keys=True),
    "gateway on this machine": lambda path: behind_a_gateway(path, server_has_keys=False),
}


@pytest.fixture(params=HOUSES)
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    with HOUSES[request.param](tmp_path) as opened:
        yield opened


@pytest.mark.sample(1)
def test_files_and_batches_of_another_key_are_as_good_as_none(house: House) -> None:
    alice, bob = house.desk("alice"), house.desk("bob")
    batch = alice.ended(alice.begin([row(f"r{i}") for i in range(10)]))
    assert batch.status == "completed"
    assert len(alice.rows(batch.output_file_id)) == 10

    def told(http: httpx.Client, file: str | None, batch: str) -> list[tuple[int, str]]:
        body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        replies = [
            http.get(f"/v1/files/{file}"), http.get(f"/v1/files/{file}/content"),
            http.delete(f"/v1/files/{file}"), http.post("/v1/batches", json=body),
            http.get(f"/v1/batches/{batch}"), http.post(f"/v1/batches/{batch}/cancel"),
            http.get(f"/v1/files?after={file}"), http.get(f"/v1/batches?after={batch}"),
        ]  # fmt: skip
        return [
            (reply.status_code, reply.text.replace(file or "", "FILE").replace(batch, "BATCH"))
            for reply in replies
        ]

    nothing = told(house.http("bob"), "file-none", "batch_none")
    assert [status for status, _ in nothing] == [404] * 6 + [400] * 2
    for file in (batch.input_file_id, batch.output_file_id):
        assert told(house.http("bob"), file, batch.id) == nothing
    assert list(bob.client.files.list()) == list(bob.client.batches.list()) == []
    assert len(list(alice.client.files.list())) == 2
    with client_of(house.url, "mp_wrong") as none, pytest.raises(openai.AuthenticationError):
        none.files.list()


@pytest.mark.sample(1)
def test_requests_of_a_batch_have_the_prefixes_of_their_owner(house: House) -> None:
    """The KV cache is no oracle for batches either."""
    for name in ("alice", "bob"):
        api = house.desk(name)
        for _ in range(2):
            assert api.ended(api.begin([row("a")])).status == "completed"
    first, same, other, again = [request.cache_salt for request in house.server.engine.requests]
    assert first == same != other == again
    assert len({request.owner for request in house.server.engine.requests}) == 2


def test_the_models_of_a_key_hold_in_a_batch(tmp_path: Path) -> None:
    with direct(tmp_path) as house:
        api = house.desk("narrow")
        batch = api.ended(api.begin([row("a"), row("b", chat("b", model="ai/other"))]))
        errors = api.rows(batch.error_file_id)
        assert batch.output_file_id is None
        assert {name: each["response"]["status_code"] for name, each in errors.items()} == {
            "a": 404, "b": 404
        }  # fmt: skip
        direct_reply = house.http("narrow").post(CHAT, json=chat("a")).json()
        assert errors["a"]["response"]["body"] == direct_reply
        assert api.engine.requests == []


def test_a_gateway_creates_no_batch_for_a_key_with_models(tmp_path: Path) -> None:
    """It cannot see the models; the key may still have files."""
    with behind_a_gateway(tmp_path, server_has_keys=True) as house:
        api = house.desk("narrow")
        with pytest.raises(openai.PermissionDeniedError, match="named in its file"):
            api.begin([row("a")])
        assert len(list(api.client.files.list())) == 1


def test_an_upstream_that_does_not_know_the_callers_gets_no_files(tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys.toml")
    settings = GatewaySettings(
        ("http://192.0.2.1:1",), Protection(keys=KeyFile(tmp_path / "keys.toml"))
    )
    with GatewayServer(settings, grace=1) as gateway:
        reply = httpx.get(f"{gateway.url}/v1/files", headers={"x-api-key": keys["alice"]})
    assert reply.status_code == 501
    assert "MODELPACK_UPSTREAM_KEY" in reply.json()["error"]["message"]


def test_a_removed_key_ends_its_batches(tmp_path: Path) -> None:
    with direct(tmp_path) as house:
        api = house.desk("alice")
        api.hold()
        batch = api.begin([row(f"r{i}") for i in range(30)])
        wait_until(lambda: api.running() > 0, "requests in flight")
        remove_key(house.file, "alice")
        add_key(house.file, "carol")
        api.release()
        store = tmp_path / "state" / "batches" / f"{batch.id}.json"
        wait_until(lambda: '"status": "completed"' in store.read_text(), "the batch to end")
        assert len(api.engine.requests) < 30
    # A server without keys opens the same directory. It knows no alice, so her batch does not run.
    with desk(tmp_path / "state") as open_:
        assert list(open_.client.batches.list()) == []


def test_a_batch_of_a_key_does_not_run_without_keys(tmp_path: Path) -> None:
    with direct(tmp_path) as house:
        api = house.desk("alice")
        api.hold()
        batch = api.begin([row("a")])
        wait_until(lambda: api.running() > 0, "requests in flight")
    with desk(tmp_path / "state") as open_:
        store = tmp_path / "state" / "batches" / f"{batch.id}.json"
        wait_until(lambda: '"status": "completed"' in store.read_text(), "the batch to end")
        assert open_.engine.requests == []


def test_the_limits_of_a_key_hold_for_its_batches(tmp_path: Path) -> None:
    """Requests above the limit wait for their turn."""
    with direct(tmp_path) as house:
        api = house.desk("slow")
        batch = api.begin([row(f"r{i}") for i in range(200)])
        wait_until(lambda: len(api.engine.requests) >= 40, "the first requests")
        http = house.http("slow")
        wait_until(lambda: http.get("/v1/models").status_code == 429, "the limit to be reached")
        assert len(api.engine.requests) < 70
    assert batch.status in ("validating", "in_progress")


def test_a_client_cannot_pose_as_a_batch(tmp_path: Path) -> None:
    """No header marks a request as one that the server makes itself."""
    with direct(tmp_path) as house:
        for name in ("modelpack.background", "x-modelpack-background", "x-modelpack-owner"):
            reply = httpx.post(house.url + CHAT, json=chat("a"), headers={name: "alice"})
            assert reply.status_code == 401
        upload = httpx.post(house.url + "/v1/files", files={"file": ("a", jsonl([row("a")]))})
        assert upload.status_code == 401
