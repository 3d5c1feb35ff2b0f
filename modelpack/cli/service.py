"""`modelpack service`: run the servers as services of systemd or launchd."""

from __future__ import annotations

import stat
from pathlib import Path

import click

from modelpack.cli.help import group
from modelpack.cli.options import Settings, common_options_without
from modelpack.cli.output import note, show
from modelpack.deploy.services import KINDS, Service, ServiceManager, carried_environment
from modelpack.errors import UsageError

_KIND = click.argument("kind", metavar="serve|registry|gateway", type=click.Choice(list(KINDS)))


@group()
def service() -> None:
    """Run a server as a service of this user: of systemd on Linux, of launchd on macOS."""


@service.command()
@_KIND
@click.argument("options", metavar="[-- OPTIONS]...", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--env-file", metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, resolve_path=True),
    help="Read variables with secrets from this file, NAME=VALUE per line, at each start.",
)  # fmt: skip
@click.option("--print", "prints", is_flag=True, help="Print the service; install nothing.")
@click.option("--no-start", is_flag=True, help="Write the service, but do not start it.")
@common_options_without("progress")
def install(
    settings: Settings,
    kind: str,
    options: tuple[str, ...],
    env_file: Path | None,
    prints: bool,
    no_start: bool,
) -> None:
    """Start a server now and at each login: `serve`, `registry serve` or `gateway`, with OPTIONS.

    An installed service of the same kind is replaced. Relative paths in OPTIONS are relative to
    the current directory.
    """
    if settings.store_root is not None:
        options = ("--store", str(Path(settings.store_root).absolute()), *options)
    _check_options(kind, options)
    made = Service(kind, options, Path.cwd(), carried_environment(), env_file)
    manager = ServiceManager()
    if prints:
        click.echo(manager.content(made), nl=False)
        return
    if env_file is not None and env_file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        note(settings, f"other users can read {env_file}: run chmod 600 on it")
    path = manager.install(made, start=not no_start)
    show(settings, {"service": str(path), "started": not no_start}, str(path))


@service.command()
@_KIND
@common_options_without("store", "quiet", "progress")
def remove(settings: Settings, kind: str) -> None:
    """Stop the service and delete its file."""
    path = ServiceManager().remove(kind)
    show(settings, {"service": str(path)}, str(path))


def _check_options(kind: str, options: tuple[str, ...]) -> None:
    """Raise the error of the command that the service runs if it does not accept `options`."""
    from modelpack.cli.main import cli

    command: click.Command = cli
    for word in KINDS[kind]:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), word)
        assert found is not None, f"modelpack has the command {word}"
        command = found
    name = f"modelpack {' '.join(KINDS[kind])}"
    context = command.make_context(name, list(options), obj=Settings())
    if isinstance(command, click.Group):
        _, words, _ = command.make_parser(context).parse_args(list(options))
        if words:  # a subcommand, such as `gateway key`, which prints a secret
            raise UsageError(f"{words[0]!r} is not an option of {name}")
