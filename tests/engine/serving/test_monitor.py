"""`modelpack logs`, `requests` and `stop` against a running server."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

import modelpack as package
from modelpack.store.layout import LayoutStore
from modelpack_server.api.app import ModelServer
from modelpack_server.cli.monitor import _row
from modelpack_server.gateway import Protection, protect
from modelpack_server.pool.pool import ModelPool
from tests.cli.running import modelpack, succeed
from tests.engine.families.runner.conftest import StoredScripts
from tests.scenarios.processes import start, wait_until
from tests.weights import write_safetensors

LOGGER = logging.getLogger("modelpack_server.tests")
CHAT = {"model": "ai/tiny", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Return the address of a server with a scripted model, ai/tiny."""
    write_safetensors(tmp_path / "files" / "model.safetensors", b"weights")
    store = LayoutStore(tmp_path / "store")
    request = package.PackageRequest(safetensors_dir=tmp_path / "files")
    package.package("ai/tiny", request, store=store)
    protection = Protection(keys=None, report=lambda trace: None)
    with ModelServer(
        lambda: ModelPool(StoredScripts(store)),
        address="127.0.0.1:0",
        wrap=lambda app: protect(app, protection),
    ) as server:
        yield server.url


def listed(url: str) -> list[dict[str, Any]]:
    """Return the latest requests; a client may have the reply before its request has ended."""
    found = requests.get(f"{url}/pool/requests", timeout=30).json()["requests"]
    assert isinstance(found, list)
    return found


def test_requests(url: str) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/api/chat", CHAT | {"model": "absent"})):
        requests.post(url + path, json=body, headers={"X-Request-ID": path[-4:]}, timeout=30)
    wait_until(lambda: not any(one["running"] for one in listed(url)), "the ends of the requests")
    header, failed, done = succeed("requests", "--host", url).out.splitlines()
    assert header.split()[:6] == ["AGE", "CALLER", "MODEL", "PATH", "STATUS", "TOKENS"]
    assert "/api/chat " in failed
    assert " 404 " in failed
    assert " tiny    /v1/chat/completions  200 " in done
    value = succeed("requests", "--json", "--host", url).json
    assert [one["status"] for one in value["requests"]] == [404, 200]
    ids = [one["id"] for one in value["requests"]]
    assert succeed("requests", "--quiet", "--host", url).out.splitlines() == ids


def test_cells_of_requests() -> None:
    running = {"age_s": 130.0, "path": "/v1/completions", "running": True, "caller": "10.0.0.1"}
    cells = ("2 min", "10.0.0.1", "", "/v1/completions", "running", "", "", "")
    assert _row(running) == cells
    done = {
        "age_s": 8000, "path": "/api/chat", "running": False, "status": 200, "key": "team",
        "caller": "10.0.0.1", "model": "m", "prompt_tokens": 12, "completion_tokens": 34,
        "ttft_s": 0.05, "duration_s": 1.2,
    }  # fmt: skip
    cells = ("2 h", "team", "m", "/api/chat", "200", "12+34", "0.050 s", "1.200 s")
    assert _row(done) == cells


def test_logs(url: str) -> None:
    LOGGER.warning("disk is \x1b[2Jfull")
    lines = succeed("logs", "--host", url).out.splitlines()
    assert lines[-1].endswith("WARNING modelpack_server.tests: disk is \ufffd[2Jfull")
    assert succeed("logs", "--json", "--host", url).json["lines"][-1].endswith("full")
    assert modelpack("logs", "--json", "--follow", "--host", url).code == 2
    assert modelpack("logs", "--host", "http://127.0.0.1:9").code == 6
    refused = modelpack("logs", "--host", f"{url}/v1/models/absent")
    assert refused.code == 3
    assert "error: " in refused.err


def test_following_logs(url: str) -> None:
    LOGGER.warning("before")
    with start("logs", "--follow", "--url", url) as process:
        assert process.stdout is not None
        while not process.stdout.readline().endswith(": before\n"):
            assert process.poll() is None
        LOGGER.warning("after")
        assert process.stdout.readline().endswith(": after\n")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_stop_unloads(url: str) -> None:
    requests.post(f"{url}/v1/chat/completions", json=CHAT, timeout=30)
    [name] = succeed("ps", "--quiet", "--host", url).out.split()
    assert succeed("stop", "ai/tiny", "--host", url).out == name
    assert succeed("ps", "--quiet", "--host", url).out == ""
