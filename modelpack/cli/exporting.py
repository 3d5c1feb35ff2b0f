"""`modelpack export`: models to other places than registries."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterable
from pathlib import Path

import click

from modelpack.cli.options import (
    Settings,
    common_options,
    model_argument,
    remote_options,
    trust_options,
)
from modelpack.cli.output import human_size, note, plural, show
from modelpack.cli.progress import shown_progress
from modelpack.errors import ConflictError, StoreError, UsageError
from modelpack.operations import archives
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.trusting import check_names
from modelpack.operations.watching import watching


@click.command("export")
@model_argument("models", nargs=-1)
@click.option(
    "-o", "--output", metavar="FILE",
    help="Write a tar archive; - is standard output.",
)  # fmt: skip
@click.option(
    "--form",
    type=click.Choice(archives.FORMS),
    default="oci",
    show_default=True,
    help="With --output: an OCI image layout with any models and their names, or the archive of "
    "one that `docker model` exchanges.",
)
@click.option("-f", "--force", is_flag=True, help="With --output: replace FILE.")
@click.option(
    "--docker-store",
    metavar="[DIR]",
    is_flag=False,
    flag_value="",
    help="To Docker Model Runner's store; DIR is MODELS_PATH or ~/.docker/models if left out.",
)
@click.option("-a", "--all", "every", is_flag=True, help="All models.")
@click.option("--copy", is_flag=True, help="Copy blobs even where a hard link would do.")
@remote_options
@trust_options
@common_options
def export_models(
    settings: Settings,
    models: tuple[str, ...],
    output: str | None,
    form: archives.Form,
    force: bool,
    docker_store: str | None,
    every: bool,
    copy: bool,
    remote: RemoteOptions,
) -> None:
    """Give stored models to a tar archive or to Docker Model Runner's store; print their digests.

    What is read from an archive by `import` is what was written: the same digests.
    """
    if (output is None) == (docker_store is None):
        raise UsageError("where to? Give --output FILE or --docker-store, one of them")
    if docker_store is not None:
        from modelpack.cli.docker import export_to_docker_store

        export_to_docker_store(settings, docker_store, models, every, copy, remote)
        return
    assert output is not None, "there is no --docker-store"
    if copy:
        raise UsageError("--copy needs --docker-store")
    if bool(models) == every:
        raise UsageError("name the models, or give --all", hint="not both, not neither")
    store = settings.store()
    if every:
        models = tuple(str(ref) for model in store.models() for ref in model.references)
    with shown_progress(settings) as progress:
        check_names(store, models, remote, watching(progress))
        archive = archives.archive_of(store, models, watching(progress), form=form)
        if output == "-":
            for piece in archive.pieces:
                sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        else:
            _write(Path(output), archive.pieces, force)
    size = human_size(archive.size)
    note(settings, f"exported {plural(len(archive.digests), 'model')} to {output}: {size}")
    if output != "-":
        digests = [str(digest) for digest in archive.digests]
        show(settings, {"file": output, "size": archive.size, "digests": digests},
             "\n".join(digests))  # fmt: skip


def _write(path: Path, pieces: Iterable[bytes], force: bool) -> None:
    """Write the file, which has its name once it is whole."""
    if path.exists() and not force:
        raise ConflictError(f"{path} exists", hint="--force replaces it")
    part = path.with_name(f".{path.name}-{secrets.token_hex(4)}.partial")
    try:
        with part.open("xb") as file:
            for piece in pieces:
                file.write(piece)
        os.replace(part, path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
