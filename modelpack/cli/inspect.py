"""Commands that read stored or remote models: inspect, manifest, config, resolve, bundle."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelpack.artifacts import media_types as mediatypes
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.model import Model
from modelpack.artifacts.reference import Reference
from modelpack.bundles.links import LinkMode
from modelpack.cli.help import command
from modelpack.cli.options import (
    DOWNLOAD,
    REMOTE,
    Settings,
    common_options,
    common_options_without,
    model_argument,
    remote_options,
    transfer_options,
    trust_options,
    variant_option,
)
from modelpack.cli.output import (
    full_reference,
    human_size,
    note,
    one_line,
    plural,
    show,
    show_json,
    shown_progress,
    table,
)
from modelpack.errors import NotFoundError, UnsupportedError, UsageError
from modelpack.formats.gguf import MetadataArray
from modelpack.operations import lookup
from modelpack.operations.provenance import Recorded, read_provenance, recorded_provenance
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.resolve import bundle as bundle_model
from modelpack.operations.resolve import resolve as resolve_files
from modelpack.storage import read_blob

if TYPE_CHECKING:
    from modelpack.operations.headers import FileHeader

#: Names of capabilities in CNCF's config, and for people.
_ABILITIES = {"toolUsage": "tools", "reasoning": "reasoning", "reward": "reward"}


def model_json(
    model: Model,
    missing: Collection[Digest] = (),
    names: Sequence[Reference] = (),
    capabilities: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the JSON value of `inspect`; `missing` are the layers that the store lacks.

    `names` are all names of a stored model.
    """
    config = model.config
    return {
        "reference": str(model.reference) if model.reference else None,
        "references": [str(name) for name in names or (model.reference,) if name],
        "digest": str(model.digest),
        "mediaType": model.manifest.media_type,
        "artifactType": model.manifest.artifact_type,
        "annotations": dict(model.manifest.annotations),
        "size": model.manifest.total_size,
        "config": {
            "mediaType": config.media_type,
            "format": config.format,
            "quantization": config.quantization,
            "parameters": config.parameters,
            "architecture": config.architecture,
            "size": config.size,
            "contextSize": config.context_size,
            "precision": config.cncf_config.get("precision"),
            "capabilities": capabilities or None,
            "licences": config.cncf_descriptor.get("licenses"),
            "authors": config.cncf_descriptor.get("authors"),
            "datasets": config.cncf_descriptor.get("datasetsURL"),
            "created": config.created,
            "gguf": dict(config.gguf) if config.gguf else None,
            "safetensors": dict(config.safetensors) if config.safetensors else None,
        },
        "files": [
            {
                "file": file.filepath,
                "role": str(file.role),
                "mediaType": file.media_type,
                "size": file.descriptor.size,
                "digest": str(file.descriptor.digest),
                **({"missing": True} if file.descriptor.digest in missing else {}),
            }
            for file in model.files()
        ],
    }


