"""`modelpack search`: in the store, in a registry and on a hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from modelpack.hub import search as search_module
from modelpack.registry_server import RegistryServer
from modelpack.testing import registry
from tests.cli.running import modelpack, succeed
from tests.hub.hub import TOKEN, FakeHub, as_json
from tests.models import tiny_gguf
from tests.registry.faults import Exchange, answering
from tests.registry.faulty import FaultyRegistry
from tests.registry.faulty_content import Reply


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
    assert header.split() == ["NAME", "WHERE", "SIZE", "DOWNLOADS", "LIKES", "LICENCE"]
    assert [row.split()[:2] for row in rows] == [["team/tiny:v1", "store"], ["tiny", "store"]]
    assert rows[0].split()[3] in ("B", "kB")
    assert succeed("search", "-q", "tiny", "--limit", "1").out == "team/tiny:v1"
    assert succeed("search", "absent").out.split() == header.split()
    assert len(succeed("search").out.splitlines()) == 4  # without a term, all


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


def test_likes_and_licences(stocked: FakeHub) -> None:
    stocked.details = {
        "Org/tiny": {"likes": 5, "tags": ["gguf", "license:apache-2.0", "license:mit"]},
        "Org/Tiny-GGUF": {"likes": "many", "tags": ["license:\x1b[2J", 1]},
        "Org/Other": {"likes": None, "tags": "license:mit"},
    }
    rows = succeed("search", "tiny", "--hub").out.splitlines()[1:]
    assert [row.split() for row in rows] == [
        ["hf.co/Org/tiny", "hub", "1234", "5", "apache-2.0"],
        ["hf.co/Org/Tiny-GGUF", "hub", "7", "\ufffd[2J"],
    ]
    value = succeed("search", "tiny", "--hub", "--json", "--limit", "1").json["models"]
    assert value == [
        {"name": "hf.co/Org/tiny", "where": "hub", "downloads": 1234, "likes": 5,
         "licence": "apache-2.0"},
    ]  # fmt: skip
    [other] = succeed("search", "other", "--hub", "--json").json["models"]
    assert other.keys() == {"name", "where", "downloads"}


class DockerHub:
    """The list of a namespace: https://docs.docker.com/reference/api/hub/latest/."""

    def __init__(self, names: dict[str, int], url: str) -> None:
        self.names, self.url = names, url

    def answer(self, exchange: Exchange) -> Reply:
        if exchange.path != "/v2/repositories/ai/":
            return Reply(404, {}, b'{"message": "object not found"}')
        page = int(exchange.query["page"][0])
        chosen = list(self.names)[2 * (page - 1) : 2 * page]  # whatever page_size is
        results = [
            {"name": name, "namespace": "ai", "description": "x", "star_count": 3,
             "pull_count": self.names[name], "repository_type": "image"}
            for name in chosen
        ]  # fmt: skip
        more = f"{self.url}{exchange.path}?page={page + 1}" if 2 * page < len(self.names) else None
        value = {"count": len(self.names), "next": more, "previous": None, "results": results}
        return as_json(value)


@pytest.fixture
def docker_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyRegistry]:
    with FaultyRegistry() as server:
        site = replace(search_module.DOCKER_HUB, endpoint=server.url)
        monkeypatch.setattr(search_module, "DOCKER_HUB", site)
        names = {"gemma3": 10, "smollm2": 30, "SmolVLM": 40}
        server.content = DockerHub(names, server.url)  # type: ignore[assignment]
        yield server


def test_docker_hub(docker_hub: FaultyRegistry) -> None:
    rows = succeed("search", "smol", "--registry", "docker.io/ai").out.splitlines()[1:]
    assert [row.split() for row in rows] == [
        ["docker.io/ai/SmolVLM", "docker.io", "40", "3"],
        ["docker.io/ai/smollm2", "docker.io", "30", "3"],
    ]
    assert [one.query["page"] for one in docker_hub.requests] == [["1"], ["2"]]
    assert all("authorization" not in one.headers for one in docker_hub.requests)
    assert succeed("search", "gemma", "--registry", "docker.io", "-q").out == "docker.io/ai/gemma3"
    absent = modelpack("search", "x", "--registry", "docker.io/nobody")
    assert absent.code == 3


@pytest.mark.parametrize(
    "answer", [b"[]", b"{}", b'{"results": [1]}', b'{"results": [{}]}', b'{"results": {}}']
)
def test_what_is_no_list_of_docker_hub(docker_hub: FaultyRegistry, answer: bytes) -> None:
    docker_hub.faults.add("GET", "/v2/repositories/ai/", answering(200, answer))
    failed = modelpack("search", "x", "--registry", "docker.io/ai")
    assert (failed.code, "search for 'x' in docker.io/ai" in failed.err) == (1, True)


def test_a_list_without_an_end(docker_hub: FaultyRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "MAX_PAGES", 1)
    failed = modelpack("search", "x", "--registry", "docker.io/ai")
    assert (failed.code, "longer than 1 pages" in failed.err) == (1, True)


def test_docker_hub_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    site = replace(search_module.DOCKER_HUB, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(search_module, "DOCKER_HUB", site)
    assert modelpack("search", "x", "--registry", "docker.io/ai").code == 6


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
