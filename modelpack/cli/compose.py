"""`modelpack compose`: what Docker Compose calls for `provider: {type: modelpack}`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from modelpack.cli.options import Settings, common_options
from modelpack.cli.output import note, show
from modelpack.errors import ModelpackError

_SERVICE = click.argument("service", required=False)


@click.group()
@click.option("--project-name", metavar="NAME", help="The project; Compose says it.")
def compose(project_name: str | None) -> None:
    """Serve the models of a Compose file; `install` makes them known to Docker."""


@compose.command()
def metadata() -> None:
    """Print which options a provider takes, for Compose."""
    from modelpack.deployment.compose import METADATA

    click.echo(json.dumps(METADATA), nl=False)


@compose.command()
@click.option("--model", "models", multiple=True, required=True, help="A model. May be repeated.")
@click.option("--context-size", type=int, default=-1, help="Longest context, in tokens; -1: all.")
@click.option("--runtime-flags", default="", help="Flags, as llama.cpp or vLLM have them.")
@_SERVICE
def up(models: tuple[str, ...], context_size: int, runtime_flags: str, service: str | None) -> int:
    """Have a model server hold and set up the models; print for Compose where they are."""
    from modelpack.deployment.compose import ComposeMessages, provide
    from modelpack.deployment.local_server import local_server

    messages = ComposeMessages(click.echo)
    try:
        messages.info("looking for a model server")
        provide(
            local_server(), models, messages,
            context_size=context_size if context_size > 0 else None, runtime_flags=runtime_flags,
        )  # fmt: skip
    except ModelpackError as error:
        # Compose reads standard output only, and nothing after an error.
        messages.error(f"{error} ({error.hint})" if error.hint else str(error))
        return error.exit_code
    return 0


@compose.command()
@_SERVICE
def down(service: str | None) -> None:
    """Do nothing: the server unloads models that are not used, and others may use it."""


@compose.command()
@click.option(
    "--models", is_flag=True,
    help="Serve the top-level `models:` of Compose files too, in the place of `docker model`.",
)  # fmt: skip
@click.option(
    "--directory", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Where Docker finds plugins. [default: ~/.docker/cli-plugins]",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace a plugin that is somebody else's.")
@common_options
def install(settings: Settings, models: bool, directory: Path | None, force: bool) -> None:
    """Make `docker modelpack` of this program, and with --models `docker model`."""
    from modelpack.deployment.plugin_files import install_plugins

    names = ["docker-modelpack", *(["docker-model"] if models else [])]
    made = install_plugins(names, directory, force=force)
    show(settings, {"plugins": [str(path) for path in made]}, "\n".join(map(str, made)))
    if not models:
        note(settings, "give --models to serve the top-level `models:` of Compose files too")


@compose.command()
@common_options
def stop(settings: Settings) -> None:
    """End the model server that was started for Compose; requests under way are finished."""
    from modelpack.deployment.local_server import stop_server

    process = stop_server()
    show(settings, {"stopped": process}, "")
    note(settings, "none was started" if process is None else f"stopping process {process}")
