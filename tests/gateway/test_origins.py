"""The web pages and hosts that may use the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelpack.errors import UsageError
from modelpack.http.hosts import AllowedHosts
from modelpack_server.gateway import KeyFile, add_key
from modelpack_server.gateway.protection import Cors, check_origins
from tests.gateway.servers import CHAT, Upstream, gateway, protected


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
    with pytest.raises(UsageError, match="is not a valid origin"):
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
    # The page can read the reason of the refusal.
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
    app, cors = Upstream(), {"cors": ("https://app.example",)}
    headers = {
        "origin": "https://app.example", "sec-fetch-site": "cross-site",
        "sec-fetch-mode": "cors", "sec-fetch-dest": "empty",
    }  # fmt: skip
    # The upstream refuses requests of other sites' pages, unless it allows them too.
    with protected(app) as upstream, gateway(upstream.url, protection=cors) as served:
        assert served.client.post(CHAT, json={}, headers=headers).status_code == 200
    sent = {name for name, _ in app.asked[0].headers}
    assert not {"referer", *headers} & sent


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


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),
        ("models.lan:80", 200),
        ("x.cluster.local", 200),
        ("192.0.2.1:12434", 200),  # a mapped port; rebinding takes a name
        ("evil.example", 403),
        ("compose-name", 403),
        ("cluster.local.evil.example", 403),
        ("", 403),
    ],
)
@pytest.mark.parametrize("with_key", [False, True])
def test_hosts_beyond_loopback(tmp_path: Path, host: str, status: int, with_key: bool) -> None:
    file = tmp_path / "keys.toml"
    headers = {"host": host, "x-api-key": add_key(file, "alice")}
    more: dict[str, Any] = {"keys": KeyFile(file)} if with_key else {"allow_anonymous": True}
    names = ("models.lan", ".cluster.local")
    with protected(Upstream(), host="0.0.0.0", allowed_hosts=names, **more) as served:
        for path in ("/", "/health", "/v1/models"):
            assert served.client.get(path, headers=headers).status_code == status


@pytest.mark.parametrize(
    ("bound", "server", "host", "allowed"),
    [
        ("10.0.0.7", "10.0.0.7", "10.0.0.7:80", True),
        ("10.0.0.7", "10.0.0.7", "10.0.0.8", False),
        ("models.lan", "10.0.0.7", "10.0.0.7", True),
        ("models.lan", "10.0.0.7", "models.lan", True),
        ("fd00::1", "fd00::1", "[fd00::1]:80", True),
        ("fd00::1", "fd00::1", "[fd00::2]:80", False),
        ("models.lan", "::ffff:10.0.0.7", "10.0.0.7", True),
        ("models.lan", "fe80::1%eth0", "[fe80::1]", True),
        ("models.lan", "fd00::1", "evil.example", False),
        ("models.lan", None, "10.0.0.7", False),
    ],
)
def test_the_address_of_the_socket_is_a_host(
    bound: str, server: str | None, host: str, allowed: bool
) -> None:
    arrived_at = None if server is None else (server, 80)
    assert AllowedHosts((bound,)).allows(host, arrived_at) is allowed


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_rebound_page_is_not_the_same_origin(host: str) -> None:
    upstream = Upstream()
    with protected(upstream, host=host, allow_anonymous=True) as served:
        headers = {"host": "evil.example", "origin": "http://evil.example"}
        assert served.client.post(CHAT, json={}, headers=headers).status_code == 403
    assert upstream.asked == []


_VISIT = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate",
          "sec-fetch-dest": "document"}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/models/evil.example/x?remote=true", {"sec-fetch-site": "cross-site"}, 403),
        ("/models/evil.example/x?remote=true", {"sec-fetch-site": "same-site"}, 403),
        ("/models/evil.example/x?remote=true", _VISIT, 403),
        ("//models/evil.example/x?remote=true", {"sec-fetch-site": "Cross-Site"}, 403),
        ("/models/evil.example/x?remote=true", {"sec-fetch-site": "same-origin"}, 200),
        ("/models/evil.example/x?remote=true", {"sec-fetch-site": "none"}, 200),
        ("/models/evil.example/x?remote=true", {}, 200),
        ("/", _VISIT, 200),
        ("/", _VISIT | {"sec-fetch-dest": "iframe"}, 403),
        ("/", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
    ],
)
def test_a_page_of_another_site_reads_nothing(
    path: str, headers: dict[str, str], status: int
) -> None:
    upstream = Upstream()
    with protected(upstream) as served:
        assert served.client.get(served.url + path, headers=headers).status_code == status
    assert len(upstream.asked) == (status == 200)


def test_listed_pages_may_read_across_sites() -> None:
    headers = {"sec-fetch-site": "cross-site"}
    with protected(Upstream(), cors=("https://app.example",)) as served:
        assert served.client.get("/v1/models", headers=headers).status_code == 403
        headers["origin"] = "https://app.example"
        assert served.client.get("/v1/models", headers=headers).status_code == 200
    with protected(Upstream(), cors=("*",)) as served:
        del headers["origin"]
        assert served.client.get("/v1/models", headers=headers).status_code == 200
