"""A pseudo terminal in which a test types into a program."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

# Control sequences for colours, cursor movements and modes, which a terminal does not show.
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
        """Type `text`: \r is the return key, \x03 is Ctrl-C, \x04 is Ctrl-D."""
        os.write(self._master, text.encode())

    def until(self, pattern: str) -> str:
        """Return the output up to and including the first match of `pattern`; keep the rest."""
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
                except OSError:  # the program has exited
                    piece = ""
                assert piece, f"{pattern!r} does not come; the end is {shown!r}"
                self._read += piece
                self.raw += piece

    def end(self) -> int:
        """Wait for the program to exit; return its exit code."""
        code = self.process.wait(_SECONDS)
        os.close(self._master)
        return code

    def kill(self) -> None:
        """Kill the program."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _take_terminal() -> None:
    import fcntl
    import termios

    # Background jobs of a shell and their children ignore Ctrl-C; this program must not.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # makes Ctrl-C send a signal
