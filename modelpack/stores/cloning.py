"""Copies that share their blocks until one of them changes, where the file system can do that."""

from __future__ import annotations

import fcntl
import os
import sys

from modelpack.stores.os_errors import FULL

_FICLONE = 0x40049409  # linux/fs.h


def clone(source: int, target: int) -> bool:
    """Make the open, empty file `target` share all blocks of `source`; return whether that worked.

    Linux (btrfs, XFS, bcachefs, ...). Elsewhere the bytes are copied.
    """
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def reserve(target: int, size: int) -> None:
    """Reserve `size` bytes for the open file, where possible; raises `OSError` if the disk is full.

    Writing is faster after that, and a full disk shows at once.
    """
    if size == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(target, 0, size)
    except OSError as error:
        if error.errno in FULL:
            raise
