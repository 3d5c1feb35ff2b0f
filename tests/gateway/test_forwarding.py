"""A gateway names the caller of a request to a server, which trusts it in some cases."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from modelpack.errors import FormatError
from modelpack_server.gateway import KeyFile, add_key
from modelpack_server.gateway.caller import Caller, caller_of
from modelpack_server.gateway.checks import Checks
from modelpack_server.gateway.keys import parse_keys
from tests.gateway.servers import Upstream, gateway, protected, respond, serving

OWNER, MODELS = "x-modelpack-owner", "x-modelpack-models"
LOCAL, REMOTE = "127.0.0.1", "10.1.2.3"
ALICE = (OWNER, "alice")


def ask(
    tmp_path: Path, key: str | None, peer: str | None, *headers: tuple[str, str], **more: Any
) -> tuple[int, Caller | None]:
    """Send a request through `Checks`; return its status and the caller in the application."""
    file = tmp_path / "keys.toml"
    if not file.exists():
        secrets = {"plain": add_key(file, "plain"), "gw": add_key(file, "gw", gateway=True)}
        (tmp_path / "secrets").write_text(json.dumps(secrets))
    secrets = json.loads((tmp_path / "secrets").read_text())
    seen: list[Caller] = []
    statuses: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(caller_of(scope))
        await respond(send, 200, {"object": "list", "data": []})

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    given = [(name.encode(), value.encode()) for name, value in headers]
    if key is not None:
        given.append((b"authorization", f"Bearer {secrets[key]}".encode()))
    scope = {
        "type": "http", "method": "GET", "path": "/v1/models", "headers": given,
        "query_string": b"", "client": None if peer is None else (peer, 50000),
    }  # fmt: skip
    keys = KeyFile(file).current if key is not None else None
    asyncio.run(Checks(app, keys=keys, **more)(scope, receive, send))
    return statuses[0], seen[0] if seen else None


@pytest.mark.parametrize(
    ("key", "peer", "headers", "status", "caller"),
    [
        ("gw", REMOTE, [ALICE], 200, Caller("gw/alice")),
        ("gw", LOCAL, [ALICE, (MODELS, '["ai/*", "\\u00e9"]')], 200,
         Caller("gw/alice", ("ai/*", "\u00e9"))),
        ("gw", REMOTE, [(OWNER, "other/alice")], 200, Caller("gw/other/alice")),
        ("gw", REMOTE, [], 200, Caller("gw")),
        (None, LOCAL, [ALICE], 200, Caller("alice")),
        (None, "::1", [ALICE, (MODELS, '["a"]')], 200, Caller("alice", ("a",))),
        (None, LOCAL, [], 200, Caller()),
        # From another machine, with any headers.
        ("plain", REMOTE, [ALICE], 403, None),
        ("plain", LOCAL, [ALICE], 403, None),
        ("plain", LOCAL, [(MODELS, '["*"]')], 403, None),
        (None, REMOTE, [ALICE], 403, None),
        (None, REMOTE, [ALICE, ("x-forwarded-for", LOCAL)], 403, None),
        (None, REMOTE, [ALICE, ("forwarded", "for=127.0.0.1")], 403, None),
        (None, None, [ALICE], 403, None),
        (None, LOCAL, [ALICE, ("origin", "http://localhost:12434")], 403, None),
        (None, LOCAL, [ALICE, ("origin", "null")], 403, None),
        # Malformed.
        ("gw", REMOTE, [(OWNER, "")], 400, None),
        ("gw", REMOTE, [(OWNER, "/alice")], 400, None),
        ("gw", REMOTE, [(OWNER, "a b")], 400, None),
        ("gw", REMOTE, [(OWNER, "alice,bob")], 400, None),
        ("gw", REMOTE, [(OWNER, "\u00e9")], 400, None),
        ("gw", REMOTE, [(OWNER, "a" * 257)], 400, None),
        ("gw", REMOTE, [ALICE, (OWNER, "bob")], 400, None),
        ("gw", REMOTE, [ALICE, ALICE], 400, None),
        ("gw", REMOTE, [(MODELS, '["a"]')], 400, None),
        *(
            ("gw", REMOTE, [ALICE, (MODELS, models)], 400, None)
            for models in ("", "*", "[]", '[""]', "[1]", '{"a":1}', '"a"', "null", '["a"',
                           "[" * 9000, json.dumps(["a" * 17000]))
        ),
        ("gw", REMOTE, [ALICE, (MODELS, '["a"]'), (MODELS, '["*"]')], 400, None),
    ],
)  # fmt: skip
def test_when_a_named_caller_is_believed(
    tmp_path: Path,
    key: str | None,
    peer: str | None,
    headers: list[tuple[str, str]],
    status: int,
    caller: Caller | None,
) -> None:
    assert ask(tmp_path, key, peer, *headers) == (status, caller)


@pytest.mark.parametrize(("key", "owner"), [("plain", "plain"), ("gw", "gw"), (None, None)])
def test_a_gateway_believes_nobody(tmp_path: Path, key: str | None, owner: str | None) -> None:
    headers = [ALICE, (MODELS, "nonsense")]
    found = ask(tmp_path, key, LOCAL, *headers, forwarded_callers=False)
    assert found == (200, Caller(owner))


def test_a_gateway_names_the_key_and_drops_what_its_client_says(tmp_path: Path) -> None:
    file, app = tmp_path / "keys.toml", Upstream()
    secrets = [add_key(file, "alice"), add_key(file, "bob", models=("ai/\u00e9*",))]
    forged = {OWNER: "admin", "X-MODELPACK-MODELS": '["*"]', "x-modelpack-caller": "editor"}
    with (
        serving(app) as url,
        gateway(url, protection={"keys": KeyFile(file)}) as keyed,
        gateway(url) as open_to_all,
    ):
        for secret in secrets:
            keyed.client.get("/v1/models", headers=forged | {"authorization": f"Bearer {secret}"})
        keyed.client.get("/version", headers=forged)  # a route without keys
        open_to_all.client.get("/v1/models", headers=forged)
    named = [(asked.header(OWNER), asked.header(MODELS)) for asked in app.asked]
    assert named == [("alice", None), ("bob", '["ai/\\u00e9*"]'), (None, None), (None, None)]
    assert {asked.header("x-modelpack-caller") for asked in app.asked} == {"editor"}


@pytest.mark.parametrize(
    ("host", "upstream_key", "owner"),
    [
        ("127.0.0.1", None, "alice"),
        ("127.1", None, None),  # another spelling, which may mean any machine
        ("127.1", "secret", "alice"),
    ],
)
def test_callers_are_named_to_upstreams_that_trust_the_gateway(
    tmp_path: Path, host: str, upstream_key: str | None, owner: str | None
) -> None:
    """A server without keys on another machine answers 403 to a gateway that names a caller."""
    file, app = tmp_path / "keys.toml", Upstream()
    bearer = {"authorization": f"Bearer {add_key(file, 'alice')}"}
    with serving(app) as url:
        upstream = url.replace("127.0.0.1", host)
        protection = {"keys": KeyFile(file)}
        with gateway(upstream, protection=protection, upstream_key=upstream_key) as keyed:
            assert keyed.client.get("/v1/models", headers=bearer).status_code == 200
    assert [asked.header(OWNER) for asked in app.asked] == [owner]


def test_a_connection_header_does_not_hide_the_owner(tmp_path: Path) -> None:
    """A client may make a proxy drop headers, but not the gateway's own headers."""
    file, app = tmp_path / "keys.toml", Upstream()
    secret = add_key(file, "alice")
    with serving(app) as url, gateway(url, protection={"keys": KeyFile(file)}) as keyed:
        keyed.client.get(
            "/v1/models",
            headers={"authorization": f"Bearer {secret}", "connection": f"keep-alive, {OWNER}"},
        )
    assert [asked.header(OWNER) for asked in app.asked] == ["alice"]


