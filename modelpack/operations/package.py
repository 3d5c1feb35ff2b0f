"""Package: files on disk, or a model that exists, into a new model in the store."""

from __future__ import annotations

from dataclasses import dataclass

from modelpack.config import ModelConfig
from modelpack.digest import Digest
from modelpack.errors import PackagingError
from modelpack.manifest import Manifest
from modelpack.operations.find import find_model
from modelpack.operations.push import Pushed, push_from
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.single_files import as_single_files, is_of_single_files
from modelpack.operations.taking import take_files
from modelpack.operations.watching import watching
from modelpack.packaging.build import Built, build
from modelpack.packaging.plan import Skipped, plan
from modelpack.packaging.repackage import plan_extras, repackage
from modelpack.packaging.request import PackageRequest
from modelpack.progress import Action, Progress, ProgressCallback, Stop
from modelpack.reference import Reference
from modelpack.stores.layout import LayoutStore


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
        digests = take_files(planned.files, None if dry_run else store, link, watch)
        if base is None:
            return build(planned, request, digests)
        whole = base
        if base.config.is_foreign or (request.format == "docker" and not is_of_single_files(base)):
            whole = as_single_files(base, store, watch)
        return repackage(whole.manifest, whole.config, request, planned, digests)

    if dry_run and (base is None or not base.config.is_foreign):
        built = make()
    else:
        # The lease keeps what is written or found in the store until the model names it.
        with store.lease(()):
            built = make()
            if not dry_run:
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
