"""Writing large files past the page cache, where the system can: Linux with O_DIRECT.

A copied model is seldom read soon, and its pages cost more than they give: fresh memory has to be
found and cleared for them, and what others have cached is pushed out.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Final

#: Addresses and lengths of direct writes are multiples of this; it suits every usual disk.
ALIGNMENT: Final = 4096
# Small files are better off in the cache.
_WORTH_IT: Final = 8 * 1024 * 1024


class DirectWriter:
    """Writes views to an open file one after the other, directly as long as that works.

    `size` is what is going to be written. Views should be aligned in memory (pages of `mmap` are);
    those that are not, a length that is not a multiple of `ALIGNMENT` (the last, usually) and file
    systems that cannot do it are written through the cache.
    """

    def __init__(self, file: int, size: int) -> None:
        self._file = file
        self._direct = False
        if size >= _WORTH_IT and hasattr(os, "O_DIRECT"):
            self._direct = self._switch(on=True)

    def write(self, view: memoryview) -> None:
        """Write all of `view`; raises `OSError`."""
        while view:
            if self._direct and len(view) % ALIGNMENT:
                self.give_up()
            try:
                view = view[os.write(self._file, view) :]
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self.give_up()

    def give_up(self) -> None:
        """Write through the cache from now on, as everybody else who uses the open file does."""
        if self._direct:
            self._direct = False
            self._switch(on=False)

    def _switch(self, *, on: bool) -> bool:
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        flags = flags | os.O_DIRECT if on else flags & ~os.O_DIRECT
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags)
        except OSError:
            return False
        return True
