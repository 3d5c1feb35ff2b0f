"""`modelpack list`, `tag`, `rm`, `prune`, `gc` and `fsck`: show, change and check the store."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelpack.artifacts import media_types
from modelpack.artifacts.reference import Reference
from modelpack.cli.help import command
from modelpack.cli.options import (
    DOWNLOAD,
    Settings,
    common_options,
    common_options_without,
    model_argument,
    remote_options,
    transfer_options,
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
    table,
)
from modelpack.errors import IntegrityError, ModelpackError, UsageError, exit_status
from modelpack.operations.lookup import StoredImage
from modelpack.operations.model_list import Summarized, list_images, summarize_models
from modelpack.operations.remote import RemoteOptions
from modelpack.storage import watching
from modelpack.store.fsck import Fault, FsckReport
from modelpack.store.layout import GRACE_SECONDS

if TYPE_CHECKING:
    from modelpack.operations.repair import Repaired
    from modelpack.store.deletion import Removal
    from modelpack.store.layout import LayoutStore


_STEPS = (("year", 365 * 86400), ("month", 30 * 86400), ("week", 7 * 86400), ("day", 86400),
          ("hour", 3600), ("minute", 60))  # fmt: skip
_HEADER = (
    "MODEL NAME", "PARAMETERS", "QUANTIZATION", "ARCHITECTURE", "MODEL ID", "CREATED", "CONTEXT",
    "SIZE",
)  # fmt: skip


@command("list")
@click.argument("model", required=False)
@click.option(
    "--sort", type=click.Choice(["name", "created", "modified", "size"]), default="name",
    show_default=True, help="Sort by this, the newest and the largest first.",
)  # fmt: skip
@common_options_without("progress")
def list_models(settings: Settings, model: str | None, sort: str) -> None:
    """List stored models and images, or those named MODEL. With --quiet, print only their ids.

    For a partly pulled model, SIZE is the stored part of the total. For a model without a creation
    time, CREATED is the time when it was stored or last pulled.
    """
    store = settings.existing_store()
    found: Sequence[Summarized] = summarize_models(store, model)
    images: Sequence[StoredImage] = list_images(store, model, known={item.digest for item in found})
    if sort != "name":
        found = sorted(found, key=lambda item: _rank(item, sort), reverse=True)
        images = sorted(images, key=lambda image: _image_rank(store, image, sort), reverse=True)
    if settings.json:
        show_json(
            {
                "models": [_listing_json(item) for item in found],
                "images": [_image_json(image) for image in images],
            }
        )
    elif settings.quiet:
        digests = [item.digest for item in found] + [image.descriptor.digest for image in images]
        for digest in dict.fromkeys(digests):
            click.echo(digest.short)
    else:
        now = datetime.now(UTC)
        ranked = [(_rank(item, sort), row) for item in found for row in _rows(item, now)]
        for image in images:
            stored = _stored(store.modified_at(image.descriptor.digest), now)
            short, size = image.descriptor.digest.short, human_size(image.size)
            rank = _image_rank(store, image, sort)
            names = _names(image.references)
            ranked += [(rank, (name, "", "", "image", short, stored, "", size)) for name in names]
        ranked.sort(key=lambda one: (-one[0], one[1][0].lower()))
        click.echo(table(_HEADER, [row for _, row in ranked]))
    for item in found:
        if item.problem:
            note(settings, f"note: {item.digest.short}: {item.problem}")


def _rank(item: Summarized, sort: str) -> float:
    """Return the number by which to sort a model, the largest first; 0 to sort by name."""
    if sort == "name":
        return 0
    if sort == "size":
        return item.summary.size if item.summary else 0
    if sort == "created" and item.summary and item.summary.created:
        with suppress(ValueError):
            when = datetime.fromisoformat(item.summary.created)
            seconds = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
            if seconds:
                return seconds
    return item.modified or 0


def _image_rank(store: LayoutStore, image: StoredImage, sort: str) -> float:
    if sort == "name":
        return 0
    return image.size if sort == "size" else store.modified_at(image.descriptor.digest) or 0


def _stored(modified: float | None, now: datetime) -> str:
    return "" if modified is None else f"stored {age(_rfc3339(modified), now)}"


def _rfc3339(seconds: float) -> str:
    when = datetime.fromtimestamp(int(seconds), UTC)
    return when.isoformat().replace("+00:00", "Z")


def _rows(item: Summarized, now: datetime) -> list[tuple[str, ...]]:
    cells = ("", "", "")
    created = context = size = ""
    known = item.summary
    if known:
        cells = (known.parameters, known.quantization, known.architecture)
        created = age(known.created, now) or _stored(item.modified, now)
        context = str(known.context_size) if known.context_size is not None else ""
        size = human_size(known.size)
        if item.missing:
            here = known.size - sum(blob.size for blob in item.missing)
            size = f"{human_size(here)} of {size}"
    rest = (*cells, item.digest.short, created, context, size)
    return [(name, *rest) for name in _names(item.references)]


def _names(references: Sequence[Reference]) -> list[str]:
    return [reference.familiar for reference in references] or ["<none>"]


def _image_json(image: StoredImage) -> dict[str, Any]:
    return {
        "digest": str(image.descriptor.digest),
        "tags": [str(reference) for reference in image.references],
        "size": image.size,
        "model": image.index.annotations.get(media_types.MODEL),
    }


def _listing_json(item: Summarized) -> dict[str, Any]:
    value: dict[str, Any] = {
        "digest": str(item.digest),
        "tags": [str(reference) for reference in item.references],
    }
    if item.summary:
        value |= item.summary.to_json()
    if item.modified is not None:
        value["modified"] = _rfc3339(item.modified)
    if item.missing:
        value["missing"] = [str(blob.digest) for blob in item.missing]
        value["missingSize"] = sum(blob.size for blob in item.missing)
    if item.problem:
        value["problem"] = item.problem
    return value


def age(created: str | None, now: datetime) -> str:
    """Return the age of an RFC 3339 time, like "2 days ago"; empty for None and for the epoch."""
    if not created:
        return ""
    try:
        when = datetime.fromisoformat(created)
    except ValueError:
        return created
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    if when.timestamp() == 0:
        return ""
    seconds = (now - when).total_seconds()
    for unit, length in _STEPS:
        count = int(seconds // length)
        if count >= 1:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now" if seconds >= 0 else created


@command()
@model_argument("source")
@click.argument("target", metavar="TARGET")
@common_options_without("progress")
def tag(settings: Settings, source: str, target: str) -> None:
    """Tag the stored model SOURCE as TARGET; print its digest."""
    where = full_reference(settings, target)
    descriptor = settings.existing_store().tag(source, where)
    value = {"reference": str(where), "digest": str(descriptor.digest)}
    show(settings, value, str(descriptor.digest))


@command()
@model_argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "-f", "--force", is_flag=True, help="Remove a model by id even if it has several tags."
)
@common_options_without("progress")
def rm(settings: Settings, models: tuple[str, ...], force: bool) -> int:
    """Remove tags, and models with their last tag.

    Blobs that no other model uses are deleted at once. If one of several models cannot be removed,
    the others still are; the exit code is that of the first failure.
    """
    store = settings.existing_store()
    untagged: list[str] = []
    deleted: list[str] = []
    failures: list[ModelpackError] = []
    failed: list[dict[str, str]] = []
    freed = 0
    try:
        for name in models:
            try:
                removal = store.remove(name, force=force)
            except ModelpackError as error:
                failures.append(error)
                failed.append({"name": name, "error": str(error)})
                if not settings.json:
                    show_error(error)
                continue
            untagged += removal.untagged
            deleted += [str(digest) for digest in removal.deleted]
            freed += removal.bytes_freed
    finally:
        # What was removed is reported after Ctrl-C too.
        lines = [f"Untagged: {name}" for name in untagged]
        lines += [f"Deleted: {digest}" for digest in deleted]
        value = {"untagged": untagged, "deleted": deleted, "bytesFreed": freed, "failed": failed}
        show(settings, value, "\n".join(lines))
        if lines:
            note(settings, f"freed {human_size(freed)}")
    if failures and settings.json:
        raise failures[0]
    return exit_status(failures[0]) if failures else 0


@command()
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be deleted; delete nothing.")
@common_options_without("progress")
def prune(settings: Settings, force: bool, dry_run: bool) -> None:
    """Remove the models without a name, and the blobs that only they need.

    A model loses its name when another takes it, as after a pull of a newer version; one pulled by
    digest has none. Models that a process uses stay, and so do the variants of a named index.
    """
    store = settings.existing_store()
    removal = store.prune(dry_run=True)
    if removal.deleted and not dry_run:
        if not (force or _confirms_removal(removal)):
            raise ModelpackError("nothing was removed: not confirmed")
        removal = store.prune()
    verb = "Would delete" if dry_run else "Deleted"
    deleted = [str(digest) for digest in removal.deleted]
    value = {"deleted": deleted, "bytesFreed": removal.bytes_freed, "dryRun": dry_run}
    show(settings, value, "\n".join(f"{verb}: {digest}" for digest in deleted))
    note(settings, f"{'would free' if dry_run else 'freed'} {human_size(removal.bytes_freed)}")


def _confirms_removal(removal: Removal) -> bool:
    """Ask whether to remove these manifests."""
    if not sys.stdin.isatty():
        raise UsageError("cannot ask: stdin is not a terminal", hint="use --force, or --dry-run")
    for digest in removal.deleted:
        click.echo(digest, err=True)
    what = f"{plural(len(removal.deleted), 'manifest')} without a name"
    return click.confirm(f"Remove {what}, {human_size(removal.bytes_freed)}?", err=True)


@command()
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be deleted; delete nothing.")
@click.option(
    "--grace", type=click.IntRange(min=0), default=GRACE_SECONDS, show_default=True,
    metavar="SECONDS",
    help="Keep unused blobs that are younger than this.",
)  # fmt: skip
@common_options_without("progress")
def gc(settings: Settings, dry_run: bool, grace: int) -> None:
    """Delete unused blobs and partial files of interrupted transfers."""
    report = settings.existing_store().gc(dry_run=dry_run, grace_seconds=grace)
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


@command()
@click.option("--fast", is_flag=True, help="Check only presence and sizes, without hashing.")
@click.option("--repair", is_flag=True, help="Fetch damaged and missing blobs.")
@click.option(
    "--from", "source", metavar="REF",
    help="Fetch from this repository. [default: the origin of each model, or the one in its name]",
)  # fmt: skip
@remote_options
@transfer_options(*DOWNLOAD)
@common_options
def fsck(
    settings: Settings, fast: bool, repair: bool, source: str | None, remote: RemoteOptions
) -> None:
    """Verify the store; quarantine damaged blobs and list the affected models."""
    if source is not None and not repair:
        raise UsageError("--from requires --repair")
    store = settings.existing_store()
    with shown_progress(settings) as progress:
        if repair:
            from modelpack.operations.repair import repair as repair_store

            done = repair_store(store, source=source, fast=fast, remote=remote, progress=progress)
            _show_fsck(settings, store.root, done.before, done)
            return
        report = store.fsck(fast=fast, watch=watching(progress))
    _show_fsck(settings, store.root, report)


def _show_fsck(
    settings: Settings, root: Path, report: FsckReport, done: Repaired | None = None
) -> None:
    """Print the problems and, after a repair, its result; raise if problems remain."""
    value: dict[str, Any] = {
        "checked": report.checked,
        "bytesChecked": report.bytes_checked,
        "partial": list(report.partial),
        "unnamed": [str(digest) for digest in report.unnamed],
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
        note(settings, f"partial models, which are valid: {', '.join(report.partial)}")
    if report.unnamed:
        ids = " ".join(digest.short for digest in report.unnamed)
        note(settings, f"without a name, but kept; to delete them, run `modelpack rm {ids}`")
    if left.problems:
        again = "pull or package the models named above again"
        hint = again if done else f"run `modelpack fsck --repair`, or {again}"
        if all(problem.kind is Fault.BUNDLE for problem in left.problems):
            hint = "restart the runtimes that use these bundles; the bundles are then made again"
        if all(problem.kind is Fault.STRAY for problem in left.problems):
            hint = "move the files that are no blobs out of the store"
        raise IntegrityError(
            f"the store {root} has {plural(len(left.problems), 'problem')}", hint=hint
        )
