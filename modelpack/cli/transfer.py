"""`modelpack lock`."""

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
from modelpack.cli.output import human_size, note, note_reference, plural, show, shown_progress
from modelpack.errors import IntegrityError, UsageError
from modelpack.operations import copy as copying
from modelpack.operations import lock as locking
from modelpack.operations import pull as pulling
from modelpack.operations import push as pushing
from modelpack.operations.lock import pull_locked
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.selection import Part, Selection
from modelpack.operations.sources import named
from modelpack.operations.transfer import Transfer

LOCK_FILE = click.option(
    "--lock-file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=FILE_NAME,
    show_default=True,
    help="The lock file.",
)


@click.command()
@click.argument("references", metavar="[REF]...", nargs=-1)
@click.option("--check", is_flag=True, help="Change nothing; fail if a reference has moved.")
@click.option("--remove", is_flag=True, help="Take the references off the lock file.")
@click.option("--offline", is_flag=True, help="Ask the store, not the registries.")
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
    """Pin references to the digests that they have now, in modelpack.lock.

    Without REF, all that the file has are pinned anew. `pull --locked` has them as they are pinned.
    """
    if check and remove:
        raise UsageError("--check and --remove exclude each other")
    store = settings.store() if offline else None
    if check:
        drifts = locking.check_lock(
            references, path=lock_file, offline=offline, store=store, remote=remote
        )
        value = [
            {
                "reference": str(drift.reference),
                "locked": str(drift.locked),
                "found": str(drift.found) if drift.found else None,
            }
            for drift in drifts
        ]
        show(settings, {"drifts": value}, "\n".join(drift.message for drift in drifts))
        if drifts:
            raise IntegrityError(
                f"{plural(len(drifts), 'reference')} drifted from {lock_file}",
                hint="`modelpack lock REF...` accepts what they are now; `pull --locked` does not",
            )
        return
    if remove:
        if not references:
            raise UsageError("--remove needs references")
        made = locking.unlock(references, path=lock_file)
    else:
        made = locking.lock(references, path=lock_file, offline=offline, store=store, remote=remote)
    note(settings, f"{lock_file} has {plural(len(made.digests), 'reference')}")
    _show(settings, made)


def _show(settings: Settings, lock: LockFile) -> None:
    pairs = sorted((str(reference), str(digest)) for reference, digest in lock.digests.items())
    value = {"models": [{"reference": name, "digest": digest} for name, digest in pairs]}
    show(settings, value, "\n".join(f"{name} {digest}" for name, digest in pairs))


WITH_REFERRERS = click.option(
    "--with-referrers", is_flag=True, help="And all that is attached to it, directly or not."
)


@click.command()
@click.argument("references", metavar="REFERENCE", nargs=-1)
@click.option("--include", metavar="GLOB", multiple=True, help="Only these files. May be repeated.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Not these files. May be repeated.")
@click.option(
    "--media-type",
    "media_types",
    metavar="T",
    multiple=True,
    help="Only files of this type: a media type, a pattern, or a short name as in `resolve`. May "
    "be repeated.",
)
@click.option(
    "--only",
    type=click.Choice([str(part) for part in Part]),
    help="Only what configures a model (configuration, tokenizer, template), or only weights.",
)
@WITH_REFERRERS
@click.option("--locked", is_flag=True, help="As the lock file has it; all it has without a name.")
@click.option("--offline", is_flag=True, help="With --locked: fetch nothing, fail instead.")
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
    """Fetch a model, verify every byte and keep it in the local store; print its digest.

    REFERENCE is in a registry, or hf.co/ORG/NAME[:QUANT][@REVISION] on the Hugging Face Hub. A pull
    that was cut short goes on where it stopped. One that leaves files out marks the model as partly
    present; the next pull fetches the rest.
    """
    selection = Selection(include, exclude, media_types, Part(only) if only else None)
    if locked:
        if with_referrers or not selection.is_everything:
            raise UsageError("--locked takes whole models, and nothing that is attached to them")
        _pull_locked(settings, references, lock_file, offline, remote)
        return
    if offline:
        raise UsageError("--offline needs --locked")
    if len(references) != 1:
        raise UsageError(f"expected one model to pull, got {len(references)}")
    [reference] = references
    source = named(reference)
    if isinstance(source, Reference):
        note_reference(settings, reference, source)
    with shown_progress(settings) as progress:
        done = pulling.pull(
            source,
            selection=selection,
            with_referrers=with_referrers,
            store=settings.store(),
            remote=remote,
            progress=progress,
        )
    show_pulled(settings, str(source), done)


def show_pulled(settings: Settings, source: str, done: pulling.Pulled) -> None:
    """Show what a pull did; its result is the digest."""
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
    note(settings, f"as {lock_file} says: {plural(len(done), 'model')} fetched")
    value = [
        {"reference": str(one.reference), "digest": str(one.digest)} | _counts(one.transfer)
        for one in done
    ]
    show(settings, {"fetched": value}, "\n".join(str(one.digest) for one in done))


@click.command()
@model_argument("reference")
@click.option("--to", metavar="REF", help="Push under this reference instead of its own.")
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
    """Send a stored model to its registry; print its digest.

    What the registry has already is not sent again.
    """
    where = Reference.parse(to if to is not None else reference)
    note_reference(settings, to or reference, where)
    with shown_progress(settings) as progress:
        done = pushing.push(
            reference,
            to=where,
            with_referrers=with_referrers,
            store=settings.store(),
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
    """Copy a model from registry to registry without storing it here; print its digest.

    SRC may be a model of the Hugging Face Hub, too: hf.co/ORG/NAME[:QUANT][@REVISION].
    """
    origin, where = named(source), Reference.parse(target)
    if isinstance(origin, Reference):
        note_reference(settings, source, origin)
    note_reference(settings, target, where)
    with shown_progress(settings) as progress:
        done = copying.copy(
            origin,
            where,
            with_referrers=with_referrers,
            target_options=remote,
            progress=progress,
        )
    note(settings, f"copied {origin} to {where}: {_summary(done.transfer, 'sent')}")
    value = {"source": str(origin), "target": str(where), "digest": str(done.digest)}
    value |= _about(settings, done.referrers)
    show(settings, value | _counts(done.transfer), str(done.digest))


def _about(settings: Settings, referrers: Sequence[Transfer]) -> dict[str, Any]:
    """Return, and tell, what was attached to the model and came along."""
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
