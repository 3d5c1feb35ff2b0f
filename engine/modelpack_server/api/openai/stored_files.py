"""StoredFiles: uploaded files and the files of batches, on disk, by owner and within limits.

The directory belongs to one server at a time::

    lock                    held by the server
    files/<id>.json         a file's attributes: the file exists once this is written
    files/<id>.data         its bytes
    files/<draft>           an upload in progress; deleted at the next start
    batches/                see `batch_runner`
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from starlette.exceptions import HTTPException

from modelpack.store.filesystem import (
    FileLock,
    draft,
    is_draft,
    map_os_errors,
    read_own,
    write_atomically,
)
from modelpack_engine.errors import QueueFullError, RequestError
from modelpack_server.api.openai.replies import list_object

_log = logging.getLogger(__name__)

#: The limit of bytes in one file; OpenAI's for the input of a batch.
MAX_FILE_BYTES = 200 * 1024 * 1024
#: The limits of an owner, and of all owners together. One owner cannot fill the directory.
MAX_OWNER_FILES, MAX_FILES = 1000, 10_000
MAX_OWNER_BYTES, MAX_BYTES = 2 * 1024**3, 8 * 1024**3
#: The uploads of an owner, and of all owners, that run at a time. Each takes up to 1 MiB of memory.
MAX_OWNER_UPLOADS, MAX_UPLOADS = 8, 32
#: The seconds after which files are deleted unless their upload says otherwise, and the range.
KEPT_FOR = 30 * 86400
SHORTEST, LONGEST = 3600, 30 * 86400

MAX_DOCUMENT = 256 * 1024  # bytes of the attributes of a file or a batch
_MODE = 0o600
_HINT = "delete files, or wait until some expire"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """The attributes of a file; times are in seconds since 1970."""

    id: str
    owner: str | None
    purpose: str
    filename: str
    bytes: int
    created: float
    expires: float

    def json(self) -> dict[str, Any]:
        """Return the OpenAI file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": int(self.created),
            "expires_at": int(self.expires),
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class Identified(Protocol):
    """An object that lists contain."""

    @property
    def id(self) -> str: ...

    def json(self) -> dict[str, Any]:
        """Return the OpenAI object."""


def page(found: Iterable[Identified], after: str | None, limit: int) -> dict[str, Any]:
    """Return the OpenAI list object with at most `limit` objects after the one with id `after`.

    Raises `RequestError` for an `after` that is not in `found`.
    """
    rows = list(found)
    start = 0
    if after is not None:
        start = 1 + next((i for i, row in enumerate(rows) if row.id == after), len(rows))
        if start > len(rows):
            raise RequestError(f"after: no such object: {after[:100]!r}", param="after")
    shown = rows[start : start + limit]
    return list_object([row.json() for row in shown], has_more=start + limit < len(rows))


