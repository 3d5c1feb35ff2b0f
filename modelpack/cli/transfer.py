"""`modelpack pull`, `push`, `copy` and `lock`: transfer models between registries and the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from modelpack.artifacts.lockfile import FILE_NAME, LockFile
from modelpack.artifacts.reference import Reference
from modelpack.cli.options import (
    Settings,
    common_options,
    model_argument,
    remote_options,
    trust_options,
    variant_option,
)
from modelpack.cli.output import full_reference, human_size, note, plural, show, shown_progress
from modelpack.errors import IntegrityError, UsageError
from modelpack.operations.lock import check_lock, pull_locked, unlock
from modelpack.operations.lock import lock as lock_references
from modelpack.operations.pull import Part, Pulled, Selection
from modelpack.operations.pull import pull as pull_model
from modelpack.operations.push import copy as copy_model
from modelpack.operations.push import push as push_model
from modelpack.operations.remote import RemoteOptions, named
from modelpack.operations.transfer import Transfer

LOCK_FILE = click.option(
    "--lock-file", type=click.Path(path_type=Path, dir_okay=False, readable=False),
    default=FILE_NAME, show_default=True,
    help="Use this lock file.",
)  # fmt: skip


@click.command()
@click.argument("references", metavar="[REF]...", nargs=-1)
@click.option("--check", is_flag=True, help="Only check; fail if a tag points to another digest.")
@click.option("--remove", is_flag=True, help="Remove the references from the lock file.")
@click.option("--offline", is_flag=True, help="Resolve references in the store, not in registries.")
@LOCK_FILE
@remote_options
@common_options
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


@click.command()
@click.argument("references", metavar="REFERENCE", nargs=-1)
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
@LOCK_FILE
@remote_options
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
    lock_file: Path,
    remote: RemoteOptions,
) -> None:
    """Fetch a model into the local store and verify every byte; print its digest.

    REFERENCE names a model in a registry, or hf.co/ORG/NAME[:QUANT][@REVISION] on the Hugging Face
    Hub. An interrupted pull resumes. Leaving out files marks the model as partial; the next pull
    fetches the rest.
    """
    selection = Selection(include, exclude, media_types, Part(only) if only else None)
    if locked:
        if with_referrers or not selection.is_everything:
            raise UsageError(
                "--locked cannot be combined with --with-referrers or a selection of files"
            )
        _pull_locked(settings, references, lock_file, offline, remote)
        return
    if offline:
        raise UsageError("--offline requires --locked")
    if len(references) != 1:
        raise UsageError(f"expected one model to pull, got {len(references)}")
    [reference] = references
    source = named(reference)
    if isinstance(source, Reference):
        full_reference(settings, reference)
    with shown_progress(settings) as progress:
        done = pull_model(
            source,
            selection=selection,
            with_referrers=with_referrers,
            store=settings.store(),
            remote=remote,
            progress=progress,
        )
    show_pulled(settings, str(source), done)


def show_pulled(settings: Settings, source: str, done: Pulled) -> None:
    """Print the digest and a summary of a pull."""
    where = done.reference
    left = f", {plural(len(done.missing), 'blob')} left out" if done.missing else ""
    kept = "" if str(where) == source else f" as {where}"
    note(settings, f"pulled {source}{kept}: {_summary(done.transfer, 'fetched')}{left}")
    missing = [str(blob.digest) for blob in done.missing]
    value = {"reference": str(where), "digest": str(done.digest), "missing": missing}
    value |= _about(settings, done.referrers)
    show(settings, value | _counts(done.transfer), str(done.digest))


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


@click.command()
@model_argument("reference")
@click.option("--to", metavar="REF", help="Push to this reference instead.")
@WITH_REFERRERS
@remote_options
@common_options
def push(
    settings: Settings,
    reference: str,
    to: str | None,
    with_referrers: bool,
    remote: RemoteOptions,
) -> None:
    """Push a stored model to its registry; print its digest.

    Blobs that the registry has are not uploaded again.
    """
    where = full_reference(settings, reference if to is None else to)
    with shown_progress(settings) as progress:
        done = push_model(
            reference,
            to=where,
            with_referrers=with_referrers,
            store=settings.existing_store(),
            remote=remote,
            progress=progress,
        )
    note(settings, f"pushed {where}: {_summary(done.transfer, 'sent')}")
    value = {"reference": str(where), "digest": str(done.digest)} | _counts(done.transfer)
    show(settings, value | _about(settings, done.referrers), str(done.digest))


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@WITH_REFERRERS
@remote_options
@common_options
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
