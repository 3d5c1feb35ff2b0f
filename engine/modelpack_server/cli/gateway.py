"""`modelpack gateway`: keys, limits and failover before servers; options that `serve` shares."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from modelpack.cli.options import Settings, common_options
from modelpack.cli.output import note, show
from modelpack.cli.server_options import request_log, tls_options
from modelpack.errors import UsageError

if TYPE_CHECKING:
    from modelpack_server.gateway.protection import Protection

F = TypeVar("F", bound=Callable[..., Any])

_MIB = 1024 * 1024
_KEY_FILE = click.option(
    "--keys",
    "key_file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="MODELPACK_KEYS",
    metavar="FILE",
    help="The API keys to ask for, a TOML file; read again when it changes. [env: MODELPACK_KEYS]",
)


def protection_options(command: F) -> F:
    """Add the options that protect a server.

    The command gets them as `protection`, a function of the host that makes a `Protection`; it
    raises `UsageError` where others could reach the server and no key would be asked for.
    """

    @_KEY_FILE
    @click.option(
        "--allow-anonymous", "--allow-remote", "allow_anonymous", is_flag=True,
        help="Allow an address that others can reach, though there are no keys.",
    )  # fmt: skip
    @click.option(
        "--cors", "origins", metavar="ORIGIN", multiple=True,
        help="Web pages that may use the server: https://app.example, http://localhost:* or *. "
        "May be repeated. [default: only its own]",
    )  # fmt: skip
    @click.option(
        "--allow-host", "hosts", metavar="NAME", multiple=True,
        help="A host name that clients may use besides the address. May be repeated.",
    )  # fmt: skip
    @click.option(
        "--max-body", type=click.IntRange(min=1), default=64, show_default=True, metavar="MIB",
        help="Largest request in MiB; larger ones are answered 413. Models that are sent may be "
        "larger.",
    )  # fmt: skip
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        key_file: Path | None,
        allow_anonymous: bool,
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
            )

        return command(*args, protection=protection, **arguments)

    return wrapped  # type: ignore[return-value]


@click.group(invoke_without_command=True)
@click.option(
    "--upstream", "upstreams", metavar="URL", multiple=True,
    help="A server to hand requests to. May be repeated.",
)  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=12435, show_default=True,
    help="The port; 0 takes a free one.",
)  # fmt: skip
@click.option(
    "--balance", type=click.Choice(["least-busy", "round-robin"]), default="least-busy",
    show_default=True, help="Whose turn it is among upstreams that are well.",
)  # fmt: skip
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=600, show_default=True,
    help="Seconds that an upstream may take between two pieces of a reply.",
)  # fmt: skip
@protection_options
@tls_options
@common_options
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
) -> None:
    """Put API keys, limits, traces and failover before servers; print the address.

    MODELPACK_UPSTREAM_KEY is sent to the upstreams as their API key.
    """
    if ctx.invoked_subcommand is not None:
        return
    _require_httpx()
    from modelpack_server.gateway.app import GatewayServer, GatewaySettings

    with request_log(settings):
        server = GatewayServer(
            GatewaySettings(
                upstreams=upstreams,
                protection=protection(host),
                policy=balance,
                timeout=timeout,
                upstream_key=os.environ.get("MODELPACK_UPSTREAM_KEY") or None,
            ),
            port,
            tls=tls,
        )
        note(settings, f"handing requests to {', '.join(upstreams)}; stop with Ctrl-C")
        server.run(lambda: click.echo(server.url))


@gateway.command()
@click.argument("name")
@_KEY_FILE
@click.option("--requests-per-minute", type=click.IntRange(min=1), metavar="N")
@click.option("--tokens-per-minute", type=click.IntRange(min=1), metavar="N")
@click.option("--concurrency", type=click.IntRange(min=1), metavar="N", help="Requests at a time.")
@click.option(
    "--model", "models", metavar="GLOB", multiple=True,
    help="Models that the key may use, and no management. May be repeated. [default: everything]",
)  # fmt: skip
@click.option(
    "--gateway", "for_gateway", is_flag=True,
    help="The key is a gateway's (MODELPACK_UPSTREAM_KEY), which names the callers it serves.",
)  # fmt: skip
@common_options
def key(
    settings: Settings,
    name: str,
    key_file: Path | None,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    concurrency: int | None,
    models: tuple[str, ...],
    for_gateway: bool,
) -> None:
    """Make an API key called NAME and print it, this once: the file gets its SHA-256 only."""
    from modelpack_server.gateway.keys import add_key
    from modelpack_server.gateway.limits import Limits

    if models and for_gateway:
        raise UsageError(
            "--gateway cannot be combined with --model", hint="give models to the gateway's keys"
        )
    if key_file is None:
        from platformdirs import user_config_path

        key_file = user_config_path("modelpack") / "keys.toml"
    limits = Limits(requests_per_minute, tokens_per_minute, concurrency)
    secret = add_key(key_file, name, limits=limits, models=models, gateway=for_gateway)
    show(settings, {"name": name, "key": secret, "file": str(key_file)}, secret)
    note(settings, f"added to {key_file}; it is not shown again. Serve with --keys {key_file}")


def _require_httpx() -> None:
    import importlib.util

    if importlib.util.find_spec("httpx") is None:
        raise UsageError(
            "a gateway needs httpx, which is not installed",
            hint="pip install 'modelpack[gateway]'",
        )
