"""`modelpack tag`, `rm`, `gc` and `fsck`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from modelpack.artifacts.reference import Reference
from modelpack.cli.options import Settings, common_options, model_argument, remote_options
from modelpack.cli.output import human_size, note, note_reference, plural, show, shown_progress
from modelpack.errors import IntegrityError, UsageError
from modelpack.operations.remote import RemoteOptions
from modelpack.storage import watching
from modelpack.store.fsck import Fault, FsckReport

if TYPE_CHECKING:
    from modelpack.operations.repair import Repaired


@click.command()
@model_argument("source")
@click.argument("target", metavar="TARGET")
@common_options
def tag(settings: Settings, source: str, target: str) -> None:
    """Give the stored model SOURCE the reference TARGET too; print its digest."""
    where = Reference.parse(target)
    note_reference(settings, target, where)
    descriptor = settings.store().tag(source, where)
    value = {"reference": str(where), "digest": str(descriptor.digest)}
    show(settings, value, str(descriptor.digest))


@click.command()
@model_argument("models", nargs=-1, required=True)
@click.option("-f", "--force", is_flag=True, help="Remove an id that has several tags.")
@common_options
def rm(settings: Settings, models: tuple[str, ...], force: bool) -> None:
    """Remove models: a tag, and the model itself when its last tag goes.

    Blobs that nothing else uses are freed at once.
    """
    store = settings.store()
    untagged: list[str] = []
    deleted: list[str] = []
    freed = 0
    try:
        for name in models:
            removal = store.remove(name, force=force)
            untagged += removal.untagged
            deleted += [str(digest) for digest in removal.deleted]
            freed += removal.bytes_freed
    finally:
        # What is gone is reported even when a later name fails.
        lines = [f"Untagged: {name}" for name in untagged]
        lines += [f"Deleted: {digest}" for digest in deleted]
        if lines:
            value = {"untagged": untagged, "deleted": deleted, "bytesFreed": freed}
            show(settings, value, "\n".join(lines))
    note(settings, f"freed {human_size(freed)}")


@click.command()
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be freed; free nothing.")
@click.option(
    "--grace",
    type=click.IntRange(min=0),
    default=3600,
    show_default=True,
    metavar="SECONDS",
    help="Keep unused blobs that are younger.",
)
@common_options
def gc(settings: Settings, dry_run: bool, grace: int) -> None:
    """Free blobs that no model uses, and what was left of interrupted work."""
    report = settings.store().gc(dry_run=dry_run, grace_seconds=grace)
    value = {
        "removed": [str(digest) for digest in report.removed],
        "partials": list(report.partials),
        "bytesFreed": report.bytes_freed,
        "dryRun": dry_run,
    }
    text = "\n".join([str(digest) for digest in report.removed] + list(report.partials))
    show(settings, value, text)
    verb = "would free" if dry_run else "freed"
    note(settings, f"{verb} {human_size(report.bytes_freed)}")


@click.command()
@click.option("--fast", is_flag=True, help="Check presence and sizes only, hash nothing.")
@click.option("--repair", is_flag=True, help="Fetch what is damaged or missing, and nothing else.")
@click.option(
    "--from",
    "source",
    metavar="REF",
    help="Fetch it from this repository. [default: where the model was pulled from, or its name]",
)
@remote_options
@common_options
def fsck(
    settings: Settings, fast: bool, repair: bool, source: str | None, remote: RemoteOptions
) -> None:
    """Verify the whole store; put damaged blobs aside and say which models they hit."""
    if source is not None and not repair:
        raise UsageError("--from needs --repair")
    store = settings.store()
    with shown_progress(settings) as progress:
        if repair:
            from modelpack.operations import repair as repairing

            done = repairing.repair(
                store, source=source, fast=fast, remote=remote, progress=progress
            )
            _show_fsck(settings, done.before, done)
            return
        report = store.fsck(fast=fast, watch=watching(progress))
    _show_fsck(settings, report)


def _show_fsck(settings: Settings, report: FsckReport, done: Repaired | None = None) -> None:
    """Print what a check found and, after a repair, what that left; raise if that is something."""
    value: dict[str, Any] = {
        "checked": report.checked,
        "bytesChecked": report.bytes_checked,
        "partial": list(report.partial),
        "problems": [
            {
                "kind": str(problem.kind),
                "digest": str(problem.digest) if problem.digest else None,
                "message": problem.message,
                "models": list(problem.models),
            }
            for problem in report.problems
        ],
    }
    lines = [
        f"{problem.message}" + (f" (in {', '.join(problem.models)})" if problem.models else "")
        for problem in report.problems
    ]
    left = report
    if done is not None:
        left = done.after
        value["restored"] = [blob.to_json() for blob in done.restored]
        value["bytesFetched"] = done.bytes_fetched
        value["failures"] = [
            {"digest": str(failure.digest), "message": failure.message} for failure in done.failures
        ]
        lines += [f"restored {blob.digest} ({human_size(blob.size)})" for blob in done.restored]
        lines += [f"not restored: {failure.message}" for failure in done.failures]
    show(settings, value, "\n".join(lines))
    note(settings, f"checked {plural(report.checked, 'blob')}, {human_size(report.bytes_checked)}")
    if report.partial:
        note(settings, f"pulled in part, which is no problem: {', '.join(report.partial)}")
    if left.problems:
        again = "pull or package the models named above again"
        hint = again if done else f"`modelpack fsck --repair`, or {again}"
        if all(problem.kind is Fault.BUNDLE for problem in left.problems):
            hint = "restart the runtimes that opened these bundles: they are made again"
        raise IntegrityError(
            f"the store {settings.store().root} has {plural(len(left.problems), 'problem')}",
            hint=hint,
        )
