"""`modelpack help` and `version`: the same as `--help` and `--version`."""

from __future__ import annotations

import click

from modelpack._version import __version__
from modelpack.cli.options import Settings, common_options
from modelpack.cli.output import show


@click.command("help")
@click.argument("words", metavar="[COMMAND]...", nargs=-1)
@common_options
def show_help(settings: Settings, words: tuple[str, ...]) -> None:
    """Print the help of COMMAND, like `gateway key`, or of modelpack."""
    where = click.get_current_context().find_root()
    for word in words:
        group = where.command
        if not isinstance(group, click.Group):
            raise click.UsageError(f"{where.command_path} has no command {word!r}", where)
        # An error has the usage of the group, and suggests similar commands.
        name, command, _ = group.resolve_command(where, [word])
        assert command is not None, "resolve_command raises for unknown names"
        where = click.Context(command, info_name=name, parent=where, **command.context_settings)
    text = where.get_help()
    show(settings, {"command": where.command_path, "help": text}, text)


@click.command()
@common_options
def version(settings: Settings) -> None:
    """Print the version."""
    show(settings, {"version": __version__}, f"modelpack {__version__}")
