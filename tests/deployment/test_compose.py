"""The calls of Compose, without Compose; tests/interop/test_compose.py uses the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelpack
from modelpack.deploy.compose import install_plugins
from modelpack.deploy.local_server import local_server
from modelpack.errors import ConflictError, RemoteUnavailableError
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.cli.running import modelpack as run
from tests.cli.running import succeed
from tests.interop.docker_model import CONFIG
from tests.models import package, tiny_gguf

ENDPOINT = "http://host.example:1/engines/v1/"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    """A server with team/tiny."""
    root = tmp_path_factory.mktemp("compose")
    store = LayoutStore(root / "store")
    package("team/tiny", tiny_gguf(root), store)
    pool = lambda: ModelPool(StoreCatalogue(store, CONFIG), memory=2**32, grace=0.0)  # noqa: E731
    with ModelServer(pool, address="127.0.0.1:0") as server:
        yield server


@pytest.fixture
def server(running: ModelServer, monkeypatch: pytest.MonkeyPatch) -> ModelServer:
    """A server with the URL ENDPOINT for containers."""
    monkeypatch.setenv("MODELPACK_HOST", running.url)
    monkeypatch.setenv("MODELPACK_ENDPOINT", ENDPOINT)
    return running


def said(lines: str) -> list[tuple[str, str]]:
    return [(line["type"], line["message"]) for line in map(json.loads, lines.splitlines())]


def test_metadata_is_one_object_of_what_up_takes() -> None:
    metadata = json.loads(succeed("compose", "metadata").stdout)
    options = {option["name"]: option for option in metadata["up"]["parameters"]}
    assert options["model"]["required"] is True
    assert set(options) == {"model", "context-size", "runtime-flags"}
    for option in options.values():
        assert isinstance(option.get("default", ""), str)  # Compose's own type


@pytest.mark.parametrize("name", ["team/tiny", "team/tiny:latest", "docker.io/team/tiny:latest"])
def test_a_model_that_is_there_is_not_pulled_however_it_is_spelled(
    server: ModelServer, name: str
) -> None:
    result = succeed("compose", "--project-name=p", "up", f"--model={name}", "llm")
    assert said(result.out) == [
        ("info", "looking for a model server"),
        ("setenv", f"MODEL={name}"),
        ("setenv", f"URL={ENDPOINT}"),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model=127.0.0.1:1/no/such"], "127.0.0.1:1"),
        (["--model=team/tiny", "--runtime-flags='"], "No closing quotation"),
        (["--model=team/tiny", "--runtime-flags=--port 80"], "--port"),
        (["--model=team/tiny", "--context-size=1"], "context_size"),
    ],
)
def test_failures_are_messages_to_compose(
    server: ModelServer, arguments: list[str], words: str
) -> None:
    result = run("compose", "up", *arguments, "llm")
    assert result.code != 0
    kind, message = said(result.out)[-1]
    assert kind == "error"
    assert words in message


def test_down_leaves_the_server(server: ModelServer) -> None:
    assert succeed("compose", "--project-name=p", "down", "llm").out == ""


def test_no_server_where_one_is_said_to_be() -> None:
    with pytest.raises(RemoteUnavailableError, match="MODELPACK_HOST"):
        local_server({"MODELPACK_HOST": "127.0.0.1:1"})


def test_a_server_that_is_no_model_server_is_none(tmp_path: Path) -> None:
    with (
        registry() as other,
        pytest.raises(RemoteUnavailableError, match="no model server"),
    ):
        local_server({"MODELPACK_HOST": other.url})


def test_plugins_replace_only_our_own(tmp_path: Path) -> None:
    theirs = tmp_path / "docker-model"
    theirs.write_bytes(b"\x7fELF\xff")
    with pytest.raises(ConflictError, match="docker-model exists and is not from modelpack"):
        install_plugins(["docker-modelpack", "docker-model"], tmp_path)
    assert not (tmp_path / "docker-modelpack").exists()
    install_plugins(["docker-model"], tmp_path, force=True)
    assert install_plugins(["docker-model"], tmp_path) == [theirs]
    assert {path.name for path in tmp_path.iterdir()} == {"docker-model"}


def test_the_binary_writes_no_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    refused = run("compose", "install", "--directory", str(tmp_path))
    assert refused.code == 1
    assert "the binary cannot install plugins" in refused.err
    assert not [*tmp_path.iterdir()]


def plugin(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(modelpack.__file__).parents[1])
    return subprocess.run(
        [path, *arguments], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}
    )


def test_the_plugins_answer_docker(tmp_path: Path, server: ModelServer) -> None:
    ours, model = install_plugins(["docker-modelpack", "docker-model"], tmp_path / "plugins")
    done: dict[str, subprocess.CompletedProcess[str]] = {}
    calls = {
        "metadata": (ours, "docker-cli-plugin-metadata"),
        "by docker": (ours, "modelpack", "--version"),
        "status": (model, "status", "--json"),
        "ls": (model, "model", "ls", "--json"),
        "configure": (model, "configure", "--context-size", "64", "team/tiny", "--", "--temp", "0"),
        "pull": (model, "pull", "127.0.0.1:1/no/such"),
    }
    threads = [
        threading.Thread(target=lambda n=n, c=c: done.__setitem__(n, plugin(*c)))
        for n, c in calls.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(done["metadata"].stdout)["SchemaVersion"] == "0.1.0"
    assert done["by docker"].stdout.startswith("modelpack ")
    # Compose parses both streams as one.
    assert json.loads(done["status"].stdout + done["status"].stderr)["endpoint"] == ENDPOINT
    [listed] = json.loads(done["ls"].stdout + done["ls"].stderr)
    assert {"team/tiny", "team/tiny:latest", "docker.io/team/tiny:latest"} <= set(listed["tags"])
    assert done["configure"].returncode == 0, done["configure"].stderr
    assert done["pull"].returncode != 0
    assert "127.0.0.1:1" in done["pull"].stdout
