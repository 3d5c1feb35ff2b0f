"""The command line as a process of its own, to be killed, interrupted and measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "scripts" / "measured"


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start `modelpack` with these arguments; what it prints is kept for `finish`."""
    return _start([], *arguments)


def _start(runner: list[str | Path], *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*runner, sys.executable, "-m", "modelpack", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=_as_in_a_terminal,
    )


def _as_in_a_terminal() -> None:
    """Take interrupts: a shell's background jobs, and what they start, ignore them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True, slots=True)
class Ended:
    """What a process left; `peak` is its largest resident size in bytes, where it was measured."""

    code: int
    out: str
    err: str
    peak: int = 0


def finish(process: subprocess.Popen[str]) -> Ended:
    """Wait for the process to end."""
    try:
        out, err = process.communicate(timeout=120)
    except BaseException:
        process.kill()  # otherwise, later tests report it as theirs
        process.communicate()
        raise
    return Ended(process.returncode, out, err)


def run(*arguments: str | Path) -> Ended:
    """Run `modelpack` to its end."""
    return finish(start(*arguments))


def run_measured(result: Path, *arguments: str | Path) -> Ended:
    """Run `modelpack` to its end and measure its memory; `result` is a file to be written."""
    command = [sys.executable, "-I", "-S", MEASURED, result]
    ended = finish(_start(command, *arguments))
    return replace(ended, peak=json.loads(result.read_text())["peak"])


def staged_bytes(store: Path) -> int:
    """Count what is written: a file that several connections fill has its full size at once."""
    return sum(path.stat().st_blocks * 512 for path in store.glob("ingest/**/*.part"))


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Return when `condition` holds; fail if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.005)
