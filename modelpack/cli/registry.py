"""`modelpack login` and `logout`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from modelpack.cli.options import Settings, common_options, remote_options
from modelpack.cli.output import note, plural, show
from modelpack.cli.server_options import tls_options
from modelpack.errors import UsageError
from modelpack.operations.remote import RemoteOptions

if TYPE_CHECKING:
    from modelpack.registry_server.auth import Guard
    from modelpack.registry_server.cache import Upstream
    from modelpack.registry_server.uploads import Limits

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


@click.command()
@click.argument("name", metavar="REGISTRY[/NAMESPACE]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Write index.html and index.json there. [default: print the list]",
)  # fmt: skip
@click.option("--title", default="", help="The page's title.")
@click.option(
    "--repository", "repositories", metavar="NAME", multiple=True,
    help="A repository to look at, for registries that list none. May be repeated.",
)  # fmt: skip
@remote_options
@common_options
def catalog(
    settings: Settings,
    name: str,
    output: Path | None,
    title: str,
    repositories: tuple[str, ...],
    remote: RemoteOptions,
) -> None:
    """List the models of a registry, or under a name in it; no files of theirs are fetched.

    The page is one file that loads nothing else; the same models give the same bytes.
    """
    from modelpack.operations import catalog as catalogs
    from modelpack.operations.catalog import as_json, write_catalog

    entries = catalogs.catalog(name, repositories=repositories, remote=remote)
    note(settings, f"{name}: {plural(len(entries), 'tag')}")
    if output is None:
        show(settings, as_json(entries, name), "\n".join(str(one.reference) for one in entries))
        return
    page, listed = write_catalog(entries, output, name=name, title=title)
    value = {"page": str(page), "list": str(listed), "count": len(entries)}
    show(settings, value, str(page))


F = TypeVar("F", bound=Callable[..., Any])

_MIB = 1024 * 1024
_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_COUNT = click.IntRange(min=1)
# Clients wait meanwhile, and try again themselves.
_UPSTREAM_TRIES = 3


def access_options(command: F) -> F:
    """Add the options that say who gets in; the command gets them as `guard`."""

    @click.option(
        "--htpasswd", type=_FILE, metavar="FILE",
        help="Ask for a user and password of this file, made by `htpasswd -B`.",
    )  # fmt: skip
    @click.option(
        "--token-realm", metavar="URL", help="Ask for a bearer token of the token server at URL."
    )
    @click.option("--token-service", metavar="NAME", help="Whom its tokens are for.")
    @click.option("--token-issuer", metavar="NAME", help="What it calls itself in them.")
    @click.option(
        "--token-certificates", type=_FILE, metavar="FILE",
        help="The certificates or public keys that it signs by.",
    )  # fmt: skip
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        htpasswd: Path | None,
        token_realm: str | None,
        token_service: str | None,
        token_issuer: str | None,
        token_certificates: Path | None,
        **arguments: Any,
    ) -> Any:
        from modelpack.registry_server.auth import (
            BearerTokens,
            PasswordFile,
            Passwords,
            TokenSettings,
        )

        tokens = (token_realm, token_service, token_issuer, token_certificates)
        guard: Guard | None = None
        if any(tokens):
            if htpasswd or not (
                token_realm and token_service and token_issuer and token_certificates
            ):
                raise UsageError(
                    "tokens need all of --token-realm, --token-service, --token-issuer and "
                    "--token-certificates, and no --htpasswd"
                )
            guard = BearerTokens(
                TokenSettings(token_realm, token_service, token_issuer, token_certificates)
            )
        elif htpasswd:
            guard = Passwords(PasswordFile(htpasswd))
        return command(*args, guard=guard, **arguments)

    return wrapped  # type: ignore[return-value]


def limit_options(command: F) -> F:
    """Add the options that bound what clients take; the command gets them as `limits`."""

    @click.option(
        "--max-manifest", type=click.IntRange(1, 4096), default=4096, show_default=True,
        metavar="KIB", help="Largest manifest.",
    )  # fmt: skip
    @click.option("--max-upload", type=_COUNT, metavar="MIB", help="Largest blob. [default: any]")
    @click.option(
        "--max-sessions", type=_COUNT, default=1000, show_default=True, metavar="N",
        help="Unfinished uploads at a time.",
    )  # fmt: skip
    @click.option(
        "--keep-free", type=click.IntRange(min=0), default=0, metavar="MIB",
        help="Take and fetch nothing that leaves less than this free on the disk.",
    )  # fmt: skip
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        max_manifest: int,
        max_upload: int | None,
        max_sessions: int,
        keep_free: int,
        **arguments: Any,
    ) -> Any:
        from modelpack.registry_server.uploads import Limits

        upload = max_upload * _MIB if max_upload else None
        limits = Limits(max_manifest * 1024, upload, max_sessions, keep_free * _MIB)
        return command(*args, limits=limits, **arguments)

    return wrapped  # type: ignore[return-value]


@click.group()
def registry() -> None:
    """The embedded registry."""


@registry.command()
@click.option(
    "--addr", default="127.0.0.1:5000", show_default=True, metavar="HOST:PORT",
    help="Where to listen; port 0 takes a free one.",
)  # fmt: skip
@click.option("--host", metavar="HOST", help="The host of --addr alone, as for `modelpack serve`.")
@click.option("--port", type=click.IntRange(0, 65535), metavar="PORT", help="Its port alone.")
@click.option(
    "--root", type=click.Path(path_type=Path, file_okay=False),
    help="The store to serve. [default: the local store]",
)  # fmt: skip
@click.option("--read-only", is_flag=True, help="Refuse pushes and deletes.")
@click.option(
    "--allow-anonymous", "--allow-remote", "allow_anonymous", is_flag=True,
    help="Allow an address that others can reach, though nobody is asked who they are.",
)  # fmt: skip
@click.option(
    "--allow-host", "hosts", metavar="NAME", multiple=True,
    help="A host name that clients may use besides the address. May be repeated.",
)  # fmt: skip
@tls_options
@click.option(
    "--sparse", is_flag=True, help="Accept manifests whose blobs are missing, as some mirrors send."
)
@click.option(
    "--upstream", metavar="URL",
    help="Fetch from this registry what is not here, and keep it. Clients can only read.",
)  # fmt: skip
@click.option(
    "--upstream-ttl", type=click.FloatRange(min=0), default=60, show_default=True,
    metavar="SECONDS", help="Look a tag up there again after this time.",
)  # fmt: skip
@access_options
@limit_options
@common_options
def serve(
    settings: Settings,
    addr: str,
    host: str | None,
    port: int | None,
    root: Path | None,
    read_only: bool,
    allow_anonymous: bool,
    hosts: tuple[str, ...],
    tls: tuple[Path, Path] | None,
    sparse: bool,
    upstream: str | None,
    upstream_ttl: float,
    guard: Guard | None,
    limits: Limits,
) -> None:
    """Serve a store as an OCI registry until interrupted; print its address.

    A model pushed here can be used from the same store at once: HOST:PORT/team/m:v1 is team/m:v1.
    """
    from modelpack.registry_server import RegistryServer
    from modelpack.store.layout import LayoutStore

    store = LayoutStore(root) if root is not None else settings.store()
    server = RegistryServer(
        store,
        address=_address(addr, host, port),
        read_only=read_only,
        sparse=sparse,
        allow_remote=allow_anonymous,
        allowed_hosts=hosts,
        guard=guard,
        tls=tls,
        limits=limits,
        upstream=_upstream(upstream, upstream_ttl) if upstream else None,
    )
    note(settings, f"serving {store.root}; stop with Ctrl-C")
    if guard is not None and tls is None and not server.is_loopback:
        note(settings, "warning: passwords and tokens come over plain http; see --tls-cert")
    server.run(on_ready=lambda: click.echo(server.host))


def _address(addr: str, host: str | None, port: int | None) -> str:
    """Return `addr` with another host or port, where these are given."""
    its_host, _, its_port = addr.rpartition(":")
    if host is not None and ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"{host or its_host}:{its_port if port is None else port}"


def _upstream(url: str, ttl: float) -> Upstream:
    """Return the upstream at `URL`: a host, or https:// or http:// and a host."""
    from modelpack.registry import Registry, RetryPolicy, Timeouts
    from modelpack.registry_server.cache import Upstream

    scheme, separator, host = url.rpartition("://")
    host = host.rstrip("/")
    if not host or "/" in host or "@" in host or (separator and scheme not in ("http", "https")):
        raise UsageError(
            f"--upstream is {url!r}, expected HOST[:PORT], https://HOST or http://HOST",
            hint="log in there with `modelpack login`; the repositories are asked for by name",
        )
    plain_http = {"http": True, "https": False}.get(scheme)
    retry = RetryPolicy(tries=_UPSTREAM_TRIES, max_delay=2)
    timeouts = Timeouts(connect=5)
    return Upstream(Registry(host, plain_http=plain_http, retry=retry, timeouts=timeouts), ttl)
