"""Pull models from a registry or the hub into a local store, whole or in part.

`pull` fetches a model. `find_model` returns a stored model for the operations that need one; it
pulls the model, or what it lacks, on request. A `Selection` limits a pull to some files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest, parse_manifest_or_index
from modelpack.artifacts.model import Model, ModelFile, Role
from modelpack.artifacts.reference import Reference, is_model_id
from modelpack.errors import (
    InterruptedTransferError,
    ManifestError,
    ModelpackError,
    NotFoundError,
    RemoteUnavailableError,
    UnsupportedError,
)
from modelpack.hub.reference import HubReference, hub_origin
from modelpack.operations.lookup import (
    check_whole,
    completing_reference,
    model_of,
    stored_model,
    with_projectors,
)
from modelpack.operations.remote import (
    RemoteOptions,
    named,
    new_reference,
    open_commit,
    open_source,
)
from modelpack.operations.transfer import Transfer, TransferOptions, transfer_model
from modelpack.operations.variants import opened_variant
from modelpack.progress import Action, Progress, ProgressCallback, Stop
from modelpack.storage import ReferrerSource, Source, Watch, watching
from modelpack.store.layout import LayoutStore

if TYPE_CHECKING:
    from modelpack.trust.signatures import Signature

# Anyone with write access to a repository may attach drafters, so the tries must be limited.
_MAX_DRAFTERS: Final = 8


class Part(StrEnum):
    """A group of files that users often pull without the others."""

    CONFIG = "config"  # configuration, tokenizer, chat template
    WEIGHTS = "weights"  # weights and projectors


_ROLES = {
    Part.CONFIG: (Role.CONFIG, Role.CHAT_TEMPLATE),
    Part.WEIGHTS: (Role.WEIGHT, Role.PROJECTOR),
}


@dataclass(frozen=True, slots=True)
class Selection:
    """Conditions that a selected file must all satisfy. The model's config is always selected.

    `include` and `media_types` are as in `Model.select`: each included path must exist. An
    `exclude` is a path, a file name or a glob of either.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    media_types: tuple[str, ...] = ()
    only: Part | None = None

    @property
    def is_everything(self) -> bool:
        """Whether no condition is given."""
        return not (self.include or self.exclude or self.media_types or self.only)

    def chosen(self, model: Model) -> tuple[ModelFile, ...]:
        """Return the selected files, in layer order.

        Raises `NotFoundError` if no file has such a type or path, or if `exclude` leaves none.
        `only` may select no files, for example the configuration of a model that is one GGUF file.
        """
        files = model.select(self.media_types, self.include)
        if self.only is not None:
            files = tuple(file for file in files if file.role in _ROLES[self.only])
        kept = tuple(file for file in files if not self._is_excluded(file))
        if files and not kept:
            raise NotFoundError(
                f"{model.reference or model.digest}: no files left after excluding "
                + ", ".join(map(repr, self.exclude)),
                hint="run `modelpack inspect --remote` to list its files",
            )
        return kept

    def _is_excluded(self, file: ModelFile) -> bool:
        path = file.filepath
        if path is None:
            return False
        name = path.rpartition("/")[2]
        return any(fnmatchcase(path, glob) or fnmatchcase(name, glob) for glob in self.exclude)


@dataclass(frozen=True, slots=True)
class Pulled:
    """A pulled model, and counts of the blobs of the model and of each of its referrers.

    `missing` are the blobs that the selection left out and that the store does not have.
    """

    reference: Reference
    digest: Digest
    transfer: Transfer
    missing: tuple[Descriptor, ...] = ()
    referrers: tuple[Transfer, ...] = ()


