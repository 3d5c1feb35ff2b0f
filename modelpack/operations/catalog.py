"""List the models of a registry or of a namespace, as values, as JSON or as an HTML page.

Weights are not fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from modelpack.artifacts.config import capability_names
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Index, parse_manifest_or_index
from modelpack.artifacts.model import Model
from modelpack.artifacts.reference import Reference
from modelpack.errors import (
    AuthError,
    FormatError,
    IntegrityError,
    InvalidReferenceError,
    ModelpackError,
    NotFoundError,
    UsageError,
)
from modelpack.lint.checks import licences
from modelpack.operations.capabilities import capabilities_of
from modelpack.operations.catalog_page import page
from modelpack.operations.lint import model_subject
from modelpack.operations.lookup import model_in, with_projectors
from modelpack.operations.model_list import Summary
from modelpack.operations.remote import RemoteOptions, fetch_referenced_manifest, open_registry
from modelpack.operations.transfer import run_all
from modelpack.progress import Stop
from modelpack.registry import Registry, Repository
from modelpack.storage import watching

# Tags that are not models: fallback lists of referrers, and cosign's signatures.
_REFERRER_TAG = re.compile(r"sha(?:256|512)-[0-9a-f]{64,128}(?:\.(?:sig|att|sbom))?\Z")
#: A larger model card is not fetched.
MAX_CARD_BYTES: Final = 256 * 1024
_ANNOTATION = "org.opencontainers.image."


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A tag of a repository.

    `summary` is None for an index, and for a tag that cannot be read; `problem` then says why. If
    the manifest itself cannot be read, `digest` is None. `licences` are SPDX identifiers; a licence
    whose text is not recognised is left out. `capabilities` are those of `capabilities_of`, by the
    names that servers use (`capability_names`). `attached` are the artifact types of the
    referrers, and `variants` the digests of the models of an index. `card` is the text of the
    README.
    """

    reference: Reference
    digest: Digest | None
    summary: Summary | None = None
    title: str = ""
    description: str = ""
    licences: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    attached: tuple[str, ...] = ()
    variants: tuple[Digest, ...] = ()
    problem: str = ""
    card: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the entry as a JSON object without its card and its empty fields."""
        value: dict[str, Any] = {
            "reference": str(self.reference),
            "repository": self.reference.repository,
            "tag": self.reference.tag,
            "digest": None if self.digest is None else str(self.digest),
        }
        if self.summary is not None:
            value |= self.summary.to_json()
        value |= {
            "title": self.title,
            "description": self.description,
            "licences": list(self.licences),
            "capabilities": list(self.capabilities),
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

    `repositories` replaces the registry's own list, which some registries do not offer. Only the
    manifest, the config, the licence and the model card are fetched and, of models in Docker's
    format, the small files that say what they can do. A tag that cannot be read is
    listed with its problem. Raises `UsageError` for an invalid `name`, and registry errors.
    """
    host, namespace = split_registry(name)
    options, watch = remote or RemoteOptions(), watching(None, stop)
    with open_registry(host, options, watch) as registry:
        names = sorted(set(repositories)) or sorted(
            one for one in registry.repositories() if is_under(one, namespace)
        )
        tasks = [partial(_repository, registry, one, watch.stop) for one in names]
        found = run_all(tasks, options.concurrency, watch.stop)
    return tuple(entry for entries in found for entry in entries)


def split_registry(name: str) -> tuple[str, str]:
    """Return the host and the namespace, or "", of `registry[/namespace]`; raise `UsageError`."""
    host, _, namespace = name.strip().strip("/").partition("/")
    try:
        place = Reference.parse(f"{host}/{namespace or 'any'}/any")
    except InvalidReferenceError as error:
        raise UsageError(f"{name!r} is not a registry: {error}") from None
    if place.registry != host:
        raise UsageError(
            f"{name!r} is not a registry",
            hint="give a host and optionally a namespace, like registry.example/team",
        )
    return host, namespace


def is_under(repository: str, namespace: str) -> bool:
    """Return whether a repository is in the namespace, or is its only one; "" has all."""
    return not namespace or repository == namespace or repository.startswith(f"{namespace}/")


def _repository(registry: Registry, name: str, stop: Stop) -> list[CatalogEntry]:
    entries: list[CatalogEntry] = []
    try:
        repository = registry.repository(name)
        tags = sorted(tag for tag in repository.tags() if not _REFERRER_TAG.match(tag))
    except (NotFoundError, InvalidReferenceError):
        return []  # its models were deleted, or its name is not valid in a reference
    for tag in tags:
        stop.check()
        try:
            reference = Reference(registry.host, name).with_tag(tag)
        except InvalidReferenceError:
            continue  # the tag is not valid in a reference
        entry = _entry(repository, reference)
        if entry is not None:
            entries.append(entry)
    return entries


def _entry(repository: Repository, reference: Reference) -> CatalogEntry | None:
    """Return the entry of a tag; None if the tag was deleted in the meantime."""
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
            title = document.annotations.get(f"{_ANNOTATION}title", "")
            return CatalogEntry(reference, digest, title=title, variants=variants)
        model = model_in(repository, reference.with_digest(digest))
        model = with_projectors(repository, model)
        return _model_entry(repository, reference, model)
    except AuthError:
        raise
    except (FormatError, IntegrityError, NotFoundError) as error:
        return CatalogEntry(reference, digest, problem=str(error))


def _model_entry(repository: Repository, reference: Reference, model: Model) -> CatalogEntry:
    subject = model_subject(model, repository, ())
    known, readme = licences(subject), subject.file("readme.md")
    card = readme.text() if readme is not None and readme.size <= MAX_CARD_BYTES else None
    annotations, described = model.manifest.annotations, model.config.cncf_descriptor
    title, description = (
        annotations.get(_ANNOTATION + key) or str(described.get(key) or "")
        for key in ("title", "description")
    )
    about = repository.referrers(model.digest)
    return CatalogEntry(
        reference,
        model.digest,
        Summary.of(model),
        title,
        description,
        tuple(sorted({one for one in known.values() if one})),
        capability_names(capabilities_of(model, repository)),
        tuple(sorted({one.artifact_type or "" for one in about} - {""})),
        card=card or "",
    )


#: Incremented when a field is removed or changes its meaning.
SCHEMA_VERSION: Final = 1


def write_catalog(
    entries: Sequence[CatalogEntry], directory: Path, *, name: str, title: str = ""
) -> tuple[Path, Path]:
    """Write `index.html` and `index.json` to `directory`; return both paths.

    The same models give the same bytes. Raises `ModelpackError` if they cannot be written.
    """
    html, listed = directory / "index.html", directory / "index.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        html.write_text(page(entries, title or f"Models of {name}"), encoding="utf-8")
        text = json.dumps(as_json(entries, name), indent=2, ensure_ascii=False)
        listed.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ModelpackError(f"{directory}: cannot be written: {error.strerror}") from error
    return html, listed


def as_json(entries: Sequence[CatalogEntry], name: str) -> dict[str, Any]:
    """Return the models under `name` as a JSON object."""
    return {
        "schemaVersion": SCHEMA_VERSION,
        "name": name,
        "models": [entry.to_json() for entry in entries],
    }
