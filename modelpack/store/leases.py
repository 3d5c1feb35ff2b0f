"""Leases: blobs that a live process needs, so that no other process deletes them while in use.

A lease is a file `ingest/leases/<id>`: a JSON object that names the holder, then one digest per
line. The holder keeps the file locked, so a lease lives exactly as long as its process. This also
works across containers, where process ids mean nothing.
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modelpack.artifacts.digest import Digest
from modelpack.errors import InvalidDigestError
from modelpack.store.filesystem import (
    boot_id,
    map_os_errors,
    open_own,
    random_name,
    try_lock,
    write_all,
)
from modelpack.store.tree import Tree


@dataclass(frozen=True, slots=True)
class LiveLease:
    """The holder of a lease and the blobs it protects."""

    holder: str
    digests: frozenset[Digest]


class Leases:
    """The leases of one store, including those that this object holds."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._mutex = threading.Lock()
        self._growing: dict[int, set[Digest]] = {}  # digests by open file

    @contextmanager
    def hold(
        self, digests: Iterable[Digest], *, growing: bool, inherited: bool = False
    ) -> Iterator[None]:
        """Protect the blobs in the block; a `growing` lease also protects those added by `note`.

        An `inherited` lease survives `exec` and ends with the new program.
        """
        wanted = set(digests)
        lease = self._create(wanted)
        if lease is None:
            yield
            return
        path, descriptor = lease
        os.set_inheritable(descriptor, inherited)
        if growing:
            with self._mutex:
                self._growing[descriptor] = wanted
        try:
            yield
        finally:
            with self._mutex:
                self._growing.pop(descriptor, None)
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def note(self, digest: Digest) -> bool:
        """Add a blob to the growing leases of this object; return whether there are any.

        The caller holds the store's lock.
        """
        with self._mutex:
            for descriptor, listed in self._growing.items():
                if digest not in listed:
                    with map_os_errors("extend a lease in", self._tree.leases):
                        write_all(descriptor, memoryview(f"{digest}\n".encode()))
                    listed.add(digest)
            return bool(self._growing)

    def live(self) -> tuple[LiveLease, ...]:
        """Return the leases of live processes and delete the others.

        The caller holds the store's lock.
        """
        found = []
        with map_os_errors("read the leases in", self._tree.leases):
            if not self._tree.leases.is_dir():
                return ()
            for path in sorted(self._tree.leases.iterdir()):
                try:
                    if not stat.S_ISREG(os.lstat(path).st_mode):
                        continue  # not a lease
                    descriptor = open_own(path)
                except FileNotFoundError:  # released since it was listed
                    continue
                try:
                    if try_lock(descriptor):
                        path.unlink(missing_ok=True)
                    else:
                        raw = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
                        found.append(_parsed(raw.decode(errors="replace")))
                finally:
                    os.close(descriptor)
        return tuple(found)

    def _create(self, digests: Iterable[Digest]) -> tuple[Path, int] | None:
        """Return the path and the locked file of a new lease; None in a read-only store."""
        path = self._tree.leases / random_name()
        header = json.dumps({"pid": os.getpid(), "boot": boot_id()})
        text = "\n".join([header, *map(str, digests)]) + "\n"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        with map_os_errors("write a lease in", self._tree.leases):
            if self._tree.is_read_only():
                return None
            self._tree.prepare()
            with self._tree.lock().held():
                descriptor = os.open(path, flags, 0o644)
                try:
                    locked = try_lock(descriptor)
                    assert locked, "a new file is locked by another process"
                    write_all(descriptor, memoryview(text.encode()))
                except BaseException:
                    path.unlink(missing_ok=True)
                    os.close(descriptor)
                    raise
        return path, descriptor


def _parsed(text: str) -> LiveLease:
    header, *lines = text.split("\n")
    digests = set()
    for line in lines:
        try:
            digests.add(Digest.parse(line))
        except InvalidDigestError:
            continue
    try:
        holder = f"process {int(json.loads(header)['pid'])}"
    except (ValueError, KeyError, TypeError):
        holder = "another process"
    return LiveLease(holder, frozenset(digests))
