"""Create an index: one reference for several variants of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import checked_platform
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Index
from modelpack.artifacts.model import Model
from modelpack.artifacts.reference import Reference, check_tag
from modelpack.errors import NotFoundError, UsageError
from modelpack.operations.lookup import check_whole, stored_model
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.operations.sources import open_source
from modelpack.operations.transfer import Transfer, TransferOptions, transfer_model
from modelpack.operations.variants import described_variant, fetch_variant
from modelpack.progress import ProgressCallback, Stop
from modelpack.storage import Source, Watch, read_blob, watching
from modelpack.store.layout import LayoutStore


@dataclass(frozen=True, slots=True)
class NamedVariant:
    """A variant to be: its name, the model that it is, and the platform that it is for, if one."""

    name: str
    model: str
    platform: str | None = None


@dataclass(frozen=True, slots=True)
class Indexed:
    """An index that was made; `transfers` are what pushing its variants took."""

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
    """Make an index of `variants`, in the store or, with `push`, in the registry of `reference`.

    The models of an index in the store are in the store. One that is pushed may have models of any
    registry, or of the hub: what its own lacks is copied there. The same models give the same
    digest. Raises `UsageError` for names that are none or come twice, `NotFoundError`.
    """
    where = Reference.parse(reference) if isinstance(reference, str) else reference
    store = store or LayoutStore()
    options = remote or RemoteOptions()
    watch = watching(progress, stop)
    _check(where, variants)
    with ExitStack() as stack:
        found = [_find(stack, variant, push, store, options, watch) for variant in variants]
        index = Index.build(
            [
                described_variant(variant.name, model, variant.platform)
                for variant, (_, model) in zip(variants, found, strict=True)
            ],
            annotations=annotations,
        )
        if not push:
            store.write_manifest(index.descriptor, index.raw, str(where))
            return Indexed(where, index)
        target = stack.enter_context(open_repository(where, options, watch, writes=True))
        how = TransferOptions(watch, options.concurrency)
        done = []
        for source, model in found:
            raw = model.manifest.raw
            copied = transfer_model(source, target, model.descriptor, raw, None, how)
            done.append(copied.model)
        target.write_manifest(index.descriptor, index.raw, where.tag)
    return Indexed(where, index, tuple(done))


def _check(where: Reference, variants: Sequence[NamedVariant]) -> None:
    if where.digest is not None:
        raise UsageError(f"{where}: a digest cannot be chosen, it follows from the variants")
    if not variants:
        raise UsageError("an index needs a variant", hint="--variant gguf=REF")
    seen = set()
    for variant in variants:
        check_tag(variant.name, variant.name)
        if variant.name in seen:
            raise UsageError(f"two variants are called {variant.name!r}")
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
    """Return the model of a variant and where to read it from."""
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
    raw = read_blob(opened.source, manifest.config)
    config = ModelConfig.parse(raw, manifest.config.media_type, f"config of {opened.asked}")
    return opened.source, Model(opened.local, descriptor, manifest, config)
