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
    """Tells the kernel about a file that is written from `start` on; only advice, never an error.

    `drop` also frees the memory of what reached the disk: for copies of files that are cached
    already.
    """

    def __init__(self, file: int, start: int, *, drop: bool) -> None:
        self._file = file
        self._told = start
        self._dropped = start
        self._drop = drop
        self._patience = _GRACE_SECONDS
        self._active = hasattr(os, "posix_fadvise")

    def written(self, position: int) -> None:
        """Note that everything before `position` is written."""
        if not self._active or position - self._told < _WINDOW:
            return
        # Of a range, the kernel starts to write what is dirty, and drops what is on the disk: that
        # is the window before, which gets its second call.
        begin = self._dropped if self._drop else self._told
        started = time.monotonic()
        try:
            os.posix_fadvise(self._file, begin, position - begin, os.POSIX_FADV_DONTNEED)
        except OSError:
            self._active = False
        self._patience += (position - self._told) / _BYTES_PER_SECOND
        self._patience -= time.monotonic() - started
        if self._patience < 0:
            self._active = False
        self._dropped, self._told = self._told, position
