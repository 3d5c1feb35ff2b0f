"""`modelpack help` and `version`, and the classes of commands: their help groups the options."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Final

import click

from modelpack._version import __version__
from modelpack.cli.options import ALL_COMMANDS, Settings, SharedOption, common_options_without
from modelpack.cli.output import show

#: Whether help shows the options that `more` leaves out: a key of a context's `meta`.
_EVERYTHING: Final = "modelpack.help.everything"


class _Grouped(click.Command):
    """A command whose help groups its options under headings, shared ones last."""

    # click's own method ends a long line in the middle of a phrase.
    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the first sentence of the help, without the phrases that do not fit."""
        text = super().get_short_help_str(1000)
        for separator in (";", ":", ","):
            while len(text) > limit and separator in text:
                text = text.rpartition(separator)[0]
        text = text if len(text) <= limit else super().get_short_help_str(limit)
        return text.removesuffix(".") if not text.endswith("...") else text

    def __init__(
        self,
        *arguments: Any,
        headings: Mapping[str, str] | None = None,
        more: Collection[str] = (),
        **attributes: Any,
    ) -> None:
        """`headings` are by the first option of each group, in the order of the options.

        Of the groups in `more`, --help shows one line each.
        """
        super().__init__(*arguments, **attributes)
        self._headings = headings or {}
        self._more = more

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each group of options under its heading."""
        heading = "Options"
        groups: dict[str, list[tuple[str, str]]] = {heading: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None or not isinstance(parameter, click.Option):
                continue
            heading = self._headings.get(parameter.opts[0], heading)
            where = heading
            if isinstance(parameter, SharedOption):
                where = parameter.heading
            elif "--help" in parameter.opts:
                where = ALL_COMMANDS
            groups.setdefault(where, []).append(record)
        groups[ALL_COMMANDS] = groups.pop(ALL_COMMANDS, [])
        everything = ctx.meta.get(_EVERYTHING, False)
        for heading, rows in groups.items():
            if rows and (everything or heading not in self._more):
                with formatter.section(heading):
                    formatter.write_dl(rows)
        left_out = [heading for heading in groups if heading in self._more and not everything]
        if left_out:
            width = formatter.width - max(map(len, left_out)) - 6
            rows = [(heading, _names(groups[heading], width)) for heading in left_out]
            with formatter.section("More options"):
                formatter.write_dl(rows)
            words = ctx.command_path.split()
            words.insert(1, "help")
            formatter.write_paragraph()
            formatter.write_text(f"Show these too: {' '.join(words)} --all")


def _names(rows: Iterable[tuple[str, str]], width: int) -> str:
    """Return the options' names in a line of at most `width` characters."""
    names = [re.findall(r"--[\w-]+", names)[0] for names, _ in rows]
    while len(text := ", ".join(names)) > width:
        names[-2:] = ["…"]
    return text


class Command(_Grouped):
    """A command whose help groups its options."""


class Group(_Grouped, click.Group):
    """A group of commands whose help groups its options."""

    command_class = Command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, then the commands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def command(
    name: str | None = None, cls: type[Command] = Command, **attributes: Any
) -> Callable[[Callable[..., Any]], Command]:
    """Return a decorator that makes a command whose help groups its options."""
    return click.command(name, cls, **attributes)


def group(**attributes: Any) -> Callable[[Callable[..., Any]], Group]:
    """Return a decorator that makes a group of such commands."""
    return click.group(None, Group, **attributes)


@command("help")
@click.argument("words", metavar="[COMMAND]...", nargs=-1)
@click.option("-a", "--all", "everything", is_flag=True, help="Show all options of COMMAND.")
@common_options_without("store", "quiet", "progress")
def show_help(settings: Settings, words: tuple[str, ...], everything: bool) -> None:
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
    where.meta[_EVERYTHING] = everything
    text = where.get_help()
    show(settings, {"command": where.command_path, "help": text}, text)


@command()
@common_options_without("store", "quiet", "progress")
def version(settings: Settings) -> None:
    """Print the version."""
    show(settings, {"version": __version__}, f"modelpack {__version__}")
