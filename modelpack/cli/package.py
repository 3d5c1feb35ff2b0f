"""`modelpack package` and `convert`: create models from files or from other models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote
from stat import S_ISDIR
from tempfile import TemporaryDirectory
from typing import Any

import click

from modelpack.builder.files import unreadable
from modelpack.builder.request import PackageRequest
from modelpack.builder.times import created_time
from modelpack.cli.help import command
from modelpack.cli.options import (
    BOTH,
    Settings,
    annotation_option,
    checked,
    common_options,
    model_argument,
    model_names,
    remote_options,
    transfer_options,
    trust_options,
)
from modelpack.cli.output import full_reference, human_size, note, plural, show, shown_progress
from modelpack.cli.trust import private_key
from modelpack.errors import NotFoundError, UsageError
from modelpack.hub.objects import ObjectAddress
from modelpack.operations.adapters import package_adapter
from modelpack.operations.convert import FORMS, PLATFORMS, Form
from modelpack.operations.convert import convert as convert_model
from modelpack.operations.drafters import package_drafter
from modelpack.operations.package import Packaged
from modelpack.operations.package import package as package_model
from modelpack.operations.provenance import ProvenanceOptions
from modelpack.operations.remote import RemoteOptions, local_reference
from modelpack.plugins import load_function
from modelpack.progress import Action, Progress, ProgressCallback
from modelpack.store.layout import LayoutStore
from modelpack.trust.provenance import Resource


class _Path(click.Path):
    """A path of files to package.

    Packaging reports files that cannot be read, with the exit code of a denied permission.
    """

    def __init__(self) -> None:
        super().__init__(path_type=Path, readable=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; refuse an address of objects and "", which `Path` reads as "."."""
        if value == "":
            raise UsageError(
                "expected a path, got an empty text", hint="write . for this directory"
            )
        if ObjectAddress.parse(str(value)) is not None:
            raise UsageError(f"{value} is not a path", hint=f"give --from {value}")
        return super().convert(value, param, ctx)


PATH = _Path()
# Bits per weight by the value of --quantize.
_BITS = {"q4": 4, "q8": 8}
# The inputs with a model's weights.
_WEIGHTS = ("gguf", "safetensors_dir", "dduf")


