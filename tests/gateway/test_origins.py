"""Which web pages and which hosts get through."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpack.errors import UsageError
from modelpack.gateway import KeyFile, add_key
from modelpack.gateway.cors import Cors, check_origins
from tests.gateway.servers import CHAT, Upstream, gateway, protected, serving


@pytest.mark.parametrize(
    ("listed", "origin", "allowed"),
    [
        ((), "http://localhost:3000", False),
        (("http://localhost:*",), "http://localhost:3000", True),
        (("http://localhost:*",), "http://localhost", True),
        (("http://localhost:*",), "https://localhost:3000", False),
        (("http://localhost:*",), "http://localhost.evil.example:1", False),
        (("http://localhost:*",), "http://localhost:3000.evil.example", False),
        (("https://App.example/",), "https://app.example", True),
        (("https://app.example",), "https://app.example:8443", False),
        (("https://app.example",), "https://x.app.example", False),
        (("http://[::1]:*",), "http://[::1]:80", True),
        (("*",), "https://anyone.example", True),
        (("null",), "null", True),
        (("https://app.example",), "null", False),
    ],
)
def test_listed_origins(listed: tuple[str, ...], origin: str, allowed: bool) -> None:
    assert Cors(Upstream(), listed).allows(origin) is allowed


@pytest.mark.parametrize(
    "origin", ["", "app.example", "https://", "http://*.example", "http://a/b"]
)
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(UsageError, match="is no origin"):
        check_origins([origin])


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
def test_foreign_pages_are_refused(method: str, origin: str) -> None:
    app = Upstream()
    with protected(app) as served:
        headers = {"origin": origin, "access-control-request-method": "POST"}
        reply = served.client.request(method, "/api/chat", headers=headers)
        assert served.traces.wait()[0].refused == "origin"
    assert reply.status_code == 403
    assert origin in reply.json()["error"]
    assert "access-control-allow-origin" not in reply.headers
    assert app.asked == []


def test_its_own_page_may_ask() -> None:
    with protected(Upstream()) as served:
        reply = served.client.post(CHAT, json={}, headers={"origin": served.url})
    assert reply.status_code == 200


def test_a_listed_page(tmp_path: Path) -> None:
    add_key(tmp_path / "keys", "a")
    app, origin = Upstream(), "https://app.example"
    with protected(app, cors=(origin,), keys=KeyFile(tmp_path / "keys")) as served:
        preflight = served.client.options(
            CHAT,
            headers={
                "origin": origin,
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization,x-stainless-os",
                "access-control-request-private-network": "true",
            },
        )
        refused = served.client.post(CHAT, json={}, headers={"origin": origin})
        plain = served.client.get("/health")
    assert preflight.status_code == 204
    granted = preflight.headers
    assert granted["access-control-allow-origin"] == origin
    assert granted["access-control-allow-credentials"] == "true"
    assert granted["access-control-allow-headers"] == "authorization,x-stainless-os"
    assert granted["access-control-allow-private-network"] == "true"
    assert set(granted["access-control-allow-methods"].split(", ")) == {
        "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE",
    }  # fmt: skip
    # The page gets to read why it was refused.
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == origin
    assert "x-request-id" in refused.headers["access-control-expose-headers"]
    assert "origin" in refused.headers["vary"].lower()
    assert "origin" in plain.headers["vary"].lower()
    assert [asked.target for asked in app.asked] == []


def test_every_page_but_without_cookies() -> None:
    with protected(Upstream(), cors=("*",)) as served:
        reply = served.client.post(CHAT, json={}, headers={"origin": "https://x.example"})
    assert reply.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in reply.headers


def test_an_upstream_does_not_see_the_page() -> None:
    upstream = Upstream()
    with (
        serving(upstream) as url,
        gateway(url, protection={"cors": ("https://app.example",)}) as served,
    ):
        served.client.post(CHAT, json={}, headers={"origin": "https://app.example"})
    assert upstream.asked[0].header("origin") is None


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("models.lan", 200),
        ("host.docker.internal:12434", 200),
        ("chat.localhost", 200),
        ("docker.internal.evil.example", 403),
        ("xdocker.internal", 403),
        ("evil.example", 403),
        ("evil.example:12434", 403),
        ("localhost.evil.example", 403),
        ("192.0.2.1", 403),
        ("", 403),
    ],
)
def test_hosts_on_loopback(host: str, status: int) -> None:
    with protected(Upstream(), allowed_hosts=("models.lan",)) as served:
        for path in ("/health", "/v1/models"):
            assert served.client.get(path, headers={"host": host}).status_code == status


def test_hosts_beyond_loopback_are_not_known() -> None:
    with protected(Upstream(), host="0.0.0.0", allow_anonymous=True) as served:
        assert served.client.get("/", headers={"host": "compose-name"}).status_code == 200
