"""The access log of `modelpack registry serve`."""

from __future__ import annotations

import base64
import json
import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from modelpack.registry_server.metrics import RequestRecord, access_log
from modelpack.testing import registry
from tests.conftest import ROOT
from tests.server.conftest import Client

TEXT = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d GET /v2/a/b/tags/list 404, "
    r"received 0 B, sent \d+ B, \d+\.\d ms\Z"
)


def line_of(caplog: pytest.LogCaptureFixture, record: RequestRecord, *, as_json: bool) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, "modelpack.requests"):
        access_log(as_json=as_json)(record)
    return "".join(record.getMessage() for record in caplog.records)


def test_a_line_for_each_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "modelpack.requests")
    with registry(on_request=access_log(as_json=True)) as server:
        client = Client(server.url, "a/b")
        digest = client.push_blob(b"weights")["digest"]
        client.request("GET", f"blobs/{digest}")
        requests.get(f"{server.url}/v2/", timeout=20)
        requests.get(f"{server.url}/v2", timeout=20)
        requests.get(f"{server.url}/nothing", timeout=20)
    records = [
        json.loads(record.getMessage())
        for record in caplog.records
        if record.name == "modelpack.requests"
    ]
    # A line is written after the response, so the next request's may come first.
    post, get, nothing = sorted(records, key=lambda record: (201, 200, 404).index(record["status"]))
    del post["time"], post["duration_ms"]
    assert post == {
        "method": "POST",
        "path": "/v2/a/b/blobs/uploads/",
        "status": 201,
        "received_bytes": 7,
        "sent_bytes": 0,
    }
    assert (get["path"], get["status"]) == (f"/v2/a/b/blobs/{digest}", 200)
    assert (get["received_bytes"], get["sent_bytes"]) == (0, 7)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", get["time"])
    assert 0 < get["duration_ms"] < 60_000
    assert nothing["status"] == 404


def test_text(caplog: pytest.LogCaptureFixture) -> None:
    record = RequestRecord("GET", "/v2/a/b/tags/list", "", 404, 0, 90, {}, 0.00123)
    line = line_of(caplog, record, as_json=False)
    assert TEXT.match(line)
    assert line.endswith("sent 90 B, 1.2 ms")


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "JSON"])
@pytest.mark.parametrize("path", ["/v2/x\nGET /forged 200", "/v2/\x1b[2J", "/v2/\u202e", "/é x"])
def test_a_path_cannot_forge_lines(
    caplog: pytest.LogCaptureFixture, path: str, as_json: bool
) -> None:
    line = line_of(caplog, RequestRecord("GET", path, "", 404, 0, 0), as_json=as_json)
    assert line.isascii()
    assert line.isprintable()
    assert "GET /forged" not in line


def test_long_paths_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    line = line_of(caplog, RequestRecord("GET", "/" * 60_000, "", 404, 0, 0), as_json=True)
    assert len(line) < 2_000


def test_a_client_that_left(caplog: pytest.LogCaptureFixture) -> None:
    record = RequestRecord("GET", "/v2/", "", None, 0, 0)
    assert json.loads(line_of(caplog, record, as_json=True))["status"] == 499


@pytest.mark.parametrize("status", [401, 403, 503])
def test_a_probe_that_fails_is_logged(caplog: pytest.LogCaptureFixture, status: int) -> None:
    assert line_of(caplog, RequestRecord("GET", "/v2/", "", status, 0, 0), as_json=True)
    assert not line_of(caplog, RequestRecord("GET", "/v2/", "", 200, 0, 0), as_json=True)


def test_secrets_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "modelpack.requests")
    with registry(on_request=access_log(as_json=True)) as server:
        client = Client(server.url, "a/b")
        location = client.request("POST", "blobs/uploads/").headers["Location"]
        secret = {"Authorization": "Basic " + base64.b64encode(b"ada:s3cret").decode()}
        client.request("GET", f"{location}?_state=hidden", headers=secret)
        client.request("DELETE", location)
    session = location.rpartition("/")[2]
    assert f"/blobs/uploads/{session[:8]}..." in caplog.text
    for hidden in (session, "hidden", secret["Authorization"].split()[1], "s3cret"):
        assert hidden not in caplog.text


@contextmanager
def serving(root: Path, *words: str, stderr: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run the command; yield its host:port and the process."""
    command = [sys.executable, "-m", "modelpack", "registry", "serve", "--addr", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*command, "--root", root, *words],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        host = process.stdout.readline().strip()
        requests.get(f"http://{host}/v2/", timeout=20)
        requests.get(f"http://{host}/v2/a/b/tags/list?n=secret", timeout=20)
        yield host, process
    finally:
        process.terminate()
        process.communicate(timeout=30)


def logged(root: Path, *words: str) -> list[str]:
    """Return the lines that the command writes to a pipe after the one that names the store."""
    with serving(root, *words, stderr=subprocess.PIPE) as (_, process):
        process.terminate()
        _, err = process.communicate(timeout=30)
    first, *others = err.splitlines() or [""]
    assert "serving" in first or "-q" in words
    return others


def test_the_command_writes_json_to_a_pipe(tmp_path: Path) -> None:
    [line] = logged(tmp_path / "root")
    assert json.loads(line)["path"] == "/v2/a/b/tags/list"


@pytest.mark.long
def test_formats_of_the_command(tmp_path: Path) -> None:
    [line] = logged(tmp_path / "root", "--log-format", "text")
    assert TEXT.match(line)
    assert logged(tmp_path / "root", "--no-access-log") == []
    assert logged(tmp_path / "root", "-q") == []


@pytest.mark.long
@pytest.mark.parametrize("words", [[], ["--log-format", "json"]])
def test_the_command_writes_text_to_a_terminal(tmp_path: Path, words: list[str]) -> None:
    ours, terminal = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen:
        try:
            with serving(tmp_path / "root", *words, stderr=terminal):
                seen = b""
                while b"tags/list" not in seen or not seen.endswith(b"\n"):
                    seen += screen.read(4096)
        finally:
            os.close(terminal)
    last = seen.decode().splitlines()[-1]
    assert json.loads(last) if words else TEXT.match(last)