@command()
@click.argument("paths", metavar="[PATH]", nargs=-1, type=PATH)
@click.argument("reference")
@click.option(
    "--gguf", type=PATH, help="Package this GGUF file; for a sharded one, give any shard."
)
@click.option(
    "--safetensors-dir", type=PATH, help="Package this directory with safetensors weights."
)
@click.option("--dduf", type=PATH, help="Package this DDUF file.")
@click.option(
    "--adapter", type=PATH,
    help="Package the LoRA adapter in this directory (PEFT, mlx-lm) or GGUF file; requires --base.",
)  # fmt: skip
@click.option(
    "--drafter", type=PATH,
    help="Package the drafter in this directory (EAGLE-3, Gemma 4's); requires --base.",
)  # fmt: skip
@click.option(
    "--base", metavar="REF", shell_complete=model_names,
    help="Name the stored or remote model that --adapter or --drafter is for.",
)  # fmt: skip
@click.option(
    "--from", "from_model", metavar="REF", shell_complete=model_names,
    help="Start from this stored or remote model, to add files or change its context size, or "
    "package the objects at s3://BUCKET/PREFIX, gs://…, az://… or another fsspec URL.",
)  # fmt: skip
@click.option(
    "-l", "--license", "licenses", type=PATH, multiple=True,
    help="Add a licence file. May be repeated.",
)  # fmt: skip
@click.option("--chat-template", type=PATH, help="Add a Jinja chat template.")
@click.option("--mmproj", type=PATH, help="Add a multimodal projector (GGUF).")
@click.option(
    "--context-size",
    type=click.IntRange(0, 2**31 - 1),
    metavar="N",
    help="Set the context size in tokens. [default: read from the weights]",
)
@click.option(
    "--format",
    type=click.Choice(["docker", "cncf"]),
    help="Use the media types of Docker or of CNCF ModelPack. [default: docker, or as in --from]",
)
@annotation_option("manifest")
@click.option(
    "--created",
    metavar="now|TIME",
    callback=checked(lambda text: created_time(text, {})),
    help="Set the creation time (RFC 3339). [default: SOURCE_DATE_EPOCH or 1970-01-01T00:00:00Z]",
)
@click.option("--preserve", is_flag=True, help="Keep file modes and times, as Docker does.")
@click.option(
    "--follow-symlinks", is_flag=True, help="Follow symbolic links that leave the directory."
)
@click.option("--allow-pickle", is_flag=True, help="Accept pickle weights, which can execute code.")
@click.option(
    "--quantize",
    type=click.Choice(list(_BITS)),
    help="Quantise --safetensors-dir to 4 or 8 bits per weight first, with mlx-lm.",
)
@click.option(
    "--provenance", is_flag=True,
    help="Attach how the model was packaged, as SLSA provenance: inputs, commit, parameters.",
)  # fmt: skip
@click.option("--key", metavar="KEY", help="Sign the provenance with this private key, as `sign`.")
@click.option(
    "--source", metavar="URI[@COMMIT]",
    help="Record this as the source of the files. [default: that of a git work tree or a snapshot "
    "of the Hub]",
)  # fmt: skip
@click.option("--link", is_flag=True, help="Hard-link files into the store instead of copying.")
@click.option("--dry-run", is_flag=True, help="Print what would be packaged; store nothing.")
@click.option("--push", is_flag=True, help="Push the model after storing it.")
@remote_options
@transfer_options(*BOTH)
@trust_options
@common_options
def package(
    settings: Settings,
    paths: tuple[Path, ...],
    reference: str,
    adapter: Path | None,
    drafter: Path | None,
    base: str | None,
    from_model: str | None,
    quantize: str | None,
    provenance: bool,
    key: str | None,
    source: str | None,
    link: bool,
    dry_run: bool,
    push: bool,
    remote: RemoteOptions,
    **inputs: Any,
) -> None:
    """Package files as the model REFERENCE in the local store; print its digest.

    PATH is a GGUF or DDUF file or a directory with weights, as for the options. The same files give
    the same digest on every machine.
    """
    if len(paths) > 1:
        raise UsageError(f"expected one PATH, got {' and '.join(map(str, paths))}")
    for path in paths:
        if not os.path.lexists(path) and os.path.exists(reference):
            words = f"{quote(reference)} {quote(str(path))}"
            raise NotFoundError(
                f"{path}: no such file or directory",
                hint=f"give the path first: modelpack package {words}",
            )
        _add_path(inputs, path)
    beside = adapter or drafter
    if beside is not None or base is not None:
        _check_extra(adapter, drafter, base, from_model, quantize, inputs)
    elif from_model is None and not any(inputs[name] for name in _WEIGHTS):
        hint = "give a PATH before REFERENCE, or --adapter, --drafter or --from"
        if os.path.exists(reference):  # Path's raises for a name that is too long
            hint = f"name the model too: modelpack package {quote(reference)} NAME"
        raise UsageError("no files to package", hint=hint)
    if push and dry_run:
        raise UsageError("--push cannot be combined with --dry-run")
    where = full_reference(settings, reference)
    record = _provenance(provenance, key, source, quantize, inputs, dry_run=dry_run)
    with ExitStack() as stack:
        progress = stack.enter_context(shown_progress(settings))
        if quantize is not None:
            directory = Path(stack.enter_context(TemporaryDirectory(prefix="modelpack-quantized-")))
            inputs["safetensors_dir"] = _quantized(settings, inputs, quantize, directory, progress)
        request = PackageRequest(**inputs)
        work = (
            partial(package_model, where, request, from_model=from_model)
            if beside is None or base is None
            else partial(
                package_adapter if adapter else package_drafter,
                where,
                beside,
                base,
                request=request,
            )
        )
        made = work(
            push=push,
            dry_run=dry_run,
            link=link,
            provenance=record,
            store=LayoutStore(settings.store_root, lazy=dry_run),
            remote=remote,
            progress=progress,
        )
    done = "would package" if dry_run else "packaged and pushed" if push else "packaged"
    size = human_size(made.manifest.total_size)
    layers = plural(len(made.manifest.layers), "layer")
    note(settings, f"{done} {where}: {layers}, {size}")
    if made.provenance is not None:
        how = "signed" if key is not None else "without a signature"
        note(settings, f"attached the provenance, {how}: {made.provenance}")
    if dry_run and not settings.json:
        for layer in made.manifest.layers:
            note(settings, f"  {layer.media_type}  {human_size(layer.size)}  {layer.filepath}")
    show(settings, _result(made), str(made.digest))


def _check_extra(
    adapter: Path | None,
    drafter: Path | None,
    base: str | None,
    from_model: str | None,
    quantize: str | None,
    inputs: dict[str, Any],
) -> None:
    """Raise `UsageError` for options that an adapter or a drafter cannot be packaged with."""
    option = "--drafter" if drafter else "--adapter"
    if base is None or not (adapter or drafter):
        raise UsageError(f"{option} and --base are required together")
    if adapter is not None and drafter is not None:
        raise UsageError("--adapter and --drafter are artifacts of their own: package one of them")
    others = ("chat_template", "mmproj", "context_size", *_WEIGHTS)
    if from_model or quantize or any(inputs[name] for name in others):
        raise UsageError(f"{option} cannot be combined with weights or files of a model")


