"""Upload sessions: chunks, streams, cuts, restarts, and several clients at once."""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modelpack.registry_server import RegistryServer
from modelpack.testing import registry
from tests.server.conftest import OCTETS, Client, digest_of, errors

CONTENT = random.Random(1).randbytes(3_000_000)
CHUNK = 1_000_000


def stored(server: RegistryServer, content: bytes, algorithm: str = "sha256") -> bool:
    path = server.store.root / "blobs" / Path(*digest_of(content, algorithm).split(":"))
    return path.exists() and path.read_bytes() == content


def sessions(server: RegistryServer) -> list[Path]:
    return sorted((server.store.root / "ingest" / "uploads").glob("*"))


@pytest.mark.parametrize("algorithm", ["sha256", "sha512", "blake3"])
@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("last_in_put", [True, False])
def test_chunks(client: Client, algorithm: str, announced: bool, last_in_put: bool) -> None:
    content = CONTENT + f"{algorithm} {announced} {last_in_put}".encode()
    query = f"?digest-algorithm={algorithm}" if announced else ""
    location = client.request("POST", f"blobs/uploads/{query}").headers["Location"]
    for first in range(0, 2 * CHUNK, CHUNK):
        response = client.patch(location, content[first : first + CHUNK], first)
        assert response.status_code == 202, response.text
        assert response.headers["Range"] == f"0-{first + CHUNK - 1}"
        location = response.headers["Location"]
    rest = content[2 * CHUNK :]
    headers = {"Content-Range": f"{2 * CHUNK}-{len(content) - 1}"} if last_in_put else {}
    if not last_in_put:
        assert client.patch(location, rest, 2 * CHUNK).status_code == 202
        rest = b""
    digest = digest_of(content, algorithm)
    response = client.put(location, digest, rest, **headers)
    assert response.status_code == 201, response.text
    assert response.headers["Docker-Content-Digest"] == digest
    assert client.request("GET", response.headers["Location"]).content == content
    assert client.request("GET", location).status_code == 404


@pytest.mark.parametrize("algorithm", ["sha256", "sha512", "blake3"])
def test_monolithic_put(client: Client, server: RegistryServer, algorithm: str) -> None:
    content = CONTENT + algorithm.encode()
    response = client.put(client.upload(), digest_of(content, algorithm), content)
    assert response.status_code == 201, response.text
    assert stored(server, content, algorithm)


