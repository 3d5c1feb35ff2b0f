"""Codex itself, where it is installed: `codex`, or what MODELPACK_CODEX names.

It is a program of 400 MB, so nothing here installs it (`npm install @openai/codex` does). It is set
up as `modelpack launch codex` does it, with a home of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from modelpack_server.cli.client import PROGRAMS, Target
from tests.engine.families.served import CALLER, LARGE_CONTEXT, Served
from tests.peers import REQUIRED


@pytest.fixture
def program() -> Path:
    found = shutil.which(os.environ.get("MODELPACK_CODEX", "codex"))
    if found is None and REQUIRED:
        pytest.xfail("Codex is not installed, and CI does not ask for it")
    if found is None:
        pytest.skip("Codex is not installed")
    return Path(found)


def test_it_prints_the_answer(program: Path, large: Served, tmp_path: Path) -> None:
    large.says(CALLER, "Hi from ", "the model.")
    setup = PROGRAMS["codex"].setup(Target(large.url, CALLER, context=LARGE_CONTEXT))
    done = subprocess.run(
        [program, *setup.arguments, "exec", "--skip-git-repo-check", "say hi"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | setup.variables,
        cwd=tmp_path, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Hi from the model." in done.stdout
    assert "say hi" in large.prompt(CALLER)
