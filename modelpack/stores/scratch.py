"""Room beside the blobs for what is made on the way: a directory that is gone afterwards."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

from modelpack.stores.layout import LayoutStore
from modelpack.stores.os_errors import translating
from modelpack.stores.tree import Tree


@contextmanager
def scratch_directory(store: LayoutStore, what: str) -> Iterator[Path]:
    """Yield a new directory on the file system of the blobs; its name begins with `what`.

    A collection deletes what a killed process left of it.
    """
    path = Tree(store.root).uploads / f"{what}-{uuid.uuid4().hex}"
    with translating("make", path):
        path.mkdir(parents=True)
    try:
        yield path
    finally:
        rmtree(path, ignore_errors=True)