def model_text(
    model: Model,
    missing: Collection[Digest] = (),
    names: Sequence[Reference] = (),
    recorded: Sequence[Recorded] = (),
    capabilities: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of `inspect`, with `names` for a model that was given by its id.

    `missing` are the layers that the store lacks, `recorded` the attached provenance.
    """
    config = model.config
    kinds = {mediatypes.CNCF_CONFIG: "CNCF ModelPack", mediatypes.CNAI_CONFIG: "CNAI model",
             mediatypes.KITOPS_CONFIG: "KitOps ModelKit",
             mediatypes.DOCKER_IMAGE_CONFIG: "Ollama"}  # fmt: skip
    kind = kinds.get(config.media_type) or f"Docker {config.media_type[-9:-5]}"
    context = str(config.context_size) if config.context_size is not None else ""
    lines = [
        ("Model", str(model.reference or ", ".join(map(str, names)) or model.short_id)),
        ("Digest", str(model.digest)),
        ("Type", kind),
        ("Created", config.created or ""),
        ("Format", config.format),
        ("Architecture", config.architecture),
        ("Parameters", config.parameters),
        ("Quantization", config.quantization),
        ("Context size", context),
        ("Precision", str(config.cncf_config.get("precision") or "")),
        ("Capabilities", _capabilities(capabilities or {})),
        ("Licences", ", ".join(config.cncf_descriptor.get("licenses") or ())),
        ("Authors", ", ".join(config.cncf_descriptor.get("authors") or ())),
        ("Size", human_size(model.manifest.total_size)),
        *(_base_lines(model) if model.is_adapter or model.is_drafter else ()),
        *(("Provenance", _provenance_line(one)) for one in recorded),
    ]
    text = [f"{label + ':':<14}{value}" for label, value in lines if value]
    text.append("Files:")
    for file in model.files():
        size = human_size(file.descriptor.size)
        line = f"  {file.role!s:<14}{size:>10}  {file.filepath or file.descriptor.digest}"
        text.append(line + ("  (missing)" if file.descriptor.digest in missing else ""))
    return "\n".join(map(one_line, text))


def _capabilities(found: Mapping[str, Any]) -> str:
    """Return CNCF's capabilities as a text: `text and image to text, tools, reasoning`."""
    ends = [" and ".join(found.get(name) or ()) for name in ("inputTypes", "outputTypes")]
    parts = [" to ".join(end for end in ends if end)]
    parts += [text for name, text in _ABILITIES.items() if found.get(name)]
    return ", ".join(part for part in parts if part)


def _provenance_line(recorded: Recorded) -> str:
    signed = "signed" if recorded.is_signed else "no signature"
    return f"{recorded.provenance} ({signed}, not verified)"


def provenance_json(recorded: Recorded) -> dict[str, Any]:
    """Return the JSON value of an attached provenance."""
    return {
        "referrer": str(recorded.referrer.digest),
        "signed": recorded.is_signed,
        "builder": recorded.provenance.builder,
        "sources": list(recorded.provenance.sources),
        "predicate": dict(recorded.predicate),
    }


def _base_lines(model: Model) -> list[tuple[str, str]]:
    """Return what an adapter or drafter is, and its base."""
    found = model.manifest.annotations
    return [
        ("Drafter", found.get(mediatypes.DRAFTER_KIND, "eagle3") if model.is_drafter else ""),
        ("Adapter", found.get(mediatypes.ADAPTER_KIND, "")),
        ("Rank", found.get(mediatypes.ADAPTER_RANK, "")),
        ("Targets", found.get(mediatypes.ADAPTER_TARGETS, "")),
        ("Base", found.get(mediatypes.BASE_NAME, "")),
        ("Base digest", found.get(mediatypes.BASE_DIGEST, "")),
    ]


def show_image(settings: Settings, image: lookup.StoredImage) -> None:
    """Print what `inspect` shows of a stored image."""
    model = image.index.annotations.get(mediatypes.MODEL)
    value = {
        "references": [str(reference) for reference in image.references],
        "digest": str(image.descriptor.digest),
        "mediaType": image.index.media_type,
        "annotations": dict(image.index.annotations),
        "size": image.size,
        "model": model,
        "manifests": [
            {"platform": one.platform, "digest": str(one.digest), "mediaType": one.media_type}
            for one in image.index.manifests
        ],
    }
    lines = [
        ("Image", ", ".join(map(str, image.references)) or image.descriptor.digest.short),
        ("Digest", str(image.descriptor.digest)),
        ("Type", "container image"),
        ("Model", model or ""),
        ("Size", human_size(image.size)),
    ]
    text = [f"{label + ':':<14}{text}" for label, text in lines if text]
    text.append("Manifests:")
    text += [f"  {one.platform or '':<14}{one.digest}" for one in image.index.manifests]
    show(settings, value, "\n".join(map(one_line, text)))


_MAX_VALUE = 120


def show_headers(settings: Settings, name: str, in_registry: bool, remote: RemoteOptions) -> None:
    """Print the headers of a model's weight files."""
    from modelpack.operations.headers import read_headers

    if in_registry:
        full_reference(settings, name)
        found = read_headers(name, remote=remote, from_registry=True)
        cost = sum(one.bytes_fetched for one in found)
        asked = plural(sum(one.requests for one in found), "request")
        note(settings, f"{asked}, {human_size(cost)}; not verified, which requires the whole files")
    else:
        found = read_headers(name, store=settings.existing_store())
    show(
        settings, {"headers": [_headers_json(one) for one in found]}, "\n\n".join(map(_text, found))
    )


def show_document(
    settings: Settings, name: str, kind: str, in_registry: bool, remote: RemoteOptions
) -> None:
    """Print a text of a model; `kind` is the name of a `Document`."""
    from modelpack.operations.documents import Document, read_document

    if in_registry:
        full_reference(settings, name)
    store = None if in_registry else settings.existing_store()
    found = read_document(
        name, Document[kind], store=store, remote=remote, from_registry=in_registry
    )
    value = {"texts": [{"file": path or None, "text": text} for path, text in found.items()]}
    show(settings, value, "\n\n".join(text.rstrip("\n") for text in found.values()))


def show_provenance(
    settings: Settings, name: str, in_registry: bool, remote: RemoteOptions
) -> None:
    """Print the attached provenance of a model."""
    store = None if in_registry else settings.existing_store()
    where = full_reference(settings, name) if in_registry else name
    found = read_provenance(where, store=store, remote=remote)
    if not found:
        raise NotFoundError(f"{name}: the model has no provenance attached")
    texts = [json.dumps(one.predicate, indent=2, ensure_ascii=False) for one in found]
    show(settings, {"provenance": [provenance_json(one) for one in found]}, "\n".join(texts))


def show_files(settings: Settings, model: Model, missing: Collection[Digest]) -> None:
    """Print the files of a model; `missing` are the layers that the store lacks."""
    rows = [
        (
            file.filepath or "",
            str(file.role),
            human_size(file.descriptor.size),
            str(file.descriptor.digest),
            "missing" if file.descriptor.digest in missing else "",
        )
        for file in model.files()
    ]
    value = {"digest": str(model.digest), "files": model_json(model, missing)["files"]}
    show(settings, value, table(("FILE", "ROLE", "SIZE", "DIGEST", ""), rows))


def _headers_json(read: FileHeader) -> dict[str, Any]:
    value: dict[str, Any] = {
        "file": read.file.filepath,
        "format": read.file.format,
        "digest": str(read.file.descriptor.digest),
        "size": read.header.file_size,
        "dataOffset": read.header.data_offset,
        "metadata": {key: _plain(held) for key, held in _metadata(read)},
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "offset": tensor.offset,
                "size": tensor.size,
            }
            for tensor in read.header.tensors
        ],
    }
    if read.requests:
        value |= {"bytesFetched": read.bytes_fetched, "requests": read.requests}
    return value


