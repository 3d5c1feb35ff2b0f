"""Files that a model would hold twice: in the directory and named by a flag, or by two flags."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from modelpack.errors import PackagingError
from modelpack.packaging.files import LayerFile, shown, unreadable

_CHUNK_BYTES: Final = 1024 * 1024


def without_duplicates(
    files: Iterable[LayerFile], named: Iterable[LayerFile]
) -> tuple[tuple[LayerFile, ...], tuple[str, ...]]:
    """Return `files`, then those `named` by flags that are not among them, and notes on the rest.

    A file named by a flag that is there already, by path and content, is not added; what the flag
    says it is counts for more than its name (`--license TERMS.txt`). Raises `PackagingError` for
    two different files of one path: only one of them could be unpacked.
    """
    kept = list(files)
    places = {file.filepath: i for i, file in enumerate(kept)}
    notes = []
    for file in named:
        place = places.setdefault(file.filepath, len(kept))
        if place == len(kept):
            kept.append(file)
            continue
        other = kept[place]
        if not _same_content(file, other):
            raise PackagingError(
                f"{shown(other.path)} and {shown(file.path)} would both be "
                f"{shown(file.filepath)!r} in the model",
                hint="rename one of them",
            )
        notes.append(f"{shown(file.path)} is in the model already as {shown(file.filepath)!r}")
        kept[place] = other.with_type(file.media_type)
    return tuple(kept), tuple(notes)


def _same_content(one: LayerFile, other: LayerFile) -> bool:
    if (one.device, one.inode) == (other.device, other.inode):
        return True
    if one.size != other.size:
        return False
    try:
        with open(one.path, "rb") as first, open(other.path, "rb") as second:
            while chunk := first.read(_CHUNK_BYTES):
                if chunk != second.read(_CHUNK_BYTES):
                    return False
            return True
    except OSError as error:
        raise unreadable(one.path, error) from None