def pull(
    reference: str | Reference | HubReference,
    *,
    to: str | Reference | None = None,
    selection: Selection | None = None,
    with_referrers: bool = False,
    drafter: bool = False,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Pulled:
    """Fetch a model into `store` under its reference, or under `to`, and verify every byte.

    The model is in a registry or, as `hf.co/ORG/NAME[:QUANT][@REVISION]`, on the Hugging Face Hub.
    From an index, one variant is pulled; `RemoteOptions` says which.

    A pull resumes an interrupted one. With a `selection`, only the selected files are fetched, and
    the model is marked partial until another pull completes it. With `with_referrers`, referrers
    are fetched too. If `remote.trust` is set, signatures are verified before any file is fetched,
    and stored with the model.

    With `drafter`, the drafter that is packaged beside the model is fetched too, unless the store
    has one: of the first 8 by digest, the first that can be used. The policy applies to it as to
    the model. A drafter that is not trusted, is larger than the model or cannot be fetched is
    reported as a note, and so are more than 8 drafters: the model runs without.

    Raises `UntrustedError`, `NotFoundError`, `AuthError`, `IntegrityError`,
    `RemoteUnavailableError`, `StorageFullError` and `UnsupportedError`.
    """
    store = store or LayoutStore()
    options = remote or RemoteOptions()
    watch = watching(progress, stop)
    with open_source(reference, options, watch) as opened:
        source, origin = opened.source, opened.local
        where = origin if to is None else new_reference(to)
        descriptor, document = opened_variant(opened, options, watch)
        raw = document.raw
        names = tuple(dict.fromkeys((origin.name, where.name)))
        signatures = _trusted_signatures(options, source, names, document)
        name = str(where.without_digest()) if where.tag else None
        with store.lease(blob.digest for blob in (*document.blobs, descriptor)):
            blobs = document.unique_blobs
            if selection is not None and not selection.is_everything:
                blobs = _selected(source, document, origin, selection)
            partial = len(blobs) < len(document.unique_blobs)

            def write() -> None:
                store.write_manifest(descriptor, raw, name, origin=origin.name, partial=partial)
                _store_signatures(signatures, source, store, watch)

            how = TransferOptions(watch, options.concurrency, with_referrers, blobs, write)
            done = transfer_model(source, store, descriptor, raw, name, how)
            if with_referrers:
                store.note_origin([one.descriptor.digest for one in done.referrers], origin.name)
            missing = store.missing(descriptor)
        if drafter:
            _pull_drafter(source, origin.name, document, store, options, watch)
    return Pulled(where, descriptor.digest, done.model, missing, done.referrers)


def _pull_drafter(
    source: ReferrerSource,
    origin: str,
    document: Manifest,
    store: LayoutStore,
    options: RemoteOptions,
    watch: Watch,
) -> None:
    """Fetch the first drafter of the model that is trusted and arrives whole; note the others.

    `document` is the model's manifest. Of the drafters, `_MAX_DRAFTERS` are tried, the first by
    digest. One that is larger than the model is not fetched.
    """
    model = document.digest
    if store.referrers(model, media_types.DRAFTER):
        return
    listed: Sequence[Descriptor] = ()
    with _optional(f"{origin}@{model}: its drafters cannot be listed", watch):
        listed = source.referrers(model, media_types.DRAFTER)
    if len(listed) > _MAX_DRAFTERS:
        message = (
            f"{origin}@{model} has {len(listed)} drafters; the first {_MAX_DRAFTERS} are tried"
        )
        watch.report(Progress(Action.NOTE, message=message))
    for found in listed[:_MAX_DRAFTERS]:
        what = f"{origin}@{found.digest}"
        with _optional(f"the drafter {what} is not used", watch):
            raw = source.fetch_manifest(found)
            manifest = Manifest.parse(raw, what)
            subject = manifest.subject
            # Clients write the list of a registry without the API, so it may name anything.
            if manifest.artifact_type != media_types.DRAFTER or subject is None:
                raise ManifestError("its manifest is not that of a drafter")
            if subject.digest != model:
                raise ManifestError(f"it drafts for {subject.digest}")
            size, most = manifest.total_size, document.total_size
            if size > most:
                raise ManifestError(f"it has {size} bytes, more than the model's {most}")
            signatures = _trusted_signatures(options, source, (origin,), manifest)
            with store.lease(blob.digest for blob in (*manifest.blobs, found)):
                # One blob at a time: parallel transfers stop the whole pull when one fails.
                transfer_model(source, store, found, raw, None, TransferOptions(watch))
                _store_signatures(signatures, source, store, watch)
                store.note_origin([found.digest], origin)
            return


@contextmanager
def _optional(what: str, watch: Watch) -> Iterator[None]:
    """Report an error of the context as a note; a stop is raised."""
    try:
        yield
    except InterruptedTransferError:
        raise
    except ModelpackError as error:
        watch.report(Progress(Action.NOTE, message=f"{what}: {error}"))


def _trusted_signatures(
    options: RemoteOptions, source: ReferrerSource, names: Sequence[str], manifest: Manifest
) -> tuple[Signature, ...]:
    """Return the signatures that satisfy the policy; raise `UntrustedError` if they do not."""
    if options.trust is None:
        return ()
    from modelpack.operations.trust import check_source

    subject = manifest.descriptor
    return check_source(
        options.trust, source, names, subject, lambda: model_of(source, subject, manifest, None)
    )


def _store_signatures(
    signatures: Sequence[Signature], source: ReferrerSource, store: LayoutStore, watch: Watch
) -> None:
    """Store attached signatures with the model: later checks read them without a registry."""
    held = {one.manifest.digest: one.manifest for one in signatures}
    for manifest in held.values():
        raw = source.fetch_manifest(manifest)
        if parse_manifest_or_index(raw, str(manifest.digest)).subject is not None:
            transfer_model(source, store, manifest, raw, None, TransferOptions(watch))


def _selected(
    source: Source, manifest: Manifest, where: Reference, selection: Selection
) -> tuple[Descriptor, ...]:
    """Return the blobs of the selected files, and the config."""
    model = with_projectors(source, model_of(source, manifest.descriptor, manifest, where))
    chosen = (*(file.descriptor for file in selection.chosen(model)), manifest.config)
    return tuple({blob.digest: blob for blob in chosen}.values())


def find_model(
    name: str,
    store: LayoutStore,
    *,
    pull: bool,
    remote: RemoteOptions | None,
    watch: Watch,
    drafter: bool = False,
) -> Model:
    """Return the stored model `name` with all its layers.

    With `pull`, a missing model or its missing layers are pulled first, with `drafter` as in
    `modelpack.pull`. Without `pull`, raises `NotFoundError` for a missing model and
    `PartialModelError` for a partial one.
    """
    model = find_any_part(name, store, pull=pull, remote=remote, watch=watch, drafter=drafter)
    if pull and store.missing(model.descriptor):
        complete(store, model, remote=remote, watch=watch, drafter=drafter)
    check_whole(store, model)
    return model


def find_any_part(
    name: str,
    store: LayoutStore,
    *,
    pull: bool,
    remote: RemoteOptions | None,
    watch: Watch,
    selection: Selection | None = None,
    drafter: bool = False,
) -> Model:
    """Return the stored model `name`, even if some of its layers are missing.

    With `pull`, a model that is not stored is pulled first, limited to `selection`, with `drafter`
    as in `modelpack.pull`. Raises `UntrustedError` if the model does not satisfy the policy
    `remote.trust`.
    """
    try:
        model = stored_model(store, name, remote)
    except NotFoundError:
        if not pull or is_model_id(name):
            raise
    except UnsupportedError:
        # The stored model of this name is one variant, and the store does not record which one.
        if not pull or is_model_id(name) or remote is None or remote.variant is None:
            raise
    else:
        if remote is not None and remote.trust is not None:
            from modelpack.operations.trust import check_stored

            check_stored(remote.trust, store, model, remote, watch)
        return model
    try:
        _pull(named(name), store, remote, watch, selection, drafter)
    except RemoteUnavailableError as error:
        raise type(error)(
            f"{name} is not in the store and cannot be pulled: {error.message}",
            host=error.host, status_code=error.status_code, code=error.code, hint=error.hint,
        ) from error  # fmt: skip
    return stored_model(store, name)


def complete(
    store: LayoutStore,
    model: Model,
    *,
    remote: RemoteOptions | None,
    watch: Watch,
    selection: Selection | None = None,
    drafter: bool = False,
) -> None:
    """Fetch the missing blobs of a partial model, limited to `selection`.

    They are requested by digest from the repository of the first pull, since the tag may point to
    another model by now.
    """
    origin = hub_origin(model.manifest)
    where = completing_reference(store, model)
    if origin is not None:
        _complete_from_hub(origin, store, model, remote or RemoteOptions(), watch, selection)
    elif where is None:
        check_whole(store, model)
    else:
        _pull(where, store, remote, watch, selection, drafter)


def _complete_from_hub(
    origin: HubReference,
    store: LayoutStore,
    model: Model,
    remote: RemoteOptions,
    watch: Watch,
    selection: Selection | None,
) -> None:
    """Fetch missing files by path from the commit that the model was made from."""
    wanted = {file.descriptor.digest for file in (selection or Selection()).chosen(model)}
    missing = [blob for blob in store.missing(model.descriptor) if blob.digest in wanted]
    with open_commit(origin, remote, watch) as repository, store.lease([model.digest]):
        for blob in missing:
            source = repository.blob(blob.filepath or "", blob)
            store.write_blob(blob, source, watch)
        store.write_manifest(
            model.descriptor, model.manifest.raw, partial=bool(store.missing(model.descriptor))
        )


def _pull(
    where: Reference | HubReference,
    store: LayoutStore,
    remote: RemoteOptions | None,
    watch: Watch,
    selection: Selection | None,
    drafter: bool,
) -> None:
    pull(
        where, selection=selection, drafter=drafter, store=store, remote=remote,
        progress=watch.report, stop=watch.stop,
    )  # fmt: skip
