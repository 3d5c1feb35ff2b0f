"""`modelpack run` in a terminal, with real weights: one session, from the first prompt to /bye."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelpack.store.layout import LayoutStore
from tests.engine.interactive.terminal import Terminal

PROMPT = r">>> \Z"


@pytest.fixture
def terminal(store: LayoutStore, tmp_path: Path) -> Iterator[Terminal]:
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    terminal = Terminal(
        [sys.executable, "-m", "modelpack", "run", "ai/smollm2", "--store", str(store.root),
         "--temperature", "0", "--device", "cpu", "--kv-cache-bytes", "100000000"],
        environment,
    )  # fmt: skip
    yield terminal
    terminal.kill()


@pytest.mark.long
def test_a_session(terminal: Terminal, tmp_path: Path) -> None:
    assert "/help" in terminal.until(PROMPT)

    terminal.type("What is the capital of France?\r")
    assert "Paris" in terminal.until(PROMPT)

    # Settings: invalid values are reported and change nothing.
    terminal.type("/set temperature hot\r")
    assert "0 (greedy) to 2" in terminal.until(PROMPT)
    terminal.type("/set top_p 7\r")
    assert "top_p is 7.0" in terminal.until(PROMPT)
    terminal.type("/set max_tokens 3\r")
    terminal.until(PROMPT)
    terminal.type("/show\r")
    shown = terminal.until(PROMPT)
    for row in (r"temperature +0\.0", r"top_p +default \(1\.0\)", r"max_tokens +3", r"turns +2"):
        assert_row(shown, row)

    terminal.type("Tell me a story.\r")
    assert "(truncated: " in terminal.until(PROMPT)
    terminal.type("/nonsense\r")
    assert "no such command: /nonsense" in terminal.until(PROMPT)

    # Prompts of several lines, by quotes and by backslashes.
    terminal.type("/clear\r")
    terminal.until(PROMPT)
    terminal.type('"""What is the capital\r')
    terminal.until(r"\.\.\. \Z")
    terminal.type('of Italy?"""\r')
    terminal.until(PROMPT)
    terminal.type("Which \\\r")
    terminal.until(r"\.\.\. \Z")
    terminal.type("one?\r")
    terminal.until(PROMPT)
    terminal.type("/show\r")
    assert_row(terminal.until(PROMPT), r"turns +4")

    # Ctrl-C stops the response, not the program.
    terminal.type("/set max_tokens default\r")
    terminal.until(PROMPT)
    terminal.type("Write down all the numbers from one to a thousand in words, one a line.\r")
    terminal.until(r"(?s)words, one a line\.\n.*?\w")
    terminal.type("\x03")
    assert "(stopped)" in terminal.until(PROMPT)
    terminal.type("/show\r")
    assert_row(terminal.until(PROMPT), r"turns +6")

    # At the prompt, Ctrl-C does not end the program, but Ctrl-D does. (If the signal arrives before
    # the select call that it should interrupt, Python sees it only at the next key.)
    terminal.type("\x03\r")
    terminal.until("Ctrl-D or /bye")
    terminal.type("/show\r")
    terminal.until("turns")
    terminal.until(PROMPT)
    terminal.type("\x04")
    assert terminal.end() == 0

    history = tmp_path / "modelpack" / "run-history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "What is the capital of France?" in history.read_text().splitlines()


def assert_row(shown: str, pattern: str) -> None:
    import re

    assert re.search(pattern, shown), shown
