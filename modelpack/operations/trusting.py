"""Whether a model may be used: the signatures that somebody's trust asks for, wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from modelpack.descriptor import Descriptor
from modelpack.errors import RegistryError, UntrustedError
from modelpack.hub.reference import HUB_REGISTRY
from modelpack.model import Model
from modelpack.reference import Reference
from modelpack.storage import ReferrerSource, Watch
from modelpack.stores.layout import LayoutStore
from modelpack.supply.signatures import Findings, Signature, find_signatures
from modelpack.supply.trust import Rule, Trust

if TYPE_CHECKING:
    from modelpack.operations.remote import RemoteOptions

_MAX_SHOWN = 5


def check_source(
    trust: Trust,
    source: ReferrerSource,
    names: Sequence[str],
    subject: Descriptor,
    model: Callable[[], Model],
) -> tuple[Signature, ...]:
    """Return the signatures in `source` for which a manifest is trusted under all of `names`.

    A name is `registry/repository`: where it is read from, or what it is to be called. Raises
    `UntrustedError`; whatever keeps it from being read is raised, too: what cannot be checked is
    not trusted.
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
    """Raise `UntrustedError` unless the stored model is trusted under the name it was asked for.

    One that was asked for by its id has to be under all its names. Signatures that the store lacks
    are looked for in the registries that the model has names of.
    """
    entry = store.get(str(model.digest))
    names = (model.reference.name,) if model.reference is not None else entry.places
    if not names:
        raise UntrustedError(
            f"{model.digest}: has no name, so no rule says who has to sign it",
            hint="give it a name: `modelpack tag`",
        )
    rules = [rule for name in names for rule in trust.rules(name) if rule.threshold]
    if not rules:
        return
    here = _find(store, model.descriptor, lambda: model, rules, tagged=False)
    if all(rule.is_met(here.keys) for rule in rules):
        return
    found, unread = here, None
    for place in dict.fromkeys((*names, *entry.origins)):
        where = Reference.parse(f"{place}@{model.digest}")
        if where.registry == HUB_REGISTRY:  # holds no signatures
            continue
        try:
            there = _find_there(where, model, rules, remote, watch)
        except RegistryError as error:  # another one may have them
            unread = unread or error
            continue
        found = Findings(found.signatures + there.signatures, found.refused + there.refused)
        if all(rule.is_met(found.keys) for rule in rules):
            return
    if unread is not None:
        raise unread
    _require(rules, found, str(model.reference or model.digest))


def _find_there(
    where: Reference, model: Model, rules: Sequence[Rule], remote: RemoteOptions, watch: Watch
) -> Findings:
    from modelpack.operations.remote import open_repository

    with open_repository(where, remote, watch) as repository:
        return _find(repository, model.descriptor, lambda: model, rules, tagged=True)


def _find(
    source: ReferrerSource,
    subject: Descriptor,
    model: Callable[[], Model],
    rules: Sequence[Rule],
    *,
    tagged: bool,
) -> Findings:
    keys = frozenset(key for rule in rules for key in rule.keys)
    return find_signatures(source, subject, model, keys, tagged=tagged)


def _require(rules: Sequence[Rule], found: Findings, what: str) -> None:
    for rule in rules:
        if rule.is_met(found.keys):
            continue
        names = " or ".join(one.name for one in rule.publishers)
        wanted = f"{rule.threshold} of {names}" if rule.threshold > 1 else names
        why = "; ".join(found.refused[:_MAX_SHOWN]) or "it has no signatures"
        raise UntrustedError(
            f"{what}: is not signed by {wanted}: {why}",
            expected=f"a signature by {wanted}",
            got=why,
            hint="`modelpack sign` signs a model; `modelpack verify` says who did",
        )
