"""`modelpack pull`, `push`, `copy` and `lock`: transfer models between registries and the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from modelpack.artifacts.lockfile import FILE_NAME, LockFile
from modelpack.artifacts.reference import Reference
from modelpack.cli.help import command
from modelpack.cli.options import (
    BOTH,
    DOWNLOAD,
    UPLOAD,
    Settings,
    common_options,
    common_options_without,
    model_names,
    remote_options,
    transfer_options,
    trust_options,
    variant_option,
)
from modelpack.cli.output import (
    full_reference,
    human_size,
    note,
    plural,
    show,
    show_error,
    show_json,
    shown_progress,
)
from modelpack.errors import (
    IntegrityError,
    InterruptedTransferError,
    ModelpackError,
    UsageError,
    exit_status,
)
from modelpack.operations.adapters import find_base
from modelpack.operations.lock import check_lock, pull_locked, unlock
from modelpack.operations.lock import lock as lock_references
from modelpack.operations.lookup import is_stored_id, stored_model
from modelpack.operations.pull import Part, Pulled, Selection
from modelpack.operations.pull import pull as pull_model
from modelpack.operations.push import copy as copy_model
from modelpack.operations.push import push as push_model
from modelpack.operations.remote import RemoteOptions, named
from modelpack.operations.transfer import Transfer
from modelpack.storage import watching
from modelpack.store.layout import LayoutStore

LOCK_FILE = click.option(
    "--lock-file", type=click.Path(path_type=Path, dir_okay=False, readable=False),
    default=FILE_NAME, show_default=True,
    help="Use this lock file.",
)  # fmt: skip


@command()
@click.argument("references", metavar="[REF]...", nargs=-1)
@click.option("--check", is_flag=True, help="Only check; fail if a tag points to another digest.")
@click.option("--remove", is_flag=True, help="Remove the references from the lock file.")
@click.option("--offline", is_flag=True, help="Resolve references in the store, not in registries.")
@LOCK_FILE
@remote_options
@common_options_without("progress")
def lock(
    settings: Settings,
    references: tuple[str, ...],
    check: bool,
    remove: bool,
    offline: bool,
    lock_file: Path,
    remote: RemoteOptions,
) -> None:
    """Pin references to their current digests in modelpack.lock.

    Without REF, update all references in the file. `pull --locked` pulls the pinned digests.
    """
    if check and remove:
        raise UsageError("--check cannot be combined with --remove")
    store = settings.existing_store() if offline else None
    if check:
        drifts = check_lock(references, path=lock_file, offline=offline, store=store, remote=remote)
        value = [
            {
                "reference": str(drift.reference),
                "locked": str(drift.locked),
                "found": drift.found and str(drift.found),
            }
            for drift in drifts
        ]
        show(settings, {"drifts": value}, "\n".join(drift.message for drift in drifts))
        if drifts:
            raise IntegrityError(
                f"{plural(len(drifts), 'reference')} drifted from {lock_file}",
                hint="run `modelpack lock REF...` to accept the new digests",
            )
        return
    if remove:
        if not references:
            raise UsageError("--remove requires references")
        made = unlock(references, path=lock_file)
    else:
        made = lock_references(
            references, path=lock_file, offline=offline, store=store, remote=remote
        )
    note(settings, f"{lock_file}: {plural(len(made.digests), 'reference')}")
    _show(settings, made)


def _show(settings: Settings, lock: LockFile) -> None:
    pairs = sorted((str(reference), str(digest)) for reference, digest in lock.digests.items())
    value = {"models": [{"reference": name, "digest": digest} for name, digest in pairs]}
    show(settings, value, "\n".join(f"{name} {digest}" for name, digest in pairs))


WITH_REFERRERS = click.option(
    "--with-referrers",
    is_flag=True,
    help="Include all referrers (signatures, SBOMs, …) and their referrers.",
)


@command()
@click.argument("references", metavar="[REFERENCE]...", nargs=-1)
@click.option(
    "--include", metavar="GLOB", multiple=True, help="Fetch only these files. May be repeated."
)
@click.option(
    "--exclude", metavar="GLOB", multiple=True, help="Leave out these files. May be repeated."
)
@click.option(
    "--media-type", "media_types", metavar="T", multiple=True,
    help="Fetch only files of this type: a media type, a pattern, or a short name as in `resolve`. "
    "May be repeated.",
)  # fmt: skip
@click.option(
    "--only",
    type=click.Choice([str(part) for part in Part]),
    help="Fetch only configuration files (config, tokenizer, template) or only weights.",
)
@WITH_REFERRERS
@click.option(
    "--locked",
    is_flag=True,
    help="Pull the digests of the lock file; without REFERENCE, of all its models.",
)
@click.option("--offline", is_flag=True, help="With --locked: fail if a model is not stored.")
@click.option("--no-base", is_flag=True, help="Do not fetch the base of an adapter.")
@LOCK_FILE
@remote_options
@transfer_options(*DOWNLOAD)
@trust_options
@variant_option
@common_options
def pull(
    settings: Settings,
    references: tuple[str, ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    media_types: tuple[str, ...],
    only: str | None,
    with_referrers: bool,
    locked: bool,
    offline: bool,
    no_base: bool,
    lock_file: Path,
    remote: RemoteOptions,
) -> int:
    """Fetch models into the local store and verify every byte; print their digests.

    REFERENCE names a model in a registry, or hf.co/ORG/NAME[:QUANT][@REVISION] on the Hugging Face
    Hub, or modelscope.cn/ORG/NAME[:QUANT][@REVISION]. An interrupted pull resumes. Leaving out
    files marks the model as partial; the next pull fetches the rest. The base of an adapter is
    fetched too, unless it is stored. If one of several models fails, the others are still pulled;
    the exit code is that of the first failure.
    """
    selection = Selection(include, exclude, media_types, Part(only) if only else None)
    if locked:
        if with_referrers or not selection.is_everything:
            raise UsageError(
                "--locked cannot be combined with --with-referrers or a selection of files"
            )
        _pull_locked(settings, references, lock_file, offline, remote)
        return 0
    if offline:
        raise UsageError("--offline requires --locked")
    if not references:
        raise UsageError("expected a model to pull", hint="name one or more models")

    def pull_one(name: str) -> dict[str, Any]:
        source = named(name)
        if isinstance(source, Reference):
            full_reference(settings, name)
        with shown_progress(settings) as progress:
            done = pull_model(
                source,
                selection=selection,
                with_referrers=with_referrers,
                store=settings.store(),
                remote=remote,
                progress=progress,
            )
            if not no_base and selection.is_everything:
                store = settings.store()
                model = stored_model(store, str(done.digest))
                if model.is_adapter:
                    watch = watching(progress)
                    base = find_base(model, store, pull=True, remote=remote, watch=watch)
                    note(settings, f"base: {base.reference or base.digest}")
        return _about_pull(settings, str(source), done)

    return _for_each(settings, references, pull_one)


def _for_each(
    settings: Settings, names: Sequence[str], transfer: Callable[[str], dict[str, Any]]
) -> int:
    """Transfer models one after another, show each result's `digest`, and return the exit code.

    With several names, a failure is shown and the others follow; the code is that of the first.
    """
    settings.resumes = True
    if len(names) == 1:
        value = transfer(names[0])
        show(settings, value, value["digest"])
        return 0
    values: list[dict[str, Any]] = []
    failures: list[ModelpackError] = []
    for name in dict.fromkeys(names):
        try:
            values.append(transfer(name))
        except InterruptedTransferError:
            raise
        except ModelpackError as error:
            failures.append(error)
            values.append({"reference": name, "error": str(error)})
            if not settings.json:
                show_error(error)
        else:
            if not settings.json:
                click.echo(values[-1]["digest"])
    if settings.json:
        show_json({"models": values})
        if failures:
            raise failures[0]
    return exit_status(failures[0]) if failures else 0


def show_pulled(settings: Settings, source: str, done: Pulled) -> None:
    """Print the digest and a summary of a pull."""
    show(settings, _about_pull(settings, source, done), str(done.digest))


def _about_pull(settings: Settings, source: str, done: Pulled) -> dict[str, Any]:
    """Print a summary of a pull; return its JSON value."""
    where = done.reference
    left = f", {plural(len(done.missing), 'blob')} left out" if done.missing else ""
    kept = "" if str(where) == source else f" as {where}"
    note(settings, f"pulled {source}{kept}: {_summary(done.transfer, 'fetched')}{left}")
    missing = [str(blob.digest) for blob in done.missing]
    value = {"reference": str(where), "digest": str(done.digest), "missing": missing}
    return value | _about(settings, done.referrers) | _counts(done.transfer)


def _pull_locked(
    settings: Settings,
    references: tuple[str, ...],
    lock_file: Path,
    offline: bool,
    remote: RemoteOptions,
) -> None:
    with shown_progress(settings) as progress:
        done = pull_locked(
            references,
            path=lock_file,
            offline=offline,
            store=settings.store(),
            remote=remote,
            progress=progress,
        )
    fetched = [one for one in done if one.transfer.written]
    note(settings, f"fetched {len(fetched)} of the {plural(len(done), 'model')} in {lock_file}")
    models, fetched_models = (
        [
            {"reference": str(one.reference), "digest": str(one.digest)} | _counts(one.transfer)
            for one in group
        ]
        for group in (done, fetched)
    )
    value = {"models": models, "fetched": fetched_models}
    show(settings, value, "\n".join(str(one.digest) for one in done))


@command()
@click.argument(
    "references", metavar="REFERENCE...", nargs=-1, required=True, shell_complete=model_names
)
@click.option("--to", metavar="REF", help="Push to this reference instead.")
@WITH_REFERRERS
@remote_options
@transfer_options(*UPLOAD)
@common_options
def push(
    settings: Settings,
    references: tuple[str, ...],
    to: str | None,
    with_referrers: bool,
    remote: RemoteOptions,
) -> int:
    """Push stored models to their registries; print their digests.

    Blobs that the registry has are not uploaded again. If one of several models fails, the others
    are still pushed; the exit code is that of the first failure.
    """
    if to is not None and len(references) > 1:
        raise UsageError(f"--to takes one model, got {len(references)}")
    if len(references) == 2:
        _refuse_target(settings, *references)

    def push_one(name: str) -> dict[str, Any]:
        store = settings.existing_store()
        by_id = to is None and is_stored_id(store, name)  # which push_model refuses
        where = None if by_id else full_reference(settings, name if to is None else to)
        with shown_progress(settings) as progress:
            done = push_model(
                name,
                to=where,
                with_referrers=with_referrers,
                store=store,
                remote=remote,
                progress=progress,
            )
        note(settings, f"pushed {done.reference}: {_summary(done.transfer, 'sent')}")
        value = {"reference": str(done.reference), "digest": str(done.digest)}
        return value | _counts(done.transfer) | _about(settings, done.referrers)

    return _for_each(settings, references, push_one)


def _refuse_target(settings: Settings, model: str, other: str) -> None:
    """Raise `UsageError` if `other` names the registry to push `model` to, as in `docker push`.

    Otherwise `model` would be pushed to its own registry before `other` is not found.
    """
    host, slash, _ = other.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        return
    store = settings.existing_store()
    if _is_stored(store, model) and not _is_stored(store, other):
        raise UsageError(
            f"no such model: {other}; nothing was pushed",
            hint=f"to push {model} to it, run modelpack push {model} --to {other}",
        )


def _is_stored(store: LayoutStore, name: str) -> bool:
    with suppress(ModelpackError):
        stored_model(store, name)
        return True
    return False


@command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@WITH_REFERRERS
@remote_options
@transfer_options(*BOTH)
@common_options_without("store")
def copy(
    settings: Settings, source: str, target: str, with_referrers: bool, remote: RemoteOptions
) -> None:
    """Copy a model between registries without storing it locally; print its digest.

    SRC may also be a model of the Hugging Face Hub: hf.co/ORG/NAME[:QUANT][@REVISION].
    """
    origin = named(source)
    if isinstance(origin, Reference):
        full_reference(settings, source)
    where = full_reference(settings, target)
    with shown_progress(settings) as progress:
        done = copy_model(
            origin, where, with_referrers=with_referrers, target_options=remote, progress=progress
        )
    note(settings, f"copied {origin} to {where}: {_summary(done.transfer, 'sent')}")
    value = {"source": str(origin), "target": str(where), "digest": str(done.digest)}
    value |= _about(settings, done.referrers)
    show(settings, value | _counts(done.transfer), str(done.digest))


def _about(settings: Settings, referrers: Sequence[Transfer]) -> dict[str, Any]:
    """Print the number of transferred referrers; return their digests as JSON."""
    if not referrers:
        return {}
    note(settings, f"with {plural(len(referrers), 'attached manifest')}")
    return {"referrers": [str(one.descriptor.digest) for one in referrers]}


def _counts(transfer: Transfer) -> dict[str, int]:
    return {
        "blobsWritten": transfer.written,
        "blobsExisted": transfer.existed,
        "blobsMounted": transfer.mounted,
        "bytesWritten": transfer.bytes_written,
    }


def _summary(transfer: Transfer, verb: str) -> str:
    parts = [f"{plural(transfer.written, 'blob')} {verb} ({human_size(transfer.bytes_written)})"]
    if transfer.existed:
        parts.append(f"{transfer.existed} already there")
    if transfer.mounted:
        parts.append(f"{transfer.mounted} mounted")
    return ", ".join(parts)
