"""A terminal that a test types into: a pseudo terminal with a program at the other end."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

# Colours, cursor movements, modes: what a terminal obeys and does not show.
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")
_SECONDS = 60.0


class Terminal:
    """Runs a program in a terminal of 80 columns and 24 lines."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._master, slave = pty.openpty()
        settings = {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", "NO_COLOR": ""}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**environment, **settings}, preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(slave)
        self._read = ""
        self.raw = ""

    def type(self, text: str) -> None:
        """Type `text`; \\r is the return key, \\x03 Ctrl-C, \\x04 Ctrl-D."""
        os.write(self._master, text.encode())

    def until(self, pattern: str) -> str:
        """Return what is shown up to the first match of `pattern`, with it; the rest is kept."""
        deadline = time.monotonic() + _SECONDS
        while True:
            shown = _ESCAPES.sub("", self._read).replace("\r\n", "\n")
            if found := re.search(pattern, shown):
                self._read = shown[found.end() :]
                return shown[: found.end()]
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} does not come; there is {shown!r}"
            if select.select([self._master], [], [], left)[0]:
                try:
                    piece = os.read(self._master, 65536).decode(errors="replace")
                except OSError:  # the program has ended
                    piece = ""
                assert piece, f"{pattern!r} does not come; the end is {shown!r}"
                self._read += piece
                self.raw += piece

    def end(self) -> int:
        """Return the exit code of the program, which ends by itself."""
        code = self.process.wait(_SECONDS)
        os.close(self._master)
        return code

    def kill(self) -> None:
        """End the program, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _take_terminal() -> None:
    import fcntl
    import termios

    # A shell's background jobs, and what they start, ignore Ctrl-C; who types here does not.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal
