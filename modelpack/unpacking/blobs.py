"""Opening blobs of a store: verified there, but they may have been lost or cut since."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from modelpack.descriptor import Descriptor
from modelpack.errors import NotFoundError, SizeMismatchError, StoreError

# Not to wait for a writer, should somebody have put a FIFO there.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_BUFFER_BYTES = 256 * 1024


@contextmanager
def open_blob(path: Path, descriptor: Descriptor) -> Iterator[BinaryIO]:
    """Give the blob for reading.

    Raises `NotFoundError` if it is not there, `SizeMismatchError` if it has not the size that the
    descriptor says, `StoreError` if it is no file.
    """
    try:
        fd = os.open(path, _READ)
    except FileNotFoundError:
        raise NotFoundError(
            f"blob {descriptor.digest} is not in the store: no {path}",
            hint="pull the model again",
        ) from None
    with os.fdopen(fd, "rb", buffering=_BUFFER_BYTES) as blob:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(f"blob {descriptor.digest} is not a file: {path}")
        if status.st_size != descriptor.size:
            raise SizeMismatchError(
                f"blob {descriptor.digest} has {status.st_size} bytes, "
                f"expected {descriptor.size}: {path}",
                expected=str(descriptor.size),
                got=str(status.st_size),
                hint="check the store with `modelpack fsck`",
            )
        yield blob
