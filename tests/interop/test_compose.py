"""Docker Compose itself brings up containers whose models modelpack serves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelpack
from modelpack.deploy.local_server import container_host
from modelpack.registry_server import RegistryServer
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.serving.tiny import write_tiny
from tests.interop.compose import ROOT, Compose, build_compose, import_client_image
from tests.interop.docker_model import CONFIG
from tests.interop.engine import require_engine
from tests.peers import require

pytestmark = [pytest.mark.peer("docker"), pytest.mark.long]

ASK = (
    'curl -sS "$${%s}chat/completions" -H "Content-Type: application/json" '
    '-d "{\\"model\\": \\"$${%s}\\", \\"max_tokens\\": 4, \\"ignore_eos\\": true, '
    '\\"messages\\": [{\\"role\\": \\"user\\", \\"content\\": \\"hi\\"}]}"'
)


@pytest.fixture(scope="module")
def binary() -> Path:
    require_engine()
    require("go")
    import_client_image()
    return build_compose()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A registry with team/tiny:v1."""
    files = write_tiny(tmp_path_factory.mktemp("tiny") / "files", temperature=0.0)
    store = LayoutStore(tmp_path_factory.mktemp("hub") / "store")
    request = modelpack.PackageRequest(safetensors_dir=files, created="2025-01-02T03:04:05Z")
    with registry() as server:
        modelpack.package(f"{server.host}/team/tiny:v1", request, push=True, store=store)
        yield server


@pytest.fixture
def server(tmp_path: Path, binary: Path) -> Iterator[tuple[ModelServer, ModelPool]]:
    """A server where containers reach it, and its models; its store is empty."""
    pools: list[ModelPool] = []

    def pool() -> ModelPool:
        made = ModelPool(
            StoreCatalogue(LayoutStore(tmp_path / "store"), CONFIG), memory=2**32, grace=0.0
        )
        pools.append(made)
        return made

    with ModelServer(pool, address=f"{container_host()}:0", allow_remote=True) as running:
        yield running, pools[0]


@pytest.fixture
def compose(
    server: tuple[ModelServer, ModelPool], binary: Path, tmp_path: Path
) -> Iterator[Compose]:
    made = Compose(binary, tmp_path, {"MODELPACK_HOST": server[0].url})
    yield made
    made.try_("down", "--timeout", "0")


def answer(log: str) -> dict[str, object]:
    """The completion that a container printed."""
    [line] = [line for line in log.splitlines() if '"choices"' in line]
    found: dict[str, object] = json.loads(line[line.index("{") :])
    return found


@pytest.mark.parametrize(
    ("models", "url", "model"),
    [
        ("[llm-a]", "LLM_A_URL", "LLM_A_MODEL"),
        ("{llm-a: {endpoint_var: WHERE, model_var: WHICH}}", "WHERE", "WHICH"),
    ],
)
def test_models_of_a_compose_file(
    compose: Compose, server: tuple[ModelServer, ModelPool], hub: RegistryServer,
    models: str, url: str, model: str,
) -> None:  # fmt: skip
    name = f"{hub.host}/team/tiny:v1"
    compose.write(f"""
services:
  app:
    image: modelpack-test/client:debian
    command: ["sh", "-c", {json.dumps(ASK % (url, model))}]
    models: {models}
models:
  llm-a: {{model: "{name}", context_size: 128, runtime_flags: ["--temp", "0.5"]}}
""")
    log = compose("up", "--abort-on-container-failure")
    completion = answer(log)
    assert completion["model"] == name
    assert completion["usage"]["completion_tokens"] == 4  # type: ignore[index]
    [settings] = server[1].configured().values()
    assert settings.context_size == 128
    assert settings.runtime_flags == ("--temp", "0.5")
    # A second time nothing is pulled: the registry may be gone.
    again = compose("up", "--abort-on-container-failure")
    assert "Pulling" not in again


def test_a_provider_sets_the_variables_of_who_depends_on_it(
    compose: Compose, server: tuple[ModelServer, ModelPool], hub: RegistryServer
) -> None:
    name = f"{hub.host}/team/tiny:v1"
    compose.write(f"""
services:
  app:
    image: modelpack-test/client:debian
    command: ["sh", "-c", {json.dumps(ASK % ("LLM_URL", "LLM_MODEL"))}]
    depends_on: [llm]
  llm:
    provider:
      type: modelpack
      options: {{model: "{name}", context-size: 64, runtime-flags: "--temp 0.25"}}
""")
    completion = answer(compose("up", "--abort-on-container-failure"))
    assert completion["model"] == name
    [settings] = server[1].configured().values()
    assert settings.runtime_flags == ("--temp", "0.25")
    compose("down", "--timeout", "0")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{}", 'required parameter "model" is missing'),
        ('{model: "127.0.0.1:1/no/such:v1"}', "127.0.0.1:1"),
        ('{model: "a b"}', "a b"),
        ('{model: X, runtime-flags: "\'"}', "runtime-flags"),
    ],
)
def test_what_is_wrong_with_a_provider_is_said(compose: Compose, options: str, words: str) -> None:
    compose.write(f"""
services:
  app: {{image: "modelpack-test/client:debian", command: ["sh"], depends_on: [llm]}}
  llm: {{provider: {{type: modelpack, options: {options}}}}}
""")
    failed = compose.try_("up")
    assert failed.returncode != 0
    assert words in failed.stdout + failed.stderr


def test_a_model_that_cannot_be_pulled_is_told(compose: Compose) -> None:
    compose.write("""
services:
  app: {image: "modelpack-test/client:debian", command: ["sh"], models: [llm]}
models:
  llm: {model: "127.0.0.1:1/no/such:v1"}
""")
    failed = compose.try_("up")
    assert failed.returncode != 0
    assert "127.0.0.1:1" in failed.stdout + failed.stderr


def test_a_server_on_loopback_is_refused_with_what_to_do(binary: Path, tmp_path: Path) -> None:
    with ModelServer(
        lambda: ModelPool(StoreCatalogue(LayoutStore(tmp_path / "s"), CONFIG), memory=2**32),
        address="127.0.0.1:0",
    ) as local:
        compose = Compose(binary, tmp_path, {"MODELPACK_HOST": local.url})
        compose.write("""
services:
  app: {image: "modelpack-test/client:debian", command: ["sh"], depends_on: [llm]}
  llm: {provider: {type: modelpack, options: {model: X}}}
""")
        failed = compose.try_("up")
    assert failed.returncode != 0
    assert "loopback" in failed.stdout + failed.stderr
    assert f"--host {container_host()}" in failed.stdout + failed.stderr


def test_a_server_is_started_where_there_is_none(
    binary: Path, tmp_path: Path, hub: RegistryServer
) -> None:
    compose = Compose(binary, tmp_path, {"MODELPACK_STORE": str(tmp_path / "store")})
    compose.write(f"""
services:
  app:
    image: modelpack-test/client:debian
    command: ["sh", "-c", {json.dumps(ASK % ("LLM_URL", "LLM_MODEL"))}]
    models: [llm]
models:
  llm: {{model: "{hub.host}/team/tiny:v1"}}
""")
    try:
        assert answer(compose("up", "--abort-on-container-failure"))["model"]
    finally:
        compose.try_("down", "--timeout", "0")
        stopped = subprocess.run(
            [sys.executable, "-m", "modelpack", "compose", "stop", "--json"],
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'engine'}",
                 "XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert json.loads(stopped.stdout)["stopped"]
