"""Create the SBOM of a model, and optionally attach it to the model."""

from __future__ import annotations

from dataclasses import dataclass

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.model import Model
from modelpack.artifacts.reference import Reference
from modelpack.formats.model_card import ModelCard, hub_url
from modelpack.lint.checks import LintSubject, licences
from modelpack.operations.lint import open_subject
from modelpack.operations.referrers import EMPTY, EMPTY_CONFIG
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.operations.signatures import put
from modelpack.progress import Stop
from modelpack.storage import watching
from modelpack.store.layout import LayoutStore
from modelpack.trust.sbom import CYCLONEDX, BaseModel, ml_bom

_MAX_BASES = 32


@dataclass(frozen=True, slots=True)
class Bom:
    """The SBOM of a model; `attached` is the digest of the referrer, None if not attached."""

    reference: Reference | None
    digest: Digest
    document: bytes
    attached: Digest | None = None


def sbom(
    name: str,
    *,
    attach: bool = False,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    from_registry: bool = False,
    stop: Stop | None = None,
) -> Bom:
    """Return the SBOM of the model `name`, in the store or its registry.

    With `attach`, the SBOM is attached to the model there; attaching it again changes nothing.
    """
    with open_subject(name, store=store, remote=remote, from_registry=from_registry, stop=stop) as (
        model,
        subject,
    ):
        known = [one or "unknown: see " + path for path, one in licences(subject).items()]
        document = ml_bom(model, licences=known, bases=base_models(subject))
    if not attach:
        return Bom(model.reference, model.digest, document)
    manifest, blobs = _manifest(document, model)
    watch = watching(None, stop)
    if from_registry:
        where = Reference.parse(name)
        with open_repository(where, remote or RemoteOptions(), watch, writes=True) as repository:
            put(repository, manifest, blobs, None, watch)
    else:
        store = store or LayoutStore()
        with store.lease(()):
            put(store, manifest, blobs, None, watch)
    return Bom(model.reference, model.digest, document, manifest.digest)


def base_models(subject: LintSubject) -> tuple[BaseModel, ...]:
    """Return the base models that the GGUF metadata or the model card names."""
    found = []
    for number in range(_MAX_BASES):
        prefix = f"general.base_model.{number}."
        base = subject.gguf_text(prefix + "name")
        if not base:
            break
        organization = subject.gguf_text(prefix + "organization")
        full = f"{organization}/{base}" if organization else base
        found.append(BaseModel(full, subject.gguf_text(prefix + "repo_url")))
    if found:
        return tuple(found)
    readme = subject.file("readme.md")
    card = ModelCard.parse(readme.text() or "") if readme is not None else ModelCard()
    return tuple(BaseModel(one, hub_url(one)) for one in card.base_models[:_MAX_BASES])


def _manifest(document: bytes, model: Model) -> tuple[Manifest, dict[Descriptor, bytes]]:
    layer = Descriptor(CYCLONEDX, Digest.of(document), len(document))
    subject = Descriptor(
        model.descriptor.media_type, model.descriptor.digest, model.descriptor.size
    )
    manifest = Manifest.build(EMPTY_CONFIG, (layer,), artifact_type=CYCLONEDX, subject=subject)
    return manifest, {layer: document, EMPTY_CONFIG: EMPTY}
