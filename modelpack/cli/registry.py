"""`modelpack login`, `logout`, `catalog` and `registry serve`: use and run registries."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from modelpack.cli.help import command, group
from modelpack.cli.options import (
    Settings,
    common_options_without,
    remote_options,
    tls_options,
    transfer_options,
)
from modelpack.cli.output import note, plural, request_log, show
from modelpack.errors import UsageError
from modelpack.operations.remote import RemoteOptions

if TYPE_CHECKING:
    from modelpack.registry_server.auth import Guard
    from modelpack.registry_server.cache import Upstream
    from modelpack.registry_server.uploads import Limits

_DOCKER_HUB = "docker.io"


@command()
@click.argument("host", default=_DOCKER_HUB)
@click.option("-u", "--username", metavar="NAME", help="Log in as this user. [default: ask]")
@click.option("--password-stdin", is_flag=True, help="Read the password from stdin.")
@remote_options
@common_options_without("store", "progress")
def login(
    settings: Settings,
    host: str,
    username: str | None,
    password_stdin: bool,
    remote: RemoteOptions,
) -> None:
    """Log in to the registry HOST and store the credentials.

    Credentials are shared with Docker: they go to the credential helper that ~/.docker/config.json
    names or, without one, into that file in plain text. With the user name `<token>`, the password
    is an identity token. No option takes the password, since other users can see arguments.
    """
    from modelpack.registry.login import log_in, login_file

    if password_stdin and not username:
        raise UsageError("--password-stdin requires --username")
    if not username:
        if not sys.stdin.isatty():
            raise UsageError(
                "cannot ask for the user name: stdin is not a terminal",
                hint="pass --username NAME and --password-stdin",
            )
        username = click.prompt("Username", err=True)
    done = log_in(host, username, _password(password_stdin), login_file(), **_options(remote))
    if not done.checked:
        note(settings, f"{host} did not request credentials; they were stored without a check")
    if done.helper is None:
        note(
            settings,
            f"warning: the password is stored in plain text in {done.file}; set credsStore in that "
            "file to use a credential helper",
        )
    where = done.helper or done.file
    show(settings, {"host": host, "keptIn": where, "checked": done.checked}, f"logged in to {host}")


@command()
@click.argument("host", default=_DOCKER_HUB)
@common_options_without("store", "quiet", "progress")
def logout(settings: Settings, host: str) -> None:
    """Remove the credentials of the registry HOST."""
    from modelpack.registry.login import log_out, login_file

    found = log_out(host, login_file())
    text = f"logged out of {host}" if found else f"not logged in to {host}"
    show(settings, {"host": host, "found": found}, text)


def _password(from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.read().rstrip("\r\n")
    if not sys.stdin.isatty():
        raise UsageError(
            "cannot ask for the password: stdin is not a terminal", hint="use --password-stdin"
        )
    password: str = click.prompt("Password", hide_input=True, err=True)
    return password


def _options(remote: RemoteOptions) -> dict[str, Any]:
    from modelpack.registry import TlsOptions

    return {"plain_http": remote.plain_http, "tls": remote.tls or TlsOptions()}


@command()
@click.argument("name", metavar="REGISTRY[/NAMESPACE]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Write index.html and index.json to DIR. [default: print the list]",
)  # fmt: skip
@click.option("--title", default="", help="Set the title of the page.")
@click.option(
    "--repository", "repositories", metavar="NAME", multiple=True,
    help="List this repository, for registries without a catalog. May be repeated.",
)  # fmt: skip
@remote_options
@transfer_options("concurrency")
@common_options_without("store", "progress")
def catalog(
    settings: Settings,
    name: str,
    output: Path | None,
    title: str,
    repositories: tuple[str, ...],
    remote: RemoteOptions,
) -> None:
    """List the models of a registry or of a namespace, without fetching their files.

    The page is one self-contained file, with search, pull commands and model cards; the same models
    give the same bytes.
    """
    from modelpack.operations.catalog import as_json, write_catalog
    from modelpack.operations.catalog import catalog as list_catalog

    entries = list_catalog(name, repositories=repositories, remote=remote)
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
# Clients wait for the upstream and retry themselves, so few tries are enough.
_UPSTREAM_TRIES = 3


def access_options(command: F) -> F:
    """Add the options of authentication; the command gets them as `guard`."""

    @click.option(
        "--htpasswd", type=_FILE, metavar="FILE",
        help="Require a user and password of this file, made by `htpasswd -B`.",
    )  # fmt: skip
    @click.option(
        "--token-realm", metavar="URL", help="Require a bearer token of the token server at URL."
    )
    @click.option("--token-service", metavar="NAME", help="Require this audience of tokens.")
    @click.option("--token-issuer", metavar="NAME", help="Require this issuer of tokens.")
    @click.option(
        "--token-certificates", type=_FILE, metavar="FILE",
        help="Verify tokens with the certificates or public keys in FILE.",
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
                    "token authentication requires --token-realm, --token-service, --token-issuer "
                    "and --token-certificates, and cannot be combined with --htpasswd"
                )
            guard = BearerTokens(
                TokenSettings(token_realm, token_service, token_issuer, token_certificates)
            )
        elif htpasswd:
            guard = Passwords(PasswordFile(htpasswd))
        return command(*args, guard=guard, **arguments)

    return wrapped  # type: ignore[return-value]


def limit_options(command: F) -> F:
    """Add the options that limit clients; the command gets them as `limits`."""

    @click.option(
        "--max-manifest", type=click.IntRange(1, 4096), default=4096, show_default=True,
        metavar="KIB", help="Limit the size of a manifest.",
    )  # fmt: skip
    @click.option(
        "--max-upload", type=_COUNT, metavar="MIB",
        help="Limit the size of a blob. [default: unlimited]",
    )  # fmt: skip
    @click.option(
        "--max-sessions", type=_COUNT, default=1000, show_default=True, metavar="N",
        help="Limit the number of unfinished uploads.",
    )  # fmt: skip
    @click.option(
        "--keep-free", type=click.IntRange(min=0), default=0, metavar="MIB",
        help="Refuse uploads and fetches that leave less than this free on the disk.",
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


@group()
def registry() -> None:
    """Run the embedded registry."""


@registry.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Listen on this address.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=5000, show_default=True,
    help="Listen on this port; 0 selects a free port.",
)  # fmt: skip
@click.option("--addr", metavar="HOST:PORT", hidden=True)  # --host and --port in one
@click.option(
    "--root", type=click.Path(path_type=Path, file_okay=False, readable=False), hidden=True
)  # --store
@click.option("--read-only", is_flag=True, help="Refuse pushes and deletions.")
@click.option(
    "--allow-anonymous", "--allow-remote", "allow_anonymous", is_flag=True,
    help="Allow an address that is not loopback without authentication.",
)  # fmt: skip
@click.option(
    "--allow-host", "hosts", metavar="NAME", multiple=True,
    help="Accept this host name besides the address. May be repeated.",
)  # fmt: skip
@tls_options
@click.option(
    "--sparse",
    is_flag=True,
    help="Accept manifests whose blobs are missing, as some mirrors push them.",
)
@click.option(
    "--upstream", metavar="URL",
    help="Act as a read-only pull-through cache of this registry.",
)  # fmt: skip
@click.option(
    "--upstream-ttl", type=click.FloatRange(min=0), default=60, show_default=True,
    metavar="SECONDS", help="Resolve a cached tag again after this time.",
)  # fmt: skip
@click.option(
    "--log-format", type=click.Choice(["text", "json"]),
    help="Format of the access log on stderr. [default: text on a terminal, otherwise json]",
)  # fmt: skip
@click.option("--no-access-log", is_flag=True, help="Do not log requests.")
@access_options
@limit_options
@common_options_without("json", "progress")
def serve(
    settings: Settings,
    host: str,
    port: int,
    addr: str | None,
    root: Path | None,
    read_only: bool,
    allow_anonymous: bool,
    hosts: tuple[str, ...],
    tls: tuple[Path, Path] | None,
    sparse: bool,
    upstream: str | None,
    upstream_ttl: float,
    log_format: str | None,
    no_access_log: bool,
    guard: Guard | None,
    limits: Limits,
) -> None:
    """Serve a store as an OCI registry until interrupted; print its address.

    Pushed models are available in the same store: HOST:PORT/team/m:v1 is team/m:v1.
    """
    from modelpack.registry_server import RegistryServer
    from modelpack.registry_server.metrics import access_log
    from modelpack.store.layout import LayoutStore

    store = LayoutStore(root) if root is not None else settings.store()
    as_json = log_format == "json" if log_format else not sys.stderr.isatty()
    server = RegistryServer(
        store,
        address=addr or _address(host, port),
        read_only=read_only,
        sparse=sparse,
        allow_remote=allow_anonymous,
        allowed_hosts=hosts,
        guard=guard,
        tls=tls,
        limits=limits,
        upstream=_upstream(upstream, upstream_ttl) if upstream else None,
        on_request=None if no_access_log else access_log(as_json=as_json),
    )

    def announce() -> None:
        click.echo(server.host)
        note(settings, f"serving {store.root}; stop with Ctrl-C")
        if guard is not None and tls is None and not server.is_loopback:
            note(settings, "warning: passwords and tokens are sent over plain http; use --tls-cert")

    with request_log(settings):
        server.run(on_ready=announce)


def _address(host: str, port: int) -> str:
    is_bare_ipv6 = ":" in host and not host.startswith("[")
    return f"[{host}]:{port}" if is_bare_ipv6 else f"{host}:{port}"


def _upstream(url: str, ttl: float) -> Upstream:
    """Return the upstream at `url`: HOST[:PORT], https://HOST or http://HOST."""
    from modelpack.registry import Registry, RetryPolicy, Timeouts
    from modelpack.registry_server.cache import Upstream

    scheme, separator, host = url.rpartition("://")
    host = host.rstrip("/")
    if not host or "/" in host or "@" in host or (separator and scheme not in ("http", "https")):
        shown = url.rpartition("@")[2]  # without a password
        raise UsageError(
            f"--upstream {shown!r}: expected HOST[:PORT], https://HOST or http://HOST",
            hint="leave out paths and credentials; use `modelpack login` to log in",
        )
    plain_http = {"http": True, "https": False}.get(scheme)
    retry = RetryPolicy(tries=_UPSTREAM_TRIES, max_delay=2)
    timeouts = Timeouts(connect=5)
    return Upstream(Registry(host, plain_http=plain_http, retry=retry, timeouts=timeouts), ttl)
