"""What the operating system refuses, said in Modelpack's own errors."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelpack.errors import StorageFullError, StoreError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


@contextmanager
def translating(doing: str, path: Path | str) -> Iterator[None]:
    """Turn an `OSError` inside the block into a `StoreError`: "cannot <doing> <path>: ..."."""
    try:
        yield
    except OSError as error:
        raise translated(error, doing, path) from error


def translated(error: OSError, doing: str, path: Path | str) -> StoreError:
    """Return the `StoreError` (a `StorageFullError` where the disk is full) for `error`."""
    why = error.strerror or str(error)
    if error.errno in FULL:
        return StorageFullError(
            f"cannot {doing} {path}: {why}",
            hint="free some space (`modelpack gc` may help) and run the same command again",
        )
    hint = None
    if doing == "lock" and error.errno in _NO_LOCKS:
        why = f"its file system has no locks ({why})"
        hint = "keep the store elsewhere, on a local disk: two processes would damage it there"
    if error.errno in _FORBIDDEN:
        hint = "check who owns the store and whether its file system is writable"
    return StoreError(f"cannot {doing} {path}: {why}", hint=hint)
