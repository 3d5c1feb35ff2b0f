"""Taking files over into a store, or their digests alone, a few at a time."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Final

from modelpack.digest import Digest, new_hasher
from modelpack.errors import PackagingError, SourceChangedError
from modelpack.operations.parallel import run_all
from modelpack.packaging.plan import LayerFile
from modelpack.progress import Action, Progress
from modelpack.storage import Watch
from modelpack.stores.layout import LayoutStore

_CHUNK: Final = 1024 * 1024
#: May be more than there are processors: a file's writes wait for the disk, not for them.
_FILES_AT_A_TIME: Final = 4


def take_files(
    files: Iterable[LayerFile], store: LayoutStore | None, link: bool, watch: Watch
) -> list[Digest]:
    """Return each file's digest; with a store, each file is in it afterwards."""

    def take(file: LayerFile) -> Digest:
        if store is None:
            digest = _hash(file, watch)
            identity = _identity(file.path)
        else:
            imported = store.import_file(file.path, watch, link=link)
            digest = imported.digest
            identity = (imported.size, imported.mtime_ns, imported.device, imported.inode)
        if identity != (file.size, file.mtime_ns, file.device, file.inode):
            raise SourceChangedError(
                f"{file.path}: the file changed while it was packaged",
                hint="package again once nothing writes to it any more",
            )
        return digest

    tasks = [partial(take, file) for file in files]
    return run_all(tasks, _FILES_AT_A_TIME, watch.stop)


def _identity(path: Path) -> tuple[int, int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise PackagingError(f"{path}: cannot be read: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino


def _hash(file: LayerFile, watch: Watch) -> Digest:
    hasher, buffer, done = new_hasher(), memoryview(bytearray(_CHUNK)), 0
    try:
        with file.path.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                watch.stop.check()
                hasher.update(buffer[:count])
                done += count
                watch.report(Progress(Action.VERIFY, file.filepath, None, done, file.size))
    except OSError as error:
        raise PackagingError(f"{file.path}: cannot be read: {error.strerror}") from error
    return Digest.of_hasher(hasher)
