"""Package drafters as referrers of the model they draft for, and find those of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import Reference
from modelpack.builder.build import Built, assemble, build
from modelpack.builder.files import expanded
from modelpack.builder.plan import plan
from modelpack.builder.request import PackageRequest
from modelpack.errors import PackagingError, UsageError
from modelpack.formats.drafter import check_drafter
from modelpack.formats.safetensors import read_safetensors_header
from modelpack.operations.adapters import find_base_model, headers_of_base
from modelpack.operations.package import Packaged, package_files
from modelpack.operations.provenance import ProvenanceOptions
from modelpack.operations.remote import RemoteOptions, new_reference
from modelpack.progress import Action, Progress, ProgressCallback, Stop
from modelpack.storage import watching
from modelpack.store.layout import LayoutStore

_MOST_CONFIG_BYTES = 1 << 20


def package_drafter(
    reference: str | Reference,
    directory: Path,
    base: str,
    *,
    request: PackageRequest | None = None,
    push: bool = False,
    dry_run: bool = False,
    link: bool = False,
    provenance: ProvenanceOptions | None = None,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Packaged:
    """Package the drafter in `directory` as `reference`, for the model `base`.

    `base` is stored or in a registry. The manifest has the base as its subject (spec/manifest.md),
    so that `modelpack serve` finds the drafter in the store, and, when it pulls the base, in the
    repository of the base. `request` has licences, annotations and the time of creation.

    Raises `PackagingError` for a directory without a drafter or with one for another base, and
    what `modelpack.package` raises.
    """
    where, request = new_reference(reference), request or PackageRequest()
    if request.format == "cncf":
        raise UsageError("--format cncf: CNCF ModelPack has no drafters", hint="omit --format")
    directory = expanded(directory)
    if not directory.is_dir():
        raise PackagingError(f"--drafter {directory} is not a directory")
    request = replace(request, safetensors_dir=directory)
    request.check()
    store, watch = store or LayoutStore(), watching(progress, stop)
    planned = plan(request)
    model, name = find_base_model(base, store, remote, watch)
    headers = headers_of_base(base, model, store, remote)
    shapes = None
    if headers is None:
        message = f"the drafter is not compared with {base}, whose headers cannot be read"
        watch.report(Progress(Action.NOTE, message=message))
    else:
        shapes = {
            tensor.name: tuple(tensor.shape) for one in headers for tensor in one.header.tensors
        }
    own = {
        tensor.name.removeprefix("model."): tuple(tensor.shape)
        for file in planned.files
        if file.path.suffix == ".safetensors"
        for tensor in read_safetensors_header(file.path).tensors
    }
    kind = check_drafter(_config(directory), own, shapes, str(directory))

    def built(digests: Sequence[Digest]) -> Built:
        made = build(planned, request, digests)
        annotations = {
            **request.annotations,
            media_types.BASE_DIGEST: str(model.digest),
            media_types.DRAFTER_KIND: kind,
        }
        if name:
            annotations[media_types.BASE_NAME] = name
        return assemble(
            made.config,
            made.manifest.layers,
            annotations,
            artifact_type=media_types.DRAFTER,
            subject=model.manifest.descriptor,
            notes=made.notes,
        )

    return package_files(
        where, planned.files, planned.skipped, built,
        store=store, push=push, dry_run=dry_run, link=link, remote=remote, watch=watch,
        request=request, provenance=provenance,
    )  # fmt: skip


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_CONFIG_BYTES + 1)
        found = json.loads(raw) if len(raw) <= _MOST_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise PackagingError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise PackagingError(f"{path}: is not a JSON object of at most {_MOST_CONFIG_BYTES} bytes")
    return found


def stored_drafters(model: Digest, store: LayoutStore) -> list[Digest]:
    """Return the digests of the stored drafters of the model, sorted."""
    return [found.digest for found in store.referrers(model, media_types.DRAFTER)]
