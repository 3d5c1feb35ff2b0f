"""The `modelpack` command group; it turns errors into messages and exit codes."""

from __future__ import annotations

import errno
import importlib
import io
import itertools
import os
import re
import sys
from typing import Any, TypeGuard

import click

from modelpack import plugins
from modelpack._version import __version__
from modelpack.cli.options import Settings, common_options
from modelpack.cli.output import show_error, visible
from modelpack.errors import ModelpackError, StorageFullError, exit_status

# command -> (module of modelpack.cli, attribute). Modules are imported when used, to start fast.
# Commands that need the engine are registered as entry points: see modelpack.plugins.
COMMANDS = {
    "attach": ("referrers", "attach"),
    "bundle": ("inspect", "bundle"),
    "catalog": ("registry", "catalog"),
    "completion": ("completion", "completion"),
    "compose": ("deploy", "compose"),
    "config": ("inspect", "config"),
    "convert": ("package", "convert"),
    "copy": ("transfer", "copy"),
    "detach": ("referrers", "detach"),
    "diff": ("diff", "diff"),
    "export": ("archives", "export_models"),
    "fsck": ("store", "fsck"),
    "gc": ("store", "gc"),
    "help": ("help", "show_help"),
    "import": ("archives", "import_models"),
    "index": ("index", "index"),
    "inspect": ("inspect", "inspect"),
    "keygen": ("trust", "keygen"),
    "k8s": ("deploy", "k8s"),
    "lint": ("trust", "lint"),
    "list": ("store", "list_models"),
    "lock": ("transfer", "lock"),
    "login": ("registry", "login"),
    "logout": ("registry", "logout"),
    "manifest": ("inspect", "manifest"),
    "package": ("package", "package"),
    "prune": ("store", "prune"),
    "pull": ("transfer", "pull"),
    "push": ("transfer", "push"),
    "referrers": ("referrers", "referrers"),
    "registry": ("registry", "registry"),
    "resolve": ("inspect", "resolve"),
    "rm": ("store", "rm"),
    "sbom": ("trust", "sbom"),
    "search": ("search", "search"),
    "service": ("service", "service"),
    "sign": ("trust", "sign"),
    "tag": ("store", "tag"),
    "verify": ("trust", "verify"),
    "version": ("help", "version"),
}

# Names of the same commands in docker model, kit, modctl, oras and ollama.
ALIASES = {
    "build": "package",
    "pack": "package",
    "cp": "copy",
    "transfer": "copy",
    "ls": "list",
    "unpack": "bundle",
    "show": "inspect",
    "remove": "rm",
    "stop": "unload",
}

# The headings of `modelpack --help`; a command without one follows under "Other".
GROUPS = {
    "Package and publish": (
        "package", "convert", "index", "import", "export", "push", "copy", "attach", "detach",
        "referrers",
    ),
    "Store": (
        "list", "inspect", "manifest", "config", "diff", "resolve", "bundle", "tag", "rm", "prune",
        "gc", "fsck",
    ),
    "Registry": ("pull", "lock", "search", "catalog", "login", "logout", "registry"),
    "Run and serve": (
        "run", "serve", "ps", "requests", "logs", "unload", "configure", "adapter", "launch",
        "gateway", "service", "compose", "k8s", "smoke", "transcribe", "bench",
        "doctor",
    ),
    "Trust": ("keygen", "sign", "verify", "lint", "sbom"),
    "Help": ("help", "version", "completion"),
}  # fmt: skip

