"""The Docker CLI plugins `docker modelpack` and `docker model`.

For the top-level `models:` of a Compose file, Compose runs docker-model (docker/compose v2.40.3,
pkg/compose/model.go): `ls --json`, `pull`, `configure` and `status --json`. It reads the stdout and
stderr of the plugin as one stream.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import click

from modelpack._version import __version__
from modelpack.cli.deploy import compose
from modelpack.cli.main import run
from modelpack.cli.output import one_line, show_error
from modelpack.errors import ModelpackError, exit_status

_METADATA = "docker-cli-plugin-metadata"
#: Compose passes runtime flags only to docker-model 1.0.6 or later, and checks the version.
_MODEL_VERSION = "v1.2.9"


def docker_modelpack() -> None:
    """Run `modelpack` as the plugin docker-modelpack."""
    sys.exit(_plugin("modelpack", f"v{__version__}", run))


def docker_model() -> None:
    """Run the commands of `docker model` that Compose uses, as the plugin docker-model."""
    sys.exit(_plugin("model", _MODEL_VERSION, _run_model))


def _plugin(name: str, version: str, command: Callable[[list[str]], int]) -> int:
    arguments = sys.argv[1:]
    if arguments[:1] == [_METADATA]:
        described = {
            "SchemaVersion": "0.1.0",
            "Vendor": "Modelpack",
            "Version": version,
            "ShortDescription": "Models as OCI artifacts, served by modelpack",
        }
        click.echo(json.dumps(described))
        return 0
    # Docker passes the plugin's name as the first argument; Compose does not.
    return command(arguments[1:] if arguments[:1] == [name] else arguments)


@click.group()
def model() -> None:
    """The commands of Docker Model Runner that Compose uses, served by modelpack."""


@model.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_models(as_json: bool) -> None:
    """List the models of the server's store."""
    from modelpack.deploy.local_server import local_server

    models = local_server().client.models()
    if as_json:
        click.echo(json.dumps(models))
    else:
        click.echo("\n".join(tag for model in models for tag in model["tags"][:1]))


@model.command()
@click.argument("name", metavar="MODEL")
def pull(name: str) -> None:
    """Pull MODEL into the server's store."""
    from modelpack.deploy.local_server import local_server

    local_server().client.pull(name, lambda message: click.echo(one_line(message)))


@model.command(context_settings={"ignore_unknown_options": True})
@click.argument("name", metavar="MODEL")
@click.option("--context-size", type=int, help="Limit the context to this many tokens.")
@click.argument("flags", metavar="[-- FLAGS...]", nargs=-1, type=click.UNPROCESSED)
def configure(name: str, context_size: int | None, flags: tuple[str, ...]) -> None:
    """Set the context length and runtime flags of MODEL in the server."""
    from modelpack.deploy.local_server import local_server

    local_server().client.configure(name, context_size=context_size, runtime_flags=flags)


@model.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(as_json: bool) -> None:
    """Print the address at which containers reach the server."""
    from modelpack.deploy.local_server import local_server

    server = local_server()
    if not as_json:
        click.echo(f"modelpack serves at {server.endpoint}")
        return
    answer = {
        "running": True,
        "backends": server.client.backends(),
        "kind": "Modelpack",
        "endpoint": server.endpoint,
        "endpointHost": f"{server.client.url}/engines/v1/",
    }
    click.echo(json.dumps(answer))


@model.command()
def version() -> None:
    """Print the emulated version of Docker Model Runner and the version of modelpack."""
    click.echo(f"Docker Model Runner version {_MODEL_VERSION} (modelpack {__version__})")


model.add_command(compose)


def _run_model(arguments: list[str]) -> int:
    try:
        result = model.main(arguments, prog_name="docker model", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ModelpackError as error:
        # Compose shows only the stdout of `pull`.
        show_error(error, err=False)
        return exit_status(error)
