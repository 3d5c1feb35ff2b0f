"""`modelpack ps`, `unload` and `configure` against a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import requests

from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from tests.cli.running import modelpack, succeed
from tests.engine.pool.shelf import Shelf


@pytest.fixture
def url() -> Iterator[str]:
    def pool() -> ModelPool:
        made = ModelPool(Shelf(big=3_000_000, small=1), memory=10**7)
        made.pin("big")
        return made

    with ModelServer(pool, address="127.0.0.1:0") as server:
        yield server.url


def test_ps_unload_and_configure(url: str) -> None:
    succeed("configure", "small", "--host", url, "--keep-alive", "7m", "--", "--temp", "0.3")
    succeed("unload", "--all", "--host", url)
    assert json.loads(succeed("ps", "--json", "--host", url).out)["models"] == []
    answer = json.loads(
        succeed("configure", "small", "--preset", "code", "--json", "--host", url).out
    )
    assert (answer["preset"], answer["keep_alive"]) == ("code", None)
    assert succeed("unload", "small", "--host", url).out == ""
    assert succeed("ps", "--host", url).out.startswith("MODEL NAME")


def test_ps_shows_whole_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    name = f"team/{'long-' * 30}name"
    with ModelServer(lambda: ModelPool(Shelf(**{name: 1})), address="127.0.0.1:0") as server:
        requests.post(f"{server.url}/api/generate", json={"model": name}, timeout=30)
        assert succeed("ps", "--host", server.url).out.splitlines()[1].split()[0] == name
        assert succeed("ps", "--quiet", "--host", server.url).out.split() == [name]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["unload"], 2, "--all"),
        (["unload", "missing"], 3, "missing"),
        (["configure", "small", "--", "--bogus", "1"], 2, "--bogus"),
        (["configure", "small", "--preset", "loud"], 2, "loud"),
        (["configure", "big", "--context-size", "1000000"], 2, "this model's context is 10000"),
    ],
)
def test_what_they_refuse(url: str, arguments: list[str], code: int, says: str) -> None:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    result = modelpack(*arguments[:at], "--host", url, *arguments[at:])
    assert result.code == code
    assert says in result.err


def test_no_server() -> None:
    result = modelpack("ps", "--host", "http://127.0.0.1:9")
    assert result.code == 6
    assert "modelpack serve" in result.err
