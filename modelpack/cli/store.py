"""`modelpack tag`, `rm`, `gc` and `fsck`."""

from __future__ import annotations

import click

from modelpack.cli.options import Settings, common_options, model_argument
from modelpack.cli.output import human_size, note, note_reference, plural, show
from modelpack.cli.progress import shown_progress
from modelpack.errors import IntegrityError
from modelpack.operations.watching import watching
from modelpack.reference import Reference


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
@common_options
def fsck(settings: Settings, fast: bool) -> None:
    """Verify the whole store; put damaged blobs aside and say which models they hit."""
    with shown_progress(settings) as progress:
        report = settings.store().fsck(fast=fast, watch=watching(progress))
    value = {
        "checked": report.checked,
        "bytesChecked": report.bytes_checked,
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
    show(settings, value, "\n".join(lines))
    note(settings, f"checked {plural(report.checked, 'blob')}, {human_size(report.bytes_checked)}")
    if report.problems:
        raise IntegrityError(
            f"the store {settings.store().root} has {plural(len(report.problems), 'problem')}",
            hint="pull or package the models named above again",
        )
