"""`modelpack import`: models of other places than registries."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import click

from modelpack.cli.options import Settings, common_options, remote_options, trust_options
from modelpack.cli.output import note, plural, show
from modelpack.cli.progress import shown_progress
from modelpack.errors import StoreError, UsageError
from modelpack.hub.reference import HubReference
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.watching import watching
from modelpack.reference import Reference

_WEIGHTS = (".gguf", ".safetensors", ".dduf")


@click.command("import")
@click.argument("arguments", metavar="[SOURCE [REFERENCE]]", nargs=-1)
@click.option(
    "--docker-store",
    metavar="[DIR]",
    is_flag=False,
    flag_value="",
    help="From Docker Model Runner's store, the models named or --all; DIR is MODELS_PATH or "
    "~/.docker/models if left out.",
)
@click.option("-a", "--all", "every", is_flag=True, help="With --docker-store: all models.")
@click.option("--copy", is_flag=True, help="Copy blobs even where a hard link would do.")
@remote_options
@trust_options
@common_options
def import_models(
    settings: Settings,
    arguments: tuple[str, ...],
    docker_store: str | None,
    every: bool,
    copy: bool,
    remote: RemoteOptions,
) -> None:
    """Take models over from elsewhere, verified, into the local store; print their digests.

    SOURCE is a model of the Hugging Face Hub, hf.co/ORG/NAME[:QUANT][@REVISION], kept as REFERENCE
    or under its own name in lower case; or a tar archive of `export` or `docker model`, - for
    standard input. With --docker-store, models of Docker Model Runner.
    """
    if docker_store is not None:
        from modelpack.cli.docker import import_from_docker_store

        import_from_docker_store(settings, docker_store, arguments, every, copy, remote)
        return
    if every or copy:
        raise UsageError("--all and --copy need --docker-store")
    if not 1 <= len(arguments) <= 2:
        raise UsageError("expected SOURCE [REFERENCE]", hint="like hf.co/ORG/NAME my/name:tag")
    name = arguments[0]
    where = Reference.parse(arguments[1]) if len(arguments) > 1 else None
    if Path(name).is_dir() or Path(name).suffix.lower() in _WEIGHTS:
        raise UsageError(
            f"{name}: these are a model's files, not a model in an archive",
            hint="`modelpack package` makes a model of them",
        )
    if name == "-" or Path(name).is_file():
        _import_archive(settings, name, where, remote)
        return
    source = HubReference.parse(name)
    if source is None:
        raise UsageError(
            f"{name!r} is no archive, and no model of the Hugging Face Hub",
            hint="from a registry, `pull` it; from Docker's store, give --docker-store",
        )
    from modelpack.cli.transfer import show_pulled
    from modelpack.operations.pull import pull

    with shown_progress(settings) as progress:
        done = pull(source, to=where, store=settings.store(), remote=remote, progress=progress)
    show_pulled(settings, str(source), done)


def _import_archive(
    settings: Settings, name: str, where: Reference | None, remote: RemoteOptions
) -> None:
    from modelpack.operations.archive_reading import import_archive
    from modelpack.operations.trusting import trusted_import

    with shown_progress(settings) as progress, ExitStack() as stack:
        if name == "-":
            stream: IO[bytes] = sys.stdin.buffer
        else:
            stream = stack.enter_context(_opened(Path(name)))
        store, watch = settings.store(), watching(progress)
        with trusted_import(store, remote, watch):
            done = import_archive(store, stream, watch, to=where)
    models = [
        {"digest": str(one.digest), "references": [str(one.reference)] if one.reference else []}
        for one in done
    ]
    show(settings, {"models": models}, "\n".join(str(one.digest) for one in done))
    named = [str(one.reference) for one in done if one.reference]
    note(settings, f"imported {plural(len(done), 'model')}: {', '.join(named) or 'without a name'}")


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
