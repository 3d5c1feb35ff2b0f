"""The real pre-commit installs the hook from a repository of ours, and runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.models import tiny_safetensors
from tests.peers import require

pytestmark = pytest.mark.long  # an environment is made, and modelpack installed into it
ROOT = Path(__file__).resolve().parents[2]
_PARTS = (".pre-commit-hooks.yaml", "pyproject.toml", "README.md", "LICENSE", "spec", "modelpack",
          "engine", "scripts")  # fmt: skip


def git(where: Path, *arguments: str) -> str:
    done = subprocess.run(
        [require("git"), "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments],
        cwd=where, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def hooks(tmp_path: Path) -> tuple[Path, str]:
    """A repository of what is needed of ours, and its commit."""
    made = tmp_path / "modelpack"
    made.mkdir()
    for part in _PARTS:
        if (ROOT / part).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, made / part, ignore=ignore)
        else:
            shutil.copy(ROOT / part, made / part)
    git(made, "init", "-q")
    git(made, "add", "-A", "-f")
    git(made, "commit", "-qm", "all")
    return made, git(made, "rev-parse", "HEAD")


def test_the_hook_lets_models_through_and_stops_pickles(
    hooks: tuple[Path, str], tmp_path: Path
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    git(project, "init", "-q")
    model = tiny_safetensors(project)
    (project / "catalogue.toml").write_text('[rules]\nmetadata = "off"\ntemplate = "off"\n')
    hook = {"id": "modelpack-lint", "args": [model.name, "--policy", "catalogue.toml"]}
    config = {"repos": [{"repo": str(hooks[0]), "rev": hooks[1], "hooks": [hook]}]}
    (project / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
    git(project, "add", "-A")

    def check() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pre_commit", "run", "--all-files", "--verbose"],
            cwd=project, capture_output=True, text=True, timeout=500,
            env={**os.environ, "PRE_COMMIT_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""},
        )  # fmt: skip

    first = check()
    (model / "weights.pkl").write_bytes(b"\x80\x04N.")
    git(project, "add", "-A")
    second = check()
    assert (first.returncode, second.returncode) == (0, 1), first.stdout + second.stdout
    assert "weights.pkl" in second.stdout