def test_from_key_to_server(tmp_path: Path) -> None:
    callers: list[Caller] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/health":  # the gateway's own requests
            callers.append(caller_of(scope))
        await respond(send, 200, {"object": "list", "data": []})

    clients, servers = tmp_path / "clients.toml", tmp_path / "servers.toml"
    secret = add_key(clients, "alice", models=("a*",))
    upstream, plain = add_key(servers, "gw", gateway=True), add_key(servers, "plain")
    bearer = {"authorization": f"Bearer {secret}"}
    with protected(app, keys=KeyFile(servers)) as server:
        for key, status in ((upstream, 200), (plain, 403)):
            more = {"protection": {"keys": KeyFile(clients)}, "upstream_key": key}
            with gateway(server.url, **more) as entrance:
                answer = entrance.client.get("/v1/models", headers=bearer)
                assert answer.status_code == status
    assert callers == [Caller("gw/alice", ("a*",))]
    assert "gateway = true" in answer.text


def test_nobody_chooses_the_address_that_a_server_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uvicorn would read it from X-Forwarded-For, of any peer if the environment says so."""
    peers: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        peers.append(scope["client"][0])
        await respond(send, 200, {"object": "list", "data": []})

    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    from modelpack.http.listener import AppServer

    with AppServer(lambda: app, "127.0.0.1:0", name="test server", grace=1) as server:
        httpx.get(server.url, headers={"x-forwarded-for": "10.9.9.9"}, trust_env=False)
    assert peers == ["127.0.0.1"]


def test_metrics_are_not_passed_on_by_a_proxy_of_this_machine() -> None:
    with protected(Upstream()) as served:
        assert served.client.get("/metrics").status_code == 200
        for name, value in (("x-forwarded-for", "127.0.0.1"), ("forwarded", "for=127.0.0.1")):
            assert served.client.get("/metrics", headers={name: value}).status_code == 403


def test_a_key_of_a_gateway() -> None:
    digest = "0" * 64
    [key] = parse_keys(f"[keys.gw]\nsha256 = '{digest}'\ngateway = true", "f").keys
    assert key.gateway
    for line in ("gateway = 1", "gateway = 'true'", "gateway = true\nmodels = ['a']"):
        with pytest.raises(FormatError, match="gateway"):
            parse_keys(f"[keys.gw]\nsha256 = '{digest}'\n{line}", "f")
