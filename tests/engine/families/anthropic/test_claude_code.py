"""Claude Code itself, where it is installed: `claude`, or what MODELPACK_CLAUDE names.

It is a program of 230 MB under a licence of its own, so nothing here installs it
(`npm install @anthropic-ai/claude-code` does). It is given a home of its own and no network but
this server.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.engine.families.served import CALLER, Served
from tests.peers import REQUIRED

pytestmark = pytest.mark.long


@pytest.fixture
def program() -> Path:
    found = shutil.which(os.environ.get("MODELPACK_CLAUDE", "claude"))
    if found is None and REQUIRED:
        pytest.xfail("Claude Code is not installed, and CI asks for it only where npm is")
    if found is None:
        pytest.skip("Claude Code is not installed")
    return Path(found)


def ask(program: Path, served: Served, home: Path, *options: str) -> str:
    work = home / "work"
    work.mkdir(exist_ok=True)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "ANTHROPIC_BASE_URL": f"{served.url}/anthropic",
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_MODEL": CALLER,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": CALLER,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }
    done = subprocess.run(
        [program, "-p", *options], env=environment, cwd=work, capture_output=True, text=True,
        timeout=120, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_prints_the_answer(program: Path, large: Served, tmp_path: Path) -> None:
    large.says(CALLER, "Hi from ", "the model.")
    assert ask(program, large, tmp_path, "say hi").strip() == "Hi from the model."
    prompt = large.prompt(CALLER)
    assert "say hi" in prompt
    assert "x-anthropic-billing-header" not in prompt
    assert '"name": "Bash"' in prompt


def test_it_counts_as_the_server_does(program: Path, large: Served, tmp_path: Path) -> None:
    large.says(CALLER, "Hi.")
    told = json.loads(ask(program, large, tmp_path, "say hi", "--output-format", "json"))
    usage = told["usage"]
    assert told["result"] == "Hi."
    total = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert total == len(large.engines[CALLER].submitted[-1][0])
    assert usage["output_tokens"] == 1


def test_it_runs_the_tool_that_the_model_calls(
    program: Path, large: Served, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "note.txt").write_text("the secret word is halibut\n")
    call = {"name": "Read", "arguments": {"file_path": str(work / "note.txt")}}
    large.says(CALLER)
    large.engines[CALLER].turns = [
        ["I read it. ", f"<tool_call>{json.dumps(call)}</tool_call>"],
        ["It is halibut."],
    ]
    assert ask(program, large, tmp_path, "what is in note.txt?").strip() == "It is halibut."
    prompt = large.prompt(CALLER)
    assert "assistant: I read it." in prompt
    assert "the secret word is halibut" in prompt[prompt.index("\ntool: ") :]
