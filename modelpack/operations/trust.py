"""Require the signatures of a trust policy before a model is pulled, imported or used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Index, Manifest, parse_manifest_or_index
from modelpack.artifacts.model import Model
from modelpack.artifacts.reference import Reference
from modelpack.errors import NotFoundError, RegistryError, UntrustedError
from modelpack.hub.reference import HUB_REGISTRIES
from modelpack.operations.lookup import model_of, reference_in
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.operations.variants import variants_of
from modelpack.storage import ReferrerSource, Watch
from modelpack.store.layout import LayoutStore
from modelpack.trust.policy import Rule, Trust
from modelpack.trust.signatures import (
    Findings,
    Refusal,
    Signature,
    SignatureKind,
    find_signatures,
)

_MAX_SHOWN = 5


def check_source(
    trust: Trust,
    source: ReferrerSource,
    names: Sequence[str],
    subject: Descriptor,
    model: Callable[[], Model],
) -> tuple[Signature, ...]:
    """Return the signatures in `source` that satisfy the policy for a manifest under all `names`.

    A name is `registry/repository`: that of the source, or the model's new name. Raises
    `UntrustedError`, and the errors of `source`: a model that cannot be checked is not trusted.
    """
    rules = [rule for name in names for rule in trust.rules(name) if rule.threshold]
    if not rules:
        return ()
    found = _find(source, subject, model, rules, tagged=True)
    _require(rules, found, f"{names[0]}@{subject.digest}")
    return found.signatures


def check_stored(
    trust: Trust, store: LayoutStore, model: Model, remote: RemoteOptions, watch: Watch
) -> None:
    """Raise `UntrustedError` unless the stored model is trusted under its requested name.

    A model that was requested by id must be trusted under all its names or, without names, under
    those of the indexes that list it. Signatures that the store lacks are read from the registries
    in the model's names and origins.
    """
    try:
        entry = store.get(str(model.digest))
        places, origins = entry.places, entry.origins
    except NotFoundError:  # a variant without a name; its index has one
        places, origins = (), ()
    places = places or _places_of_indexes(store, model.digest)
    names = (model.reference.name,) if model.reference is not None else places
    if not names:
        raise UntrustedError(
            f"{model.digest}: has no name, so no rule of the policy applies to it",
            hint="name it with `modelpack tag`",
        )
    rules = [rule for name in names for rule in trust.rules(name) if rule.threshold]
    if not rules:
        return
    here = _find(store, model.descriptor, lambda: model, rules, tagged=False)
    if all(rule.is_met(here.signatures) for rule in rules):
        return
    found, unread = here, None
    for place in dict.fromkeys((*names, *origins)):
        where = Reference.parse(f"{place}@{model.digest}")
        if where.registry in HUB_REGISTRIES:  # has no signatures
            continue
        try:
            with open_repository(where, remote, watch) as repository:
                there = _find(repository, model.descriptor, lambda: model, rules, tagged=True)
        except RegistryError as error:  # another registry may have the signatures
            unread = unread or error
            continue
        found = Findings(found.signatures + there.signatures, found.refused + there.refused)
        if all(rule.is_met(found.signatures) for rule in rules):
            return
    if unread is not None:
        raise unread
    _require(rules, found, str(model.reference or model.digest))


def check_remote(model: Model, remote: RemoteOptions, watch: Watch) -> None:
    """Raise `UntrustedError` unless a registry's model satisfies the policy of `remote`."""
    if remote.trust is None:
        return
    where = model.reference
    assert where is not None, "a model from a registry has a reference"
    with open_repository(where, remote, watch) as repository:
        check_source(remote.trust, repository, [where.name], model.descriptor, lambda: model)


def check_names(
    store: LayoutStore, names: Iterable[str], remote: RemoteOptions, watch: Watch
) -> None:
    """Raise `UntrustedError` unless all named models and their variants satisfy the policy."""
    if remote.trust is None:
        return
    for name in names:
        descriptor = store.resolve(name)
        raw = store.fetch_manifest(descriptor)
        document = parse_manifest_or_index(raw, name, media_type=descriptor.media_type)
        manifests = [(descriptor, document)] if isinstance(document, Manifest) else []
        if isinstance(document, Index):
            for one in (variant.descriptor for variant in variants_of(document)):
                found = replace(one, annotations={}, platform=None)
                manifests.append((found, Manifest.parse(store.fetch_manifest(found), name)))
        reference = reference_in(store, name, descriptor)
        for found, manifest in manifests:
            model = model_of(store, found, manifest, reference)
            check_stored(remote.trust, store, model, remote, watch)


