"""`modelpack sbom`: what a model is made of."""

from __future__ import annotations

from pathlib import Path

import click

from modelpack.cli.options import Settings, common_options, model_argument, remote_options
from modelpack.cli.output import note, show
from modelpack.operations.remote import RemoteOptions


@click.command()
@model_argument("model")
@click.option("--attach", is_flag=True, help="And attach it to the model, where that is.")
@click.option("-r", "--remote", "from_registry", is_flag=True, help="Of its registry.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write it there. [default: print it, unless it is attached]",
)  # fmt: skip
@remote_options
@common_options
def sbom(
    settings: Settings,
    model: str,
    attach: bool,
    from_registry: bool,
    output: Path | None,
    remote: RemoteOptions,
) -> None:
    """Write the bill of materials of MODEL as CycloneDX 1.6: files, digests, licence, base models.

    The same model gives the same bytes. With --attach, prints the digest of what was attached.
    """
    from modelpack.operations import sbom as boms

    done = boms.sbom(
        model,
        attach=attach,
        store=None if from_registry else settings.store(),
        remote=remote,
        from_registry=from_registry,
    )
    if output is not None:
        output.write_bytes(done.document)
    if done.attached is not None:
        note(settings, f"attached to {done.reference or done.digest}")
        value = {"subject": str(done.digest), "digest": str(done.attached)}
        show(settings, value, str(done.attached))
    elif output is None:
        click.echo(done.document.decode(), nl=False)