def test_blake3_without_its_package(
    client: Client, server: RegistryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    digest = f"blake3:{'0' * 64}"
    location = client.upload()
    before = sessions(server)
    for refused in (
        client.put(location, digest, CONTENT),
        client.request("POST", f"blobs/uploads/?digest={digest}", data=CONTENT),
        client.request("POST", "blobs/uploads/?digest-algorithm=blake3"),
    ):
        assert sessions(server) == before
        assert refused.status_code == 400, refused.text
        [error] = refused.json()["errors"]
        assert error["code"] == "DIGEST_INVALID"
        assert "the package blake3 is not installed" in error["message"]
    assert client.request("HEAD", f"blobs/{digest}").status_code == 404


@pytest.mark.parametrize("content", [b"", b"x", b"{}"])
def test_tiny_blobs(client: Client, server: RegistryServer, content: bytes) -> None:
    assert client.put(client.upload(), digest_of(content), content).status_code == 201
    location = client.upload()
    assert client.patch(location, content).status_code == 202
    assert client.put(location, digest_of(content)).status_code == 201
    assert client.push_blob(content)["size"] == len(content)
    assert client.request("GET", f"blobs/{digest_of(content)}").content == content


def test_a_stream_of_unknown_length(client: Client, server: RegistryServer) -> None:
    content = CONTENT + b"stream"

    def pieces() -> Iterator[bytes]:
        for first in range(0, len(content), 77_777):
            yield content[first : first + 77_777]

    location = client.upload()
    response = client.request("PATCH", location, data=pieces(), headers=OCTETS)
    assert response.status_code == 202
    assert response.headers["Range"] == f"0-{len(content) - 1}"
    assert client.put(response.headers["Location"], digest_of(content)).status_code == 201
    assert stored(server, content)


def test_out_of_order(client: Client) -> None:
    content = b"0123456789"
    location = client.upload()
    for first, data in ((5, b"56789"), (1, b"1234")):
        response = client.patch(location, data, first)
        assert (response.status_code, response.headers["Range"]) == (416, "0-0")
        assert response.headers["Location"] == location
        assert errors(response) == ["BLOB_UPLOAD_INVALID"]
    assert client.patch(location, content[:5], 0).status_code == 202
    for first in (0, 4, 6):
        assert client.patch(location, content[5:], first).status_code == 416
        response = client.put(
            location, digest_of(content), b"x", **{"Content-Range": f"{first}-{first}"}
        )
        assert response.status_code == 416
    status = client.request("GET", location)
    assert (status.status_code, status.headers["Range"]) == (204, "0-4")
    assert status.headers["Location"] == location
    assert client.patch(status.headers["Location"], content[5:], 5).status_code == 202
    assert client.put(location, digest_of(content)).status_code == 201


def test_one_byte_may_be_sent_again(client: Client) -> None:
    """`Range: 0-0` means nothing or one byte; a client may start again in both cases."""
    location = client.upload()
    assert client.patch(location, b"a", 0).headers["Range"] == "0-0"
    assert client.patch(location, b"xyz", 0).headers["Range"] == "0-2"
    assert client.put(location, digest_of(b"xyz")).status_code == 201


@pytest.mark.parametrize(
    ("content_range", "code"),
    [("0-3", "SIZE_INVALID"), ("0-5", "SIZE_INVALID"), ("bytes 0-4/5", "BLOB_UPLOAD_INVALID"),
     ("4-0", "BLOB_UPLOAD_INVALID"), ("", "BLOB_UPLOAD_INVALID")],
)  # fmt: skip
def test_a_content_range_that_lies(client: Client, content_range: str, code: str) -> None:
    location = client.upload()
    headers = {**OCTETS, "Content-Range": content_range}
    response = client.request("PATCH", location, data=b"01234", headers=headers)
    assert (response.status_code, errors(response)) == (400, [code])
    assert client.request("GET", location).headers["Range"] == "0-0"


@pytest.mark.parametrize("claimed", [3, 7])
def test_a_content_range_that_lies_about_a_stream(client: Client, claimed: int) -> None:
    location = client.upload()
    headers = {**OCTETS, "Content-Range": f"0-{claimed - 1}"}
    response = client.request("PATCH", location, data=iter([b"01234"]), headers=headers)
    assert (response.status_code, errors(response)) == (400, ["SIZE_INVALID"])


def test_cancel(client: Client, server: RegistryServer) -> None:
    location = client.upload()
    client.patch(location, b"abc")
    before = len(sessions(server))
    assert client.request("DELETE", location).status_code == 204
    assert len(sessions(server)) == before - 1
    for method in ("GET", "DELETE", "PATCH"):
        assert client.request(method, location).status_code == 404
    assert client.put(location, digest_of(b"abc")).status_code == 404


def test_a_wrong_digest_publishes_nothing(client: Client, server: RegistryServer) -> None:
    wrong = digest_of(b"something else")
    before = sessions(server)
    location = client.upload()
    client.patch(location, b"abc")
    put = [client.put(location, wrong), client.put(client.upload(), wrong, b"abc")]
    post = client.request("POST", f"blobs/uploads/?digest={wrong}", data=b"abc", headers=OCTETS)
    for response in (*put, post):
        assert (response.status_code, errors(response)) == (400, ["DIGEST_INVALID"])
    assert client.request("HEAD", f"blobs/{wrong}").status_code == 404
    assert client.request("HEAD", f"blobs/{digest_of(b'abc')}").status_code == 404
    assert sessions(server) == before


def test_a_malformed_digest_does_not_end_the_session(client: Client) -> None:
    location = client.upload()
    client.patch(location, b"abc")
    assert client.put(location, "md5:x").status_code == 400
    assert client.put(location, digest_of(b"abc")).status_code == 201


def test_a_session_belongs_to_its_repository(client: Client) -> None:
    location = client.upload()
    other = location.replace(client.name, "test/somewhere-else")
    assert client.request("GET", other).status_code == 404
    assert client.request("GET", location).status_code == 204


def cut_chunk(server: RegistryServer, location: str, chunk: bytes, first: int, sent: int) -> None:
    """Send `sent` bytes of a chunk and cut the connection."""
    host, port = server.host.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = (
            f"PATCH {location} HTTP/1.1\r\nHost: {server.host}\r\n"
            f"Content-Type: application/octet-stream\r\nContent-Length: {len(chunk)}\r\n"
            f"Content-Range: {first}-{first + len(chunk) - 1}\r\n\r\n"
        )
        connection.sendall(head.encode() + chunk[:sent])


def status_after_cut(client: Client, location: str, at_least: int) -> int:
    """Return the staged bytes after the server has detected the cut."""
    for _ in range(2000):
        response = client.request("GET", location)
        assert response.status_code == 204
        staged = int(response.headers["Range"].removeprefix("0-")) + 1
        if staged > at_least:
            return staged
    raise AssertionError(f"the bytes of the cut chunk never arrived, {staged} are there")


@pytest.mark.scenario(29)
def test_a_cut_inside_the_third_chunk(client: Client, server: RegistryServer) -> None:
    content = CONTENT + b"cut"
    location = client.upload()
    for first in (0, CHUNK):
        assert client.patch(location, content[first : first + CHUNK], first).status_code == 202
    cut_chunk(server, location, content[2 * CHUNK :], 2 * CHUNK, 600_000)
    staged = status_after_cut(client, location, 2 * CHUNK)
    assert 2 * CHUNK < staged <= 2 * CHUNK + 600_000
    response = client.patch(location, content[staged:], staged)
    if response.status_code == 416:  # more of the cut chunk came after the status
        staged = status_after_cut(client, location, staged)
        response = client.patch(location, content[staged:], staged)
    assert response.status_code == 202, response.text
    assert client.put(location, digest_of(content)).status_code == 201
    assert stored(server, content)


def test_a_session_survives_the_server(tmp_path: Path) -> None:
    content = CONTENT + b"restart"
    with registry(tmp_path / "store") as server:
        location = Client(server.url, "a/b").upload()
        Client(server.url, "a/b").patch(location, content[:CHUNK], 0)
    with registry(tmp_path / "store") as server:
        client = Client(server.url, "a/b")
        status = client.request("GET", location)
        assert (status.status_code, status.headers["Range"]) == (204, f"0-{CHUNK - 1}")
        assert client.patch(location, content[CHUNK:], CHUNK).status_code == 202
    with registry(tmp_path / "store") as server:
        assert Client(server.url, "a/b").put(location, digest_of(content)).status_code == 201
        assert stored(server, content)
        assert sessions(server) == []


def test_idle_sessions_expire(tmp_path: Path) -> None:
    with registry(tmp_path / "store") as server:
        old, young = (Client(server.url, "a/b").upload() for _ in range(2))
        directory = server.store.root / "ingest" / "uploads"
        long_ago = os.stat(directory).st_mtime - 25 * 3600
        os.utime(directory / old.rpartition("/")[2] / "data", (long_ago, long_ago))
        # An incomplete session after a crash.
        (directory / "12345678-1234-4234-8234-123456789abc").mkdir()
        (directory / "manifest-1").touch()
        for name in ("12345678-1234-4234-8234-123456789abc", "manifest-1"):
            os.utime(directory / name, (long_ago, long_ago))
    with registry(tmp_path / "store") as server:
        client = Client(server.url, "a/b")
        new = client.upload()
        assert client.request("GET", old).status_code == 404
        assert client.request("GET", young).status_code == 204
        names = {location.rpartition("/")[2] for location in (young, new)}
        assert {path.name for path in sessions(server)} == names


def test_a_later_request_takes_the_session_over(client: Client, server: RegistryServer) -> None:
    """A client reconnects while the server still waits for its old connection."""
    location = client.upload()
    old = http.client.HTTPConnection(server.host, timeout=10)
    old.putrequest("PATCH", location)
    old.putheader("Content-Length", "4000000")
    old.putheader("Content-Type", "application/octet-stream")
    old.endheaders()
    old.send(b"a" * 2_000_000)
    status_after_cut(client, location, 1)
    response = client.patch(location, b"", None)
    assert response.status_code == 202
    staged = int(response.headers["Range"].removeprefix("0-")) + 1
    old.send(b"b" * 2_000_000)
    answer = old.getresponse()
    assert answer.status == 409
    assert json.loads(answer.read())["errors"][0]["code"] == "BLOB_UPLOAD_INVALID"
    old.close()
    assert client.put(location, digest_of(b"a" * staged)).status_code == 201


def test_many_clients_upload_one_blob(client: Client, server: RegistryServer) -> None:
    content = CONTENT + b"concurrent"
    together = threading.Barrier(6)

    def upload(_: int) -> int:
        location = client.upload()
        together.wait(timeout=20)
        assert client.patch(location, content[:CHUNK], 0).status_code == 202
        status: int = client.put(location, digest_of(content), content[CHUNK:]).status_code
        return status

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(upload, range(6))) == [201] * 6
    assert stored(server, content)


def test_a_refused_upload_can_be_answered(client: Client) -> None:
    """The response reaches a client that is still sending."""
    response = client.put(client.upload() + "0", digest_of(b""), b"x" * 20_000_000)
    assert response.status_code == 404


def test_a_blob_that_does_not_fit_is_refused_at_once(
    client: Client, server: RegistryServer
) -> None:
    connection = http.client.HTTPConnection(server.host, timeout=10)
    connection.putrequest("PATCH", client.upload())
    connection.putheader("Content-Length", str(1 << 60))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 507
    assert "no room" in json.loads(response.read())["errors"][0]["message"]
    connection.close()
