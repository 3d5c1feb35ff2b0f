"""A plugin of pytest that hides what Windows lacks: `-p tests.without_posix`."""

from __future__ import annotations

import os
import sys

HIDDEN_MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty")
HIDDEN_NAMES = ("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "fchmod", "statvfs")


def pytest_collection() -> None:
    """Hide them before tests are imported; pytest itself has been."""
    for name in HIDDEN_MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in HIDDEN_NAMES:
        if hasattr(os, name):
            delattr(os, name)
