"""Pin the references of a project to digests, check the pins, and pull the pinned digests."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.lockfile import FILE_NAME, MAX_BYTES, LockFile, lockable
from modelpack.artifacts.reference import Reference
from modelpack.errors import IntegrityError, NotFoundError, StoreError, UnsupportedError
from modelpack.hub.reference import HUB_REGISTRIES
from modelpack.operations.lookup import check_whole, stored_model
from modelpack.operations.pull import Pulled, pull
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.operations.transfer import Transfer
from modelpack.operations.trust import check_stored
from modelpack.progress import ProgressCallback, Stop
from modelpack.storage import watching
from modelpack.store.layout import LayoutStore


@dataclass(frozen=True, slots=True)
class Drift:
    """A locked reference that now has another digest, `found`; None if it no longer exists."""

    reference: Reference
    locked: Digest
    found: Digest | None
    message: str


def read_lock(path: Path = Path(FILE_NAME)) -> LockFile:
    """Return the lock file `path`; raises `NotFoundError`, `FormatError` and `StoreError`."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(
            f"no such file: {path}", hint="run `modelpack lock REF...` to create it"
        ) from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
    return LockFile.parse(raw, str(path))


def write_lock(lock: LockFile, path: Path = Path(FILE_NAME)) -> bool:
    """Replace the lock file atomically; return whether it changed. Raises `StoreError`."""
    content = lock.encode()
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        if path.exists() and path.read_bytes() == content:
            return False
        staged.write_bytes(content)
        os.replace(staged, path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise StoreError(f"{path}: cannot be written: {error.strerror}") from error
    return True


def lock(
    names: Sequence[str] = (),
    *,
    path: Path = Path(FILE_NAME),
    offline: bool = False,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    stop: Stop | None = None,
) -> LockFile:
    """Pin `names` to their current digests and keep the other pins; without names, update all.

    Digests come from the registries or, with `offline`, from the store. If a reference is not
    found, nothing is written.
    """
    before = read_lock(path) if path.exists() or not names else LockFile()
    references = [lockable(name) for name in names] or list(before.digests)
    found = {ref: _resolve(ref, offline, store, remote, stop) for ref in references}
    after = before.with_digests(found)
    write_lock(after, path)
    return after


def unlock(names: Iterable[str], *, path: Path = Path(FILE_NAME)) -> LockFile:
    """Remove references from the lock file; raise `NotFoundError` if it lacks one of them."""
    before = read_lock(path)
    gone = [lockable(name) for name in names]
    for reference in gone:
        if reference not in before.digests:
            raise NotFoundError(f"{reference} is not in {path}")
    after = before.without(gone)
    write_lock(after, path)
    return after


def check_lock(
    names: Sequence[str] = (),
    *,
    path: Path = Path(FILE_NAME),
    offline: bool = False,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    stop: Stop | None = None,
) -> tuple[Drift, ...]:
    """Return the references whose current digest differs from the locked one.

    Digests come from the registries or, with `offline`, from the store. Raises the errors of
    registries.
    """
    drifts = []
    for reference, locked in _chosen(read_lock(path), names, path).items():
        found: Digest | None = None
        try:
            found = _resolve(reference, offline, store, remote, stop)
        except NotFoundError as error:
            drifts.append(Drift(reference, locked, None, str(error)))
            continue
        if found != locked:
            message = f"{reference} points to {found}, but is locked to {locked}"
            drifts.append(Drift(reference, locked, found, message))
    return tuple(drifts)


def pull_locked(
    names: Sequence[str] = (),
    *,
    path: Path = Path(FILE_NAME),
    offline: bool = False,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> tuple[Pulled, ...]:
    """Pull the locked models by digest, and tag them in the store with their references.

    Without `names`, pulls all models of the lock file. Stored models are not fetched again: their
    transfers have written no blobs. With `offline`, nothing is fetched: a missing or partial model
    raises `NotFoundError`. If a call fails, the models before the failure stay stored.
    """
    store = store or LayoutStore()
    watch = watching(progress, stop)
    done = []
    for reference, digest in _chosen(read_lock(path), names, path).items():
        watch.stop.check()
        pinned = reference.with_digest(digest)
        if not _is_stored(store, digest):
            if offline:
                raise NotFoundError(
                    f"{reference} is locked to {digest}, which is not in the store {store.root}",
                    hint="run `modelpack pull --locked`",
                )
            pulled = pull(
                pinned, store=store, remote=remote, progress=watch.report, stop=watch.stop
            )
            digest = pulled.digest  # for an index, the digest of the variant
        else:
            model = replace(stored_model(store, str(digest)), reference=reference)
            if remote is not None and remote.trust is not None:
                check_stored(remote.trust, store, model, remote, watch)
            existed = len(model.manifest.unique_blobs)
            pulled = Pulled(pinned, model.digest, Transfer(model.descriptor, 0, existed, 0, 0))
        done.append(pulled)
        store.tag(str(digest), reference)
    return tuple(done)


def _is_stored(store: LayoutStore, digest: Digest) -> bool:
    """Return whether the store has the model with all its blobs."""
    try:
        model = stored_model(store, str(digest))
        check_whole(store, model)
    except (NotFoundError, IntegrityError):
        return False
    return all(store.has_blob(blob) for blob in model.manifest.unique_blobs)


def _chosen(lock: LockFile, names: Sequence[str], path: Path) -> dict[Reference, Digest]:
    references = [lockable(name) for name in names] or sorted(lock.digests, key=str)
    return {reference: lock.digest_of(reference, str(path)) for reference in references}


def _resolve(
    reference: Reference,
    offline: bool,
    store: LayoutStore | None,
    remote: RemoteOptions | None,
    stop: Stop | None,
) -> Digest:
    if offline:
        return (store or LayoutStore()).resolve(str(reference)).digest
    if reference.registry in HUB_REGISTRIES:
        raise UnsupportedError(
            f"cannot lock {reference}: {HUB_REGISTRIES[reference.registry].title} has no digests",
            hint="copy the model to a registry and lock that reference",
        )
    with open_repository(reference, remote or RemoteOptions(), watching(None, stop)) as repository:
        return repository.resolve(reference.target).digest
