"""`modelpack help` and `version`, and commands whose help has headings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from modelpack._version import __version__
from modelpack.cli.options import Settings, common_options
from modelpack.cli.output import show


class CommandWithHeadings(click.Command):
    """A command whose help groups its options under headings."""

    def __init__(self, *arguments: Any, headings: Mapping[str, str], **attributes: Any) -> None:
        """`headings` are by the first option of each group, in the order of the options."""
        super().__init__(*arguments, **attributes)
        self._headings = headings

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each group of options under its heading."""
        rows: list[tuple[str, str]] = []
        groups = [("Options", rows)]
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                heading = self._headings.get(parameter.opts[0])
                if heading is not None:
                    rows = []
                    groups.append((heading, rows))
                rows.append(record)
        for heading, rows in groups:
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


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
