"""The GitHub action and the GitLab job, run as the shell that they are, against a registry."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import modelpack
from modelpack.registry_server import RegistryServer
from modelpack.testing import registry
from tests.models import tiny_safetensors

pytestmark = pytest.mark.long  # a command after the other, each a new process
ROOT = Path(__file__).parents[1]
CI = ROOT / "examples" / "ci"


@pytest.fixture
def hub() -> Iterator[RegistryServer]:
    with registry() as server:
        yield server


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """The environment of a runner: our command line, and a `python` that installs it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    installed = tmp_path / "installed"
    for name, text in (
        ("modelpack", f'exec {sys.executable} -m modelpack "$@"'),
        ("python", f'test "$*" = "-m pip install --quiet modelpack" && echo yes > {installed}'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "DOCKER_CONFIG": str(tmp_path / "docker"),
        "MODELPACK_STORE": str(tmp_path / "store"),
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(tmp_path),
        "INSTALLED": str(installed),
    }


def shell(script: str, variables: dict[str, str], where: Path) -> None:
    # As GitHub starts it: bash --noprofile --norc -eo pipefail.
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        env=variables, cwd=where, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise AssertionError(f"{script}\n{done.stdout}{done.stderr}")


class Action:
    """As much of GitHub's composite actions as ours uses."""

    def __init__(self, inputs: dict[str, str]) -> None:
        self.action: dict[str, Any] = yaml.safe_load(
            (CI / "github-action" / "action.yml").read_text()
        )
        declared = self.action["inputs"]
        assert inputs.keys() <= declared.keys()
        for name, about in declared.items():
            assert not about["required"] or name in inputs
        self.values = {
            f"inputs.{name}": about.get("default", "") for name, about in declared.items()
        }
        self.values |= {f"inputs.{name}": value for name, value in inputs.items()}

    def fill(self, text: str) -> str:
        return re.sub(r"\$\{\{ (\S+) \}\}", lambda found: self.values[found[1]], text)

    def run(self, variables: dict[str, str], where: Path) -> str:
        for step in self.action["runs"]["steps"]:
            # A value put into a script could be a command: they come by the environment.
            assert "${{" not in step["run"]
            assert step["shell"] == "bash"
            if condition := step.get("if"):
                name = re.fullmatch(r"(\S+) != ''", condition)
                assert name is not None
                if not self.values[name[1]]:
                    continue
            output = where / "output"
            output.write_text("")
            given = {key: self.fill(value) for key, value in step.get("env", {}).items()}
            shell(step["run"], {**variables, **given, "GITHUB_OUTPUT": str(output)}, where)
            for line in output.read_text().splitlines():
                key, _, value = line.partition("=")
                self.values[f"steps.{step['id']}.outputs.{key}"] = value
        return self.fill(self.action["outputs"]["digest"]["value"])


def test_the_github_action(hub: RegistryServer, variables: dict[str, str], tmp_path: Path) -> None:
    repository, stable = f"{hub.host}/team/tiny", f"{hub.host}/prod/tiny:stable"
    action = Action({
        "directory": str(tiny_safetensors(tmp_path)), "repository": repository, "tag": "v1",
        "promote-to": stable, "username": "ci", "password": "secret",
    })  # fmt: skip
    digest = action.run(variables, tmp_path)
    assert digest.startswith("sha256:")
    for name in (f"{repository}:v1", stable):
        assert str(modelpack.inspect(name, from_registry=True).digest) == digest
    assert Path(variables["INSTALLED"]).exists()


def test_the_github_action_needs_no_login_and_no_promotion(
    hub: RegistryServer, variables: dict[str, str], tmp_path: Path
) -> None:
    action = Action({
        "directory": str(tiny_safetensors(tmp_path)), "repository": f"{hub.host}/a/b", "tag": "v1"
    })  # fmt: skip
    assert action.run(variables, tmp_path).startswith("sha256:")
    assert not (tmp_path / "docker").exists()


def test_a_directory_that_is_none_fails_the_action(
    hub: RegistryServer, variables: dict[str, str], tmp_path: Path
) -> None:
    action = Action({"directory": "nowhere", "repository": f"{hub.host}/a/b", "tag": "v1"})
    with pytest.raises(AssertionError, match="nowhere"):
        action.run(variables, tmp_path)


@pytest.mark.parametrize("promote", [True, False])
def test_the_gitlab_job(
    hub: RegistryServer, variables: dict[str, str], tmp_path: Path, promote: bool
) -> None:
    job = yaml.safe_load((CI / "modelpack.gitlab-ci.yml").read_text())[".modelpack-publish"]
    stable = f"{hub.host}/prod/tiny:stable"
    variables |= job["variables"] | {
        "DIRECTORY": str(tiny_safetensors(tmp_path)), "REPOSITORY": f"{hub.host}/team/tiny",
        "TAG": "v1", "CI_REGISTRY_USER": "ci", "CI_REGISTRY_PASSWORD": "secret",
    }  # fmt: skip
    if promote:
        variables["PROMOTE_TO"] = stable
    shell("\n".join([*job["before_script"], *job["script"]]), variables, tmp_path)
    name, _, digest = (tmp_path / job["artifacts"]["reports"]["dotenv"]).read_text().partition("=")
    assert name == "MODEL_DIGEST"
    wanted = stable if promote else f"{hub.host}/team/tiny:v1"
    assert str(modelpack.inspect(wanted, from_registry=True).digest) == digest.strip()


def test_shells_of_the_environment_are_not_needed() -> None:
    """What GitLab's images run the job by is sh: nothing in it is of bash alone."""
    job = yaml.safe_load((CI / "modelpack.gitlab-ci.yml").read_text())[".modelpack-publish"]
    script = "\n".join([*job["before_script"], *job["script"]])
    checked = subprocess.run(
        ["sh", "-n", "-c", script], capture_output=True, text=True, env=dict(os.environ)
    )
    assert checked.returncode == 0, checked.stderr
    assert "[[" not in script
