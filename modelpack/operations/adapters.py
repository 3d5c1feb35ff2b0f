"""Package LoRA adapters as artifacts that name their base by digest, and pull an adapter's base.

`package_adapter` compares the adapter with the headers of the base's weights: those in the store,
or by a few ranges from the registry. `find_base` finds the base of a stored adapter, or pulls it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.model import Model, ModelFile, Role
from modelpack.artifacts.reference import Reference
from modelpack.builder.build import Built, assemble, file_layers
from modelpack.builder.classify import MEDIA_TYPES, FileKind, classify
from modelpack.builder.files import (
    LayerFile,
    LayerFiles,
    Skipped,
    expanded,
    kind_of_file,
    status_of,
)
from modelpack.builder.request import PackageRequest
from modelpack.builder.times import created_time
from modelpack.errors import NotFoundError, UnsupportedError, UsageError
from modelpack.formats.adapter import CONFIG, Adapter, check_base, read_adapter, read_adapter_files
from modelpack.formats.units import format_parameters
from modelpack.hub.reference import HubReference
from modelpack.operations.headers import FileHeader, read_headers
from modelpack.operations.lookup import model_of, stored_model
from modelpack.operations.package import Packaged, package_files
from modelpack.operations.provenance import ProvenanceOptions
from modelpack.operations.pull import find_model
from modelpack.operations.remote import RemoteOptions, named, new_reference, open_source
from modelpack.operations.variants import opened_variant
from modelpack.progress import Action, Progress, ProgressCallback, Stop
from modelpack.storage import Watch, watching
from modelpack.store.layout import LayoutStore

#: Other files of an adapter's directory that belong to it; trainers leave many more.
_DOCUMENTS: Final = ("README.md",)


@dataclass(frozen=True, slots=True)
class _Planned:
    adapter: Adapter
    files: tuple[LayerFile, ...]
    skipped: tuple[Skipped, ...]


def package_adapter(
    reference: str | Reference,
    adapter: Path,
    base: str,
    *,
    request: PackageRequest | None = None,
    push: bool = False,
    dry_run: bool = False,
    link: bool = False,
    provenance: ProvenanceOptions | None = None,
    store: LayoutStore | None = None,
    base_store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Packaged:
    """Package the adapter in the directory or GGUF file `adapter` as `reference`.

    `base` is the model that it changes, stored or in a registry; only the headers of its weights
    are read. `base_store` is where it is stored, if not in `store`. `request` has licences,
    annotations and the time of creation, and `provenance` says how to record them. The manifest
    names the base by digest, rank and targets (spec/manifest.md).

    Raises `AdapterError` for an adapter that is invalid or does not fit the base, and what
    `modelpack.package` raises.
    """
    where, request = new_reference(reference), request or PackageRequest()
    request.check()
    if request.format == "cncf":
        raise UsageError("--format cncf: CNCF ModelPack has no adapters", hint="omit --format")
    store, watch = store or LayoutStore(), watching(progress, stop)
    planned = _plan(adapter, request, os.environ)
    model, name = find_base_model(base, base_store or store, remote, watch)
    if model.is_adapter:
        raise UsageError(f"--base {base} is an adapter itself, expected a model")
    if not compare(planned.adapter, base, model, base_store or store, remote):
        message = f"the adapter is not compared with {base}, whose headers cannot be read"
        watch.report(Progress(Action.NOTE, message=message))
    for skipped in planned.skipped:
        message = f"skipped {skipped.path}: {skipped.reason}"
        watch.report(Progress(Action.NOTE, skipped.path, message=message))
    make = partial(_build, planned, model, name, request)
    return package_files(
        where, planned.files, planned.skipped, make,
        store=store, push=push, dry_run=dry_run, link=link, remote=remote, watch=watch,
        request=request, provenance=provenance,
    )  # fmt: skip


def _plan(path: Path, request: PackageRequest, environ: Mapping[str, str]) -> _Planned:
    """Return the files of an adapter; files that trainers leave beside it are skipped."""
    path = expanded(path)
    status_of(path)
    adapter = read_adapter(path)
    maker = LayerFiles.of(request, environ)
    weights = (
        media_types.DOCKER_GGUF_LORA
        if adapter.format == "gguf"
        else media_types.ADAPTER_SAFETENSORS
    )
    files = [maker.at(adapter.weights, weights)]
    skipped = []
    if adapter.config is not None:
        files.append(maker.at(adapter.config, media_types.DOCKER_MODEL_FILE))
    if path.is_dir():
        known = {file.path for file in files}
        for entry in sorted(path.iterdir()):
            if entry in known or entry.name.startswith("."):
                continue
            is_file = entry.is_file()
            if is_file and (entry.name in _DOCUMENTS or classify(entry.name) is FileKind.LICENSE):
                files.append(maker.at(entry, MEDIA_TYPES[classify(entry.name)]))
            else:
                why = "not part of an adapter" if is_file else kind_of_file(entry.lstat())
                skipped.append(Skipped(entry.name, why))
    files += [maker.at(expanded(one), media_types.DOCKER_LICENSE) for one in request.licenses]
    return _Planned(adapter, tuple(files), tuple(skipped))


def _build(
    planned: _Planned, base: Model, name: str, request: PackageRequest, digests: Sequence[Digest]
) -> Built:
    adapter, layers = planned.adapter, file_layers(planned.files, digests)
    parameters = sum(
        math.prod((target.experts or 1, target.rank, target.inputs + target.outputs))
        for target in adapter.targets
    )
    config = ModelConfig(
        media_types.DOCKER_CONFIG_V02,
        format="gguf" if adapter.format == "gguf" else "safetensors",
        parameters=format_parameters(parameters),
        architecture=base.config.architecture,
        created=created_time(request.created, os.environ),
        diff_ids=tuple(layer.digest for layer in layers),
    )
    annotations = {
        **request.annotations,
        media_types.BASE_DIGEST: str(base.digest),
        media_types.ADAPTER_KIND: adapter.kind,
        media_types.ADAPTER_RANK: str(adapter.rank),
        media_types.ADAPTER_TARGETS: ",".join(adapter.modules),
    }
    if name:
        annotations[media_types.BASE_NAME] = name
    return assemble(config, layers, annotations, artifact_type=media_types.ADAPTER)


def find_base_model(
    base: str, store: LayoutStore, remote: RemoteOptions | None, watch: Watch
) -> tuple[Model, str]:
    """Return the base, from the store or its registry without its layers, and its reference."""
    try:
        model = stored_model(store, base, remote)
    except NotFoundError:
        options = remote or RemoteOptions()
        with open_source(base, options, watch) as opened:
            descriptor, manifest = opened_variant(opened, options, watch)
            model = model_of(opened.source, descriptor, manifest, opened.local)
    reference = model.reference
    return model, str(reference.without_digest()) if reference is not None else ""


def compare(
    adapter: Adapter, base: str, model: Model, store: LayoutStore, remote: RemoteOptions | None
) -> bool:
    """Return whether the headers of the base `model`, named `base`, could be read and compared.

    Raises `AdapterError` for an adapter that does not fit the base.
    """
    headers = headers_of_base(base, model, store, remote)
    if headers is None:
        return False
    tensors = [tensor for one in headers for tensor in one.header.tensors]
    kind = next((one.file.format for one in headers), "safetensors")
    check_base(adapter, tensors, format=kind)
    return True


def headers_of_base(
    base: str, model: Model, store: LayoutStore, remote: RemoteOptions | None
) -> tuple[FileHeader, ...] | None:
    """Return the headers of the base's weights; None if only a whole pull could read them."""
    try:
        return read_headers(str(model.digest), store=store)
    except NotFoundError:  # not stored, or without its weights
        where = named(base) if model.reference is None else model.reference
    if isinstance(where, HubReference):
        return None
    try:
        return read_headers(where.with_digest(model.digest), remote=remote, from_registry=True)
    except (NotFoundError, UnsupportedError):
        return None


