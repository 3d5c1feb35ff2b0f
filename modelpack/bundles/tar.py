"""Unpack an archive layer into a tree: files and directories, within limits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from modelpack.artifacts.digest import Digest, new_hasher
from modelpack.artifacts.model import ModelFile
from modelpack.artifacts.paths import checked_path
from modelpack.bundles.directory import EXECUTABLE_MODE, FILE_MODE, Tree
from modelpack.bundles.links import open_blob, write_all
from modelpack.bundles.tar_reader import Allowance, Content, TarEntry, TarReader, over_limit
from modelpack.errors import StorageFullError
from modelpack.progress import Action, Progress
from modelpack.storage import Watch

_CHUNK = 256 * 1024
_REPORT_BYTES = 4 * 1024 * 1024
# Bytes to leave free on the disk for other programs.
_RESERVE_BYTES = 64 * 1024 * 1024


def extract(
    layer: ModelFile, path: Path, tree: Tree, allowance: Allowance, watch: Watch, what: str
) -> tuple[tuple[str, Digest], ...]:
    """Unpack the archive at `path` into `tree`; return the path and digest of each file.

    Owners, times and all permissions except the executable bit are ignored. Raises `FormatError`
    for a damaged archive, `UnsafePathError` for a link, a device, or an unsafe or duplicate path,
    `UnsupportedError` for a sparse file, `IntegrityError` beyond a limit, `StorageFullError` if
    the disk is full, `DigestMismatchError` if the content does not match `layer.diff_id`.
    """
    assert layer.archive is not None, f"{what} is one raw file"
    hasher = layer.diff_id.hasher() if layer.diff_id else None
    limit = allowance.of(layer.descriptor.size)
    with open_blob(path, layer.descriptor) as blob:
        content = Content(
            blob,
            layer.archive,
            what,
            limit=limit,
            max_window_bytes=allowance.limits.max_window_bytes,
            hasher=hasher,
            on_read=_ReadProgress(layer, blob, watch, what).tick,
        )
        reader = TarReader(content, what, max_header_bytes=allowance.limits.max_header_bytes)
        files = _unpack(reader, tree, allowance, limit, what)
        content.drain()
    allowance.spend(content.count)
    if layer.diff_id and hasher:
        layer.diff_id.check_equal(Digest.of_hasher(hasher), f"{what}, uncompressed")
    size = layer.descriptor.size
    watch.report(Progress(Action.UNPACK, what, layer.descriptor.digest, size, size))
    return files


class _ReadProgress:
    """Reports the number of bytes read from the blob at intervals, and checks for a stop."""

    def __init__(self, layer: ModelFile, blob: BinaryIO, watch: Watch, what: str) -> None:
        self._layer, self._blob, self._watch, self._what = layer, blob, watch, what
        self._reported = 0

    def tick(self) -> None:
        self._watch.stop.check()
        position, size = self._blob.tell(), self._layer.descriptor.size
        if position - self._reported >= _REPORT_BYTES and position < size:
            self._reported = position
            digest = self._layer.descriptor.digest
            self._watch.report(Progress(Action.UNPACK, self._what, digest, position, size))


def _unpack(
    reader: TarReader, tree: Tree, allowance: Allowance, limit: int, what: str
) -> tuple[tuple[str, Digest], ...]:
    files: list[tuple[str, Digest]] = []
    limits = allowance.limits
    budget, room = limit, tree.free_bytes() - _RESERVE_BYTES
    for number, entry in enumerate(reader, start=1):
        path = _member_path(entry)
        # The size is only a claim, but no more bytes than that are read.
        if entry.size > budget:
            raise over_limit(what, f"{limit} bytes")
        if entry.size > room:
            raise StorageFullError(
                f"no room to unpack {entry.name[:200]!r} of {what}: "
                f"need {entry.size} bytes, have {max(room, 0)}",
                needed=entry.size,
                available=max(room, 0),
                hint="free some space and run the same command again",
            )
        budget -= entry.size
        room -= entry.size
        if not entry.is_directory:
            files.append((path, _write_file(path, entry, reader, tree, what)))
        elif path:
            tree.add_directory(path, what)
        if max(number, len(tree) - allowance.others) > limits.max_entries:
            raise over_limit(what, f"{limits.max_entries} files and directories")
        if tree.path_bytes > limits.max_path_bytes:
            raise over_limit(what, f"{limits.max_path_bytes} bytes of paths")
    return tuple(files)


def _member_path(entry: TarEntry) -> str:
    """Return the checked path of an entry, "" for the root directory of the archive."""
    path = entry.name
    while path.startswith("./"):  # as `tar -c .` writes them
        path = path[2:]
    if entry.is_directory:
        if path in ("", "."):
            return ""
        path = path.removesuffix("/")
    return checked_path(path)


def _write_file(path: str, entry: TarEntry, reader: TarReader, tree: Tree, what: str) -> Digest:
    mode = EXECUTABLE_MODE if entry.executable else FILE_MODE
    hasher = new_hasher()
    with tree.place(path, what) as (folder, name):
        target = folder.create(name, mode)
        try:
            while data := reader.read(_CHUNK):
                write_all(target, data)
                hasher.update(data)
        finally:
            os.close(target)
    return Digest.of_hasher(hasher)
