"""`modelpack pull`, `push` and `copy`."""

from __future__ import annotations

import click

from modelpack.cli.options import Settings, common_options, model_argument, remote_options
from modelpack.cli.output import human_size, note, note_reference, plural, show
from modelpack.cli.progress import shown_progress
from modelpack.operations import copy as copying
from modelpack.operations import pull as pulling
from modelpack.operations import push as pushing
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.transfer import Transfer
from modelpack.reference import Reference


@click.command()
@click.argument("reference")
@remote_options
@common_options
def pull(settings: Settings, reference: str, remote: RemoteOptions) -> None:
    """Fetch a model, verify every byte and keep it in the local store; print its digest.

    A pull that was cut short goes on where it stopped.
    """
    where = Reference.parse(reference)
    note_reference(settings, reference, where)
    with shown_progress(settings) as progress:
        done = pulling.pull(where, store=settings.store(), remote=remote, progress=progress)
    note(settings, f"pulled {where}: {_summary(done.transfer, 'fetched')}")
    value = {"reference": str(where), "digest": str(done.digest)} | _counts(done.transfer)
    show(settings, value, str(done.digest))


@click.command()
@model_argument("reference")
@click.option("--to", metavar="REF", help="Push under this reference instead of its own.")
@remote_options
@common_options
def push(settings: Settings, reference: str, to: str | None, remote: RemoteOptions) -> None:
    """Send a stored model to its registry; print its digest.

    What the registry has already is not sent again.
    """
    where = Reference.parse(to if to is not None else reference)
    note_reference(settings, to or reference, where)
    with shown_progress(settings) as progress:
        done = pushing.push(
            reference, to=where, store=settings.store(), remote=remote, progress=progress
        )
    note(settings, f"pushed {where}: {_summary(done.transfer, 'sent')}")
    value = {"reference": str(where), "digest": str(done.digest)} | _counts(done.transfer)
    show(settings, value, str(done.digest))


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@remote_options
@common_options
def copy(settings: Settings, source: str, target: str, remote: RemoteOptions) -> None:
    """Copy a model from registry to registry without storing it here; print its digest."""
    origin, where = Reference.parse(source), Reference.parse(target)
    note_reference(settings, source, origin)
    note_reference(settings, target, where)
    with shown_progress(settings) as progress:
        done = copying.copy(origin, where, target_options=remote, progress=progress)
    note(settings, f"copied {origin} to {where}: {_summary(done.transfer, 'sent')}")
    value = {"source": str(origin), "target": str(where), "digest": str(done.digest)}
    show(settings, value | _counts(done.transfer), str(done.digest))


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
