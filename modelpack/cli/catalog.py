"""`modelpack catalog`: the models of a registry, as a page."""

from __future__ import annotations

from pathlib import Path

import click

from modelpack.cli.options import Settings, common_options, remote_options
from modelpack.cli.output import note, plural, show
from modelpack.operations.remote import RemoteOptions


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
    from modelpack.operations.catalog_page import as_json, write_catalog

    entries = catalogs.catalog(name, repositories=repositories, remote=remote)
    note(settings, f"{name}: {plural(len(entries), 'tag')}")
    if output is None:
        show(settings, as_json(entries, name), "\n".join(str(one.reference) for one in entries))
        return
    page, listed = write_catalog(entries, output, name=name, title=title)
    value = {"page": str(page), "list": str(listed), "count": len(entries)}
    show(settings, value, str(page))
