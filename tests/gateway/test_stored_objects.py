"""Requests about a stored response or conversation go to the upstream that has it."""

from __future__ import annotations

import itertools
import json
import threading
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.types import Receive, Send

from modelpack_server.gateway.json_bodies import put_document
from modelpack_server.gateway.stored_objects import Locations, stored_object
from tests.gateway.servers import (
    Asked,
    Upstream,
    gateway,
    respond,
    serving,
    unused_url,
    wait_for,
)


@pytest.mark.parametrize(
    ("path", "body", "stored"),
    [
        ("/v1/responses/resp_1", None, "/v1/responses/resp_1"),
        ("/v1/responses/resp_1/cancel", None, "/v1/responses/resp_1"),
        ("/responses/resp_1", None, "/v1/responses/resp_1"),
        ("/engines/vllm/v1/conversations/conv_1/items/i", None, "/v1/conversations/conv_1"),
        ("/v1/responses", {"previous_response_id": "resp_1"}, "/v1/responses/resp_1"),
        ("/v1/responses/input_tokens", {"conversation": "conv_1"}, "/v1/conversations/conv_1"),
        ("/v1/responses", {"conversation": {"id": "conv_1"}}, "/v1/conversations/conv_1"),
        ("/v1/responses", {"previous_response_id": "../files"}, None),
        ("/v1/responses", {"previous_response_id": 7, "conversation": []}, None),
        ("/v1/responses", {"model": "m"}, None),
        ("/v1/responses", [], None),
        ("/v1/responses", None, None),
        ("/v1/conversations", {"conversation": "conv_1"}, None),
        ("/v1/chat/completions", {"conversation": "conv_1"}, None),
        ("/v1/files/file-1", None, None),
    ],
)
def test_what_a_request_names(path: str, body: Any, stored: str | None) -> None:
    scope: dict[str, Any] = {"type": "http", "path": path}
    if body is not None:
        put_document(scope, body)
    assert stored_object(scope) == stored


def test_few_locations_are_remembered() -> None:
    locations = Locations(limit=2)
    for name in ("a", "b"):
        locations.put(name, "one")
    assert locations.get("a") == "one"
    locations.put("c", "two")
    assert [locations.get(name) for name in ("a", "b", "c")] == ["one", None, "two"]


def keeping(*names: str) -> Upstream:
    """Return a server that has the objects with these names."""

    async def reply(asked: Asked, _: Receive, send: Send) -> None:
        parts = asked.target.decode().strip("/").split("/")
        body = json.loads(asked.body or b"{}")
        name = parts[2] if len(parts) > 2 else body.get("previous_response_id", names[0])
        await respond(send, 200 if name in names else 404, {"id": name, "of": names[0]})

    return Upstream(reply)


def test_a_request_goes_to_the_upstream_that_has_the_object() -> None:
    servers = {name: keeping(name) for name in ("resp_a", "resp_b", "resp_c")}
    with ExitStack() as opened:
        urls = [opened.enter_context(serving(server)) for server in servers.values()]
        http = opened.enter_context(gateway(*urls)).client
        for name in servers:
            for _ in range(2):
                assert http.get(f"/v1/responses/{name}/input_items").json()["of"] == name
                body = {"model": "m", "input": "x", "previous_response_id": name}
                assert http.post("/v1/responses", json=body).json()["of"] == name
                assert http.post(f"/v1/responses/{name}/cancel").json()["of"] == name
                assert http.delete(f"/v1/responses/{name}").json()["of"] == name
        assert http.get("/v1/responses/resp_none").status_code == 404
    for name, server in servers.items():
        lookups = [asked.target.decode() for asked in server.asked if asked.method == "GET"]
        for other in servers:
            assert lookups.count(f"/v1/responses/{other}") == 1, (name, other)


def test_an_object_may_be_on_an_upstream_that_cannot_be_reached() -> None:
    """A 404 would tell the client that it is gone."""
    with serving(keeping("resp_a")) as url, gateway(url, unused_url()) as served:
        assert served.client.get("/v1/responses/resp_a").status_code == 200
        reply = served.client.get("/v1/responses/resp_b")
    assert reply.status_code == 503
    assert "/v1/responses/resp_b cannot be reached" in reply.json()["error"]["message"]


def test_a_lookup_names_the_caller() -> None:
    servers = keeping("resp_a"), keeping("resp_b")
    with serving(servers[0]) as one, serving(servers[1]) as two:
        headers = {"authorization": "Bearer secret-key"}
        with gateway(one, two, upstream_key="own") as served:
            assert served.client.get("/v1/responses/resp_b", headers=headers).status_code == 200
    for server in servers:
        assert {asked.header("authorization") for asked in server.asked} == {"Bearer own"}


def test_addresses_from_dns_keep_no_files() -> None:
    """They come and go, and a file would be gone with its server."""

    async def lookup(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    found, fixed = Upstream(), Upstream()
    with serving(found) as url, serving(fixed) as home:
        name = f"dns+http://servers.test:{url.rpartition(':')[2]}"
        with gateway(name, lookup=lookup) as served:
            assert served.client.get("/v1/models").status_code == 200
            refused = served.client.get("/v1/files")
            assert refused.status_code == 501
            assert "fixed address" in refused.json()["error"]["message"]
        with gateway(name, home, lookup=lookup) as served:
            assert served.client.get("/v1/files").status_code == 200
        with gateway(url, name, lookup=lookup) as served:  # the same address, fixed and found
            assert served.client.get("/v1/files/file-1").status_code == 200
        with gateway(url, url) as served:
            assert served.client.get("/v1/files/file-2").status_code == 200
    assert [asked.target for asked in found.asked] == [
        b"/v1/models", b"/v1/files/file-1", b"/v1/files/file-2",
    ]  # fmt: skip
    assert [asked.target for asked in fixed.asked] == [b"/v1/files"]


@pytest.mark.parametrize("path", ["/v1/files", "/v1/responses/resp_a/cancel"])
def test_an_upstream_that_appears_meanwhile_gets_no_request_of_another(path: str) -> None:
    """It has no files, and would keep an upload where no later request looks for it."""
    busy, known = threading.Event(), threading.Event()
    lookups_after = itertools.count()

    async def lookup(host: str, port: int) -> list[str]:
        if busy.is_set() and next(lookups_after):
            known.set()  # the last lookup's addresses are upstreams now
        return ["127.0.0.1"] if busy.is_set() else []

    async def reply(asked: Asked, _: Receive, send: Send) -> None:
        if asked.method == "POST":
            busy.set()
            await wait_for(known)
        headers = [(b"retry-after", b"1")]
        await respond(send, 503 if asked.method == "POST" else 200, {}, headers)

    found, home = Upstream(), Upstream(reply)
    with serving(found) as url, serving(home) as fixed:
        name = f"dns+http://servers.test:{url.rpartition(':')[2]}"
        with gateway(fixed, unused_url(), name, lookup=lookup, probe_interval=0.01) as served:
            assert served.client.post(path, content=b"x").status_code == 503
    assert found.asked == []
