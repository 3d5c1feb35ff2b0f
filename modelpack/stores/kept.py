"""Bundles that are kept beside the blobs, `bundles/<alg>-<hex>`, each of one stored manifest.

A runtime may have files of one open: they stay readable when it goes, as blobs do.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from typing import Final

from modelpack.digest import Digest
from modelpack.stores.abandoned import EXPIRY
from modelpack.stores.tree import label, labelled

#: Below the root of the store.
BUNDLES: Final = "bundles"


def bundle_directory(root: Path, manifest: Digest) -> Path:
    """Return where the bundle of a manifest is kept."""
    return root / BUNDLES / label(manifest)


def stale_bundles(root: Path, live: Collection[Digest], seconds: float) -> Iterator[Path]:
    """Return the bundles of manifests that are not `live`, made more than `seconds` ago.

    One that was cut off while it was made is among them after a day: making it may take long.
    """
    for path in sorted((root / BUNDLES).glob("*")):
        with suppress(FileNotFoundError, NotADirectoryError):
            patience = max(seconds, EXPIRY) if path.name.startswith(".") else seconds
            is_old = time.time() - path.stat().st_mtime >= patience
            if is_old and labelled(path.name) not in live:
                yield path


def own_bytes(path: Path) -> int:
    """Return the bytes on the disk that go with a bundle: not those of links to blobs."""
    size = 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):
            found = file.lstat()
            size += found.st_blocks * 512 if found.st_nlink == 1 else 0
    return size


def remove_bundle(path: Path) -> None:
    """Delete a bundle."""
    rmtree(path, ignore_errors=True)
