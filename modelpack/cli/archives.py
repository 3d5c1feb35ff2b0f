"""Docker Model Runner's store in `modelpack import` and `export`."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import click

from modelpack.artifacts.reference import Reference
from modelpack.cli.options import (
    Settings,
    common_options,
    model_argument,
    remote_options,
    trust_options,
)
from modelpack.cli.output import human_size, note, plural, show, shown_progress
from modelpack.errors import ConflictError, StoreError, UsageError
from modelpack.hub.reference import HubReference
from modelpack.operations import archives
from modelpack.operations import docker as exchanging
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.trust import check_names, trusted_import
from modelpack.storage import watching
from modelpack.store.docker_store import DockerStore


def import_from_docker_store(
    settings: Settings,
    docker_store: str,
    models: tuple[str, ...],
    every: bool,
    copy: bool,
    remote: RemoteOptions,
) -> None:
    """Take models over, and show their digests; `docker_store` may be a model's name."""
    path, names = _arguments(docker_store, models, every)
    store = settings.store()
    with (
        shown_progress(settings) as progress,
        trusted_import(store, remote, watching(progress)),
    ):
        done = exchanging.import_from_docker(
            names,
            docker=DockerStore(path),
            store=store,
            link=not copy,
            progress=progress,
        )
    _show(settings, done, "imported")


def export_to_docker_store(
    settings: Settings,
    docker_store: str,
    models: tuple[str, ...],
    every: bool,
    copy: bool,
    remote: RemoteOptions,
) -> None:
    """Give models to it, and show their digests; `docker_store` may be a model's name."""
    path, names = _arguments(docker_store, models, every)
    store = settings.store()
    exported = names or [str(ref) for model in store.models() for ref in model.references]
    with shown_progress(settings) as progress:
        check_names(store, exported, remote, watching(progress))
        done = exchanging.export_to_docker(
            names,
            docker=DockerStore(path, create=True),
            store=store,
            link=not copy,
            progress=progress,
        )
    _show(settings, done, "exported")


def _arguments(
    docker_store: str, models: tuple[str, ...], every: bool
) -> tuple[Path | None, tuple[str, ...]]:
    """Tell the optional directory from a model: `--docker-store REF` takes REF as its value."""
    path: Path | None = Path(docker_store).expanduser() if docker_store else None
    if path is not None and not path.is_dir() and not _looks_like_path(docker_store):
        path, models = None, (docker_store, *models)
    if bool(models) == every:
        raise UsageError("name the models, or give --all", hint="not both, not neither")
    return path, models


def _looks_like_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~"))


def _show(settings: Settings, done: Sequence[exchanging.Exchanged], verb: str) -> None:
    value = {
        "models": [
            {"digest": str(item.digest), "references": list(item.references)} for item in done
        ]
    }
    show(settings, value, "\n".join(str(item.digest) for item in done))
    note(settings, f"{verb} {plural(len(done), 'model')}")


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
    from modelpack.operations.archives import import_archive
    from modelpack.operations.trust import trusted_import

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
