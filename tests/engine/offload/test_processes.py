"""A process finds the prefixes of the one before it, for every kind of model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.offload.turns import BLOCK, FIRST, NEXT

pytestmark = pytest.mark.long

#: Sliding and full layers, latents, recurrent layers with full ones and with latents.
NAMES = ("gemma3_text", "gpt_oss", "deepseek_v3", "kimi_linear", "bailing_hybrid", "qwen3_next")


def run(directory: Path, prompts: dict[str, list[int]]) -> dict[str, tuple[list[int], int]]:
    """Return the tokens and the number of computed tokens of each model, in a new process."""
    command = [sys.executable, "-m", "tests.engine.offload.turns", str(directory)]
    done = subprocess.run(
        [*command, json.dumps(prompts)], capture_output=True, text=True, check=True
    )
    assert "dropped" not in done.stderr
    return {name: tuple(turn) for name, turn in json.loads(done.stdout.splitlines()[-1]).items()}


def test_a_second_turn_in_another_process(tmp_path: Path) -> None:
    first = run(tmp_path / "kv", dict.fromkeys(NAMES, FIRST))
    second = {name: FIRST + reply + NEXT for name, (reply, _) in first.items()}
    restored, computed = run(tmp_path / "kv", second), run(tmp_path / "another", second)
    assert [count for _, count in first.values()] == [len(FIRST)] * len(NAMES)
    for name in NAMES:
        assert restored[name][0] == computed[name][0]
        assert restored[name][1] == len(second[name]) - 150 // BLOCK * BLOCK
        assert computed[name][1] == len(second[name])
