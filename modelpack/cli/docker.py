"""Docker Model Runner's store in `modelpack import` and `export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modelpack.cli.options import Settings
from modelpack.cli.output import note, plural, show
from modelpack.cli.progress import shown_progress
from modelpack.errors import UsageError
from modelpack.operations import docker as exchanging
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.trusting import check_names, trusted_import
from modelpack.operations.watching import watching
from modelpack.stores.docker import DockerStore


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