def base_name(model: Model) -> str:
    """Return the base of an adapter as `REPOSITORY@DIGEST`, or its digest if it has no name.

    Raises `UsageError` for a model that is no adapter, and `InvalidReferenceError` or
    `InvalidDigestError` for annotations that are invalid.
    """
    annotations = model.manifest.annotations
    digest = annotations.get(media_types.BASE_DIGEST, "")
    if not model.is_adapter or not digest:
        what = "names no base" if model.is_adapter else "is not an adapter"
        raise UsageError(f"{model.reference or model.digest} {what}")
    parsed = Digest.parse(digest)
    name = annotations.get(media_types.BASE_NAME, "")
    return str(Reference.parse(name).with_digest(parsed)) if name else str(parsed)


def find_base(
    model: Model,
    store: LayoutStore,
    *,
    pull: bool,
    remote: RemoteOptions | None,
    watch: Watch,
    drafter: bool = False,
) -> Model:
    """Return the stored base of an adapter; with `pull`, a missing base is pulled first.

    `drafter` is as in `modelpack.pull`. The policy `remote.trust` applies to the base as to any
    model. Raises `NotFoundError` if the store lacks it and it cannot be pulled.
    """
    name = base_name(model)
    digest = model.manifest.annotations[media_types.BASE_DIGEST]
    try:
        stored_model(store, digest)
    except NotFoundError:
        if not pull or name == digest:
            raise NotFoundError(
                f"the base of {model.reference or model.digest} is not stored: {name}",
                hint=f"run modelpack pull {name}" if name != digest else None,
            ) from None
        wanted = name
    else:
        wanted = digest
    return find_model(wanted, store, pull=pull, remote=remote, watch=watch, drafter=drafter)


def stored_adapter(model: Model, store: LayoutStore) -> Adapter:
    """Return the adapter in a stored artifact. Raises as `read_adapter`."""
    files = model.files()

    def path_of(file: ModelFile) -> Path:
        return store.blob_path(file.descriptor.digest)

    weights = [file for file in files if file.role is Role.ADAPTER]
    if len(weights) != 1:
        raise UsageError(
            f"{model.reference or model.digest} has {len(weights)} adapters, expected 1"
        )
    configs = [file for file in files if file.filepath == CONFIG]
    config = path_of(configs[0]) if configs and weights[0].format != "gguf" else None
    if config is None and weights[0].format != "gguf":
        raise NotFoundError(f"{model.reference or model.digest}: no {CONFIG}")
    return read_adapter_files(config, path_of(weights[0]))
