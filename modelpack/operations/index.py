"""Create an index: one reference for several variants of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from modelpack.artifacts.descriptor import checked_platform
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Index
from modelpack.artifacts.model import Model
from modelpack.artifacts.reference import Reference, check_tag
from modelpack.errors import NotFoundError, UsageError
from modelpack.operations.lookup import check_whole, model_of, stored_model
from modelpack.operations.remote import RemoteOptions, new_reference, open_repository, open_source
from modelpack.operations.transfer import Transfer, TransferOptions, transfer_model
from modelpack.operations.variants import described_variant, fetch_variant
from modelpack.progress import ProgressCallback, Stop
from modelpack.storage import Source, Watch, watching
from modelpack.store.layout import LayoutStore


@dataclass(frozen=True, slots=True)
class NamedVariant:
    """A variant to put into an index: its name, its model, and its platform or None."""

    name: str
    model: str
    platform: str | None = None


@dataclass(frozen=True, slots=True)
class Indexed:
    """A created index; `transfers` count the blobs of each variant that was pushed."""

    reference: Reference
    index: Index
    transfers: tuple[Transfer, ...] = ()

    @property
    def digest(self) -> Digest:
        """The digest of the index."""
        return self.index.digest


def create_index(
    reference: str | Reference,
    variants: Sequence[NamedVariant],
    *,
    annotations: Mapping[str, str] | None = None,
    push: bool = False,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Indexed:
    """Create an index of `variants`, in the store or, with `push`, in the registry of `reference`.

    An index in the store lists stored models. With `push`, models may also be in any registry or on
    the hub: blobs that the registry of `reference` lacks are copied to it. The same models give the
    same digest. Raises `NotFoundError`, and `UsageError` for invalid or repeated variant names.
    """
    where = new_reference(reference)
    store = store or LayoutStore()
    options = remote or RemoteOptions()
    watch = watching(progress, stop)
    _check(variants)
    with ExitStack() as stack:
        found = [_find(stack, variant, push, store, options, watch) for variant in variants]
        entries = [
            described_variant(variant.name, model, variant.platform)
            for variant, (_, model) in zip(variants, found, strict=True)
        ]
        index = Index.build(entries, annotations=annotations)
        if not push:
            store.write_manifest(index.descriptor, index.raw, str(where))
            return Indexed(where, index)
        target = stack.enter_context(open_repository(where, options, watch, writes=True))
        how = TransferOptions(watch, options.concurrency)
        done = tuple(
            transfer_model(source, target, model.descriptor, model.manifest.raw, None, how).model
            for source, model in found
        )
        target.write_manifest(index.descriptor, index.raw, where.tag)
    return Indexed(where, index, done)


def _check(variants: Sequence[NamedVariant]) -> None:
    if not variants:
        raise UsageError(
            "an index needs at least one variant", hint="give a variant, like --variant gguf=REF"
        )
    seen = set()
    for variant in variants:
        check_tag(variant.name, variant.name)
        if variant.name in seen:
            raise UsageError(f"two variants have the name {variant.name!r}")
        seen.add(variant.name)
        if variant.platform is not None:
            checked_platform(variant.platform, f"variant {variant.name}")


def _find(
    stack: ExitStack,
    variant: NamedVariant,
    push: bool,
    store: LayoutStore,
    options: RemoteOptions,
    watch: Watch,
) -> tuple[Source, Model]:
    """Return the model of a variant, and the source to read its blobs from."""
    try:
        model = stored_model(store, variant.model)
    except NotFoundError:
        if not push:
            raise
    else:
        check_whole(store, model)
        return store, model
    opened = stack.enter_context(open_source(variant.model, options, watch))
    descriptor, manifest = fetch_variant(
        opened.source, opened.descriptor, opened.raw, opened.asked, options=options
    )
    return opened.source, model_of(opened.source, descriptor, manifest, opened.local)
