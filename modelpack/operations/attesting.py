"""Attest: a signed statement about a model, attached to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelpack.digest import Digest
from modelpack.errors import UsageError
from modelpack.model import Model
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.signing import attach_statement, opened_model
from modelpack.operations.watching import watching
from modelpack.progress import Stop
from modelpack.stores.layout import LayoutStore
from modelpack.supply.keys import PrivateKey
from modelpack.supply.statements import Statement, Subject


def attest(
    model: Model,
    predicate_type: str,
    predicate: Mapping[str, Any],
    key: PrivateKey,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    stop: Stop | None = None,
) -> Digest:
    """Sign an in-toto statement about `model` and attach it as a sigstore bundle.

    To the manifest of that digest in its registry, whatever its tag is by now, or, with `store`,
    there; return the digest of what was attached. Raises what a push raises, and `UsageError` for
    a model of no registry.
    """
    watch, reference = watching(None, stop), model.reference
    name = reference.name if reference is not None else ""
    statement = Statement((Subject(model.digest, name),), predicate_type, predicate)
    if store is not None:
        with store.lease(()):
            return attach_statement(store, model, statement, key, watch)
    if reference is None:
        raise UsageError(f"{model.digest} names no registry", hint="name the model by reference")
    where = reference.with_digest(model.digest)
    with opened_model(where, None, remote, watch, writes=True) as (place, there):
        return attach_statement(place, there, statement, key, watch)
