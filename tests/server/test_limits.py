"""Limits of one client: sizes, sessions and room on the disk; and metrics."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from modelpack.errors import StorageFullError, UsageError
from modelpack.registry_server import RegistryServer
from modelpack.registry_server.uploads import Limits
from tests.server.conftest import OCTETS, Client, digest_of


@contextmanager
def limited(tmp_path: Path, **limits: Any) -> Iterator[Client]:
    root = tmp_path / "store"
    with RegistryServer(root, address="127.0.0.1:0", grace=1, limits=Limits(**limits)) as server:
        yield Client(server.url, "a/b")


def code_of(answer: requests.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["errors"][0]["code"]


def test_manifests(tmp_path: Path) -> None:
    with limited(tmp_path, manifest=1000) as client:
        for body in (b"x" * 1001, iter([b"x" * 1001])):
            answer = client.request("PUT", "manifests/v1", data=body)
            assert code_of(answer) == (413, "SIZE_INVALID")
        assert client.request("PUT", "manifests/v1", data=b"x" * 1000).status_code == 400


def test_uploads(tmp_path: Path) -> None:
    with limited(tmp_path, upload=1000) as client:
        client.push_blob(b"x" * 1000)
        large = b"x" * 1001
        url = f"blobs/uploads/?digest={digest_of(large)}"
        assert code_of(client.request("POST", url, data=large, headers=OCTETS)) == (
            413,
            "SIZE_INVALID",
        )
        streamed = client.request("PATCH", client.upload(), data=iter([large]), headers=OCTETS)
        assert code_of(streamed) == (413, "SIZE_INVALID")
        location = client.upload()
        assert client.patch(location, b"x" * 600, 0).status_code == 202
        assert code_of(client.patch(location, b"x" * 600, 600)) == (413, "SIZE_INVALID")
        content = b"x" * 1000
        assert client.patch(location, b"x" * 400, 600).status_code == 202
        assert client.put(location, digest_of(content)).status_code == 201


def test_sessions(tmp_path: Path) -> None:
    with limited(tmp_path, sessions=2) as client:
        first, _ = client.upload(), client.upload()
        refused = client.request("POST", "blobs/uploads/")
        assert code_of(refused) == (429, "TOOMANYREQUESTS")
        assert int(refused.headers["Retry-After"]) > 0
        assert client.request("DELETE", first).status_code == 204
        last = client.upload()
        assert client.patch(last, b"x", 0).status_code == 202
        (data,) = (d for d in tmp_path.rglob("data") if d.stat().st_size)
        os.utime(data, (0, 0))
        client.upload()  # the idle session was cancelled
        assert client.request("GET", last).status_code == 404


def test_sessions_that_begin_together(tmp_path: Path) -> None:
    with limited(tmp_path, sessions=3) as client, ExitStack() as stack:
        host, _, port = client.base.removeprefix("http://").partition(":")
        connections = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            for _ in range(60)
        ]
        for connection in connections:
            connection.sendall(
                f"POST /v2/a/b/blobs/uploads/ HTTP/1.1\r\nHost: {host}:{port}\r\n"
                "Content-Length: 0\r\n\r\n".encode()
            )
        statuses = [connection.recv(1000).split()[1] for connection in connections]
        assert (statuses.count(b"202"), statuses.count(b"429")) == (3, 57)
        assert len(list((tmp_path / "store" / "ingest" / "uploads").iterdir())) == 3


def test_room_to_keep(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    with limited(tmp_path, keep_free=disk.f_blocks * disk.f_frsize + 1) as client:
        url = f"blobs/uploads/?digest={digest_of(b'x')}"
        answer = client.request("POST", url, data=b"x", headers=OCTETS)
        assert answer.status_code == 507
        assert list((tmp_path / "store" / "ingest" / "uploads").glob("*")) == []


def test_room_to_keep_during_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def check_room(folder: Path, size: int, what: str) -> None:
        asked.append(size)
        if len(asked) > 2:
            raise StorageFullError("no room")

    monkeypatch.setattr("modelpack.registry_server.uploads.check_room", check_room)
    with limited(tmp_path, keep_free=5) as client:
        pieces = (bytes(1024 * 1024) for _ in range(64))
        answer = client.request("PATCH", client.upload(), data=pieces, headers=OCTETS)
        assert answer.status_code == 507
    assert asked == [5, 5, 5]


@pytest.mark.parametrize(
    "limits",
    [{"manifest": 0}, {"manifest": 2**23}, {"upload": 0}, {"sessions": 0}, {"keep_free": -1}],
)
def test_limits_that_make_no_sense(limits: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Limits(**limits)


def test_metrics(tmp_path: Path) -> None:
    with limited(tmp_path) as client:
        client.push_blob(b"weights")
        client.upload()
        client.request("GET", f"blobs/{digest_of(b'weights')}")
        client.request("GET", "manifests/none")
        answer = client.request("GET", "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    samples = dict(
        line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#")
    )
    name = "modelpack_registry_requests_total"
    assert samples[f'{name}{{method="POST",code="201"}}'] == "1"
    assert samples[f'{name}{{method="POST",code="202"}}'] == "1"
    assert samples[f'{name}{{method="GET",code="404"}}'] == "1"
    assert samples["modelpack_registry_received_bytes_total"] == "7"
    assert int(samples["modelpack_registry_sent_bytes_total"]) > 7
    assert samples["modelpack_registry_requests_in_progress"] == "1"
    assert samples["modelpack_registry_upload_sessions"] == "1"
