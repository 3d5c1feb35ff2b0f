"""Download a model of an object store or a remote file system, to package it.

The files are chosen as on the hub. Downloads that were interrupted stay in the store, where the
next one of the same objects goes on; garbage collection deletes them after a day.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import rmtree

from modelpack.artifacts import media_types
from modelpack.builder.classify import FileKind, classify, is_projector_name
from modelpack.builder.request import PackageRequest
from modelpack.errors import NotFoundError, UsageError
from modelpack.formats.shards import shard_set
from modelpack.hub.filesystems import RemoteFiles
from modelpack.hub.object_stores import CloudStorage
from modelpack.hub.objects import CLOUD, Bucket, ObjectAddress, StoredObject, part_name
from modelpack.hub.repository import HubFile
from modelpack.hub.selection import Choice, choose
from modelpack.operations.provenance import ProvenanceOptions
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.transfer import run_all
from modelpack.progress import Action, Progress
from modelpack.storage import Watch
from modelpack.store.filesystem import FileLock, boot_id, check_room, map_os_errors
from modelpack.store.layout import LayoutStore
from modelpack.store.tree import Tree
from modelpack.trust.provenance import Resource

_WEIGHTS = (FileKind.GGUF, FileKind.DDUF, FileKind.SAFETENSORS)


@dataclass(frozen=True, slots=True)
class DownloadedModel:
    """The chosen files of an address in `directory`, and the objects that they are of."""

    address: ObjectAddress
    directory: Path
    kind: FileKind
    weight: Path
    projector: Path | None
    objects: tuple[StoredObject, ...]

    def completed(self, request: PackageRequest) -> PackageRequest:
        """Return the request to package these files, with their address as an annotation.

        Raises `UsageError` if it names weights itself.
        """
        if request.sources:
            raise UsageError(
                f"{self.address} cannot be combined with {request.sources[0][0]}: both are weights"
            )
        request = replace_fields(
            request, annotations={media_types.SOURCE: str(self.address), **request.annotations}
        )
        if self.kind is FileKind.SAFETENSORS:
            return replace_fields(request, safetensors_dir=self.directory)
        papers = [one for one in self.objects if "/" not in one.path]
        licences = [self.directory / one.path for one in papers
                    if classify(one.path) is FileKind.LICENSE]  # fmt: skip
        templates = [self.directory / one.path for one in papers if one.path.endswith(".jinja")]
        return replace_fields(
            request,
            gguf=self.weight if self.kind is FileKind.GGUF else None,
            dduf=self.weight if self.kind is FileKind.DDUF else None,
            mmproj=request.mmproj or self.projector,
            licenses=(*licences, *request.licenses),
            chat_template=request.chat_template or next(iter(templates), None),
        )

    def recorded(self, options: ProvenanceOptions) -> ProvenanceOptions:
        """Return the options with each object as an input: its address and its ETag."""
        origins = []
        for one in self.objects:
            digest = {"etag": one.etag.strip('"')} if one.etag else {}
            origins.append(Resource(one.path, self.address.url(one.key), digest))
        return replace(options, origins=(*options.origins, *origins))


def replace_fields(request: PackageRequest, **changes: object) -> PackageRequest:
    """Return the request with these fields replaced; its constructor takes other types."""
    values = {name: getattr(request, name) for name in PackageRequest.__dataclass_fields__}
    return PackageRequest(**{**values, **changes})


def open_bucket(
    address: ObjectAddress,
    *,
    insecure: frozenset[str] = frozenset(),
    environ: Mapping[str, str] = os.environ,
) -> Bucket:
    """Return the bucket of an address; plain http is for this machine and `insecure` hosts.

    Raises `UsageError` for a scheme that nothing installed reads, and for an invalid endpoint or
    setting.
    """
    if address.scheme in CLOUD:
        return Bucket(address, CloudStorage.opened(address, insecure, environ))
    return Bucket(address, RemoteFiles.opened(address, insecure))


@contextmanager
def downloaded_model(
    address: ObjectAddress, store: LayoutStore, remote: RemoteOptions, watch: Watch
) -> Iterator[DownloadedModel]:
    """Yield the downloaded files of the model at an address; they are deleted after the block.

    Raises what `Bucket.objects`, `Bucket.fetch` and `choose` raise, and `StorageFullError` before
    anything is downloaded.
    """
    from modelpack.registry.limits import RateLimit

    insecure = remote.tls.insecure if remote.tls else frozenset()
    bucket = open_bucket(address, insecure=insecure)
    objects = _of_address(address, bucket.objects())
    choice = choose([HubFile(one.path, one.size, one.etag) for one in objects], address)
    for note in choice.notes:
        watch.report(Progress(Action.NOTE, message=note))
    wanted = {file.path for file in choice.files}
    chosen = tuple(one for one in objects if one.path in wanted)
    tree = Tree(store.root)
    tree.prepare()
    # Bytes that were not flushed before a reboot may be lost: another boot begins again.
    name = hashlib.sha256(f"{address}\0{boot_id()}".encode()).hexdigest()
    parts = tree.uploads / f"objects-{name}"
    rate = None if remote.limit_rate is None else RateLimit(remote.limit_rate)
    lock = FileLock(tree.ingest / f"objects-{name}.lock")

    def waiting(holder: str) -> None:
        message = f"{address} is being downloaded by {holder}: waiting"
        watch.report(Progress(Action.NOTE, str(address), message=message))

    with lock.held(patience=None, stop=watch.stop, waiting=waiting, remove=True):
        with map_os_errors("make", parts):
            parts.mkdir(parents=True, exist_ok=True)
        _discard_others(parts, chosen)
        there = {part.name: part.stat().st_size for part in parts.glob("*.part")}
        missing = sum(max(0, one.size - there.get(part_name(one), 0)) for one in chosen)
        check_room(parts, missing, str(address))
        tasks = [partial(bucket.fetch, one, parts / part_name(one), watch, rate) for one in chosen]
        run_all(tasks, remote.concurrency, watch.stop)
        directory = parts / "model"
        try:
            _place(parts, directory, chosen)
            yield _model(address, directory, choice, chosen)
        finally:
            rmtree(directory, ignore_errors=True)
        rmtree(parts, ignore_errors=True)


def _of_address(
    address: ObjectAddress, objects: Sequence[StoredObject]
) -> tuple[StoredObject, ...]:
    """Leave out the weights of other models if the address is that of one file."""
    if not address.is_file:
        return tuple(objects)
    name = address.prefix.rpartition("/")[2]
    shards = shard_set(name)
    wanted = {str(path) for path in shards.paths()} if shards else {name}
    if not any(one.path == name for one in objects):
        raise NotFoundError(f"{address}: not found", hint="check the bucket and the key")
    return tuple(
        one
        for one in objects
        if one.path in wanted
        or classify(one.path) not in _WEIGHTS
        or (is_projector_name(one.path) and "/" not in one.path)
    )


def _discard_others(parts: Path, chosen: Sequence[StoredObject]) -> None:
    """Delete the downloads of objects that were replaced."""
    wanted = {part_name(one) for one in chosen}
    with map_os_errors("delete files in", parts):
        rmtree(parts / "model", ignore_errors=True)
        for part in parts.iterdir():
            if part.name not in wanted:
                part.unlink()


def _place(parts: Path, directory: Path, chosen: Sequence[StoredObject]) -> None:
    """Make the directory of the model from links; files have the times of their objects."""
    with map_os_errors("write to", directory):
        for one in chosen:
            place = directory / one.path
            place.parent.mkdir(parents=True, exist_ok=True)
            part = parts / part_name(one)
            seconds = one.modified.timestamp() if one.modified else 0
            os.utime(part, (seconds, seconds))
            part.chmod(0o444)  # a blob of the store is a link of it
            os.link(part, place)


def _model(
    address: ObjectAddress, directory: Path, choice: Choice, chosen: tuple[StoredObject, ...]
) -> DownloadedModel:
    projector = choice.projectors[0].path if choice.projectors else None
    return DownloadedModel(
        address,
        directory,
        choice.kind,
        directory / choice.weights[0].path,
        directory / projector if projector else None,
        chosen,
    )
