"""Lines that a user types: with a history that outlives the process, and over several lines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import platformdirs

_QUOTES = '"""'
_KEPT = 1000  # lines of history
_FIRST, _MORE = ">>> ", "... "


def read_question() -> str:
    """Return what the user asks: a line, lines that end in a backslash and the one after them, or
    all between two triple quotes.

    Raises `EOFError` at the end of input, `KeyboardInterrupt` for Ctrl-C.
    """
    line = input(_FIRST)
    if line.lstrip().startswith(_QUOTES):
        return _quoted(line.lstrip()[len(_QUOTES) :])
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(_MORE))
    return "\n".join(lines).strip()


def _quoted(line: str) -> str:
    lines = []
    while not line.rstrip().endswith(_QUOTES):
        lines.append(line)
        line = input(_MORE)
    lines.append(line.rstrip()[: -len(_QUOTES)])
    return "\n".join(lines).strip("\n")


@contextmanager
def line_editing(words: Sequence[str], path: Path | None = None) -> Iterator[None]:
    """Let lines be edited, recalled and completed with `words`, where Python can.

    What is typed is kept in `path`, which only its owner may read.
    """
    try:
        import readline
    except ImportError:  # a Python without it: lines are read all the same
        yield
        return
    path = path or Path(platformdirs.user_state_dir("modelpack")) / "run-history"

    def complete(typed: str, at: int) -> str | None:
        found = [word for word in words if word.startswith(typed)] if typed else []
        return found[at] if at < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")
    readline.set_history_length(_KEPT)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        # A history that cannot be written is no reason to fail.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            path.chmod(0o600)
            readline.write_history_file(path)
            path.chmod(0o600)
        readline.set_completer(None)
        readline.clear_history()
