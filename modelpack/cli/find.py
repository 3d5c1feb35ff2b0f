"""`modelpack inspect`, `manifest`, `config`, `resolve` and `bundle`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from modelpack.blob import read_blob
from modelpack.cli.describe import model_json, model_text
from modelpack.cli.options import (
    Settings,
    common_options,
    model_argument,
    remote_options,
    trust_options,
    variant_option,
)
from modelpack.cli.output import note, note_reference, show, show_json
from modelpack.cli.progress import shown_progress
from modelpack.model import Model
from modelpack.operations import find as finding
from modelpack.operations import resolve as resolving
from modelpack.operations.remote import RemoteOptions
from modelpack.reference import Reference
from modelpack.unpacking.links import LinkMode

REMOTE = click.option("-r", "--remote", "in_registry", is_flag=True, help="Ask the registry.")
PULL = click.option("--pull", is_flag=True, help="Pull first what is not stored.")


@click.command()
@model_argument()
@click.option(
    "--header", is_flag=True, help="Show what its weight files say: metadata and tensors."
)
@REMOTE
@remote_options
@variant_option
@common_options
def inspect(
    settings: Settings, model: str, header: bool, in_registry: bool, remote: RemoteOptions
) -> None:
    """Show what a model is: format, size, context, layers.

    Of a remote model a few small pieces are fetched, with --header too.
    """
    if header:
        from modelpack.cli.headers import show_headers

        show_headers(settings, model, in_registry, remote)
        return
    found = _find(settings, model, in_registry, remote)
    lacking = () if in_registry else settings.store().missing(found.descriptor)
    missing = {blob.digest for blob in lacking}
    if settings.json:
        show_json(model_json(found, missing))
    else:
        click.echo(model_text(found, missing))


@click.command()
@model_argument()
@REMOTE
@remote_options
@variant_option
@common_options
def manifest(settings: Settings, model: str, in_registry: bool, remote: RemoteOptions) -> None:
    """Print the manifest, byte for byte."""
    _write(_find(settings, model, in_registry, remote).manifest.raw)


@click.command()
@model_argument()
@REMOTE
@remote_options
@common_options
def config(settings: Settings, model: str, in_registry: bool, remote: RemoteOptions) -> None:
    """Print the config blob, byte for byte."""
    if in_registry:
        where = Reference.parse(model)
        note_reference(settings, model, where)
        _write(finding.remote_config(where, remote))
    else:
        store = settings.store()
        found = finding.stored_model(store, model)
        _write(read_blob(store, found.manifest.config))


@click.command()
@model_argument()
@click.option(
    "--media-type",
    "media_types",
    metavar="T",
    multiple=True,
    help="A media type, a pattern, or one of weight, gguf, safetensors, dduf, mmproj, license, "
    "chat-template, config. May be repeated. [default: weight]",
)
@click.option("--file", "files", metavar="PATH", multiple=True, help="A file path of the model.")
@PULL
@remote_options
@trust_options
@variant_option
@common_options
def resolve(
    settings: Settings,
    model: str,
    media_types: tuple[str, ...],
    files: tuple[str, ...],
    pull: bool,
    remote: RemoteOptions,
) -> None:
    """Print the paths of a model's files in the store, a line each.

    With --pull, files that --media-type or --file ask for are fetched alone.
    """
    with shown_progress(settings) as progress:
        found = resolving.resolve(
            model,
            media_types=media_types,
            files=files,
            pull=pull,
            store=settings.store(),
            remote=remote,
            progress=progress,
        )
    value = {
        "digest": str(found.model.digest),
        "files": [
            {
                "path": str(item.path),
                "mediaType": item.file.media_type,
                "role": str(item.file.role),
                "file": item.file.filepath,
                "digest": str(item.file.descriptor.digest),
                "size": item.file.descriptor.size,
            }
            for item in found.files
        ],
    }
    show(settings, value, "\n".join(str(item.path) for item in found.files))


@click.command()
@model_argument()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--links",
    type=click.Choice([str(mode) for mode in LinkMode]),
    default=str(LinkMode.AUTO),
    show_default=True,
    help="How files get there: hard links to the store where possible, else copies.",
)
@click.option("-f", "--force", is_flag=True, help="Replace what DIRECTORY holds.")
@PULL
@remote_options
@trust_options
@variant_option
@common_options
def bundle(
    settings: Settings,
    model: str,
    directory: Path,
    links: str,
    force: bool,
    pull: bool,
    remote: RemoteOptions,
) -> None:
    """Lay a model out in DIRECTORY, ready for a runtime to open; print the path of its weight."""
    with shown_progress(settings) as progress:
        made = resolving.bundle(
            model,
            directory,
            links=LinkMode(links),
            overwrite=force,
            pull=pull,
            store=settings.store(),
            remote=remote,
            progress=progress,
        )
    value = {
        "directory": str(made.directory),
        "weight": str(made.weight),
        "chatTemplate": str(made.chat_template) if made.chat_template else None,
        "mmproj": str(made.mmproj) if made.mmproj else None,
        "config": str(made.config),
        "files": [
            {"path": str(file.path), "role": str(file.role), "how": str(file.linked)}
            for file in made.files
        ],
    }
    note(settings, f"laid out {len(made.files)} files in {made.directory}")
    show(settings, value, str(made.weight))


def _find(settings: Settings, name: str, in_registry: bool, remote: RemoteOptions) -> Model:
    if in_registry:
        note_reference(settings, name, Reference.parse(name))
        return finding.inspect(name, remote=remote, from_registry=True)
    return finding.inspect(name, store=settings.store())


def _write(content: bytes) -> None:
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()
