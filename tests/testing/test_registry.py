"""`modelpack.testing.registry`, as users' tests use it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import requests

import modelpack.testing
from modelpack.registry_server import RequestRecord


def test_a_registry_for_the_length_of_a_block() -> None:
    with modelpack.testing.registry() as server:
        root = server.store.root
        assert requests.get(f"{server.url}/v2/", timeout=10).json() == {}
        assert (root / "oci-layout").is_file()
    assert not root.exists()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.url}/v2/", timeout=10)


def test_it_ends_with_an_error_in_the_block_too(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), modelpack.testing.registry(tmp_path / "s") as server:
        raise ZeroDivisionError
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.url}/v2/", timeout=10)
    assert (tmp_path / "s" / "oci-layout").is_file()


def test_options() -> None:
    records: list[RequestRecord] = []
    with modelpack.testing.registry(
        read_only=True, allowed_hosts=["models.lan"], on_request=records.append
    ) as server:
        headers = {"Host": "models.lan"}
        assert requests.get(f"{server.url}/v2/", headers=headers, timeout=10).status_code == 200
        assert requests.post(f"{server.url}/v2/a/blobs/uploads/", timeout=10).status_code == 405
    assert [record.status for record in records] == [200, 405]


def test_nothing_is_printed(tmp_path: Path) -> None:
    code = """
import socket, sys, requests, modelpack.testing
with modelpack.testing.registry() as server:
    requests.get(server.url + "/v2/", timeout=10)
    host, port = server.host.split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"nonsense\\r\\n\\r\\n")
        connection.recv(1000)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
