"""`modelpack import` and `export`: models in tar archives and in the stores of other tools."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO

import click

from modelpack.artifacts.reference import Reference
from modelpack.cli.help import command
from modelpack.cli.options import (
    DOWNLOAD,
    F,
    Settings,
    common_options,
    model_argument,
    remote_options,
    transfer_options,
    trust_options,
)
from modelpack.cli.output import human_size, note, plural, show, shown_progress
from modelpack.errors import ConflictError, NotFoundError, StoreError, UsageError
from modelpack.hub.objects import ObjectAddress
from modelpack.hub.reference import HubReference
from modelpack.operations import archives
from modelpack.operations.docker import (
    Exchanged,
    export_to_docker,
    import_from_docker,
    import_from_ollama,
)
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.trust import check_names, trusted_import
from modelpack.storage import watching
from modelpack.store.docker_store import DockerStore
from modelpack.store.ollama_store import OllamaStore


def import_from_docker_store(
    settings: Settings,
    docker_store: str,
    models: tuple[str, ...],
    every: bool,
    copy: bool,
    remote: RemoteOptions,
) -> None:
    """Import models and print their digests; `docker_store` may be the name of a model."""
    path, names = _arguments(docker_store, models, every)
    store = settings.store()
    with (
        shown_progress(settings) as progress,
        trusted_import(store, remote, watching(progress)),
    ):
        docker = DockerStore(path)
        done = import_from_docker(
            names, docker=docker, store=store, link=not copy, progress=progress
        )
    _show(settings, done, "imported")


def import_from_ollama_store(
    settings: Settings,
    ollama_store: str,
    models: tuple[str, ...],
    every: bool,
    copy: bool,
    remote: RemoteOptions,
) -> None:
    """Import models and print their digests; `ollama_store` may be the name of a model."""
    path, names = _arguments(ollama_store, models, every)
    store = settings.store()
    with (
        shown_progress(settings) as progress,
        trusted_import(store, remote, watching(progress)),
    ):
        done = import_from_ollama(
            names, ollama=OllamaStore(path), store=store, link=not copy, progress=progress
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
    """Export models and print their digests; `docker_store` may be the name of a model."""
    path, names = _arguments(docker_store, models, every)
    store = settings.existing_store()
    exported = names or [str(ref) for model in store.models() for ref in model.references]
    with shown_progress(settings) as progress:
        check_names(store, exported, remote, watching(progress))
        docker = DockerStore(path, create=True)
        done = export_to_docker(names, docker=docker, store=store, link=not copy, progress=progress)
    _show(settings, done, "exported")


def _arguments(
    directory: str, models: tuple[str, ...], every: bool
) -> tuple[Path | None, tuple[str, ...]]:
    """Return the directory or None, and the models.

    In `--docker-store REF`, click parses REF as the directory.
    """
    path: Path | None = Path(directory).expanduser() if directory else None
    looks_like_path = directory.startswith(("/", "./", "../", "~"))
    if path is not None and not path.is_dir() and not looks_like_path:
        path, models = None, (directory, *models)
    _check_named(models, every)
    return path, models


def _check_named(models: tuple[str, ...], every: bool) -> None:
    if bool(models) == every:
        raise UsageError("expected either models or --all", hint="name the models, or give --all")


def _show(settings: Settings, done: Sequence[Exchanged], verb: str) -> None:
    value = {
        "models": [
            {"digest": str(item.digest), "references": list(item.references)} for item in done
        ]
    }
    show(settings, value, "\n".join(str(item.digest) for item in done))
    note(settings, f"{verb} {plural(len(done), 'model')}")


def _docker_store(verb: str) -> Callable[[F], F]:
    return click.option(
        "--docker-store", metavar="[DIR]", is_flag=False, flag_value="",
        help=f"{verb} the store of Docker Model Runner. [default DIR: MODELS_PATH or "
        "~/.docker/models]",
    )  # fmt: skip


_COPY = click.option("--copy", is_flag=True, help="Copy blobs instead of hard-linking them.")


@command("export")
@model_argument("models", metavar="[MODEL]...", nargs=-1)
@click.option(
    "-o", "--output", metavar="FILE",
    help="Write a tar archive; - writes to stdout.",
)  # fmt: skip
@click.option(
    "--format", "--form", "form", type=click.Choice(archives.FORMS), default="oci",
    show_default=True,
    help="With --output: write an OCI image layout of any number of models, or the archive format "
    "of `docker model`, which contains one.",
)  # fmt: skip
@click.option("-f", "--force", is_flag=True, help="With --output: replace FILE.")
@_docker_store("Export to")
@click.option("-a", "--all", "every", is_flag=True, help="Export all models.")
@_COPY
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
    """Export stored models to a tar archive or to Docker Model Runner; print their digests.

    `import` reads the archive back with the same digests.
    """
    if (output is None) == (docker_store is None):
        raise UsageError(
            "expected either --output or --docker-store",
            hint="give --output FILE or --docker-store",
        )
    if docker_store is not None:
        export_to_docker_store(settings, docker_store, models, every, copy, remote)
        return
    assert output is not None
    if copy:
        raise UsageError("--copy requires --docker-store")
    _check_named(models, every)
    store = settings.existing_store()
    if output != "-":
        store.check_outside(Path(output))
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
    if attached := sum(len(store.referrers(digest)) for digest in archive.digests):
        note(settings, f"left out: {plural(attached, 'attached manifest')}, such as signatures")
    if output != "-":
        digests = [str(digest) for digest in archive.digests]
        show(settings, {"file": output, "size": archive.size, "digests": digests},
             "\n".join(digests))  # fmt: skip


def _write(path: Path, pieces: Iterable[bytes], force: bool) -> None:
    """Write the file under a temporary name and rename it when it is complete."""
    if path.exists() and not force:
        raise ConflictError(f"{path} already exists", hint="give --force to replace it")
    part = path.with_name(f".{path.name}-{secrets.token_hex(4)}.partial")
    try:
        with part.open("xb") as file:
            for piece in pieces:
                file.write(piece)
        os.replace(part, path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


_WEIGHTS = (".gguf", ".safetensors", ".dduf")
_ARCHIVES = (".tar", ".tgz", ".gz", ".zst")


@command("import")
@click.argument("arguments", metavar="[SOURCE [REFERENCE]]", nargs=-1)
@_docker_store("Import from")
@click.option(
    "--ollama-store", metavar="[DIR]", is_flag=False, flag_value="",
    help="Import from the models directory of Ollama. [default DIR: OLLAMA_MODELS or "
    "~/.ollama/models]",
)  # fmt: skip
@click.option(
    "-a", "--all", "every", is_flag=True,
    help="With --docker-store or --ollama-store: import all models.",
)  # fmt: skip
@_COPY
@remote_options
@transfer_options(*DOWNLOAD)
@trust_options
@common_options
def import_models(
    settings: Settings,
    arguments: tuple[str, ...],
    docker_store: str | None,
    ollama_store: str | None,
    every: bool,
    copy: bool,
    remote: RemoteOptions,
) -> None:
    """Import models into the local store and verify them; print their digests.

    SOURCE is a model of the Hugging Face Hub, hf.co/ORG/NAME[:QUANT][@REVISION], of ModelScope,
    modelscope.cn/ORG/NAME[:QUANT][@REVISION], the objects at s3://BUCKET/PREFIX, gs://BUCKET/PREFIX,
    az://CONTAINER/PREFIX or another fsspec URL, or a tar archive made by `export` or `docker model`
    (- reads stdin). REFERENCE names the model in the store; objects need one, and the default of
    others is their own name in lower case. With --docker-store or --ollama-store, the arguments are
    names of models in Docker Model Runner or Ollama.
    """
    if docker_store is not None and ollama_store is not None:
        raise UsageError("--docker-store and --ollama-store cannot be combined")
    if ollama_store is not None:
        import_from_ollama_store(settings, ollama_store, arguments, every, copy, remote)
        return
    if docker_store is not None:
        import_from_docker_store(settings, docker_store, arguments, every, copy, remote)
        return
    if every or copy:
        raise UsageError("--all and --copy require --docker-store or --ollama-store")
    if not 1 <= len(arguments) <= 2:
        raise UsageError(
            "expected SOURCE [REFERENCE]", hint="give both, like hf.co/ORG/NAME my/name:tag"
        )
    name = arguments[0]
    where = Reference.parse(arguments[1]) if len(arguments) > 1 else None
    address = ObjectAddress.parse(name)
    if address is not None:
        if where is None:
            raise UsageError(
                f"{address} needs a name for the store", hint=f"write import {address} my/name:tag"
            )
        _import_objects(settings, address, where, remote)
        return
    if os.path.isdir(name) or Path(name).suffix.lower() in _WEIGHTS:
        raise UsageError(
            f"{name} is not an archive, but the files of a model",
            hint=f"run modelpack package {name} NAME",
        )
    if name == "-" or os.path.isfile(name):
        _import_archive(settings, name, where, remote)
        return
    source = HubReference.parse(name)
    if source is None:
        if Path(name).suffix.lower() in _ARCHIVES:
            raise NotFoundError(f"no such file: {name}", hint="check the path")
        raise UsageError(
            f"{name!r} is not an archive, a model of the Hugging Face Hub or objects in a bucket",
            hint="use `modelpack pull` for a registry, --docker-store for Docker Model Runner, "
            "--ollama-store for Ollama",
        )
    from modelpack.cli.transfer import show_pulled
    from modelpack.operations.pull import pull

    with shown_progress(settings) as progress:
        done = pull(source, to=where, store=settings.store(), remote=remote, progress=progress)
    show_pulled(settings, str(source), done)


def _import_objects(
    settings: Settings, address: ObjectAddress, where: Reference, remote: RemoteOptions
) -> None:
    from modelpack.builder.request import PackageRequest
    from modelpack.operations.package import package

    store = settings.store()
    with (
        shown_progress(settings) as progress,
        trusted_import(store, remote, watching(progress)),
    ):
        made = package(
            where, PackageRequest(), from_model=str(address),
            store=store, remote=replace(remote, trust=None), progress=progress,
        )  # fmt: skip
    models = {"models": [{"digest": str(made.digest), "references": [str(where)]}]}
    show(settings, models, str(made.digest))
    size = human_size(made.manifest.total_size)
    note(settings, f"imported {address} as {where}: {size}")


def _import_archive(
    settings: Settings, name: str, where: Reference | None, remote: RemoteOptions
) -> None:
    with shown_progress(settings) as progress, ExitStack() as stack:
        if name == "-":
            stream: IO[bytes] = sys.stdin.buffer
        else:
            try:
                stream = stack.enter_context(open(name, "rb"))
            except OSError as error:
                raise StoreError(f"cannot read {name}: {error.strerror}") from error
        store, watch = settings.store(), watching(progress)
        with trusted_import(store, remote, watch):
            done = archives.import_archive(store, stream, watch, to=where)
    models = [
        {"digest": str(one.digest), "references": [str(one.reference)] if one.reference else []}
        for one in done
    ]
    show(settings, {"models": models}, "\n".join(str(one.digest) for one in done))
    named = [str(one.reference) for one in done if one.reference]
    note(settings, f"imported {plural(len(done), 'model')}: {', '.join(named) or 'without a name'}")
