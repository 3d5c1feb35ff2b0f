"""Catalog: what models there are under a name of a registry, without fetching any."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from modelpack.digest import Digest
from modelpack.errors import (
    AuthError,
    FormatError,
    IntegrityError,
    InvalidReferenceError,
    NotFoundError,
    UsageError,
)
from modelpack.linting.description import licences
from modelpack.manifest import Index, parse_manifest_or_index
from modelpack.model import Model
from modelpack.operations.find import model_in
from modelpack.operations.listing import Summary
from modelpack.operations.parallel import run_all
from modelpack.operations.remote import RemoteOptions, fetch_referenced_manifest, open_registry
from modelpack.operations.subjects import model_subject
from modelpack.operations.watching import watching
from modelpack.progress import Stop
from modelpack.reference import Reference
from modelpack.registry import Registry, Repository

# What clients keep under tags beside models: fallback lists of referrers, and cosign's.
_ABOUT = re.compile(r"sha(?:256|512)-[0-9a-f]{64,128}(?:\.(?:sig|att|sbom))?\Z")
_TITLE = "org.opencontainers.image.title"
_DESCRIPTION = "org.opencontainers.image.description"


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A tag; `summary` is None for what is no model, or cannot be read, and `problem` says why.

    `digest` is None where its manifest cannot be read.

    `licences` are SPDX identifiers, empty where a text is not recognised; `attached` the artifact
    types of what is attached to it, `variants` the digests of the models of an index.
    """

    reference: Reference
    digest: Digest | None
    summary: Summary | None = None
    title: str = ""
    description: str = ""
    licences: tuple[str, ...] = ()
    attached: tuple[str, ...] = ()
    variants: tuple[Digest, ...] = ()
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the entry for programs; what is not known is left out."""
        value: dict[str, Any] = {
            "reference": str(self.reference),
            "repository": self.reference.repository,
            "tag": self.reference.tag,
            "digest": None if self.digest is None else str(self.digest),
        }
        if self.summary is not None:
            value |= {
                "size": self.summary.size,
                "format": self.summary.format,
                "architecture": self.summary.architecture,
                "parameters": self.summary.parameters,
                "quantization": self.summary.quantization,
                "contextSize": self.summary.context_size,
                "created": self.summary.created,
            }
        value |= {
            "title": self.title,
            "description": self.description,
            "licences": list(self.licences),
            "attached": list(self.attached),
            "variants": [str(digest) for digest in self.variants],
            "problem": self.problem,
        }
        return {key: item for key, item in value.items() if item not in (None, "", [])}


def catalog(
    name: str,
    *,
    repositories: Sequence[str] = (),
    remote: RemoteOptions | None = None,
    stop: Stop | None = None,
) -> tuple[CatalogEntry, ...]:
    """Return the models under `name`, a registry or `registry/namespace`, by repository and tag.

    `repositories` are those to look at, for a registry that does not list its own. Of a model only
    its manifest, its config and its licence are fetched. A tag that cannot be read is listed with
    its problem. Raises what the network does, and `UsageError` for a name that is no registry's.
    """
    host, namespace = _split(name)
    options, watch = remote or RemoteOptions(), watching(None, stop)
    with open_registry(host, options, watch) as registry:
        names = sorted(set(repositories)) or sorted(
            one for one in registry.repositories() if _is_under(one, namespace)
        )
        tasks = [partial(_repository, registry, one, watch.stop) for one in names]
        found = run_all(tasks, options.concurrency, watch.stop)
    return tuple(entry for entries in found for entry in entries)


def _split(name: str) -> tuple[str, str]:
    host, _, namespace = name.strip().strip("/").partition("/")
    try:
        place = Reference.parse(f"{host}/{namespace or 'any'}/any")
    except InvalidReferenceError as error:
        raise UsageError(f"{name!r} is no registry: {error}") from None
    if place.registry != host:
        raise UsageError(
            f"{name!r} names no registry", hint="registry.example or registry.example/team"
        )
    return host, namespace


def _is_under(repository: str, namespace: str) -> bool:
    return not namespace or repository == namespace or repository.startswith(f"{namespace}/")


def _repository(registry: Registry, name: str, stop: Stop) -> list[CatalogEntry]:
    entries: list[CatalogEntry] = []
    try:
        repository = registry.repository(name)
        tags = sorted(tag for tag in repository.tags() if not _ABOUT.match(tag))
    except (NotFoundError, InvalidReferenceError):
        return []  # its models are all gone, or nobody could name one
    for tag in tags:
        stop.check()
        try:
            reference = Reference(registry.host, name).with_tag(tag)
        except InvalidReferenceError:
            continue  # as above
        entry = _entry(repository, reference)
        if entry is not None:
            entries.append(entry)
    return entries


def _entry(repository: Repository, reference: Reference) -> CatalogEntry | None:
    """Return what a tag is; None if it went away meanwhile."""
    try:
        descriptor, raw = fetch_referenced_manifest(repository, reference)
    except NotFoundError:
        return None
    except (FormatError, IntegrityError) as error:
        return CatalogEntry(reference, None, problem=str(error))
    digest = descriptor.digest
    try:
        document = parse_manifest_or_index(raw, str(reference), media_type=descriptor.media_type)
        if isinstance(document, Index):
            variants = tuple(child.digest for child in document.manifests)
            title = document.annotations.get(_TITLE, "")
            return CatalogEntry(reference, digest, title=title, variants=variants)
        model = model_in(repository, reference.with_digest(digest))
        return _model_entry(repository, reference, model)
    except AuthError:
        raise
    except (FormatError, IntegrityError, NotFoundError) as error:
        return CatalogEntry(reference, digest, problem=str(error))


def _model_entry(repository: Repository, reference: Reference, model: Model) -> CatalogEntry:
    known = licences(model_subject(model, repository, ()))
    annotations = model.manifest.annotations
    about = repository.referrers(model.digest)
    return CatalogEntry(
        reference,
        model.digest,
        Summary.of(model),
        annotations.get(_TITLE, "") or str(model.config.cncf_descriptor.get("title") or ""),
        annotations.get(_DESCRIPTION, "")
        or str(model.config.cncf_descriptor.get("description") or ""),
        tuple(sorted({one for one in known.values() if one})),
        tuple(sorted({one.artifact_type or "" for one in about} - {""})),
    )
