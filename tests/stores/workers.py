"""Processes that work on a store, controlled by lines through pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


class Worker:
    """A running `tests.stores.worker`; see there for what the arguments and lines mean."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.stores.worker", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def expect(self, word: str) -> str:
        """Read lines until one starts with `word`; return it. Fails when the process ends first."""
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if line.split()[:1] == [word]:
                return line.strip()
        raise AssertionError(f"no {word!r} but {seen}, exit status {self.process.wait()}")

    def go(self) -> None:
        """Let a waiting process go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def finish(self) -> list[str]:
        """Wait for the end; return the lines not read yet. Fails unless it ended well."""
        assert self.process.stdout is not None
        lines = [line.strip() for line in self.process.stdout]
        assert self.process.wait() == 0, lines
        return lines

    def kill(self) -> None:
        """Kill the process, as `kill -9` does, and close its pipes."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
