"""`modelpack convert`."""

from __future__ import annotations

import click

from modelpack.cli.options import (
    Settings,
    common_options,
    model_argument,
    remote_options,
    trust_options,
)
from modelpack.cli.output import note, note_reference, show
from modelpack.cli.progress import shown_progress
from modelpack.errors import UsageError
from modelpack.operations import convert as converting
from modelpack.operations.image import PLATFORMS
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.sources import local_reference
from modelpack.reference import Reference


@click.command()
@model_argument()
@click.argument("target", required=False)
@click.option(
    "--to",
    type=click.Choice(converting.FORMS),
    required=True,
    help="Docker's model format, CNCF ModelPack, or an OCI image with the files under /models.",
)
@click.option(
    "--platform",
    "platforms",
    metavar="OS/ARCH",
    multiple=True,
    help=f"Of an image. May be repeated. [default: {' and '.join(PLATFORMS)}]",
)
@click.option("--push", is_flag=True, help="Push it; an image is then not stored here.")
@remote_options
@trust_options
@common_options
def convert(
    settings: Settings,
    model: str,
    target: str | None,
    to: converting.Form,
    platforms: tuple[str, ...],
    push: bool,
    remote: RemoteOptions,
) -> None:
    """Make MODEL one of another format, as TARGET; print its digest.

    Without TARGET, it is MODEL's own name with the format behind the tag: team/m:v1-image.
    """
    if platforms and to != "image":
        raise UsageError("--platform is for --to image")
    if target is None:
        local = local_reference(model).without_digest()
        where = local.with_tag(f"{local.tag}-{to}")
    else:
        where = Reference.parse(target)
        note_reference(settings, target, where)
    with shown_progress(settings) as progress:
        done = converting.convert(
            model,
            where,
            to=to,
            platforms=platforms or PLATFORMS,
            push=push,
            store=settings.store(),
            remote=remote,
            progress=progress,
        )
    for text in done.notes:
        note(settings, f"note: {text}")
    note(settings, f"{'pushed' if push else 'made'} {where}")
    value = {"reference": str(where), "digest": str(done.digest), "form": to, "pushed": push}
    show(settings, value, str(done.digest))
