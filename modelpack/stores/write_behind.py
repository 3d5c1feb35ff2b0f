"""Large files on their way to the disk: writing starts early, and without piling up in memory.

Left alone, the kernel keeps gigabytes of written pages for later. They cost fresh memory, push out
what others have cached, and make the flush at the end long.
"""

from __future__ import annotations

import os
import time
from typing import Final

_WINDOW: Final = 8 * 1024 * 1024
# A disk that keeps us waiting for longer than this is left to write later.
_BYTES_PER_SECOND: Final = 1e9
_GRACE_SECONDS: Final = 0.1


class WriteBehind:
    """Tells the kernel about a file that is written from `start` on: advice, never an error."""

    def __init__(self, file: int, start: int) -> None:
        self._file = file
        self._told = start
        self._patience = _GRACE_SECONDS
        self._active = hasattr(os, "posix_fadvise")

    def written(self, position: int) -> None:
        """Note that everything before `position` is written."""
        if not self._active or position - self._told < _WINDOW:
            return
        # The kernel starts to write what is dirty in the range; that keeps it cached.
        length = position - self._told
        started = time.monotonic()
        try:
            os.posix_fadvise(self._file, self._told, length, os.POSIX_FADV_DONTNEED)
        except OSError:
            self._active = False
        self._patience += length / _BYTES_PER_SECOND
        self._patience -= time.monotonic() - started
        if self._patience < 0:
            self._active = False
        self._told = position
