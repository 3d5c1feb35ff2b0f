"""`modelpack lock`."""

from __future__ import annotations

from pathlib import Path

import click

from modelpack.cli.options import Settings, common_options, remote_options
from modelpack.cli.output import note, plural, show
from modelpack.errors import IntegrityError, UsageError
from modelpack.lockfile import FILE_NAME, LockFile
from modelpack.operations import lock as locking
from modelpack.operations.remote import RemoteOptions

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
