"""Package: files on disk, or a model that exists, into a new model in the store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from modelpack.config import ModelConfig
from modelpack.digest import Digest, new_hasher
from modelpack.errors import PackagingError, SourceChangedError
from modelpack.manifest import Manifest
from modelpack.operations.find import find_model
from modelpack.operations.parallel import run_all
from modelpack.operations.push import Pushed, push_from
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.watching import watching
from modelpack.packaging.build import Built, build
from modelpack.packaging.plan import LayerFile, Skipped, plan
from modelpack.packaging.repackage import plan_extras, repackage
from modelpack.packaging.request import PackageRequest
from modelpack.progress import Action, Progress, ProgressCallback, Stop
from modelpack.reference import Reference
from modelpack.storage import Watch
from modelpack.stores.layout import LayoutStore

_CHUNK = 1024 * 1024
#: May be more than there are processors: a file's writes wait for the disk, not for them.
_FILES_AT_A_TIME = 4


@dataclass(frozen=True, slots=True)
class Packaged:
    """A packaged model. `stored` is false for a dry run; `pushed` says what a push did."""

    reference: Reference
    digest: Digest
    manifest: Manifest
    config: ModelConfig
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    stored: bool
    pushed: Pushed | None = None


def package(
    reference: str | Reference,
    request: PackageRequest,
    *,
    from_model: str | None = None,
    push: bool = False,
    dry_run: bool = False,
    link: bool = False,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Packaged:
    """Make a model of what `request` names, keep it in `store` as `reference`, and push it.

    `from_model` starts from a stored or remote model instead of files: `request` then holds what
    to add or change. `dry_run` computes the digest and writes nothing. `link` hard-links the files
    into the store rather than copying them, where the file system can.

    Raises `PackagingError`, `WeightFormatError`, `UsageError`, `SourceChangedError`,
    `StorageFullError`, and what `modelpack.push` raises.
    """
    where = Reference.parse(reference) if isinstance(reference, str) else reference
    if where.digest is not None:
        raise PackagingError(
            f"{where}: a digest cannot be chosen, it follows from the files",
            hint=f"write {where.without_digest()}",
        )
    store = store or LayoutStore()
    watch = watching(progress, stop)
    if from_model is not None:
        base = find_model(from_model, store, pull=True, remote=remote, watch=watch)
        planned = plan_extras(request)
    else:
        base = None
        planned = plan(request)
    for skipped in planned.skipped:
        message = f"skipped {skipped.path}: {skipped.reason}"
        watch.report(Progress(Action.NOTE, skipped.path, message=message))

    def make() -> Built:
        digests = _take_files(planned.files, None if dry_run else store, link, watch)
        if base is not None:
            return repackage(base.manifest, base.config, request, planned, digests)
        return build(planned, request, digests)

    if dry_run:
        built = make()
    else:
        # The lease keeps what is written or found in the store until the model names it.
        with store.lease(()):
            built = make()
            _keep(store, built, where)
    for note in built.notes:
        watch.report(Progress(Action.NOTE, message=note))
    pushed = None
    if push and not dry_run:
        pushed = push_from(store, str(where), where, remote, watch)
    return Packaged(
        where,
        built.manifest.digest,
        built.manifest,
        built.config,
        planned.skipped,
        built.notes,
        stored=not dry_run,
        pushed=pushed,
    )


def _keep(store: LayoutStore, built: Built, where: Reference) -> None:
    config = store.write_bytes(built.config_bytes, built.manifest.config.media_type)
    assert config.digest == built.manifest.config.digest
    store.write_manifest(built.manifest.descriptor, built.manifest.raw, str(where))


def _take_files(
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
