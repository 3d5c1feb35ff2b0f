"""`modelpack login` and `logout`."""

from __future__ import annotations

import sys
from typing import Any

import click

from modelpack.cli.options import Settings, common_options, remote_options
from modelpack.cli.output import note, show
from modelpack.errors import UsageError
from modelpack.operations.remote import RemoteOptions

_DOCKER_HUB = "docker.io"


@click.command()
@click.argument("host", default=_DOCKER_HUB)
@click.option("-u", "--username", metavar="NAME", help="The user; asked for where it is left out.")
@click.option("--password-stdin", is_flag=True, help="Read the password from stdin.")
@remote_options
@common_options
def login(
    settings: Settings,
    host: str,
    username: str | None,
    password_stdin: bool,
    remote: RemoteOptions,
) -> None:
    """Check a user's password with the registry HOST, and keep it for later.

    Docker and its relatives find it, too: the credential helper that ~/.docker/config.json names
    keeps it, else that file does, in plain text. With the user name `<token>` the password is an
    identity token. No option takes the password: every user of a machine sees arguments.
    """
    from modelpack.registry.login import log_in, login_file

    if password_stdin and not username:
        raise UsageError("--password-stdin needs --username")
    username = username or click.prompt("Username", err=True)
    done = log_in(host, username, _password(password_stdin), login_file(), **_options(remote))
    if not done.checked:
        note(settings, f"{host} asked for no credentials, so they are unchecked")
    if done.helper is None:
        note(
            settings,
            f"warning: the password is in {done.file} in plain text; a credential helper "
            "(credsStore in that file) would keep it safe",
        )
    where = done.helper or done.file
    show(settings, {"host": host, "keptIn": where, "checked": done.checked}, f"logged in to {host}")


@click.command()
@click.argument("host", default=_DOCKER_HUB)
@common_options
def logout(settings: Settings, host: str) -> None:
    """Forget the password for the registry HOST."""
    from modelpack.registry.login import log_out, login_file

    found = log_out(host, login_file())
    text = f"logged out of {host}" if found else f"there was no login to {host}"
    show(settings, {"host": host, "found": found}, text)


def _password(from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.read().rstrip("\r\n")
    if not sys.stdin.isatty():
        raise UsageError(
            "there is no terminal to ask for the password", hint="give it with --password-stdin"
        )
    password: str = click.prompt("Password", hide_input=True, err=True)
    return password


def _options(remote: RemoteOptions) -> dict[str, Any]:
    from modelpack.registry import TlsOptions

    return {"plain_http": remote.plain_http, "tls": remote.tls or TlsOptions()}
