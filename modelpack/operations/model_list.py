"""Summarise the models of a store, as `modelpack list` shows them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from typing import Any

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.model import Model
from modelpack.artifacts.reference import Reference, is_model_id
from modelpack.errors import ModelpackError
from modelpack.operations.lookup import StoredImage, stored_image, stored_model
from modelpack.store.layout import LayoutStore
from modelpack.store.lookup import StoredModel, begins


@dataclass(frozen=True, slots=True)
class Listed:
    """A stored model. If it cannot be read, `model` is None and `problem` says why."""

    digest: Digest
    references: tuple[Reference, ...]
    model: Model | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """The fields of a model in a list: `size` is that of all blobs; the config has the others."""

    size: int
    format: str
    parameters: str
    quantization: str
    architecture: str
    context_size: int | None
    created: str | None

    @classmethod
    def of(cls, model: Model) -> Summary:
        """Return the summary of a model."""
        config = model.config
        return cls(
            model.manifest.total_size,
            config.format,
            config.parameters,
            config.quantization,
            config.architecture,
            config.context_size,
            config.created,
        )

    @classmethod
    def from_facts(cls, facts: Any) -> Summary | None:
        """Return the summary from the values of `to_facts`; None if they are invalid."""
        if not isinstance(facts, list) or len(facts) != len(_KINDS):
            return None
        fits = all(isinstance(fact, kind) for fact, kind in zip(facts, _KINDS, strict=True))
        return cls(*facts) if fits else None

    def to_facts(self) -> list[Any]:
        """Return the summary as JSON values, which the store caches."""
        return list(astuple(self))

    def to_json(self) -> dict[str, Any]:
        """Return the summary as a JSON object."""
        return {
            "size": self.size,
            "format": self.format,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "quantization": self.quantization,
            "contextSize": self.context_size,
            "created": self.created,
        }


_KINDS = (int, str, str, str, str, int | None, str | None)


@dataclass(frozen=True, slots=True)
class Summarized:
    """The summary of a stored model. If it cannot be read, `summary` is None; see `problem`.

    `missing` are the layers that a partial pull left out. `modified` is when the manifest was
    stored or last pulled, in seconds since 1970.
    """

    digest: Digest
    references: tuple[Reference, ...]
    summary: Summary | None
    problem: str = ""
    missing: tuple[Descriptor, ...] = ()
    modified: float | None = None


def list_models(store: LayoutStore, name: str | None = None) -> tuple[Listed, ...]:
    """Return the stored models; with `name`, those of that repository, tag or id.

    An index is listed as the variant that this machine would run. A model that cannot be read is
    listed with its problem.
    """
    listed = []
    for entry, references in _chosen(store, name):
        try:
            model = stored_model(store, str(entry.digest))
        except ModelpackError as error:
            if _may_be_a_model(store, entry):
                listed.append(Listed(entry.digest, references, None, str(error)))
        else:
            listed.append(Listed(entry.digest, references, model))
    return tuple(listed)


def summarize_models(store: LayoutStore, name: str | None = None) -> tuple[Summarized, ...]:
    """Return summaries of the stored models; `name` and problems are as in `list_models`.

    The store caches the summary of each model. Only the presence of the manifest is checked, not
    the integrity of blobs.
    """
    known = store.listing_cache.read()
    added: dict[str, list[Any]] = {}
    listed = []
    for entry, references in _chosen(store, name):
        key = str(entry.digest)
        summary = Summary.from_facts(known.get(key))
        if summary is None or not store.has_file(entry.digest):
            try:
                summary = Summary.of(stored_model(store, key))
            except ModelpackError as error:
                if _may_be_a_model(store, entry):
                    listed.append(Summarized(entry.digest, references, None, str(error)))
                continue
            added[key] = summary.to_facts()
        missing = store.missing(key) if entry.is_partial else ()
        modified = store.modified_at(entry.digest)
        listed.append(
            Summarized(entry.digest, references, summary, missing=missing, modified=modified)
        )
    if added:
        if name is None:  # all models were listed: drop the summaries of deleted ones
            known = {str(item.digest): known.get(str(item.digest), []) for item in listed}
        store.listing_cache.write({**known, **added})
    return tuple(listed)


def list_images(
    store: LayoutStore, name: str | None = None, *, known: Collection[Digest] = ()
) -> tuple[StoredImage, ...]:
    """Return the readable images in the store, without the indexes in `known`.

    `name` is as in `list_models`.
    """
    found = []
    for entry, references in _chosen(store, name):
        if entry.descriptor.media_type in media_types.INDEX_TYPES and entry.digest not in known:
            with suppress(ModelpackError):
                image = stored_image(store, str(entry.digest))
                if image is not None:
                    found.append(replace(image, references=references))
    return tuple(found)


def _may_be_a_model(store: LayoutStore, entry: StoredModel) -> bool:
    """Return whether to list a manifest that cannot be read as a model.

    Indexes and unnamed container images are not listed: they may be part of any index.
    """
    if entry.descriptor.media_type not in media_types.MANIFEST_TYPES:
        return False
    if entry.names:
        return True
    try:
        manifest = Manifest.parse(store.fetch_manifest(entry.descriptor))
    except ModelpackError:
        return True
    return manifest.config.media_type != media_types.OCI_IMAGE_CONFIG


def _chosen(
    store: LayoutStore, name: str | None
) -> Iterator[tuple[StoredModel, tuple[Reference, ...]]]:
    """Yield the models that match `name`, each with its matching references."""
    for entry in (*store.models(), *store.indexes()):
        references = entry.references
        if name is not None and not begins(name, entry.digest):
            references = tuple(ref for ref in references if _matches(name, ref))
            if not references:
                continue
        yield entry, references


def _matches(name: str, reference: Reference) -> bool:
    """Return whether `name` is the reference or, without a tag, its repository."""
    if is_model_id(name):
        return False
    wanted = Reference.parse(name)
    typed_tag = ":" in name.strip().rpartition("/")[2]
    return wanted.name == reference.name and (not typed_tag or wanted.tag == reference.tag)
