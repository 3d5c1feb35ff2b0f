"""skopeo and umoci as clients and as readers of what clients pushed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from modelpack.registry_server import RegistryServer
from tests.peers import require
from tests.server.conftest import Client, digest_of, index


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def layout_digests(layout: Path) -> list[str]:
    value: dict[str, Any] = json.loads((layout / "index.json").read_text())
    return [entry["digest"] for entry in value["manifests"]]


@pytest.mark.peer("skopeo")
@pytest.mark.parametrize("nested", [False, True])
def test_skopeo_copies_in_and_out(
    client: Client, server: RegistryServer, tmp_path: Path, nested: bool
) -> None:
    skopeo = require("skopeo")
    raw = client.push_model("v1", b"w" * 300_000)
    if nested:
        raw = index(raw)
        client.put_manifest("v1", raw, json.loads(raw)["mediaType"])
    here = f"docker://{server.host}/{client.name}"
    layout = f"oci:{tmp_path / 'layout'}"

    run(skopeo, "copy", "--all", "--src-tls-verify=false", f"{here}:v1", f"{layout}:v1")
    assert layout_digests(tmp_path / "layout") == [digest_of(raw)]
    client.request("DELETE", f"manifests/{digest_of(raw)}")

    copy = ["copy", "--all", "--preserve-digests", "--dest-tls-verify=false"]
    run(skopeo, *copy, f"{layout}:v1", f"{here}-back:v2")
    back = Client(client.base, client.name + "-back")
    assert back.request("GET", "manifests/v2").content == raw
    inspected = run(skopeo, "inspect", "--raw", "--tls-verify=false", f"{here}-back:v2")
    assert inspected.encode() == raw


@pytest.mark.peer("skopeo")
def test_skopeo_lists_and_deletes(client: Client, server: RegistryServer) -> None:
    skopeo = require("skopeo")
    client.push_model("v1")
    client.push_model("v2", b"other")
    here = f"docker://{server.host}/{client.name}"
    listed = json.loads(run(skopeo, "list-tags", "--tls-verify=false", here))
    assert listed["Tags"] == ["v1", "v2"]
    run(skopeo, "delete", "--tls-verify=false", f"{here}:v1")
    assert client.request("GET", "tags/list").json()["tags"] == ["v2"]


@pytest.mark.peer("skopeo")
@pytest.mark.peer("umoci")
def test_the_store_is_a_layout_while_it_is_served(client: Client, server: RegistryServer) -> None:
    skopeo, umoci = require("skopeo"), require("umoci")
    raw = client.push_model("v1")
    client.push_model(None, b"by digest only")
    client.upload()
    name = f"docker.io/{client.name}:v1"
    assert name in run(umoci, "ls", "--layout", server.store.root).split()
    read = run(skopeo, "inspect", "--raw", f"oci:{server.store.root}:{name}")
    assert read.encode() == raw
