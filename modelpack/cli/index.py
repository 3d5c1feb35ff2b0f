"""`modelpack index`: create and show indexes, one reference for several variants of a model."""

from __future__ import annotations

import click

from modelpack.artifacts.manifest import Index, parse_manifest_or_index
from modelpack.cli.help import group
from modelpack.cli.options import (
    BOTH,
    REMOTE,
    Settings,
    annotation_option,
    common_options,
    common_options_without,
    model_argument,
    remote_options,
    transfer_options,
)
from modelpack.cli.output import (
    full_reference,
    human_size,
    note,
    plural,
    show,
    shown_progress,
    table,
)
from modelpack.errors import UnsupportedError, UsageError
from modelpack.operations.index import NamedVariant, create_index
from modelpack.operations.remote import RemoteOptions, open_source
from modelpack.operations.variants import choose_variant, variants_of
from modelpack.storage import watching


@group()
def index() -> None:
    """Publish several variants of a model under one reference; each machine pulls the best one."""


@index.command()
@click.argument("reference")
@click.option(
    "--variant", "variants", metavar="NAME=REF", multiple=True, required=True,
    help="Add the model REF as the variant NAME. May be repeated.",
)  # fmt: skip
@click.option(
    "--platform", "platforms", metavar="NAME=OS/ARCH", multiple=True,
    help="Restrict a variant to a platform, like mlx=darwin/arm64. May be repeated.",
)  # fmt: skip
@annotation_option("index")
@click.option(
    "--push", is_flag=True, help="Create the index in the registry of REFERENCE, not in the store."
)
@remote_options
@transfer_options(*BOTH)
@common_options
def create(
    settings: Settings,
    reference: str,
    variants: tuple[str, ...],
    platforms: tuple[str, ...],
    annotations: dict[str, str],
    push: bool,
    remote: RemoteOptions,
) -> None:
    """Create the index REFERENCE of stored models; print its digest.

    `modelpack push` pushes the index. With --push, models may also be in registries and on the
    Hugging Face Hub: missing blobs are copied to the registry of REFERENCE, and nothing is stored.
    """
    where = full_reference(settings, reference)
    named = dict(_pair(text, "--variant", "NAME=REF") for text in variants)
    if len(named) < len(variants):
        raise UsageError("two --variant options have the same name")
    wanted = dict(_pair(text, "--platform", "NAME=OS/ARCH") for text in platforms)
    unknown = sorted(wanted.keys() - named.keys())
    if unknown:
        raise UsageError(f"--platform {unknown[0]}: no such --variant")
    with shown_progress(settings) as progress:
        made = create_index(
            where,
            [NamedVariant(name, model, wanted.get(name)) for name, model in named.items()],
            annotations=annotations,
            push=push,
            store=settings.store(),
            remote=remote,
            progress=progress,
        )
    note(settings, f"{'pushed' if push else 'created'} {where}: {plural(len(named), 'variant')}")
    value = {"reference": str(where), "digest": str(made.digest), "pushed": push}
    entries = [manifest.to_json() for manifest in made.index.manifests]
    show(settings, value | {"manifests": entries}, str(made.digest))


@index.command("show")
@model_argument()
@REMOTE
@remote_options
@common_options_without("progress")
def show_variants(settings: Settings, model: str, in_registry: bool, remote: RemoteOptions) -> None:
    """List the variants of MODEL; mark the one that this machine would pull."""
    if in_registry:
        with open_source(model, remote, watching(None)) as opened:
            descriptor, raw = opened.descriptor, opened.raw
    else:
        store = settings.existing_store()
        descriptor = store.resolve(model)
        raw = store.fetch_manifest(descriptor)
    document = parse_manifest_or_index(raw, model, media_type=descriptor.media_type)
    if not isinstance(document, Index):
        raise UnsupportedError(f"{model} is a single model, not an index of variants")
    chosen = None
    try:
        chosen = choose_variant(document, model).variant
    except UnsupportedError as error:
        note(settings, f"note: {error}")
    variants = variants_of(document)
    rows = [
        (
            variant.name,
            variant.format,
            variant.quantization,
            "" if variant.size is None else human_size(variant.size),
            variant.descriptor.platform or "any",
            variant.descriptor.digest.short,
            "chosen here" if variant is chosen or variant == chosen else "",
        )
        for variant in variants
    ]
    header = ("VARIANT", "FORMAT", "QUANTIZATION", "SIZE", "PLATFORM", "MODEL ID", "")
    value = {
        "digest": str(descriptor.digest),
        "chosen": chosen.name if chosen else None,
        "variants": [
            {
                "name": variant.name,
                "digest": str(variant.descriptor.digest),
                "format": variant.format,
                "quantization": variant.quantization,
                "size": variant.size,
                "platform": variant.descriptor.platform,
            }
            for variant in variants
        ],
    }
    show(settings, value, table(header, rows))


def _pair(text: str, option: str, shape: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise UsageError(f"{option} {text!r}: expected {shape}")
    return name, value
