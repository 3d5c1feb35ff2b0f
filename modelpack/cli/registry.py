"""`modelpack registry serve`: the embedded registry."""

from __future__ import annotations

from pathlib import Path

import click

from modelpack.cli.options import Settings, common_options
from modelpack.cli.output import note


@click.group()
def registry() -> None:
    """The embedded registry."""


@registry.command()
@click.option(
    "--addr",
    default="127.0.0.1:5000",
    show_default=True,
    metavar="HOST:PORT",
    help="Where to listen; port 0 takes a free one.",
)
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    help="The store to serve. [default: the local store]",
)
@click.option("--read-only", is_flag=True, help="Refuse pushes and deletes.")
@click.option("--allow-remote", is_flag=True, help="Allow an address that others can reach.")
@click.option(
    "--allow-host",
    "hosts",
    metavar="NAME",
    multiple=True,
    help="A host name that clients may use besides the address. May be repeated.",
)
@click.option(
    "--sparse", is_flag=True, help="Accept manifests whose blobs are missing, as some mirrors send."
)
@common_options
def serve(
    settings: Settings,
    addr: str,
    root: Path | None,
    read_only: bool,
    allow_remote: bool,
    hosts: tuple[str, ...],
    sparse: bool,
) -> None:
    """Serve a store as an OCI registry until interrupted; print its address.

    A model pushed here can be used from the same store at once: HOST:PORT/team/m:v1 is team/m:v1.
    """
    from modelpack.server import RegistryServer
    from modelpack.stores.layout import LayoutStore

    store = LayoutStore(root) if root is not None else settings.store()
    server = RegistryServer(
        store,
        address=addr,
        read_only=read_only,
        sparse=sparse,
        allow_remote=allow_remote,
        allowed_hosts=hosts,
    )
    note(settings, f"serving {store.root}; stop with Ctrl-C")
    server.run(on_ready=lambda: click.echo(server.host))
