"""Find the shards of a model, by file name and by index, and check that none is missing.

llama.cpp and transformers name shards `<prefix>-00001-of-00003.<ending>`; transformers also
writes `<stem>.safetensors.index.json`, which says in which file each tensor is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelpack.artifacts.paths import path_problem
from modelpack.errors import ModelpackError, NotFoundError, PackagingError
from modelpack.formats.json_reader import JSONText
from modelpack.formats.reader import WeightFile, quoted

INDEX_SUFFIX = ".safetensors.index.json"
#: Tensors in one index. The largest models have some 150,000.
MAX_INDEX_TENSORS = 500_000

# Both are case-sensitive, as in llama.cpp and transformers; only GGUF allows an empty prefix.
_SHARD_NAMES = (
    re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<ending>gguf)", re.A),
    re.compile(
        r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<ending>safetensors)", re.A
    ),
)
_NAMED_IN_ERRORS = 5


@dataclass(frozen=True, slots=True)
class ShardSet:
    """The files `<prefix>-00001-of-<count>.<ending>` and so on, in one directory."""

    directory: Path
    prefix: str
    count: int
    ending: str

    def name(self, number: int) -> str:
        """Return the name of shard `number`, counted from 1."""
        return f"{self.prefix}-{number:05d}-of-{self.count:05d}.{self.ending}"

    def paths(self) -> tuple[Path, ...]:
        """Return the paths of all shards, whether they exist or not."""
        return tuple(self.directory / self.name(at) for at in range(1, self.count + 1))


def shard_set(path: str | os.PathLike[str]) -> ShardSet | None:
    """Return the shard set that the name of the file `path` belongs to, or None.

    Raises `PackagingError` for a number outside the set, such as `00004-of-00003`.
    """
    path = Path(path)
    for pattern in _SHARD_NAMES:
        found = pattern.fullmatch(path.name)
        if found:
            number, count = int(found["number"]), int(found["count"])
            if not 1 <= number <= count:
                raise PackagingError(
                    f"{path}: {number} of {count} is not a valid shard number; the first is 00001"
                )
            return ShardSet(path.parent, found["prefix"], count, found["ending"])
    return None


def find_shards(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Return all shards of the set that the file `path` belongs to, in order.

    A file that is not a shard is returned alone. Raises `PackagingError` with the names of shards
    that are missing from the directory.
    """
    path = Path(path)
    shards = shard_set(path)
    if shards is None:
        return (path,)
    present = _names_in(shards.directory)
    missing = [shard.name for shard in shards.paths() if shard.name not in present]
    if missing:
        raise _missing(shards.directory, missing, f"{shards.count} shards")
    return shards.paths()


def check_complete(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Check that no shard is missing among the weight files `paths`, by name and by index.

    Raises `PackagingError` with the missing names, and `WeightFormatError` for a broken index.
    """
    present: dict[Path, set[str]] = {}
    sets: dict[ShardSet, None] = {}
    for path in map(Path, paths):
        present.setdefault(path.parent, set()).add(path.name)
        shards = shard_set(path)
        if shards:
            sets[shards] = None
    indexed: set[Path] = set()
    for directory, names in present.items():
        for index in _indexes(directory, names):
            expected = read_index(index)
            missing = sorted(expected - names)
            if missing:
                raise _missing(directory, missing, index.name)
            indexed.update(directory / name for name in expected)
    for shards in sets:
        names = present[shards.directory]
        missing = [shard.name for shard in shards.paths() if shard.name not in names]
        # A complete index overrides the numbers in the names.
        if missing and not any(path in indexed for path in shards.paths()):
            raise _missing(shards.directory, missing, f"{shards.count} shards")


def indexed_files(directory: Path, names: Sequence[str]) -> frozenset[str] | None:
    """Return the weight files that the indexes in `directory` name, or None without an index.

    `names` are the weight files in `directory`; those that no index names hold the same weights
    again, in another layout.
    """
    found = [read_index(index) for index in _indexes(directory, set(names))]
    return frozenset().union(*found) if found else None


def read_index(path: Path) -> frozenset[str]:
    """Return the file names in the `weight_map` of the index `path`."""
    with WeightFile.open(path) as file:
        if not file.head().lstrip().startswith(b"{"):
            raise file.foreign("the index of a sharded model")
        text = JSONText(file, 0, file.size)
        names: set[str] = set()
        for key in text.keys():  # noqa: SIM118 (no dict)
            if key != "weight_map":
                text.value()
                continue
            for at, tensor in enumerate(text.keys()):
                start = text.position
                if at >= MAX_INDEX_TENSORS:
                    raise text.error(f"more tensors than the limit of {MAX_INDEX_TENSORS}", start)
                name = text.value()
                if not isinstance(name, str) or path_problem(name) or "/" in name:
                    raise text.error(
                        f"the file of {quoted(tensor)} is not a name in this directory", start
                    )
                names.add(name)
        text.finish()
        return frozenset(names)


def _indexes(directory: Path, weights: set[str]) -> list[Path]:
    """Return the indexes in `directory`, without those whose model exists as one whole file."""
    return [
        directory / name
        for name in sorted(_names_in(directory))
        if name.endswith(INDEX_SUFFIX) and name.removesuffix(".index.json") not in weights
    ]


def _names_in(directory: Path) -> set[str]:
    try:
        return set(os.listdir(directory))
    except FileNotFoundError:
        raise NotFoundError(f"{directory}: no such directory") from None
    except OSError as error:
        raise ModelpackError(f"{directory}: cannot be listed: {error.strerror}") from error


def _missing(directory: Path, names: Sequence[str], expected_by: str) -> PackagingError:
    listed = ", ".join(names[:_NAMED_IN_ERRORS])
    more = len(names) - _NAMED_IN_ERRORS
    return PackagingError(
        f"{directory}: missing {listed}{f' and {more} more' if more > 0 else ''}"
        f" (expected by {expected_by})",
        hint="fetch the missing files, or remove the rest of their set",
    )
