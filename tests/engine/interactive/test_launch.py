"""`modelpack launch`: the environment of programs, and errors if a program cannot be launched."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from tests.cli.running import modelpack, succeed
from tests.engine.pool.shelf import Shelf

pytestmark = pytest.mark.long

_DUMP = """\
#!{python}
import json, os, sys
print(json.dumps([sys.argv[1:], dict(os.environ)]))
"""


COMMANDS = ("aider", "cn", "crush", "goose", "llm", "open-webui", "zed")


def serve(**models: int) -> ModelServer:
    return ModelServer(lambda: ModelPool(Shelf(**models), memory=10**7), address="127.0.0.1:0")


@pytest.fixture
def url() -> Iterator[str]:
    with serve(big=3, small=1) as server:
        yield server.url


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory with programs that print their arguments and environment."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("claude", "codex", "opencode", "tool", *COMMANDS):
        path = directory / name
        path.write_text(_DUMP.format(python=sys.executable))
        path.chmod(0o755)
    return directory


def launched(programs: Path, *words: str, **variables: str) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", **variables}
    done = subprocess.run(
        [sys.executable, "-m", "modelpack", "launch", *words],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    arguments, seen = json.loads(done.stdout)
    return arguments, seen


def test_claude(url: str, programs: Path) -> None:
    arguments, seen = launched(
        programs, "claude", "small", "--host", url, "--", "-p", "say hi", "--", "--host",
        ANTHROPIC_API_KEY="sk-of-another", MODELPACK_API_KEY="mp-secret",
    )  # fmt: skip
    assert arguments == ["-p", "say hi", "--", "--host"]
    assert seen["ANTHROPIC_BASE_URL"] == f"{url}/anthropic"
    assert seen["ANTHROPIC_AUTH_TOKEN"] == "mp-secret"
    for name in ("ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL", "CLAUDE_CODE_SUBAGENT_MODEL"):
        assert seen[name] == "small"
    assert seen["CLAUDE_CODE_ATTRIBUTION_HEADER"] == "0"
    assert "ANTHROPIC_API_KEY" not in seen


def codex_config(arguments: list[str]) -> dict[str, Any]:
    """Return the configuration in codex's -c options."""
    text = "\n".join(value for flag, value in pairwise(arguments) if flag == "-c")
    return tomllib.loads(text)


def test_codex(url: str, programs: Path) -> None:
    arguments, seen = launched(programs, "codex", "small", "--host", url, "--", "exec", "hi")
    assert arguments[:2] == ["-m", "small"]
    assert arguments[-2:] == ["exec", "hi"]
    config = codex_config(arguments)
    assert config["model_provider"] == "modelpack"
    provider = {"name": "Modelpack", "base_url": f"{url}/v1", "wire_api": "responses"}
    assert config["model_providers"] == {"modelpack": provider}
    assert "MODELPACK_API_KEY" not in seen

    arguments, seen = launched(
        programs, "codex", "small", "--host", url, MODELPACK_API_KEY="mp-secret"
    )
    env_key = codex_config(arguments)["model_providers"]["modelpack"]["env_key"]
    assert seen[env_key] == "mp-secret"


def test_opencode(url: str, programs: Path) -> None:
    arguments, seen = launched(programs, "opencode", "small", "--host", url)
    assert arguments == []
    config = json.loads(seen["OPENCODE_CONFIG_CONTENT"])
    assert config["model"] == config["small_model"] == "modelpack/small"
    provider = config["provider"]["modelpack"]
    assert provider["options"]["baseURL"] == f"{url}/v1"
    assert provider["models"] == {"small": {"name": "small"}}


def test_programs_that_are_configured_by_variables(url: str, programs: Path) -> None:
    arguments, seen = launched(programs, "aider", "small", "--host", url, "--", "--yes")
    assert arguments == ["--model", "openai/small", "--no-show-model-warnings", "--yes"]
    assert seen["OPENAI_API_BASE"] == f"{url}/v1"
    _, seen = launched(programs, "goose", "small", "--host", url, MODELPACK_API_KEY="mp-secret")
    assert (seen["GOOSE_PROVIDER"], seen["GOOSE_MODEL"]) == ("openai", "small")
    assert f"{seen['OPENAI_HOST']}/{seen['OPENAI_BASE_PATH']}" == f"{url}/v1/chat/completions"
    assert seen["OPENAI_API_KEY"] == "mp-secret"
    arguments, seen = launched(programs, "open-webui", "small", "--host", url)
    assert arguments == ["serve"]
    assert seen["OPENAI_API_BASE_URL"] == f"{url}/v1"