def _add_path(inputs: dict[str, Any], path: Path) -> None:
    """Set the option of `package` that a path without an option is for."""
    is_directory = os.path.isdir(path)  # Path's raises for a name that is too long
    option = "safetensors_dir" if is_directory else "dduf" if path.suffix == ".dduf" else "gguf"
    if inputs[option] is not None:
        name = f"--{option.replace('_', '-')}"
        raise UsageError(
            f"expected one model, got {inputs[option]} and {path}",
            hint=f"give {name} or PATH, once",
        )
    inputs[option] = path


def _provenance(
    is_wanted: bool,
    key: str | None,
    source: str | None,
    quantize: str | None,
    inputs: dict[str, Any],
    *,
    dry_run: bool,
) -> ProvenanceOptions | None:
    """Return how to record the provenance; a quantisation before packaging is a part of it."""
    if not is_wanted:
        if key is not None or source is not None:
            raise UsageError("--key and --source require --provenance")
        return None
    if dry_run:
        raise UsageError("--provenance cannot be combined with --dry-run")
    signer = private_key(key) if key is not None else None
    options = ProvenanceOptions(signer, Resource.named(source) if source is not None else None)
    if quantize is None:
        return options
    tools = dict(_versions("mlx", "mlx-lm"))
    return replace(
        options, parameters={"quantize": quantize}, tools=tools, inputs=inputs["safetensors_dir"]
    )


def _versions(*names: str) -> Iterator[tuple[str, str]]:
    from importlib.metadata import PackageNotFoundError, version  # takes a tenth of the start

    for name in names:
        with suppress(PackageNotFoundError):  # reported by the quantisation itself
            yield name, version(name)


def _quantized(
    settings: Settings,
    inputs: dict[str, Any],
    quantize: str,
    directory: Path,
    progress: ProgressCallback,
) -> Path:
    """Return the directory of the quantised model, in `directory`."""
    source: Path | None = inputs["safetensors_dir"]
    if source is None or inputs["gguf"] or inputs["dduf"]:
        raise UsageError(
            "--quantize requires --safetensors-dir alone",
            hint="use llama-quantize of llama.cpp for GGUF",
        )
    try:
        is_directory = S_ISDIR(source.stat().st_mode)
    except OSError as error:
        raise unreadable(source, error) from error
    if not is_directory:
        raise UsageError(f"--safetensors-dir {source} is not a directory")
    try:
        quantize_directory = load_function("quantize_directory")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--quantize requires {error.name}, which is not installed",
            hint="run pip install 'modelpack[engine]'",
        ) from None
    assert quantize_directory is not None, "registered by this distribution"

    def made(completed: int, total: int) -> None:
        progress(Progress(Action.QUANTIZE, source.name, None, completed, total))

    done = quantize_directory(
        source,
        directory,
        bits=_BITS[quantize],
        follow_symlinks=inputs["follow_symlinks"],
        progress=made,
    )
    sizes = f"{human_size(done.before)} to {human_size(done.after)}"
    note(settings, f"quantised {plural(done.modules, 'module')} to {done.bits} bits: {sizes}")
    return directory


def _result(made: Packaged) -> dict[str, Any]:
    return {
        "reference": str(made.reference),
        "digest": str(made.digest),
        "stored": made.stored,
        "pushed": made.pushed is not None,
        "provenance": None if made.provenance is None else str(made.provenance),
        "size": made.manifest.total_size,
        "layers": [layer.to_json() for layer in made.manifest.layers],
        "skipped": [{"path": item.path, "reason": item.reason} for item in made.skipped],
        "notes": list(made.notes),
    }


@command()
@model_argument()
@click.argument("target", required=False)
@click.option(
    "--to", type=click.Choice(FORMS), required=True,
    help="Convert to Docker's format, to CNCF ModelPack, or to an OCI image with files in /models.",
)  # fmt: skip
@click.option(
    "--platform", "platforms", metavar="OS/ARCH", multiple=True,
    help=f"Add this platform to the image. May be repeated. [default: {' and '.join(PLATFORMS)}]",
)  # fmt: skip
@click.option("--push", is_flag=True, help="Push the result; an image is then not stored.")
@remote_options
@transfer_options(*BOTH)
@trust_options
@common_options
def convert(
    settings: Settings,
    model: str,
    target: str | None,
    to: Form,
    platforms: tuple[str, ...],
    push: bool,
    remote: RemoteOptions,
) -> None:
    """Convert MODEL to another format as TARGET; print its digest.

    The default TARGET is MODEL with the format appended to its tag, like team/m:v1-image.
    """
    if platforms and to != "image":
        raise UsageError("--platform requires --to image")
    if target is None:
        local = local_reference(model).without_digest()
        where = local.with_tag(f"{local.tag}-{to}")
    else:
        where = full_reference(settings, target)
    with shown_progress(settings) as progress:
        done = convert_model(
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
    note(settings, f"converted {model}{' and pushed' if push else ''}: {where}")
    value = {"reference": str(where), "digest": str(done.digest), "form": to, "pushed": push}
    show(settings, value, str(done.digest))