@contextmanager
def trusted_import(store: LayoutStore, remote: RemoteOptions, watch: Watch) -> Iterator[None]:
    """Check the models that the context imports; undo all imports if one is not trusted.

    Raises `UntrustedError`. Does nothing if `remote` has no policy.
    """
    if remote.trust is None:
        yield
        return
    before, new = _named(store), list[str]()
    try:
        # Keep models whose name an imported model takes, to restore the names on failure.
        with store.lease({Digest.parse(digest) for digest in before.values()}):
            yield
            new = _names_of_new(before, _named(store))
            try:
                check_names(store, new, remote, watch)
            except BaseException:
                for name in before.keys() & set(new):
                    store.tag(before[name], Reference.parse(name))
                raise
    except BaseException:
        for name in new:
            if name not in before:
                store.remove(name)
        raise


def _names_of_new(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return the names that are new or changed, and the digests of new models without a name."""
    old = set(before.values())  # a model that lost its name was here before
    return [
        name
        for name, digest in after.items()
        if before.get(name) != digest and not (name == digest and digest in old)
    ]


def _named(store: LayoutStore) -> dict[str, str]:
    """Return the digests of all models by name; models without a name are listed by digest."""
    return {
        name: str(model.digest)
        for model in store.models()
        for name in [*map(str, model.references)] or [str(model.digest)]
    }


def _places_of_indexes(store: LayoutStore, digest: Digest) -> tuple[str, ...]:
    """Return the repositories of the stored indexes that list a manifest."""
    found: list[str] = []
    for index in store.indexes():
        document = Index.parse(store.fetch_manifest(index.descriptor), str(index.digest))
        if any(one.digest == digest for one in document.manifests):
            found += index.places
    return tuple(dict.fromkeys(found))


def _find(
    source: ReferrerSource,
    subject: Descriptor,
    model: Callable[[], Model],
    rules: Sequence[Rule],
    *,
    tagged: bool,
) -> Findings:
    signers = frozenset(signer for rule in rules for signer in rule.signers)
    formats = {kind for rule in rules for kind in rule.formats}
    if any(rule.provenance for rule in rules):
        formats.add(SignatureKind.PROVENANCE)
    return find_signatures(source, subject, model, signers, tagged=tagged, formats=formats)


def _require(rules: Sequence[Rule], found: Findings, what: str) -> None:
    for rule in rules:
        if rule.is_met(found.signatures):
            continue
        names = " or ".join(one.name for one in rule.publishers)
        wanted = f"{rule.threshold} of {names}" if rule.threshold > 1 else names
        others = [
            Refusal(f"a rule does not accept signatures of the format {one.kind}")
            for one in found.signatures
            if one.kind not in rule.formats and one.provenance is None
        ]
        shown = tuple(dict.fromkeys((*others, *found.refused)))[:_MAX_SHOWN]
        why = "; ".join(one.reason for one in shown) or "it has no signatures"
        if rule.is_signed(found.signatures):
            raise _without_provenance(rule, found, names, what)
        hint = "sign it with `modelpack sign`, or check its signatures with `modelpack verify`"
        raise UntrustedError(
            f"{what}: is not signed by {wanted}: {why}",
            expected=f"a signature by {wanted}",
            got=why,
            hint=next((one.hint for one in shown if one.hint), hint),
        )


def _without_provenance(rule: Rule, found: Findings, names: str, what: str) -> UntrustedError:
    """Return the error for a signed model without the provenance that a rule requires."""
    said = [
        f"it names {', '.join(one.provenance.sources) or 'no source'}"
        for one in found.signatures
        if one.provenance is not None and one.signer in rule.signers
    ]
    reasons = [*said, *(one.reason for one in found.refused)][:_MAX_SHOWN]
    why = "; ".join(dict.fromkeys(reasons)) or "it has none with a signature"
    wanted = f"provenance signed by {names}"
    if rule.sources:
        wanted += f" with commits of {' or '.join(rule.sources)}"
    return UntrustedError(
        f"{what}: has no {wanted}: {why}",
        expected=wanted,
        got=why,
        hint="package it with `modelpack package --provenance --key KEY`",
    )
