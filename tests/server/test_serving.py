"""RegistryServer: start, stop, and records of requests."""

from __future__ import annotations

import http.client
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from modelpack.artifacts.digest import Digest
from modelpack.errors import StoreError, UsageError
from modelpack.registry_server import RegistryServer, RequestRecord
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from tests.server.conftest import Client, digest_of


def test_free_ports(tmp_path: Path) -> None:
    with registry() as one, registry() as two:
        assert one.host != two.host
        assert one.url == f"http://{one.host}"
        for server in (one, two):
            assert requests.get(f"{server.url}/v2/", timeout=10).status_code == 200
        roots = [server.store.root for server in (one, two)]
    assert not any(root.exists() for root in roots)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{one.url}/v2/", timeout=10)


def test_a_root_of_ones_own_stays(tmp_path: Path) -> None:
    for expected in (404, 200):
        with registry(tmp_path / "store") as server:
            client = Client(server.url, "a/b")
            assert client.request("GET", "manifests/v1").status_code == expected
            client.push_model("v1")


def test_a_server_starts_again(tmp_path: Path) -> None:
    server = RegistryServer(tmp_path / "store", address="127.0.0.1:0", grace=1)
    for _ in range(2):
        with server:
            assert requests.get(f"{server.url}/v2/", timeout=10).status_code == 200
            with pytest.raises(UsageError, match="is already running"):
                server.start()
    server.stop()


def test_the_default_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELPACK_STORE", str(tmp_path / "mine"))
    assert RegistryServer(None).store.root == tmp_path / "mine"
    assert RegistryServer(LayoutStore(tmp_path / "other")).store.root == tmp_path / "other"


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1", ":5000", "localhost:", "127.0.0.1:x", "[::1]", "127.0.0.1:65536"]
)
def test_what_is_no_address(tmp_path: Path, address: str) -> None:
    with pytest.raises(UsageError, match="address"):
        RegistryServer(tmp_path / "store", address=address)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with registry() as server:
        other = RegistryServer(tmp_path / "store", address=server.host)
        with pytest.raises(UsageError, match="cannot listen on"):
            other.start()


def test_a_root_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError):
        RegistryServer(tmp_path)


def test_localhost(tmp_path: Path) -> None:
    with RegistryServer(tmp_path / "store", address="localhost:0", grace=1) as server:
        assert server.host.startswith("localhost:")
        assert requests.get(f"{server.url}/v2/", timeout=10).status_code == 200


def test_ipv6(tmp_path: Path) -> None:
    server = RegistryServer(tmp_path / "store", address="[::1]:5000")
    assert server.host == "[::1]:5000"


def test_records() -> None:
    records: list[RequestRecord] = []
    with registry(on_request=records.append) as server:
        client = Client(server.url, "a/b")
        blob = client.push_blob(b"weights")["digest"]
        client.request("GET", f"blobs/{blob}?x=1", headers={"X-Test": "yes"})
        client.request("HEAD", f"blobs/{blob}")
        client.request("GET", "blobs/nope")
    seen = [(r.method, r.path, r.query, r.status, r.received, r.sent) for r in records]
    path = f"/v2/a/b/blobs/{blob}"
    assert seen[:3] == [
        ("POST", "/v2/a/b/blobs/uploads/", f"digest={blob}", 201, 7, 0),
        ("GET", path, "x=1", 200, 0, 7),
        ("HEAD", path, "", 200, 0, 0),
    ]
    assert records[1].headers["x-test"] == "yes"
    assert records[3].status == 400


SERVE = """
import sys
from modelpack.registry_server import RegistryServer
server = RegistryServer(sys.argv[1], address="127.0.0.1:0")
server.run(on_ready=lambda: print(server.host, flush=True))
print("done", flush=True)
"""


COLLECTED = """
import gc, os, sys
from modelpack.registry_server import RegistryServer
imported = len(gc.get_objects())
def tell():
    print(imported, len(gc.get_objects()), flush=True)
    os._exit(0)
RegistryServer(sys.argv[1], address="127.0.0.1:0").run(on_ready=tell)
"""


def test_the_garbage_collector_passes_over_what_was_imported(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COLLECTED, str(tmp_path / "store")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=60,
    )
    imported, served = map(int, done.stdout.split())
    assert served < imported / 4


DRAINING = """
import sys
from modelpack.http.listener import AppServer
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-length", b"2"), (b"connection", b"keep-alive")]})
    await send({"type": "http.response.body", "body": b"ok"})
server = AppServer(lambda: app, "127.0.0.1:0", name="test server", drain=int(sys.argv[1]))
server.run(on_ready=lambda: print(server.url, flush=True))
"""


@contextmanager
def draining_server(seconds: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that drains for this long after SIGTERM, and its address."""
    with subprocess.Popen(
        [sys.executable, "-c", DRAINING, str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_a_server_that_drains_answers_and_closes_each_connection() -> None:
    with draining_server(3600) as (process, url), requests.Session() as session:
        assert session.get(url, timeout=10).headers["connection"] == "keep-alive"
        process.send_signal(signal.SIGTERM)
        # The signal arrives some requests later, perhaps.
        while session.get(url, timeout=10).headers["connection"] != "close":
            assert process.poll() is None
        for _ in range(3):  # each on a connection of its own
            assert session.get(url, timeout=10).headers["connection"] == "close"
        health = session.get(f"{url}/health", timeout=10)
        assert (health.status_code, health.json()) == (503, {"status": "draining"})
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_a_server_stops_when_it_has_drained() -> None:
    with draining_server(1) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_an_interrupt_does_not_drain() -> None:
    with draining_server(3600) as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_let_requests_finish(tmp_path: Path, number: signal.Signals) -> None:
    content = b"x" * 3_000_000
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(tmp_path / "store")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout is not None
        host = process.stdout.readline().strip()
        connection = http.client.HTTPConnection(host, timeout=20)
        connection.putrequest("POST", f"/v2/a/b/blobs/uploads/?digest={digest_of(content)}")
        connection.putheader("Content-Length", str(len(content)))
        connection.endheaders()
        connection.send(content[:1_000_000])
        requests.get(f"http://{host}/v2/", timeout=10)  # the upload has begun by now
        process.send_signal(number)
        refused = threading.Event()
        for _ in range(2000):  # it accepts no more connections, but continues running requests
            try:
                requests.get(f"http://{host}/v2/", timeout=10)
            except requests.ConnectionError:
                refused.set()
                break
        assert refused.is_set()
        connection.send(content[1_000_000:])
        response = connection.getresponse()
        assert response.status == 201
        response.read()
        connection.close()
        output, problems = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, output, problems) == (0, "done\n", "")
    assert LayoutStore(tmp_path / "store").touch_blob(Digest.of(content))
