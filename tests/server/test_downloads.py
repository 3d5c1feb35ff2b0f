"""Blob downloads: ranges, validators, and clients that disconnect."""

from __future__ import annotations

import os
import random
import socket

import pytest

from modelpack.registry_server import RegistryServer
from tests.server.conftest import Client, digest_of

CONTENT = random.Random(2).randbytes(3_000_001)
DIGEST = digest_of(CONTENT)
SIZE = len(CONTENT)


@pytest.fixture(scope="module")
def blob(server: RegistryServer) -> Client:
    client = Client(server.url, "ranges/m")
    client.push_blob(CONTENT)
    client.push_blob(b"")
    return client


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=500-1499", 500, 1499),
        ("bytes=1000000-", 1_000_000, SIZE - 1),
        ("bytes=-500", SIZE - 500, SIZE - 1),
        ("bytes=2999999-5000000", 2_999_999, SIZE - 1),
        ("bytes=0-0", 0, 0),
        ("bytes=1048576-2097151", 1_048_576, 2_097_151),
    ],
)
def test_ranges(blob: Client, asked: str, first: int, last: int) -> None:
    response = blob.request("GET", f"blobs/{DIGEST}", headers={"Range": asked})
    assert response.status_code == 206
    assert response.headers["Content-Range"] == f"bytes {first}-{last}/{SIZE}"
    assert response.headers["Content-Length"] == str(last - first + 1)
    assert response.content == CONTENT[first : last + 1]


@pytest.mark.parametrize("asked", ["bytes=500-0", f"bytes={SIZE}-", "bytes=9999999-", "bytes=-0"])
def test_ranges_beyond_the_end(blob: Client, asked: str) -> None:
    response = blob.request("GET", f"blobs/{DIGEST}", headers={"Range": asked})
    assert response.status_code == 416
    assert response.headers["Content-Range"] == f"bytes */{SIZE}"
    assert (response.headers["Content-Length"], response.content) == ("0", b"")


@pytest.mark.parametrize("asked", ["bytes=0-1,5-6", "lines=1-2", "bytes=x"])
def test_ranges_that_are_not_understood(blob: Client, asked: str) -> None:
    response = blob.request("GET", f"blobs/{DIGEST}", headers={"Range": asked})
    assert (response.status_code, response.content) == (200, CONTENT)


@pytest.mark.parametrize(
    ("validator", "status"),
    [
        (f'"{DIGEST}"', 206),
        ('"other"', 200),
        (f'W/"{DIGEST}"', 200),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 200),
    ],
)
def test_if_range(blob: Client, validator: str, status: int) -> None:
    headers = {"Range": "bytes=1-2", "If-Range": validator}
    response = blob.request("GET", f"blobs/{DIGEST}", headers=headers)
    assert response.status_code == status
    assert response.content == (CONTENT[1:3] if status == 206 else CONTENT)
    assert response.headers["ETag"] == f'"{DIGEST}"'


def test_head_ignores_ranges(blob: Client) -> None:
    response = blob.request("HEAD", f"blobs/{DIGEST}", headers={"Range": "bytes=1-2"})
    assert (response.status_code, response.headers["Content-Length"]) == (200, str(SIZE))
    assert response.headers["Accept-Ranges"] == "bytes"


def test_the_empty_blob(blob: Client) -> None:
    digest = digest_of(b"")
    response = blob.request("GET", f"blobs/{digest}")
    assert (response.status_code, response.content) == (200, b"")
    response = blob.request("GET", f"blobs/{digest}", headers={"Range": "bytes=0-"})
    assert (response.status_code, response.headers["Content-Range"]) == (416, "bytes */0")


def test_every_repository_has_every_blob(server: RegistryServer, blob: Client) -> None:
    """All repositories share a store; a client that checks first does not upload stored blobs."""
    other = Client(server.url, "ranges/other")
    assert other.request("HEAD", f"blobs/{DIGEST}").status_code == 200


def open_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def test_clients_that_hang_up_cost_nothing(server: RegistryServer) -> None:
    content = random.Random(3).randbytes(30_000_000)  # more than sockets buffer
    client = Client(server.url, "ranges/hangup")
    client.push_blob(content)
    host, port = server.host.split(":")
    before = open_descriptors()
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            path = client.path(f"blobs/{digest_of(content)}")
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {server.host}\r\n\r\n".encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
    for _ in range(1000):
        if open_descriptors() <= before + 2:  # kept-alive connections open and close
            break
        client.request("GET", "tags/list")
    assert open_descriptors() <= before + 2


def test_a_blob_that_shrinks_is_not_passed_off_as_whole(server: RegistryServer) -> None:
    content = random.Random(4).randbytes(30_000_000)
    client = Client(server.url, "ranges/shrinks")
    client.push_blob(content)
    path = server.store.root / "blobs" / digest_of(content).replace(":", "/")
    host, port = server.host.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        url = client.path(f"blobs/{digest_of(content)}")
        connection.sendall(f"GET {url} HTTP/1.1\r\nHost: {server.host}\r\n\r\n".encode())
        received = len(connection.recv(4096))
        path.chmod(0o644)
        os.truncate(path, 1000)
        while chunk := connection.recv(1 << 20):
            received += len(chunk)
    assert received < len(content)
