"""`modelpack import` and `export`: models of other stores on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from modelpack.cli.options import Settings, common_options, model_argument
from modelpack.cli.output import note, plural, show
from modelpack.cli.progress import shown_progress
from modelpack.errors import UsageError
from modelpack.operations import docker as exchanging
from modelpack.stores.docker import DockerStore

# The option's value may be left out; click then gives it this.
_DEFAULT = ""

DOCKER_STORE = click.option(
    "--docker-store",
    metavar="[DIR]",
    is_flag=False,
    flag_value=_DEFAULT,
    required=True,
    help="Docker Model Runner's store; DIR is MODELS_PATH or ~/.docker/models if left out.",
)
ALL = click.option("-a", "--all", "every", is_flag=True, help="All models.")
COPY = click.option("--copy", is_flag=True, help="Copy blobs even where a hard link would do.")


@click.command("import")
@DOCKER_STORE
@click.argument("models", nargs=-1)
@ALL
@COPY
@common_options
def import_models(
    settings: Settings, docker_store: str, models: tuple[str, ...], every: bool, copy: bool
) -> None:
    """Take models over from Docker Model Runner's store, verified; print their digests."""
    path, names = _arguments(docker_store, models, every)
    with shown_progress(settings) as progress:
        done = exchanging.import_from_docker(
            names,
            docker=DockerStore(path),
            store=settings.store(),
            link=not copy,
            progress=progress,
        )
    _show(settings, done, "imported")


@click.command("export")
@DOCKER_STORE
@model_argument("models", nargs=-1)
@ALL
@COPY
@common_options
def export_models(
    settings: Settings, docker_store: str, models: tuple[str, ...], every: bool, copy: bool
) -> None:
    """Give stored models to Docker Model Runner's store; print their digests."""
    path, names = _arguments(docker_store, models, every)
    with shown_progress(settings) as progress:
        done = exchanging.export_to_docker(
            names,
            docker=DockerStore(path, create=True),
            store=settings.store(),
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
