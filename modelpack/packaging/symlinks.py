"""Which symbolic links in a directory are followed.

A directory that came from elsewhere must not pull in files of this machine (`key -> ~/.ssh/id`).
So a link is followed only where its target lies inside the directory, or in the blobs of the
Hugging Face cache that the directory is a snapshot of (models--org--name/{blobs,snapshots}), which
consists of nothing but links.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from modelpack.errors import PackagingError
from modelpack.packaging.files import shown


@dataclass(frozen=True, slots=True)
class LinkRule:
    """Decides about the links in one directory; `allowed` are real paths."""

    allowed: tuple[str, ...]
    follow_all: bool

    @classmethod
    def for_directory(cls, root: Path, *, follow_all: bool) -> Self:
        """Return the rule for the directory `root`, which may be a link itself."""
        real = os.path.realpath(root)
        blobs = hub_blobs(real)
        return cls((real,) if blobs is None else (real, blobs), follow_all)

    def check(self, link: str) -> None:
        """Raise `PackagingError`, naming the link and its target, unless it is to be followed."""
        try:
            target = os.path.realpath(link, strict=True)
        except OSError as error:
            raise PackagingError(
                f"{shown(link)} is a symbolic link to {shown(os.readlink(link))}, which "
                f"cannot be followed: {error.strerror}"
            ) from None
        if self.follow_all or any(_is_inside(target, place) for place in self.allowed):
            return
        raise PackagingError(
            f"{shown(link)} is a symbolic link to {shown(target)}, outside the directory",
            hint="if that file belongs to the model, use --follow-symlinks, or copy it here",
        )


def hub_blobs(real: str) -> str | None:
    """Return the blobs of the Hugging Face cache repository that holds the real path `real`."""
    parts = Path(real).parts
    for i in range(len(parts) - 2, 0, -1):
        if parts[i] == "snapshots" and parts[i - 1].startswith("models--"):
            return os.path.join(*parts[:i], "blobs")
    return None


def _is_inside(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip(os.sep) + os.sep)
