"""Completion by bash, with the script that `modelpack completion bash` prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import succeed
from tests.models import tiny_gguf

# Bash breaks words like this: "host:5000/m:v" is host, colon, 5000/m, colon, v.
CASES = {
    ("reg",): ["registry"],
    ("inspect", "team/mod"): ["team/model:v1", "team/model:v2", "team/model"],
    ("inspect", "team/model", ":"): ["latest", "v1", "v2"],
    ("inspect", "team/model", ":", "v"): ["v1", "v2"],
    ("inspect", "localhost", ":", "5000/m", ":", "v"): ["v3"],
    ("inspect", "localhost", ":", "50"): ["5000/m:v3"],
    ("tag", "team/model", ":", "v1", "team/model", ":", "l"): [],
    ("diff", "team/model", ":", "v1", "team/model", ":", "v2"): ["v2"],
    ("pull", "--progress", ""): ["auto", "bars", "plain", "none"],
}


def complete(script: str, words: tuple[str, ...], breaks: str) -> list[str]:
    program = Path(sys.executable).parent / "modelpack"
    code = 'COMP_WORDBREAKS=$1; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
    code += '_modelpack_completion "$1"; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "--norc", "-uc", f"{script}\n{code}", "bash", breaks, str(program), *words],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.long
def test_words_are_split_at_colons(tmp_path: Path) -> None:
    succeed("package", "--gguf", tiny_gguf(tmp_path), "team/model:v1")
    for name in ("team/model:v2", "team/model", "localhost:5000/m:v3"):
        succeed("tag", "team/model:v1", name)
    script = succeed("completion", "bash").out
    for words, expected in CASES.items():
        assert sorted(complete(script, words, " \t\n:=")) == sorted(expected), words
    # Where the user removed the colon from COMP_WORDBREAKS.
    whole = complete(script, ("inspect", "team/model:v"), " \t\n=")
    assert whole == ["team/model:v1", "team/model:v2"]
