"""Access: which models the current request may use, by the names of the model it resolved to.

The server sets the caller for the time of each request; the pool asks here whenever a name becomes
a model and whenever it lists models, so that no route decides by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING

from modelpack.errors import InvalidReferenceError
from modelpack.reference import DEFAULT_REGISTRY, DEFAULT_TAG, Reference
from modelpack_server.pool.catalogue import StoredModel

if TYPE_CHECKING:
    from modelpack_server.gateway.caller import Caller

_HUB = "huggingface.co/"
_caller: ContextVar[Caller | None] = ContextVar("modelpack_caller", default=None)


@contextmanager
def acting_for(caller: Caller) -> Iterator[None]:
    """Have the pool answer for `caller` in the block, and in the tasks that start there."""
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)


def owner() -> str | None:
    """Return the name of the API key of the current request; None without one."""
    caller = _caller.get()
    return None if caller is None else caller.owner


def is_restricted() -> bool:
    """Return whether the current request may only use some models, and manage none."""
    caller = _caller.get()
    return caller is not None and caller.is_restricted


def view_of(model: StoredModel, aliases: Iterable[str] = ()) -> StoredModel | None:
    """Return the model with the names that the current request may see, None if it may not use it.

    `aliases` are names that the server gives the model besides those in the store. A name allows
    the model if any of its spellings matches a pattern of the key; an id does if it is the pattern.
    """
    caller = _caller.get()
    if caller is None or caller.models is None:
        return model
    names = tuple(n for n in (*model.names, *aliases) if caller.allows(spellings(n)))
    pulled = [f"{place}@{model.key}" for place in model.origins]
    ids = (model.key, model.key.removeprefix("sha256:"))
    if not (
        names
        or any(caller.allows(spellings(name)) for name in pulled)
        or any(text in caller.models for text in ids)
    ):
        return None
    return replace(model, names=names, origins=())


def spellings(name: str) -> tuple[str, ...]:
    """Return the ways in which users write a name: with and without registry, `ai/` and `latest`.

    Source: the rules of `modelpack.reference`.
    """
    try:
        reference = Reference.parse(name, default_registry=DEFAULT_REGISTRY)
    except InvalidReferenceError:
        return (name,)
    whole = str(reference)
    found = {name, whole, reference.familiar, whole.removeprefix(f"{DEFAULT_REGISTRY}/")}
    if whole.startswith(_HUB):
        found.add("hf.co/" + whole.removeprefix(_HUB))
    end = f":{DEFAULT_TAG}"
    if reference.tag == DEFAULT_TAG and reference.digest is None:
        found |= {text.removesuffix(end) for text in found} | {reference.familiar + end}
    return tuple(sorted(found))
