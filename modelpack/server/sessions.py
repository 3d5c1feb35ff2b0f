"""Upload sessions: bytes of a blob to be, on disk, so that a cut or a restart loses none of them.

On disk (below the store's `ingest/`, so that a finished upload is published by a rename)::

    uploads/<uuid>/session.json    {"repository": ..., "algorithm": ...}
    uploads/<uuid>/data            the bytes received so far; its size is the session's offset

The hash runs along while bytes arrive. After a restart it is built again from `data` when the
next chunk comes.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

from modelpack.digest import Digest, new_hasher
from modelpack.errors import DigestMismatchError, NotFoundError
from modelpack.stores.abandoned import abandoned_uploads, idle_seconds, remove_upload
from modelpack.stores.os_errors import translating
from modelpack.stores.write_behind import WriteBehind

if TYPE_CHECKING:
    from hashlib import _Hash

_SWEEP_INTERVAL = 600.0
_READ_SIZE = 1024 * 1024
# Hash a piece while it is written, one for each processor: they wait for nothing else.
_HASHERS: Final = ThreadPoolExecutor(os.cpu_count() or 1, "modelpack-hash")

#: Publishes a complete file, whose bytes have this digest, as a blob.
Publish = Callable[[Path, Digest], None]


class OutOfOrder(Exception):
    """A chunk does not start where the last one ended."""


class TooMany(Exception):
    """There are as many sessions as there may be."""


class Superseded(Exception):
    """A later request took the session over."""


class UploadSession:
    """One upload; its methods block and are called from worker threads."""

    def __init__(self, directory: Path, repository: str, algorithm: str) -> None:
        self.id = directory.name
        self.repository = repository
        self.size = 0
        self._directory = directory
        self._data = directory / "data"
        self._algorithm = algorithm
        self._hasher: _Hash | None = None
        self._turn = 0
        self._closed = False
        self._lock = threading.Lock()

    @classmethod
    def create(cls, directory: Path, repository: str, algorithm: str) -> UploadSession:
        """Return a new, empty session."""
        session = cls(directory, repository, algorithm)
        state = {"repository": repository, "algorithm": algorithm}
        with translating("make an upload session in", directory):
            directory.mkdir(parents=True)
            (directory / "session.json").write_text(json.dumps(state))
            session._data.touch()
        session._hasher = new_hasher(algorithm)
        return session

    @classmethod
    def load(cls, directory: Path) -> UploadSession:
        """Return the session that an earlier server left; raise `NotFoundError`."""
        try:
            state = json.loads((directory / "session.json").read_text())
            session = cls(directory, state["repository"], state["algorithm"])
            session.size = session._data.stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            raise NotFoundError(f"no upload session {directory.name}") from None
        return session

    def writer(self, start: int | None, algorithm: str | None = None) -> Writer:
        """Take the session over from any earlier request and return how to append to it.

        `start` is the offset that the client believes in (None: wherever we are), `algorithm` the
        one it will name in the end, if it is known. Raises `OutOfOrder`.
        """
        with self._lock:
            self._check_open()
            if start == 0 and self.size == 1:
                # The status `0-0` says both "nothing" and "one byte": starting again is right.
                os.truncate(self._data, 0)
                self.size, self._hasher = 0, None
            if start is not None and start != self.size:
                raise OutOfOrder
            if algorithm is not None and algorithm != self._algorithm:
                self._algorithm, self._hasher = algorithm, None
            descriptor = self._open()
            try:
                if self._hasher is None or os.fstat(descriptor).st_size != self.size:
                    self._rebuild(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            self._turn += 1
            return Writer(self, descriptor, self._turn)

    def cancel(self) -> None:
        """Forget the session and its bytes."""
        with self._lock:
            self._close()

    def idle_seconds(self) -> float:
        """Return how long ago the last bytes came."""
        try:
            return idle_seconds(self._directory)
        except FileNotFoundError:
            return float("inf")

    def is_over(self) -> bool:
        """Return whether it ended, or a collection removed it."""
        return self._closed or not self._data.exists()

    def _open(self) -> int:
        try:
            return os.open(self._data, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self._unknown() from None

    def _append(self, turn: int, descriptor: int, content: bytes | bytearray) -> None:
        with self._lock:
            self._check_turn(turn)
            assert self._hasher is not None
            hasher = self._hasher.copy()
            hashing = _HASHERS.submit(hasher.update, content)
            try:
                with translating("receive a blob in", self._directory):
                    _write_at(descriptor, content, self.size)
            finally:
                hashing.result()
            self._hasher = hasher
            self.size += len(content)

    def _finish(self, turn: int, digest: Digest, publish: Publish) -> None:
        with self._lock:
            self._check_turn(turn)
            assert self._hasher is not None
            try:
                digest.check_equal(Digest.of_hasher(self._hasher), "the upload")
            except DigestMismatchError:
                self._close()  # no request can make these bytes right again
                raise
            publish(self._data, digest)
            self._close()

    def _rebuild(self, descriptor: int) -> None:
        hasher, offset = new_hasher(self._algorithm), 0
        while chunk := os.pread(descriptor, _READ_SIZE, offset):
            hasher.update(chunk)
            offset += len(chunk)
        self._hasher, self.size = hasher, offset

    def _check_turn(self, turn: int) -> None:
        self._check_open()
        if turn != self._turn:
            raise Superseded

    def _check_open(self) -> None:
        if self._closed:
            raise self._unknown()

    def _unknown(self) -> NotFoundError:
        return NotFoundError(f"no upload session {self.id}")

    def _close(self) -> None:
        self._closed = True
        remove_upload(self._directory)


def _write_at(descriptor: int, content: bytes | bytearray, offset: int) -> None:
    """Write all of `content`, or leave the file as long as it was."""
    try:
        position = offset
        with memoryview(content) as view:
            while position < offset + len(view):
                position += os.pwrite(descriptor, view[position - offset :], position)
    except OSError:
        os.ftruncate(descriptor, offset)
        raise


class Writer:
    """One request's right to append to a session, until a later request takes it."""

    def __init__(self, session: UploadSession, descriptor: int, turn: int) -> None:
        self._session = session
        self._descriptor = descriptor
        self._turn = turn
        self._behind = WriteBehind(descriptor, session.size)

    def append(self, content: bytes | bytearray) -> None:
        """Write and hash `content`. Raises `Superseded`, `NotFoundError` once it is closed."""
        self._session._append(self._turn, self._descriptor, content)
        self._behind.written(self._session.size)

    def finish(self, digest: Digest, publish: Publish) -> None:
        """Verify the whole and publish it; the session ends, also by `DigestMismatchError`."""
        self._session._finish(self._turn, digest, publish)

    def close(self) -> None:
        """Close the file; what was appended stays in the session."""
        os.close(self._descriptor)


