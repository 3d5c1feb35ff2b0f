"""`modelpack search`: find models in the store, in registries and on the Hugging Face Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from modelpack.cli.help import command
from modelpack.cli.options import Settings, common_options_without, remote_options
from modelpack.cli.output import human_size, one_line, show_json, table
from modelpack.operations.remote import RemoteOptions

if TYPE_CHECKING:
    from modelpack.operations.search import Found

_HEADER = ("NAME", "WHERE", "SIZE", "DOWNLOADS", "LIKES", "LICENCE")


@command()
@click.argument("term", default="")
@click.option(
    "--registry", "registries", metavar="HOST[/NAMESPACE]", multiple=True,
    help="Search the repositories of this registry too; of Docker Hub, those of one namespace, "
    "like docker.io/ai. May be repeated.",
)  # fmt: skip
@click.option("--hub", is_flag=True, help="Search the Hugging Face Hub too.")
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=25, show_default=True, metavar="N",
    help="Show at most N models of each place.",
)  # fmt: skip
@remote_options
@common_options_without("progress")
def search(
    settings: Settings,
    term: str,
    registries: tuple[str, ...],
    hub: bool,
    limit: int,
    remote: RemoteOptions,
) -> None:
    """List the models with TERM in their names: of the store and, if asked, of other places.

    With --quiet, print only their names, which `pull` accepts. DOWNLOADS are those of the last 30
    days on the hub, and all pulls on Docker Hub, whose stars are LIKES. A registry names its
    repositories, without tags and sizes.
    """
    from modelpack.operations.search import search_hub, search_registry, search_store

    found = list(search_store(settings.existing_store(), term)[:limit])
    for registry in registries:
        found += search_registry(registry, term, remote)[:limit]
    if hub:
        found += search_hub(term, limit=limit, remote=remote)
    if settings.json:
        show_json({"models": [one.to_json() for one in found]})
    elif settings.quiet:
        for one in found:
            click.echo(one_line(one.name))
    else:
        click.echo(table(_HEADER, [_row(one) for one in found]))


def _row(one: Found) -> tuple[str, ...]:
    size = "" if one.size is None else human_size(one.size)
    counts = ("" if count is None else str(count) for count in (one.downloads, one.likes))
    return one.name, one.where, size, *counts, one_line(one.licence or "")