def test_programs_that_are_configured_by_files(url: str, programs: Path, tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "MODELPACK_API_KEY": "mp-secret"}
    _, seen = launched(programs, "llm", "small", "--host", url, **cache)
    file = Path(seen["LLM_USER_PATH"], "extra-openai-models.yaml")
    [model] = yaml.safe_load(file.read_text())
    assert (model["model_id"], model["model_name"]) == (seen["LLM_MODEL"], "small")
    assert model["api_base"] == f"{url}/v1"
    _, seen = launched(programs, "crush", "small", "--host", url, **cache)
    config = json.loads(Path(seen["CRUSH_GLOBAL_CONFIG"], "crush.json").read_text())
    assert config["providers"]["modelpack"]["base_url"] == f"{url}/v1"
    assert config["models"]["large"] == {"provider": "modelpack", "model": "small"}
    assert seen["MODELPACK_API_KEY"] == "mp-secret"
    arguments, _ = launched(programs, "continue", "small", "--host", url, **cache)
    file = Path(arguments[arguments.index("--config") + 1])
    assert file.stat().st_mode & 0o77 == 0
    [model] = yaml.safe_load(file.read_text())["models"]
    assert (model["apiBase"], model["apiKey"]) == (f"{url}/v1", "mp-secret")


def test_zed_says_what_to_add_to_its_settings(url: str, programs: Path) -> None:
    _, seen = launched(programs, "zed", "small", "--host", url, MODELPACK_API_KEY="mp-secret")
    assert seen["MODELPACK_API_KEY"] == "mp-secret"
    printed = succeed("launch", "zed", "small", "--print", "--host", url).out
    settings = "\n".join(line[2:] for line in printed.splitlines() if line.startswith("# "))
    provider = json.loads(settings[settings.index("{") :])["language_models"]["openai_compatible"]
    assert provider["modelpack"]["api_url"] == f"{url}/v1"
    assert provider["modelpack"]["available_models"][0]["name"] == "small"


def test_the_context_is_that_which_the_model_runs_with(url: str, programs: Path) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "x"}]}
    requests.post(
        f"{url}/v1/chat/completions", json=body, headers={"X-Preload-Only": "true"}, timeout=60
    ).raise_for_status()
    [running] = requests.get(f"{url}/pool", timeout=60).json()["models"]
    arguments, _ = launched(programs, "codex", "small", "--host", url)
    assert codex_config(arguments)["model_context_window"] == running["context_size"] > 0


def test_env_runs_a_program_or_prints(url: str, programs: Path) -> None:
    arguments, seen = launched(programs, "env", "small", "--host", url, "--", "tool", "x y")
    assert arguments == ["x y"]
    assert seen["OPENAI_BASE_URL"] == f"{url}/v1"
    assert seen["OLLAMA_HOST"] == seen["MODEL_RUNNER_HOST"] == url

    printed = succeed("launch", "env", "small", "--host", url).out
    script = f"export ANTHROPIC_API_KEY=x\n{printed}\nenv"
    shell = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    lines = shell.stdout.splitlines()
    assert f"OPENAI_BASE_URL={url}/v1" in lines
    assert "OPENAI_MODEL=small" in lines
    assert not any(line.startswith("ANTHROPIC_API_KEY") for line in lines)


def test_print(url: str) -> None:
    printed = succeed("launch", "codex", "small", "--print", "--host", url, "--", "exec").out
    [line] = printed.splitlines()
    command = shlex.split(line.removeprefix("# "))
    assert (command[0], command[-1]) == ("codex", "exec")
    [line] = succeed("launch", "opencode", "small", "--print", "--host", url).out.splitlines()
    name, value = shlex.split(line.removeprefix("export "))[0].split("=", 1)
    assert name == "OPENCODE_CONFIG_CONTENT"
    assert json.loads(value)["provider"]
    shown = succeed("launch", "claude", "small", "--print", "--json", "--host", url).json
    assert shown["variables"]["ANTHROPIC_MODEL"] == "small"


@pytest.mark.parametrize("alias", [None, "gpt-4"])
def test_the_only_model_need_not_be_named(programs: Path, alias: str | None) -> None:
    def pool() -> ModelPool:
        made = ModelPool(Shelf(one=1), memory=10**7)
        if alias is not None:
            made.alias(alias, "one")
        return made

    with ModelServer(pool, address="127.0.0.1:0") as server:
        _, seen = launched(programs, "claude", "--host", server.url)
    assert seen["ANTHROPIC_MODEL"] == (alias or "one")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["claude"], 2, "big, small"),
        (["claude", "missing"], 3, "modelpack pull missing"),
        (["claude", "small", "extra"], 2, "extra"),
        (["emacs", "small"], 2, "emacs"),
        (["claude", "small", "-p"], 2, "-p"),
    ],
)
def test_what_it_refuses(
    url: str,
    programs: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    says: str,
) -> None:
    monkeypatch.setenv("PATH", str(programs))
    result = modelpack("launch", *words, "--host", url)
    assert result.code == code
    assert says in result.err


def test_a_program_that_is_not_installed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    result = modelpack("launch", "codex", "small", "--host", url)
    assert result.code == 3
    assert "npm install -g @openai/codex" in result.err


def test_no_server() -> None:
    result = modelpack("launch", "env", "m", "--host", "http://127.0.0.1:9")
    assert result.code == 6
    assert "modelpack serve" in result.err
