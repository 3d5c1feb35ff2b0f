"""`modelpack gateway`: API keys, limits and failover for servers; options shared with `serve`."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import click

from modelpack.cli.help import Group, group
from modelpack.cli.options import (
    Settings,
    checked,
    common_options_without,
    stop_options,
    tls_options,
)
from modelpack.cli.output import SCHEMA_VERSION, note, show, table
from modelpack.errors import UsageError
from modelpack_server.cli.logs import LogFormat, log_format_option, serving_log

if TYPE_CHECKING:
    from modelpack_server.gateway.protection import Protection

F = TypeVar("F", bound=Callable[..., Any])

_MIB = 1024 * 1024
#: The default port of the gateway.
GATEWAY_PORT = 12435
_KEY_FILE = click.option(
    "--keys",
    "key_file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="MODELPACK_KEYS",
    metavar="FILE",
    help="Require an API key of this TOML file; it is reloaded on change. [env: MODELPACK_KEYS]",
)


def _check_origins(origins: tuple[str, ...]) -> None:
    from modelpack_server.gateway.protection import check_origins

    check_origins(origins)


def protection_options(command: F) -> F:
    """Add the options that protect a server.

    The command gets them as `protection`, a function of the host that makes a `Protection`; it
    raises `UsageError` if the server would be reachable from other machines without keys.
    """

    @_KEY_FILE
    @click.option(
        "--allow-anonymous", "--allow-remote", "allow_anonymous", is_flag=True,
        help="Allow an address that is not loopback without API keys.",
    )  # fmt: skip
    @click.option("--allow-remote-metrics", is_flag=True,
                  help="Without API keys, let other machines read /metrics.")  # fmt: skip
    @click.option(
        "--cors", "origins", metavar="ORIGIN", multiple=True, callback=checked(_check_origins),
        help="Allow web pages of this origin: https://app.example, http://localhost:* or *. "
        "May be repeated. [default: only its own page]",
    )  # fmt: skip
    @click.option(
        "--allow-host", "hosts", metavar="NAME", multiple=True,
        help="Accept this host name besides the address. May be repeated.",
    )  # fmt: skip
    @click.option(
        "--max-body", type=click.IntRange(min=1), default=64, show_default=True, metavar="MIB",
        help="Limit the size of requests in MiB, except uploaded models; larger requests get "
        "status 413.",
    )  # fmt: skip
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        key_file: Path | None,
        allow_anonymous: bool,
        allow_remote_metrics: bool,
        origins: tuple[str, ...],
        hosts: tuple[str, ...],
        max_body: int,
        **arguments: Any,
    ) -> Any:
        def protection(host: str) -> Protection:
            from modelpack_server.gateway import KeyFile, Protection
            from modelpack_server.gateway.protection import check_origins

            return Protection(
                host=host,
                keys=KeyFile(key_file) if key_file is not None else None,
                cors=check_origins(origins),
                allowed_hosts=hosts,
                max_body=max_body * _MIB,
                allow_anonymous=allow_anonymous,
                remote_metrics=allow_remote_metrics,
            )

        return command(*args, protection=protection, **arguments)

    return wrapped  # type: ignore[return-value]


@group(invoke_without_command=True)
@click.option(
    "--upstream", "upstreams", metavar="URL", multiple=True,
    help="Forward requests to this server; with dns+http://NAME:PORT, to each address of NAME. May "
    "be repeated.",
)  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="Listen on this address.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=GATEWAY_PORT, show_default=True,
    help="Listen on this port; 0 selects a free port.",
)  # fmt: skip
@click.option(
    "--balance", type=click.Choice(["least-busy", "prefix", "round-robin"]), default="least-busy",
    show_default=True,
    help="Choose the least busy healthy upstream, the one that has served a prompt with the same "
    "beginning, or each in turn.",
)  # fmt: skip
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=600, show_default=True,
    help="Wait at most this many seconds for the next chunk of a response.",
)  # fmt: skip
@protection_options
@tls_options
@stop_options
@log_format_option
@common_options_without("store", "progress")
@click.pass_context
def gateway(
    ctx: click.Context,
    settings: Settings,
    upstreams: tuple[str, ...],
    host: str,
    port: int,
    balance: Any,
    timeout: float,
    protection: Callable[[str], Protection],
    tls: tuple[Path, Path] | None,
    drain: int,
    grace: int,
    log_format: LogFormat | None,
) -> None:
    """Forward requests to servers: API keys, limits, traces, failover; print the address.

    MODELPACK_UPSTREAM_KEY is the API key for the upstreams.
    """
    if ctx.invoked_subcommand is not None:
        return
    _require_extra()
    from modelpack_server.gateway.app import GatewayServer, GatewaySettings
    from modelpack_server.gateway.forwarding import names_callers

    key = os.environ.get("MODELPACK_UPSTREAM_KEY") or None
    guard = protection(host)
    with serving_log(settings, log_format):
        chosen = GatewaySettings(upstreams, guard, balance, timeout, upstream_key=key)
        server = GatewayServer(chosen, port, tls=tls, drain=drain, grace=grace)
        shared = [url for url in upstreams if not names_callers(urlsplit(url).hostname or "", key)]
        if guard.keys is not None and shared:
            note(
                settings,
                f"all clients are one owner at {', '.join(shared)}: set MODELPACK_UPSTREAM_KEY to "
                "a key marked 'gateway = true' there to keep their stored responses apart",
            )
        text = f"forwarding requests to {', '.join(upstreams)}"
        server.run(lambda: announce(settings, server.url, text, upstreams=upstreams))


def announce(settings: Settings, url: str, text: str, **details: Sequence[str]) -> None:
    """Print the address of a server, with --json as one line with `details`, and a note."""
    if settings.json:
        found = {"schemaVersion": SCHEMA_VERSION, "url": url, **details, "pid": os.getpid()}
        click.echo(json.dumps(found))
    else:
        click.echo(url)
    note(settings, f"{text}; stop with Ctrl-C")


class _KeyGroup(Group):
    """`key NAME` is short for `key create NAME`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the subcommand if there is none."""
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["create", *args]
        return super().parse_args(ctx, args)


@gateway.group(cls=_KeyGroup, epilog="`gateway key NAME` is short for `gateway key create NAME`.")
def key() -> None:
    """Create, list and revoke the API keys in a file."""


@key.command()
@click.argument("name")
@_KEY_FILE
@click.option("--requests-per-minute", type=click.IntRange(min=1), metavar="N",
              help="Limit the requests per minute.")  # fmt: skip
@click.option("--tokens-per-minute", type=click.IntRange(min=1), metavar="N",
              help="Limit the tokens per minute.")  # fmt: skip
@click.option("--concurrency", type=click.IntRange(min=1), metavar="N",
              help="Limit the concurrent requests.")  # fmt: skip
@click.option(
    "--model", "models", metavar="GLOB", multiple=True,
    help="Restrict the key to these models, without management. May be repeated. [default: all]",
)  # fmt: skip
@click.option(
    "--gateway", "for_gateway", is_flag=True,
    help="Make a key for a gateway (MODELPACK_UPSTREAM_KEY), which may name its callers.",
)  # fmt: skip
@common_options_without("store", "progress")
def create(
    settings: Settings,
    name: str,
    key_file: Path | None,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    concurrency: int | None,
    models: tuple[str, ...],
    for_gateway: bool,
) -> None:
    """Create an API key called NAME and print it once: the file stores only its SHA-256."""
    from modelpack_server.gateway.keys import add_key
    from modelpack_server.gateway.limits import Limits

    if models and for_gateway:
        raise UsageError(
            "--gateway cannot be combined with --model",
            hint="restrict the keys of the gateway's callers instead",
        )
    key_file = _key_file(key_file)
    limits = Limits(requests_per_minute, tokens_per_minute, concurrency)
    secret = add_key(key_file, name, limits=limits, models=models, gateway=for_gateway)
    show(settings, {"name": name, "key": secret, "file": str(key_file)}, secret)
    note(settings, f"added to {key_file}; the key is not shown again. Serve with --keys {key_file}")


@key.command("list")
@_KEY_FILE
@common_options_without("store", "progress")
def list_keys(settings: Settings, key_file: Path | None) -> None:
    """List the names, limits and models of the API keys; the keys themselves are not stored."""
    from modelpack_server.gateway.keys import KeyFile

    path = _key_file(key_file)
    keys = KeyFile(path).current().keys
    found = [
        {"name": key.name, **asdict(key.limits),
         "per_caller": None if key.per_caller is None else asdict(key.per_caller),
         "models": key.models, "gateway": key.gateway}
        for key in keys
    ]  # fmt: skip
    if settings.quiet and not settings.json:
        click.echo("".join(f"{key.name}\n" for key in keys), nl=False)
        return
    header = ("NAME", "REQUESTS/MIN", "TOKENS/MIN", "CONCURRENCY", "MODELS", "GATEWAY")
    rows = [
        (key.name, *("-" if limit is None else str(limit) for limit in astuple(key.limits)),
         "all" if key.models is None else " ".join(key.models), "yes" if key.gateway else "")
        for key in keys
    ]  # fmt: skip
    show(settings, {"file": str(path), "keys": found}, table(header, rows))


@key.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@_KEY_FILE
@common_options_without("store", "progress")
def revoke(settings: Settings, names: tuple[str, ...], key_file: Path | None) -> None:
    """Remove API keys from the file; servers refuse them from the next request on."""
    from modelpack_server.gateway.keys import remove_key

    path = _key_file(key_file)
    for name in names:
        remove_key(path, name)
        note(settings, f"removed {name} from {path}")
    show(settings, {"file": str(path), "revoked": names}, "")


def _key_file(given: Path | None) -> Path:
    from platformdirs import user_config_path

    return given or user_config_path("modelpack") / "keys.toml"


def _require_extra() -> None:
    import importlib.util

    for module in ("httpx", "prometheus_client"):
        if importlib.util.find_spec(module) is None:
            raise UsageError(
                f"the gateway requires {module}, which is not installed",
                hint="run pip install 'modelpack[gateway]'",
            )
