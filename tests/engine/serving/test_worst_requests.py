"""A server stays responsive and small under the most expensive requests."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles

import fastapi.routing
import pytest
from starlette.testclient import TestClient

import modelpack
from modelpack.operations.package import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_server.api.app import create_app
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.serving.test_api import wait_until_ready
from tests.engine.serving.tiny import write_tiny
from tests.engine.serving.worst_requests import requests_to, send

CONTEXT = 131_072


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[int, str]]:
    """A server for a model with a long context: its process and its address."""
    store = LayoutStore(tmp_path / "store")
    files = write_tiny(tmp_path / "files")
    config = json.loads((files / "config.json").read_text())
    (files / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    modelpack.package("team/tiny", PackageRequest(safetensors_dir=files), store=store)
    process = subprocess.Popen(
        [sys.executable, "-m", "modelpack", "serve", "team/tiny", "--port", "0", "--device", "cpu",
         "--store", str(store.root), "--kv-cache-bytes", "100000000"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        wait_until_ready(url)
        yield process.pid, url.removeprefix("http://")
    finally:
        process.kill()
        process.communicate()


def resident(pid: int) -> int:
    """Return the peak memory of a process in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def time_of_health(address: str) -> float:
    """Return the seconds that GET /health takes on a new connection."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection(address, timeout=300)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()
    return time.perf_counter() - began


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_health_answers_whatever_is_sent(server: tuple[int, str]) -> None:
    pid, address = server
    before = resident(pid)
    sender = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("worst_requests.py"), address, "team/tiny", "2"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    times = []
    try:
        while sender.poll() is None:
            times.append(time_of_health(address))
            time.sleep(0.02)  # the interval of the measurements, not a synchronisation
        assert sender.stdout is not None
        replies = json.loads(sender.stdout.read())
    finally:
        sender.kill()
        sender.communicate()
    deciles = quantiles(times, n=10)
    grown = resident(pid) - before
    print(f"{len(times)} calls, median {deciles[4]:.3f} s, p90 {deciles[8]:.3f} s, "
          f"worst {max(times):.3f} s, {grown / 2**20:.0f} MiB, {replies}")  # fmt: skip
    assert set(replies) <= {"400", "404", "413", "503", "529"}, replies
    assert len(times) > 20
    assert deciles[4] < 0.1
    assert deciles[8] < 0.5
    assert grown < 1024 * 2**20


def test_no_route_is_built_at_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building all of them takes the event loop 100 ms."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a route is built")

    store = LayoutStore(tmp_path / "store")
    with TestClient(create_app(ModelPool(StoreCatalogue(store, EngineConfig())))) as client:
        monkeypatch.setattr(fastapi.routing, "get_dependant", refuse)
        for path in ("/health", "/v1/models", "/api/tags", "/models", "/nothing"):
            assert client.get(path).status_code in (200, 404)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_each_of_them_is_refused_at_once(server: tuple[int, str]) -> None:
    _, address = server
    slow = {}
    for name, path, body in requests_to("team/tiny"):
        content = body()
        began = time.perf_counter()
        status = send(address, path, content)
        took = time.perf_counter() - began
        print(f"{name:20} {len(content) / 2**20:6.1f} MiB {status} {took:.2f} s")
        assert status in ("400", "404", "413"), (name, status)
        if took > 10:
            slow[name] = took
    assert not slow