class StoredFiles:
    """The files in a directory, None: in a temporary one.

    Another owner's file does not exist for an owner. The directory is created at the first upload,
    and locked until `close`. All methods are thread-safe, and may wait for the disk.
    """

    def __init__(
        self, directory: Path | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.clock = clock
        self._directory = directory
        self._files: dict[str, StoredFile] = {}
        self._used: dict[str | None, int] = {}  # bytes of files, uploads and inputs of batches
        self._uploads: dict[str | None, int] = {}  # the number of uploads
        self._lock = threading.RLock()
        self._held = ExitStack()
        self._opened = False

    @property
    def exists(self) -> bool:
        """Whether there is a directory, so that files may have survived a restart."""
        return self._directory is not None and self._directory.is_dir()

    def open(self) -> Path:
        """Lock the directory and read it, if that has not happened yet; return it.

        Raises `LockedError` if another server has it, `StoreError` if it cannot be written.
        """
        with self._lock:
            if self._opened:
                assert self._directory is not None
                return self._directory
            if self._directory is None:
                self._directory = Path(tempfile.mkdtemp(prefix="modelpack-server-"))
                self._held.callback(shutil.rmtree, self._directory, ignore_errors=True)
            for folder in (self._directory, self.folder, self._directory / "batches"):
                with map_os_errors("make", folder):
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = FileLock(self._directory / "lock")
            self._held.enter_context(lock.held(patience=0))
            self._read()
            self._opened = True
            return self._directory

    def close(self) -> None:
        """Release the directory."""
        with self._lock:
            self._opened = False
            self._files.clear()
            self._used.clear()
            self._held.close()

    @property
    def folder(self) -> Path:
        """The directory of the files."""
        assert self._directory is not None, "not opened"
        return self._directory / "files"

    def _read(self) -> None:
        files = [file for path in self.folder.glob("*.json") if (file := self._load(path))]
        self._files = {file.id: file for file in sorted(files, key=lambda each: each.created)}
        for file in files:
            self._used[file.owner] = self._used.get(file.owner, 0) + file.bytes
        for path in self.folder.iterdir():
            if is_draft(path) or (path.suffix != ".json" and path.stem not in self._files):
                _log.warning("deleting the incomplete file %s", path)
                path.unlink(missing_ok=True)
        self.sweep()

    def _load(self, path: Path) -> StoredFile | None:
        """Return a stored file, or None, after deleting it, if it is incomplete."""
        try:
            file = StoredFile(**read_document(path))
            checked = (file.id == path.stem, file.created <= file.expires)
            if all(checked) and self.path(file).stat().st_size == file.bytes:
                return file
            why = "its size or name is not the recorded one"
        except (OSError, ValueError, TypeError) as error:
            why = str(error)
        _log.warning("dropping the uploaded file %s: %s", path.stem, why)
        for part in (path, path.with_suffix(".data")):
            part.unlink(missing_ok=True)
        return None

    def path(self, file: StoredFile) -> Path:
        """Return where the bytes of a file are."""
        return self.folder / f"{file.id}.data"

    def list(self, owner: str | None, purpose: str | None = None) -> list[StoredFile]:
        """Return the files of an owner, oldest first."""
        with self._lock:
            self.open()
            self.sweep()
            return [
                file for file in self._files.values()
                if file.owner == owner and purpose in (None, file.purpose)
            ]  # fmt: skip

    def find(self, owner: str | None, name: str) -> StoredFile:
        """Return the file with this id; raises a 404."""
        with self._lock:
            self.open()
            file = self._files.get(name)
            if file is None or file.owner != owner or file.expires <= self.clock():
                raise HTTPException(404, f"no such file: {name[:100]!r}")
            return file

    def remove(self, owner: str | None, name: str) -> None:
        """Delete a file; raises a 404."""
        with self._lock:
            self._delete(self.find(owner, name))

    def sweep(self) -> None:
        """Delete the files that have expired."""
        with self._lock:
            now = self.clock()
            for file in [each for each in self._files.values() if each.expires <= now]:
                self._delete(file)

    def _delete(self, file: StoredFile) -> None:
        path = self.path(file)
        with map_os_errors("delete", path):
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        del self._files[file.id]
        self.reserve(file.owner, -file.bytes)

    def upload(self, owner: str | None) -> Upload:
        """Begin a file of `owner`.

        Raises `RequestError` beyond a limit of files, and `QueueFullError` beyond one of uploads.
        """
        with self._lock:
            self.open()
            self.sweep()
            self._check_number(owner)
            self._uploads[owner] = self._uploads.get(owner, 0) + 1
            return Upload(self, owner, draft(self.folder, "upload"))

    def reserve(self, owner: str | None, size: int, *, check: bool = True) -> None:
        """Count bytes as used by `owner`; if `check`, raise `RequestError` beyond a limit."""
        with self._lock:
            mine = self._used.get(owner, 0) + size
            everything = sum(self._used.values()) + size
            if check and size > 0 and (mine > MAX_OWNER_BYTES or everything > MAX_BYTES):
                limit = MAX_OWNER_BYTES if mine > MAX_OWNER_BYTES else MAX_BYTES
                raise RequestError(
                    f"the stored files would exceed {limit} bytes", param="file", hint=_HINT
                )
            self._used.pop(owner, None)
            if mine > 0:
                self._used[owner] = mine

    def add(
        self, owner: str | None, path: Path, *, purpose: str, filename: str,
        seconds: float = KEPT_FOR, name: str | None = None,
    ) -> StoredFile:  # fmt: skip
        """Move `path`, which must be on the same file system, to a new file and return it.

        `name` is the id of the file, by default a new one. If the file exists, it is returned.
        """
        name = name or f"file-{uuid.uuid4().hex}"
        with self._lock:
            if (known := self._files.get(name)) is not None:
                return known
            target = self.folder / f"{name}.data"
            now = self.clock()
            with map_os_errors("store", target):
                try:
                    link_or_copy(path, target)
                    size = target.stat().st_size
                    file = StoredFile(name, owner, purpose, filename, size, now, now + seconds)
                    write_document(target.with_suffix(".json"), asdict(file))
                except BaseException:
                    target.unlink(missing_ok=True)  # no limit would count it
                    raise
                path.unlink()
            self._files[name] = file
            self._used[owner] = self._used.get(owner, 0) + size
            return file

    def ended(self, owner: str | None, size: int) -> None:
        """Record that an upload of `owner` ended, for which `size` bytes were reserved."""
        with self._lock:
            left = self._uploads.pop(owner, 0) - 1
            if left > 0:
                self._uploads[owner] = left
            self.reserve(owner, -size)

    def _check_number(self, owner: str | None) -> None:
        uploads = sum(self._uploads.values())
        if uploads >= MAX_UPLOADS or self._uploads.get(owner, 0) >= MAX_OWNER_UPLOADS:
            raise QueueFullError("too many uploads run at the same time", retry_after=1.0)
        mine = sum(file.owner == owner for file in self._files.values())
        for count, limit in (
            (mine + self._uploads.get(owner, 0), MAX_OWNER_FILES),
            (len(self._files) + uploads, MAX_FILES),
        ):
            if count >= limit:
                raise RequestError(
                    f"the limit of {limit} stored files is reached", param="file", hint=_HINT
                )


class Upload:
    """A file that is being written, until `close`, which deletes it unless `finish` was called."""

    def __init__(self, files: StoredFiles, owner: str | None, path: Path) -> None:
        self._files = files
        self._owner = owner
        self._path = path
        self._stream: BinaryIO | None = None
        self._size = 0

    def close(self) -> None:
        """End the upload."""
        if self._stream is not None:
            self._stream.close()
        self._path.unlink(missing_ok=True)
        self._files.ended(self._owner, self._size)
        self._size = 0

    def write(self, content: bytes) -> None:
        """Append bytes; raises `RequestError` beyond the limits of the owner's files."""
        self._files.reserve(self._owner, len(content))
        self._size += len(content)
        with map_os_errors("write", self._path):
            if self._stream is None:
                self._stream = open(self._path, "xb", opener=_private)  # noqa: SIM115
            self._stream.write(content)

    def finish(self, *, purpose: str, filename: str, seconds: float) -> StoredFile:
        """Store the bytes as a file."""
        self.write(b"")
        assert self._stream is not None
        with map_os_errors("write", self._path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self._stream.close()
        return self._files.add(
            self._owner, self._path, purpose=purpose, filename=filename, seconds=seconds
        )


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a file with the bytes of `source`, which is kept."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV):
            raise
        shutil.copyfile(source, target)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE)


def read_document(path: Path) -> dict[str, Any]:
    """Return a JSON object that `write_document` wrote; raises `OSError`, `ValueError`."""
    found = json.loads(read_own(path, MAX_DOCUMENT))
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def write_document(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a file by a JSON object, durably."""
    write_atomically(path, json.dumps(value).encode(), by_way_of=path.parent, mode=_MODE)
