"""Attacks of web pages and of other clients."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from modelpack.artifacts import media_types
from modelpack.errors import UsageError
from modelpack.registry_server import RegistryServer
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from tests.server.conftest import OCTETS, Client, digest_of, errors, index


def raw_request(server: RegistryServer, request: str) -> tuple[int, bytes]:
    """Send a request that no library sends; return the status and the rest of the response."""
    host, port = server.host.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        text = f"{request} HTTP/1.1\r\nHost: {server.host}\r\nConnection: close\r\n\r\n"
        connection.sendall(text.encode())
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return int(answer.split(b" ", 2)[1]), answer


def files(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file() and p.name != ".lock")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:5000", "localhost.evil.example", ""]
)
def test_dns_rebinding(server: RegistryServer, host: str) -> None:
    for method, path in (("GET", "/v2/"), ("POST", "/v2/a/b/blobs/uploads/"), ("GET", "/nowhere")):
        response = requests.request(method, server.url + path, headers={"Host": host}, timeout=10)
        assert (response.status_code, errors(response)) == (403, ["DENIED"])


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.1.2.3:99", "[::1]:5"]
)
def test_loopback_names(server: RegistryServer, host: str) -> None:
    response = requests.get(server.url + "/v2/", headers={"Host": host}, timeout=10)
    assert response.status_code == 200


def test_names_that_the_owner_allows() -> None:
    with registry(allowed_hosts=["models.lan"]) as server:
        for host, status in (("models.lan:80", 200), ("evil.example", 403), ("localhost", 200)):
            response = requests.get(server.url + "/v2/", headers={"Host": host}, timeout=10)
            assert response.status_code == status


def test_pages_of_a_browser_cannot_write(client: Client) -> None:
    origin = {"Origin": "http://localhost:3000", **OCTETS}
    url = f"blobs/uploads/?digest={digest_of(b'x')}"
    response = client.request("POST", url, data=b"x", headers=origin)
    assert (response.status_code, errors(response)) == (403, ["DENIED"])
    assert client.request("GET", f"blobs/{digest_of(b'x')}").status_code == 404
    assert client.request("GET", "/v2/", headers=origin).status_code == 200


def test_pages_of_other_sites_have_nothing_fetched(server: RegistryServer) -> None:
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200),
                         ("none", 200)):  # fmt: skip
        for path in ("/v2/", "/metrics"):
            response = requests.get(server.url + path, headers={"Sec-Fetch-Site": site}, timeout=10)
            assert response.status_code == status
            assert status == 200 or errors(response) == ["DENIED"]


@pytest.mark.parametrize("path", ["../../etc", "..%2f..%2f..%2fetc", "%2e%2e/%2e%2e", "a/../../b"])
@pytest.mark.parametrize(
    "rest", ["manifests/v1", "tags/list", f"blobs/{'sha256:' + '0' * 64}", "blobs/uploads/x"]
)
def test_no_name_leaves_the_store(server: RegistryServer, path: str, rest: str) -> None:
    for method in ("GET", "PUT", "POST", "DELETE", "PATCH"):
        status, answer = raw_request(server, f"{method} /v2/{path}/{rest}")
        assert status in (400, 404, 405), answer
        assert b'"errors"' in answer


@pytest.mark.parametrize(
    "path",
    ["blobs/sha256:../../index.json", "blobs/sha256:..%2f..%2findex.json", "manifests/..",
     "manifests/..%2f..%2findex.json", "blobs/uploads/..", "blobs/uploads/..%2f..%2f..%2fblobs",
     "blobs/uploads/%00", "blobs/..%2foci-layout"],
)  # fmt: skip
def test_no_digest_tag_or_session_leaves_the_store(server: RegistryServer, path: str) -> None:
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        status, answer = raw_request(server, f"{method} /v2/a/b/{path}")
        assert status in (400, 404, 405), answer
    assert (server.store.root / "index.json").exists()
    assert (server.store.root / "blobs").is_dir()


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Client]:
    store = LayoutStore(tmp_path / "store")
    with RegistryServer(store, address="127.0.0.1:0", grace=1) as writable:
        Client(writable.url, "a/b").push_model("v1")
    with registry(tmp_path / "store", read_only=True) as server:
        before = files(store.root)
        yield Client(server.url, "a/b")
        assert files(store.root) == before


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "blobs/uploads/"),
        ("POST", f"blobs/uploads/?digest={digest_of(b'x')}"),
        ("POST", f"blobs/uploads/?mount={digest_of(b'weights')}"),
        ("PATCH", "blobs/uploads/x"),
        ("PUT", "blobs/uploads/x"),
        ("PUT", "manifests/v2"),
        ("DELETE", "manifests/v1"),
        ("DELETE", f"blobs/{digest_of(b'weights')}"),
    ],
)
def test_read_only_refuses(read_only: Client, method: str, path: str) -> None:
    response = read_only.request(method, path, data=b"x")
    assert (response.status_code, errors(response)) == (405, ["UNSUPPORTED"])
    assert response.headers["Allow"] == "GET, HEAD"


def test_read_only_serves(read_only: Client) -> None:
    assert read_only.request("GET", "manifests/v1").status_code == 200
    assert read_only.request("GET", f"blobs/{digest_of(b'weights')}").content == b"weights"
    assert read_only.request("GET", "tags/list").json()["tags"] == ["v1"]


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:5000", "models.lan:5000"])
def test_remote_access_must_be_asked_for(tmp_path: Path, address: str) -> None:
    with pytest.raises(UsageError, match="not a loopback address"):
        RegistryServer(tmp_path / "store", address=address)
    RegistryServer(tmp_path / "store", address=address, allow_remote=True)


def test_bound_to_all_addresses(tmp_path: Path) -> None:
    with RegistryServer(
        tmp_path / "store", address="0.0.0.0:0", allow_remote=True, grace=1
    ) as server:
        url = f"http://127.0.0.1:{server.host.rpartition(':')[2]}/v2/"
        for host, status in (("192.0.2.7:5000", 200), ("evil.example", 403)):
            assert requests.get(url, headers={"Host": host}, timeout=10).status_code == status


def test_a_blob_is_no_page(client: Client) -> None:
    """An index may claim `text/html` for a blob, but the registry never serves it so."""
    page = client.push_blob(b"<script>alert(1)</script>")
    listed = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX}
    raw = json.dumps({**listed, "manifests": [{**page, "mediaType": "text/html"}]}).encode()
    assert client.put_manifest("v1", raw, media_types.OCI_INDEX).status_code == 201
    answer = client.request("GET", f"manifests/{page['digest']}")
    assert (answer.status_code, errors(answer)) == (404, ["MANIFEST_UNKNOWN"])
    for path in (f"blobs/{page['digest']}", "manifests/v1"):
        assert client.request("GET", path).headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "media_type", ["text/x\r\nX-Evil: 1", "text/\u2603", "a/b\x00", "x" * 70_000, "", "a/b; c=d"]
)
@pytest.mark.parametrize("place", ["mediaType", "artifactType", "child"])
def test_no_header_is_made_of_what_is_no_media_type(
    client: Client, media_type: str, place: str
) -> None:
    value = json.loads(index(client.push_model(None)))
    (value["manifests"][0] if place == "child" else value)[place.replace("child", "mediaType")] = (
        media_type
    )
    answer = client.put_manifest("v1", json.dumps(value).encode(), media_types.OCI_INDEX)
    assert (answer.status_code, errors(answer)) == (400, ["MANIFEST_INVALID"])
    assert "X-Evil" not in answer.headers


@pytest.mark.parametrize("name", ["a%0d%0aX-Evil:1", "a%0aX-Evil:%201", "a%00", "%e2%98%83"])
def test_no_header_is_made_of_a_path(server: RegistryServer, name: str) -> None:
    for path in (f"{name}/b/blobs/uploads/", f"a/b/manifests/{name}", f"a/b/blobs/uploads/{name}"):
        for method in ("GET", "POST", "PUT"):
            status, answer = raw_request(server, f"{method} /v2/{path}")
            assert 400 <= status < 500
            assert b"x-evil" not in answer.partition(b"\r\n\r\n")[0].lower()
