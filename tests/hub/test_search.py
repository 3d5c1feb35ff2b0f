"""`modelpack search`: in the store, in a registry and on a hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelpack.registry_server import RegistryServer
from modelpack.testing import registry
from tests.cli.running import modelpack, succeed
from tests.hub.hub import TOKEN, FakeHub
from tests.models import tiny_gguf
from tests.registry.faults import answering


@pytest.fixture
def stocked(hub: FakeHub) -> FakeHub:
    hub.downloads = {"Org/Tiny-GGUF": 7, "Org/tiny": 1234, "Org/Other": 99}
    for name in hub.downloads:
        hub.put(name, {"config.json": b"{}"})
    return hub


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RegistryServer]:
    """A registry with team/tiny, team/other and users/tiny; the store is empty."""
    gguf = tiny_gguf(tmp_path)
    with registry() as running:
        for name in ("team/tiny:v1", "team/other:v1", "users/tiny:v2"):
            reference = f"{running.host}/{name}"
            succeed("package", "--gguf", gguf, "--push", reference)
            succeed("rm", reference)
        yield running


def test_the_store(tmp_path: Path) -> None:
    for name in ("tiny", "team/tiny:v1", "team/other"):
        succeed("package", "--gguf", tiny_gguf(tmp_path), name)
    header, *rows = succeed("search", "TINY").out.splitlines()
    assert header.split() == ["NAME", "WHERE", "SIZE", "DOWNLOADS"]
    assert [row.split()[:2] for row in rows] == [["team/tiny:v1", "store"], ["tiny", "store"]]
    assert rows[0].split()[3] in ("B", "kB")
    assert succeed("search", "-q", "tiny", "--limit", "1").out == "team/tiny:v1"
    assert succeed("search", "absent").out.split() == header.split()


def test_a_registry(server: RegistryServer) -> None:
    assert succeed("search", "tiny").out.splitlines()[1:] == []
    found = succeed("search", "Tiny", "--registry", server.host, "-q").out.splitlines()
    assert found == [f"{server.host}/team/tiny", f"{server.host}/users/tiny"]
    value = succeed("search", "tiny", "--json", "--registry", f"{server.host}/users").json
    assert value["models"] == [{"name": f"{server.host}/users/tiny", "where": server.host}]
    assert modelpack("search", "tiny", "--registry", "not a host").code == 2
    assert modelpack("search", "tiny", "--registry", "127.0.0.1:9").code == 6


def test_the_hub(stocked: FakeHub, server: RegistryServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    rows = succeed("search", "tiny", "--hub", "--registry", server.host).out.splitlines()[1:]
    assert [row.split() for row in rows] == [
        [f"{server.host}/team/tiny", server.host],
        [f"{server.host}/users/tiny", server.host],
        ["hf.co/Org/tiny", "hub", "1234"],
        ["hf.co/Org/Tiny-GGUF", "hub", "7"],
    ]
    assert stocked.requests[-1].headers["authorization"] == f"Bearer {TOKEN}"
    assert succeed("search", "tiny", "--hub", "--limit", "1", "-q").out == "hf.co/Org/tiny"
    value = succeed("search", "other", "--hub", "--json").json
    assert value["models"] == [{"name": "hf.co/Org/Other", "where": "hub", "downloads": 99}]


def test_a_term_is_not_part_of_the_url(stocked: FakeHub) -> None:
    assert succeed("search", "tiny&limit=0#?/é", "--hub", "-q").out == ""
    assert stocked.requests[-1].query["search"] == ["tiny&limit=0#?/é"]


@pytest.mark.parametrize("answer", [b"{}", b"[{}]", b"[1]", b"<html>"])
def test_what_is_no_list_of_models(stocked: FakeHub, answer: bytes) -> None:
    stocked.faults.add("GET", "/api/models", answering(200, answer))
    failed = modelpack("search", "tiny", "--hub")
    assert (failed.code, failed.out) == (1, "")
    assert "search for 'tiny' on the hub" in failed.err


def test_names_cannot_control_the_terminal(stocked: FakeHub) -> None:
    names = [{"id": "Org/\x1b[2J\nname", "downloads": "many"}]
    stocked.faults.add("GET", "/api/models", answering(200, json.dumps(names).encode()))
    assert succeed("search", "x", "--hub").out.splitlines()[1].split() == [
        "hf.co/Org/\ufffd[2J\ufffdname", "hub",
    ]  # fmt: skip


def test_offline(stocked: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    failed = modelpack("search", "tiny", "--hub")
    assert failed.code == 6
    assert "HF_HUB_OFFLINE" in failed.err
    assert stocked.requests == []