class UploadSessions:
    """All sessions of a store."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sessions: dict[str, UploadSession] = {}
        self._lock = threading.Lock()
        self._swept = -_SWEEP_INTERVAL

    def __len__(self) -> int:
        """Return how many sessions this server has begun or continued, and not ended."""
        return len(self._sessions)

    def create(self, repository: str, algorithm: str, most: int | None = None) -> UploadSession:
        """Return a new session, whose id cannot be guessed; raise `TooMany` if there are `most`."""
        self._sweep()
        name = str(uuid.uuid4())
        with self._lock:  # so that those who come together count each other
            if most is not None and len(self._sessions) >= most:
                raise TooMany
            session = UploadSession.create(self._directory / name, repository, algorithm)
            self._sessions[name] = session
        return session

    def get(self, repository: str, name: str) -> UploadSession:
        """Return the session `name` of `repository`; raise `NotFoundError`."""
        try:
            known = str(uuid.UUID(name)) == name
        except ValueError:
            known = False
        if not known:
            raise NotFoundError(f"no upload session {name[:80]!r}")
        with self._lock:
            session = self._sessions.get(name)
            if session is None or session.is_over():
                session = self._sessions[name] = UploadSession.load(self._directory / name)
        if session.repository != repository:
            raise NotFoundError(f"no upload session {name} in {repository}")
        return session

    def drop_idle(self, seconds: float) -> None:
        """Cancel the sessions that have received nothing for so long."""
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            if session.idle_seconds() > seconds:
                session.cancel()
                self.forget(session)

    def forget(self, session: UploadSession) -> None:
        """Drop a session that ended."""
        with self._lock:
            self._sessions.pop(session.id, None)

    def _sweep(self) -> None:
        """Cancel what has been idle for too long; every ten minutes is often enough."""
        now = time.monotonic()
        with self._lock:
            if now - self._swept < _SWEEP_INTERVAL:
                return
            self._swept = now
        for path in abandoned_uploads(self._directory):
            with self._lock:
                session = self._sessions.get(path.name)
            if session is None:
                remove_upload(path)
            else:
                session.cancel()
                self.forget(session)
