"""The real `docker model` command line, with MODEL_RUNNER_HOST at our server: scenarios 29, 30."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import modelpack
from modelpack.registry_server import RegistryServer
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from tests.engine.families.runner.conftest import StoredScripts
from tests.engine.serving.tiny import write_tiny
from tests.interop.docker_model import DockerModel, build_docker_model, serving
from tests.models import tiny_gguf
from tests.peers import require

pytestmark = [pytest.mark.peer("go"), pytest.mark.long]

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@pytest.fixture(scope="module")
def binary() -> Path:
    require("go")
    return build_docker_model()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that answers."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "files", temperature=0.0)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Iterator[RegistryServer]:
    """A registry with team/tiny:v1."""
    store = LayoutStore(tmp_path_factory.mktemp("hub") / "store")
    request = modelpack.PackageRequest(safetensors_dir=files, created="2025-01-02T03:04:05Z")
    with registry() as server:
        modelpack.package(f"{server.host}/team/tiny:v1", request, push=True, store=store)
        yield server


@pytest.fixture
def docker(binary: Path, tmp_path: Path) -> Iterator[DockerModel]:
    """The command line before a server whose store is empty."""
    with serving(LayoutStore(tmp_path / "store")) as server:
        yield DockerModel(binary, server.url, tmp_path)


@pytest.fixture
def tiny(docker: DockerModel, hub: RegistryServer) -> str:
    """The name of a model that was pulled."""
    name = f"{hub.host}/team/tiny:v1"
    docker("pull", name)
    return name


def inspect(docker: DockerModel, name: str, *flags: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(docker("inspect", *flags, name))
    return found


def test_pull_list_inspect_tag_ps_df_unload_rm(docker: DockerModel, hub: RegistryServer) -> None:
    name = f"{hub.host}/team/tiny:v1"
    pulled = docker("pull", name)
    assert re.search(r"^Downloaded (\S+) of \1$", pulled, re.MULTILINE), pulled
    assert pulled.splitlines()[-1] == "Model pulled successfully"

    for wrong, words in (
        (f"{hub.host}/team/none:v1", "404 Not Found: Model not found"),
        ("a b", "400 Bad Request: Invalid model reference"),
    ):
        refused = docker.try_("pull", wrong)
        assert refused.returncode != 0
        assert words in refused.stderr

    [row] = docker("list").splitlines()[1:]
    assert row.split()[:3] == [name, "90.50K", "F32"]
    model = inspect(docker, name)
    assert DIGEST.fullmatch(model["id"])
    assert (model["tags"], model["created"]) == ([name], 1735787045)
    assert (model["config"]["format"], model["config"]["architecture"]) == ("safetensors", "llama")

    docker("tag", name, "ai/tagged:latest")
    docker("tag", model["id"][7:19], "ai/tagged:v2")
    assert sorted(inspect(docker, "tagged")["tags"]) == [name, "ai/tagged:latest", "ai/tagged:v2"]
    assert [row.split()[0] for row in docker("list", "tagged").splitlines()[1:]] == [
        "tagged", "tagged:v2",
    ]  # fmt: skip

    assert len(docker("ps").splitlines()) == 1
    docker("run", "--detach", "tagged")
    [running] = docker("ps").splitlines()[1:]
    assert running.split()[1:3] == ["modelpack", "completion"]
    assert re.search(r"^Models\s+\d+\.\d+kB", docker("df"), re.MULTILINE)
    assert docker("unload", "tagged:v2") == "Unloaded 1 model(s).\n"
    assert docker("unload", "--all") == "No models are running.\n"
    assert docker("unload", "nothing") == "No such model(s) running.\n"

    conflict = docker.try_("rm", model["id"])
    assert "409 Conflict" in conflict.stderr
    assert docker("rm", "tagged:v2") == "Untagged: ai/tagged:v2\n"
    assert docker("rm", "--force", "tagged", name) == (
        f"Untagged: ai/tagged:latest\nUntagged: {name}\nDeleted: {model['id']}\n"
    )
    assert "no such model: tagged" in docker.try_("rm", "tagged").stderr
    assert len(docker("list").splitlines()) == 1


def test_configure(docker: DockerModel, tiny: str) -> None:
    docker("configure", "--context-size", "128", "--keep-alive", "10m", tiny, "--", "--temp", "0.5")
    [entry] = json.loads(docker("configure", "show", tiny))
    assert entry == {
        "Backend": "modelpack", "Model": tiny, "ModelID": inspect(docker, tiny)["id"],
        "Mode": "completion",
        "Config": {
            "context-size": 128, "runtime-flags": ["--temp", "0.5"], "keep_alive": "10m0s",
        },
    }  # fmt: skip
    assert json.loads(docker("configure", "show")) == [entry]
    docker("run", "--detach", tiny)  # it was loaded ahead: this waits until it is
    [running] = docker("ps").splitlines()[1:]
    assert "minutes from now" in running

    docker("configure", "--think=false", tiny)
    [thoughtless] = json.loads(docker("configure", "show"))
    assert thoughtless["Config"] == {"llamacpp": {"reasoning-budget": 0}}

    docker("configure", f"--speculative-draft-model={tiny}", "--speculative-num-tokens=3", tiny)
    [speculating] = json.loads(docker("configure", "show"))
    wanted = {"draft_model": tiny, "num_tokens": 3}
    assert speculating["Config"]["speculative"].items() >= wanted.items()
    refused = docker.try_("configure", "--speculative-draft-model=ai/absent", tiny)
    assert "no such model in the store: ai/absent" in refused.stderr, refused.stderr

    for wrong in (["--", "--bogus"], ["--mode", "image-generation"]):
        refused = docker.try_("configure", tiny, *wrong)
        assert "400 Bad Request" in refused.stderr, refused.stderr


def test_a_model_in_use_is_not_set_up_anew(binary: Path, files: Path, tmp_path: Path) -> None:
    store = LayoutStore(tmp_path / "store")
    modelpack.package("ai/m", modelpack.PackageRequest(safetensors_dir=files), store=store)
    catalogue = StoredScripts(store)
    with serving(store, catalogue) as server:
        docker = DockerModel(binary, server.url, tmp_path)
        docker("configure", "--context-size", "4096", "m")
        docker("run", "--detach", "m")
        [engine] = catalogue.engines
        engine.wait = asyncio.Event()
        body = {"model": "m", "prompt": "a", "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as stream:
            pieces = stream.iter_lines()
            first = next(pieces)
            busy = docker.try_("configure", "--context-size", "8192", "m")
            assert busy.returncode != 0
            assert busy.stderr.startswith("Error: runner already active: ")
            assert docker("unload", "m") == "No such model(s) running.\n"
            engine.release()
            rest = "\n".join(pieces)
        assert first.startswith("data: ")
        assert " world" in rest
        assert rest.rstrip().endswith("data: [DONE]")
        docker("configure", "--context-size", "8192", "m")
        docker("run", "--detach", "m")
        assert catalogue.engines[-1].max_model_len == 8192


def test_running_a_prompt(docker: DockerModel, tiny: str) -> None:
    assert docker("run", tiny, "hello").strip()
    missing = docker.try_("run", tiny.replace("tiny", "none"), "hello")
    assert "Unable to find model" in missing.stdout + missing.stderr
    assert "Model not found" in missing.stderr


def test_running_pulls_what_is_missing(docker: DockerModel, hub: RegistryServer) -> None:
    name = f"{hub.host}/team/tiny:v1"
    said = docker("run", name, "hello")
    assert f"Unable to find model '{name}' locally" in said
    assert "Model pulled successfully" in said


def test_inspecting_in_all_ways(docker: DockerModel, tiny: str) -> None:
    remote = inspect(docker, tiny, "--remote")
    local = inspect(docker, tiny)
    assert remote == {key: value for key, value in local.items() if key != "tags"}
    card = inspect(docker, tiny, "--openai")
    assert (card["id"], card["object"], card["owned_by"]) == (tiny, "model", "modelpack")
    assert card["dmr"]["size"].endswith("kB")
    [listed] = json.loads(docker("list", "--openai"))["data"]
    assert listed == card
    assert json.loads(docker("list", "--json")) == [local]
    assert docker("list", "-q").strip() == local["id"][7:19]
    assert "Context Size: 256" in docker("show", tiny)


def test_packaging_and_pushing(docker: DockerModel, hub: RegistryServer, tmp_path: Path) -> None:
    gguf = tiny_gguf(tmp_path)
    license_file = tmp_path / "LICENSE"
    license_file.write_text("MIT\n")
    name = f"{hub.host}/team/packed:v1"
    said = docker("package", "--gguf", gguf, "--license", license_file, name)
    assert "Model loaded successfully" in said
    assert inspect(docker, name)["config"]["format"] == "gguf"

    docker("package", "--from", name, "--context-size", "99", "team/small:v1")
    assert inspect(docker, "team/small:v1")["config"]["context_size"] == 99
    # What cannot be done by the server is exported, changed by the command line and loaded again.
    docker("package", "--from", "team/small:v1", "--license", gguf, "team/licensed:v1")
    assert inspect(docker, "team/licensed:v1")["config"]["context_size"] == 99

    assert "Model pushed successfully" in docker("push", name)
    assert str(modelpack.inspect(name, from_registry=True).digest) == inspect(docker, name)["id"]
    assert "404 Not Found: Model not found" in docker.try_("push", "nothing").stderr
    docker("purge", "--force")
    assert len(docker("list").splitlines()) == 1


def test_what_the_server_says_of_itself(docker: DockerModel, tiny: str) -> None:
    assert f"Version:    {modelpack.__version__}" in docker("version")
    status = docker("status")
    assert "Docker Model Runner is running" in status
    assert re.search(rf"^modelpack\s+Running\s+modelpack {modelpack.__version__}", status,
                     re.MULTILINE)  # fmt: skip
    assert json.loads(docker("status", "--json"))["running"] is True
    docker("configure", tiny, "--", "--verbose")
    assert "no effect: --verbose" in docker("logs")


def test_requests_are_shown_and_followed(docker: DockerModel, tiny: str) -> None:
    assert json.loads(docker("requests")) == []
    with docker.following("requests", "--follow", "--model", tiny) as said:
        assert said.readline().startswith("Connected to request stream")
        docker("run", tiny, "hello")
        [group] = json.loads(said.readline())
    [record] = group["records"]
    assert (record["model"], record["status_code"]) == (tiny, 200)
    assert record["user_agent"].startswith("docker-model-cli/")
    assert json.loads(record["request"])["messages"] == [{"role": "user", "content": "hello"}]
    [kept] = json.loads(docker("requests", "--model", tiny))
    assert kept["records"] == group["records"]
    with docker.following("requests", "-f", "--include-existing") as said:
        assert said.readline().startswith("Connected")
        assert json.loads(said.readline()) == [group]


def test_compose_sets_a_model_up(docker: DockerModel, hub: RegistryServer) -> None:
    name = f"{hub.host}/team/tiny:v1"
    flags = ["--context-size", "64", "--runtime-flags", "--temp 0.1 --top-p 0.9"]
    said = docker("compose", "up", "--model", name, *flags)
    messages = [json.loads(line) for line in said.splitlines()]
    values = [message["message"] for message in messages if message["type"] == "setenv"]
    assert values == [f"MODEL={name}", f"URL={docker.url}/engines/v1/"]
    [entry] = json.loads(docker("configure", "show"))
    assert entry["Config"] == {
        "context-size": 64, "runtime-flags": ["--temp", "0.1", "--top-p", "0.9"],
    }  # fmt: skip
    again = docker("compose", "up", "--model", name, *flags)
    assert "Downloaded" not in again


@pytest.mark.weights
def test_smollm2_answers_a_prompt(binary: Path, tmp_path: Path) -> None:
    from modelpack.testing.weights import smollm2_gguf

    store = LayoutStore(tmp_path / "store")
    request = modelpack.PackageRequest(gguf=smollm2_gguf())
    modelpack.package("ai/smollm2", request, store=store, link=True)
    with serving(store) as server:
        docker = DockerModel(binary, server.url, tmp_path)
        docker("configure", "smollm2", "--", "--temp", "0")
        answer = docker("run", "smollm2", "What is the capital of France?")
        assert "Paris" in answer
        [running] = docker("ps").splitlines()[1:]
        assert running.split()[0] == "smollm2"
