"""Package files, or a changed copy of another model, as a model in the store, and push it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Final

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig, ollama_defaults
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.model import Model, Role
from modelpack.artifacts.reference import Reference
from modelpack.builder.build import Built, build, repackage
from modelpack.builder.capabilities import LocalFile
from modelpack.builder.classify import WEIGHT_TYPES
from modelpack.builder.conversion import docker_layers
from modelpack.builder.description import describe
from modelpack.builder.files import LayerFile, LayerFiles, Skipped
from modelpack.builder.plan import check_added_files, plan, plan_extras, weight_statistics
from modelpack.builder.request import PackageRequest
from modelpack.bundles.bundle import Bundle, lay_out
from modelpack.errors import ModelpackError, PackagingError, SourceChangedError, UsageError
from modelpack.formats.config_json import CONFIG_JSON
from modelpack.formats.statistics import ModelStatistics
from modelpack.hub.objects import ObjectAddress
from modelpack.operations.lookup import with_projectors
from modelpack.operations.provenance import Packaging, ProvenanceOptions, attach_provenance
from modelpack.operations.pull import find_model
from modelpack.operations.push import Pushed, push_from
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.transfer import run_all
from modelpack.progress import Action, Progress, ProgressCallback, Stop
from modelpack.storage import Watch, read_blob, watching
from modelpack.store.file_copy import hash_file
from modelpack.store.filesystem import map_os_errors
from modelpack.store.layout import LayoutStore
from modelpack.store.tree import Tree
from modelpack.trust.provenance import Resource


@contextmanager
def scratch_directory(store: LayoutStore, what: str) -> Iterator[Path]:
    """Yield a new directory on the file system of the blobs; its name begins with `what`.

    Garbage collection deletes the directory of a killed process.
    """
    path = Tree(store.root).uploads / f"{what}-{uuid.uuid4().hex}"
    with map_os_errors("make", path):
        path.mkdir(parents=True)
    try:
        yield path
    finally:
        rmtree(path, ignore_errors=True)


#: Files to hash and copy in parallel. May exceed the number of processors, since writes wait for
#: the disk.
_PARALLEL_FILES: Final = 4


def take_files(
    files: Iterable[LayerFile], store: LayoutStore | None, link: bool, watch: Watch
) -> list[Digest]:
    """Return the digest of each file; with a store, also import the files into it."""

    def take(file: LayerFile) -> Digest:
        if store is None:
            digest, identity = _hashed(file, watch)
        else:
            imported = store.import_file(file.path, watch, link=link)
            digest = imported.digest
            identity = (imported.size, imported.mtime_ns, imported.device, imported.inode)
        if identity != (file.size, file.mtime_ns, file.device, file.inode):
            raise SourceChangedError(
                f"{file.path}: the file changed while it was packaged",
                hint="wait until the file is complete, then package again",
            )
        return digest

    tasks = [partial(take, file) for file in files]
    return run_all(tasks, _PARALLEL_FILES, watch.stop)


def package_files(
    where: Reference,
    files: Sequence[LayerFile],
    skipped: tuple[Skipped, ...],
    make: Callable[[Sequence[Digest]], Built],
    *,
    store: LayoutStore,
    push: bool,
    dry_run: bool,
    link: bool,
    remote: RemoteOptions | None,
    watch: Watch,
    request: PackageRequest,
    base: Resource | None = None,
    provenance: ProvenanceOptions | None = None,
) -> Packaged:
    """Store files and the manifest that `make` returns for their digests; push it if asked to.

    With `provenance`, attach it; `request` and the `base` that the model starts from are part of
    it. Raises what `take_files` and pushing raise.
    """
    pushed = attached = None
    if dry_run:
        built = make(take_files(files, None, link, watch))
    else:
        # The lease protects written and reused blobs from deletion until the manifest lists them.
        with store.lease(()):
            digests = take_files(files, store, link, watch)
            built = make(digests)
            store.write_bytes(built.config_bytes, built.manifest.config.media_type)
            store.write_manifest(built.manifest.descriptor, built.manifest.raw, str(where))
            if provenance is not None:
                made = Packaging(where, request, files, digests, base)
                attached = attach_provenance(provenance, made, built.manifest, store, watch)
        if push:
            pushed = push_from(
                store, str(where), where, remote, watch, with_referrers=attached is not None
            )
    return Packaged(
        where, built.manifest.digest, built.manifest, built.config, skipped, built.notes,
        stored=not dry_run, pushed=pushed, provenance=attached,
    )  # fmt: skip


def _hashed(file: LayerFile, watch: Watch) -> tuple[Digest, tuple[int, int, int, int]]:
    def seen(done: int) -> None:
        watch.stop.check()
        watch.report(Progress(Action.VERIFY, file.filepath, None, done, file.size))

    try:
        digest = hash_file(file.path, seen=seen)
        status = file.path.stat()
    except OSError as error:
        raise PackagingError(f"{file.path}: cannot be read: {error.strerror}") from error
    return digest, (status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)


_BESIDE_A_GGUF = (Role.WEIGHT, Role.LICENSE, Role.CHAT_TEMPLATE, Role.PROJECTOR)
_OPENCONTAINERS = "org.opencontainers.image."
# Layers of Ollama that the annotation DEFAULTS replaces, and templates that only Ollama reads.
_OLLAMA_ONLY = (
    media_types.OLLAMA_PARAMS,
    media_types.OLLAMA_SYSTEM,
    media_types.OLLAMA_MESSAGES,
    media_types.OLLAMA_TEMPLATE,
    media_types.OLLAMA_PROMPT,
)


def is_of_single_files(model: Model) -> bool:
    """Return whether the model has Docker's or CNCF's format and each layer is a single file."""
    return not model.config.is_foreign and not any(file.archive for file in model.files())


def as_single_files(model: Model, store: LayoutStore, watch: Watch) -> Model:
    """Return a stored model in Docker's format, with each file as a separate layer in `store`.

    Neither config nor manifest is stored, so the caller must hold a lease on the store. The same
    model gives the same digest. Raises as `modelpack.bundle` and `modelpack.package` do.
    """
    with scratch_directory(store, "files") as directory:
        laid_out = directory / "bundle"
        bundle = lay_out(
            model,
            lambda blob: store.blob_path(blob.digest),
            laid_out,
            watch=watch,
            runtime_names=False,
        )
        request = _request(model, bundle, store, watch)
        planned = plan(request)
        for skipped in planned.skipped:
            message = f"skipped {skipped.path}: {skipped.reason}"
            watch.report(Progress(Action.NOTE, skipped.path, message=message))
        digests = take_files(planned.files, store, True, watch)
        built = build(planned, request, digests)
    config = built.config.with_changes(
        created=model.config.created or built.config.created,
        cncf_descriptor={**model.config.cncf_descriptor},
        cncf_config={**model.config.cncf_config},
    )
    return Model(model.reference, built.manifest.descriptor, built.manifest, config)


def _request(model: Model, bundle: Bundle, store: LayoutStore, watch: Watch) -> PackageRequest:
    annotations = dict(model.manifest.annotations)
    if model.config.is_foreign:  # other annotations are the tool's own, such as its version
        annotations = {k: text for k, text in annotations.items() if k.startswith(_OPENCONTAINERS)}
    root = bundle.directory
    files = bundle.files
    if model.manifest.is_ollama:
        usage = ollama_defaults(model.manifest.layers, lambda layer: read_blob(store, layer))
        annotations |= {media_types.DEFAULTS: usage} if usage else {}
        own = {x.digest for x in model.manifest.layers if x.media_type in _OLLAMA_ONLY}
        for file in files:
            if file.digest in own:
                (root / file.path).unlink()
            if file.path.endswith("template.gotmpl"):
                why = "skipped: a Go template; add a Jinja template with `package --chat-template`"
                watch.report(Progress(Action.NOTE, file.path, message=why))
        files = tuple(file for file in files if file.digest not in own)
    weights = [file for file in files if file.role is Role.WEIGHT]
    beside = all(file.role in _BESIDE_A_GGUF and file.path.count("/") == 1 for file in files)
    kinds = {file.format for file in weights}
    if not beside or len(kinds) > 1 or not kinds <= {"gguf", "dduf"}:
        return PackageRequest(safetensors_dir=root / "model", annotations=annotations)
    return PackageRequest(
        gguf=bundle.weight if kinds == {"gguf"} else None,
        dduf=bundle.weight if kinds == {"dduf"} else None,
        licenses=tuple(root / file.path for file in files if file.role is Role.LICENSE),
        chat_template=bundle.chat_template,
        mmproj=bundle.mmproj,
        annotations=annotations,
    )


def _resource(base: Model) -> Resource:
    uri = f"oci://{base.reference.name}" if base.reference is not None else ""
    return Resource.of(base.digest, name="base", uri=uri)


def _local_files(model: Model, store: LayoutStore) -> list[LocalFile]:
    """Return the files of a stored model that have a path, without archives and missing files."""
    return [
        LocalFile(store.blob_path(file.descriptor.digest), file.filepath, file.role, file.format)
        for file in model.files()
        if file.filepath and not file.archive and store.has_blob(file.descriptor)
    ]


def _statistics(
    model: Model, store: LayoutStore, request: PackageRequest
) -> tuple[ModelStatistics | None, tuple[str, ...]]:
    """Return the statistics of a stored CNCF model, None with a note if they cannot be read."""
    paths = {file.descriptor.digest: file.filepath for file in model.files()}
    maker, files = LayerFiles.of(PackageRequest(), {}), []
    try:
        with scratch_directory(store, "files") as directory:
            for layer in docker_layers(model.manifest.layers, model.config, model.projectors):
                filepath = paths[layer.digest] or layer.digest.encoded
                if layer.media_type in WEIGHT_TYPES or filepath == CONFIG_JSON:
                    path = directory / filepath
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if not path.is_symlink():
                        path.symlink_to(store.blob_path(layer.digest))
                    files.append(maker.at(path, layer.media_type, filepath))
            statistics, _ = weight_statistics(files, exact=request.preserve)
        return statistics, ()
    except (ModelpackError, OSError) as error:
        return None, (f"the config lacks values of the weights, which cannot be read: {error}",)


@dataclass(frozen=True, slots=True)
class Packaged:
    """A packaged model. `stored` is false for a dry run; `pushed` is the result of a push.

    `provenance` is the digest of the attached provenance, if it was asked for.
    """

    reference: Reference
    digest: Digest
    manifest: Manifest
    config: ModelConfig
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    stored: bool
    pushed: Pushed | None = None
    provenance: Digest | None = None


def package(
    reference: str | Reference,
    request: PackageRequest,
    *,
    from_model: str | None = None,
    push: bool = False,
    dry_run: bool = False,
    link: bool = False,
    provenance: ProvenanceOptions | None = None,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Packaged:
    """Package the files of `request` as the model `reference` in `store`; push it with `push`.

    With `from_model`, a stored or remote model is the base, and `request` says what to add or
    change; if it is an address of objects (`ObjectAddress`), these are packaged. With
    `dry_run`, only the digest is computed. With `link`, files are hard-linked into the store,
    if the file system allows it, instead of copied. With `provenance`, how the model was
    packaged is attached to it, and pushed with it.

    Raises `PackagingError`, `WeightFormatError`, `UsageError`, `SourceChangedError`,
    `StorageFullError`, and what `modelpack.push` raises.
    """
    where = Reference.parse(reference) if isinstance(reference, str) else reference
    if where.digest is not None:
        raise PackagingError(
            f"{where}: a digest cannot be chosen, the content determines it",
            hint=f"write {where.without_digest()}",
        )
    store = store or LayoutStore()
    watch = watching(progress, stop)
    address = None if from_model is None else ObjectAddress.parse(from_model)
    if address is not None:
        if dry_run:
            raise UsageError(
                "a dry run downloads nothing", hint=f"leave out --dry-run for {address}"
            )
        if remote is not None and remote.trust is not None:
            raise UsageError(
                f"{address}: objects have no signatures to verify",
                hint="leave out the keys, identities and policy (also MODELPACK_POLICY)",
            )
        from modelpack.operations.objects import downloaded_model  # imports requests

        with downloaded_model(address, store, remote or RemoteOptions(), watch) as model:
            return package(
                where, model.completed(request), link=True, push=push,
                provenance=None if provenance is None else model.recorded(provenance),
                store=store, remote=remote, progress=progress, stop=stop,
            )  # fmt: skip
    if from_model is not None:
        base = find_model(from_model, store, pull=True, remote=remote, watch=watch)
        base = with_projectors(store, base)
        planned = plan_extras(request)
    else:
        base = None
        planned = plan(request)
    check_added_files(request)
    for skipped in planned.skipped:
        message = f"skipped {skipped.path}: {skipped.reason}"
        watch.report(Progress(Action.NOTE, skipped.path, message=message))

    def make(digests: Sequence[Digest]) -> Built:
        if base is None:
            return build(planned, request, digests)
        whole = base
        if base.config.is_foreign or (request.format == "docker" and not is_of_single_files(base)):
            whole = with_projectors(store, as_single_files(base, store, watch))
        if whole.config.is_cncf == (request.format == "cncf") or request.format is None:
            return repackage(
                whole.manifest, whole.config, request, planned, digests,
                projectors=whole.projectors,
            )  # fmt: skip
        description, statistics = None, None
        notes: tuple[str, ...] = ()
        if request.format == "docker":
            statistics, notes = _statistics(whole, store, request)
        elif not request.preserve:
            added = [LocalFile.of(file) for file in planned.files]
            files = [*_local_files(whole, store), *added]
            try:
                description = describe(files, whole.config.quantization)
            except ModelpackError as error:
                notes = (f"the config says no more of the files, which cannot be read: {error}",)
        built = repackage(
            whole.manifest, whole.config, request, planned, digests,
            description=description, statistics=statistics, projectors=whole.projectors,
        )  # fmt: skip
        return replace(built, notes=(*notes, *built.notes))

    writes = base is not None and base.config.is_foreign  # blobs, even in a dry run
    with store.lease(()) if writes else nullcontext():
        packaged = package_files(
            where, planned.files, planned.skipped, make,
            store=store, push=push, dry_run=dry_run, link=link, remote=remote, watch=watch,
            request=request, provenance=provenance,
            base=None if base is None else _resource(base),
        )  # fmt: skip
    for note in packaged.notes:
        watch.report(Progress(Action.NOTE, message=note))
    return packaged