def _text(read: FileHeader) -> str:
    header = read.header
    name = read.file.filepath or read.file.descriptor.digest
    lines = [
        f"{name}: {read.file.format}, {human_size(header.file_size)}, "
        f"{plural(len(header.tensors), 'tensor')}"
    ]
    for key, held in _metadata(read):
        shown = one_line(str(_plain(held)))
        lines.append(f"  {one_line(key)} = {shown[:_MAX_VALUE]}{'…' * (len(shown) > _MAX_VALUE)}")
    rows = [(t.name, t.dtype, " x ".join(map(str, t.shape))) for t in header.tensors]
    return "\n".join([*lines, table(("TENSOR", "TYPE", "SHAPE"), rows)])


def _metadata(read: FileHeader) -> Iterator[tuple[str, Any]]:
    for key, held in read.header.metadata.items():
        yield key, getattr(held, "value", held)


def _plain(value: Any) -> Any:
    """Return a value as JSON; for a long array, only its length and type, as the parser does."""
    if isinstance(value, MetadataArray):
        if value.items is None:
            return f"{value.length} x {value.element_type.name.lower()}"
        return [_plain(item) for item in value.items]
    if isinstance(value, str):
        return value.encode(errors="replace").decode(errors="replace")
    return value if isinstance(value, int | float | bool) else str(value)


PULL = click.option("--pull", is_flag=True, help="Pull missing files first.")


@command()
@model_argument()
@click.option(
    "--header",
    is_flag=True,
    help="Show the metadata and the tensors in the headers of weight files.",
)
@click.option("--template", is_flag=True, help="Print the chat template.")
@click.option("--license", is_flag=True, help="Print the licences.")
@click.option("--card", is_flag=True, help="Print the model card.")
@click.option("--files", is_flag=True, help="List only the files, with their digests.")
@click.option(
    "--provenance", is_flag=True, help="Print the attached provenance, without verifying it."
)
@REMOTE
@remote_options
@variant_option
@common_options_without("progress")
def inspect(
    settings: Settings,
    model: str,
    header: bool,
    template: bool,
    license: bool,
    card: bool,
    files: bool,
    provenance: bool,
    in_registry: bool,
    remote: RemoteOptions,
) -> None:
    """Show the format, size, context length and files of a model, or the parts of an image.

    For a remote model, only the manifest, the config and the requested headers and texts are
    fetched.
    """
    if sum((header, template, license, card, files, provenance)) > 1:
        raise UsageError(
            "--header, --template, --license, --card, --files and --provenance exclude each other"
        )
    if provenance:
        show_provenance(settings, model, in_registry, remote)
        return
    if header:
        show_headers(settings, model, in_registry, remote)
        return
    if template or license or card:
        kind = "TEMPLATE" if template else "LICENSE" if license else "CARD"
        show_document(settings, model, kind, in_registry, remote)
        return
    try:
        found = _find(settings, model, in_registry, remote)
    except UnsupportedError:
        image = None if in_registry else lookup.stored_image(settings.existing_store(), model)
        if image is None:
            raise
        show_image(settings, image)
        return
    from modelpack.operations.capabilities import capabilities_of

    missing: set[Digest] = set()
    source = None if in_registry else settings.existing_store()
    names: tuple[Reference, ...] = ()
    recorded: tuple[Recorded, ...] = ()
    if source is not None:
        missing = {blob.digest for blob in source.missing(found.descriptor)}
        recorded = recorded_provenance(source, found.digest)
        with suppress(NotFoundError):  # a variant without a name; its index has one
            names = source.get(str(found.digest)).references
    if files:
        show_files(settings, found, missing)
    elif settings.json:
        value = model_json(found, missing, names, capabilities_of(found, source))
        show_json(value | {"provenance": [provenance_json(one) for one in recorded]})
    else:
        shown = capabilities_of(found, source)
        click.echo(model_text(found, missing, names, recorded, shown))