EXIT_CODES = """
\b
Exit codes:
  0    done
  1    any other failure
  2    wrong usage
  3    not found
  4    authentication or permission
  5    integrity: digest, size or signature mismatch
  6    the registry or the network is unavailable
  7    conflict or lock
  130  interrupted
"""


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, without aliases."""
        return sorted({*COMMANDS, *self.commands, *plugins.command_names()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command that `cmd_name` or its alias names."""
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return self.commands.get(name) or plugins.load_command(name)
        module, attribute = COMMANDS[name]
        command = getattr(importlib.import_module(f"modelpack.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by task."""
        names = self.list_commands(ctx)
        width = max(map(len, names))
        grouped = {name for group in GROUPS.values() for name in group}
        for heading, group in {
            **GROUPS, "Other": tuple(name for name in names if name not in grouped)
        }.items():  # fmt: skip
            rows = []
            for name in group:
                command = self.get_command(ctx, name)
                if command is not None and not command.hidden:
                    text = command.get_short_help_str(formatter.width - width - 4)
                    rows.append((name.ljust(width), text))
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command for `args`, with an alias replaced by the command's name."""
        typed = args[0]
        if not (typed.startswith("-") or ctx.resilient_parsing or self.get_command(ctx, typed)):
            from difflib import get_close_matches

            close = get_close_matches(typed, [*self.list_commands(ctx), *ALIASES])
            meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            ctx.fail(f"No such command {typed!r}.{meant}")
        name, command, rest = super().resolve_command(ctx, args)
        return (ALIASES.get(name, name) if name else name), command, rest


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@click.version_option(__version__, "-V", "--version", message="modelpack %(version)s")
@common_options
def cli(settings: Settings) -> None:
    """Package models as OCI artifacts; push, pull, copy, verify and resolve them."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    settings = Settings()
    for stream in (sys.stdout, sys.stderr):
        # Print the characters that the terminal's encoding lacks as question marks.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    try:
        result = cli.main(args, prog_name="modelpack", standalone_mode=False, obj=settings)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        # Parsing fails before the command sees its options.
        if not (settings.json or _asks_for_json(sys.argv[1:] if args is None else args)):
            error.show()
        else:
            context = getattr(error, "ctx", None)
            hint = f"run {context.command_path} --help" if context else None
            kind = click.UsageError if isinstance(error, click.UsageError) else type(error)
            _show_json(kind.__name__, error.format_message(), error.exit_code, hint)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        if settings.resumes and not settings.quiet:
            click.echo("hint: run the same command again to resume", err=True)
        return 130
    except BrokenPipeError:
        # The process that reads stdout has exited, as in `| head`, so nothing is printed.
        _discard_output()
        return 1
    except ModelpackError as error:
        _show_error(error, settings)
        status = exit_status(error)
        return settings.failure_code if status == 1 else status
    except Exception as error:  # noqa: BLE001 - the outermost frame: never a bare traceback
        if _is_of_output(error):
            _discard_output()
            _show_error(StorageFullError(f"cannot write the output: {error.strerror}"), settings)
        else:
            _show_unexpected(error, settings)
        return settings.failure_code


def _is_of_output(error: Exception) -> TypeGuard[OSError]:
    """Return whether writing to an open stream failed: operations translate their own errors."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    return isinstance(error, OSError) and error.filename is None and error.errno in codes


def _discard_output() -> None:
    """Discard what stdout still buffers: Python writes it at exit, and would report the failure."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_error(error: ModelpackError, settings: Settings) -> None:
    if settings.debug:
        _show_traceback(error)
    message, hint = _as_typed(str(error), settings), _as_typed(error.hint or "", settings)
    if settings.json:
        _show_json(type(error).__name__, message, exit_status(error), hint)
    else:
        show_error(ModelpackError(message, hint=hint))


def _as_typed(text: str, settings: Settings) -> str:
    """Return an error's text with the command's options in place of their names in Python."""
    for name, option in settings.options.items():
        text = re.sub(rf"(?<![\w./='\"-]){name}(?![\w/='\"-]|\.\w)", option, text)
    return text


def _show_unexpected(error: Exception, settings: Settings) -> None:
    if settings.debug:
        _show_traceback(error)
    hint = None if settings.debug else "run again with --debug to see where, and report it as a bug"
    if settings.json:
        _show_json(type(error).__name__, f"unexpected: {error}", settings.failure_code, hint)
        return
    detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    click.echo(visible(f"error: unexpected {detail}").replace("\n", "\n  "), err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)


def _asks_for_json(args: list[str]) -> bool:
    return "--json" in itertools.takewhile(lambda arg: arg != "--", args)


def _show_json(kind: str, message: str, code: int, hint: str | None) -> None:
    import json

    body: dict[str, Any] = {"type": kind, "message": message, "exitCode": code}
    if hint:
        body["hint"] = hint
    click.echo(json.dumps({"error": body}), err=True)


def _show_traceback(error: BaseException) -> None:
    import traceback

    click.echo(visible("".join(traceback.format_exception(error))), err=True, nl=False)