@command()
@model_argument()
@REMOTE
@remote_options
@variant_option
@common_options_without("json", "progress")
def manifest(settings: Settings, model: str, in_registry: bool, remote: RemoteOptions) -> None:
    """Print the exact bytes of the manifest."""
    _write(_find(settings, model, in_registry, remote).manifest.raw)


@command()
@model_argument()
@REMOTE
@remote_options
@common_options_without("json", "progress")
def config(settings: Settings, model: str, in_registry: bool, remote: RemoteOptions) -> None:
    """Print the exact bytes of the config blob."""
    if in_registry:
        where = full_reference(settings, model)
        _write(lookup.remote_config(where, remote))
    else:
        store = settings.existing_store()
        found = lookup.stored_model(store, model)
        _write(read_blob(store, found.manifest.config))


@command()
@model_argument()
@click.option(
    "--media-type", "media_types", metavar="T", multiple=True,
    help="Print files of this type: a media type, a pattern, or one of weight, gguf, safetensors, "
    "dduf, mmproj, license, chat-template, config. May be repeated. [default: weight]",
)  # fmt: skip
@click.option(
    "--file", "files", metavar="PATH", multiple=True,
    help="Print the file of this path in the model. May be repeated.",
)  # fmt: skip
@PULL
@remote_options
@transfer_options(*DOWNLOAD)
@trust_options
@variant_option
@common_options
def resolve(
    settings: Settings,
    model: str,
    media_types: tuple[str, ...],
    files: tuple[str, ...],
    pull: bool,
    remote: RemoteOptions,
) -> None:
    """Print the paths of a model's files in the store, one per line.

    With --pull, only the files that --media-type or --file select are fetched.
    """
    with shown_progress(settings) as progress:
        found = resolve_files(
            model,
            media_types=media_types,
            files=files,
            pull=pull,
            store=settings.store() if pull else settings.existing_store(),
            remote=remote,
            progress=progress,
        )
    value = {
        "digest": str(found.model.digest),
        "files": [
            {
                "path": str(item.path),
                "mediaType": item.file.media_type,
                "role": str(item.file.role),
                "file": item.file.filepath,
                "digest": str(item.file.descriptor.digest),
                "size": item.file.descriptor.size,
            }
            for item in found.files
        ],
    }
    show(settings, value, "\n".join(str(item.path) for item in found.files))


@command()
@model_argument()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--links", type=click.Choice([str(mode) for mode in LinkMode]), default=str(LinkMode.AUTO),
    show_default=True,
    help="Place files as links or copies; auto makes hard links if possible, else copies.",
)  # fmt: skip
@click.option("-f", "--force", is_flag=True, help="Replace the contents of DIRECTORY.")
@PULL
@remote_options
@transfer_options(*DOWNLOAD)
@trust_options
@variant_option
@common_options
def bundle(
    settings: Settings,
    model: str,
    directory: Path,
    links: str,
    force: bool,
    pull: bool,
    remote: RemoteOptions,
) -> None:
    """Write the files of a model to DIRECTORY for a runtime; print the path of its weights."""
    with shown_progress(settings) as progress:
        made = bundle_model(
            model,
            directory,
            links=LinkMode(links),
            overwrite=force,
            pull=pull,
            store=settings.store() if pull else settings.existing_store(),
            remote=remote,
            progress=progress,
        )
    value = {
        "directory": str(made.directory),
        "weight": str(made.weight),
        "chatTemplate": str(made.chat_template) if made.chat_template else None,
        "mmproj": str(made.mmproj) if made.mmproj else None,
        "config": str(made.config),
        "files": [
            {"path": str(file.path), "role": str(file.role), "how": str(file.linked)}
            for file in made.files
        ],
    }
    note(settings, f"wrote {plural(len(made.files), 'file')} to {made.directory}")
    show(settings, value, str(made.weight))


def _find(settings: Settings, name: str, in_registry: bool, remote: RemoteOptions) -> Model:
    if in_registry:
        full_reference(settings, name)
        return lookup.inspect(name, remote=remote, from_registry=True)
    return lookup.inspect(name, store=settings.existing_store())


def _write(content: bytes) -> None:
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()
