"""Model names in a pool, and which models the caller of the current request may use.

The server sets the caller of each request. The pool uses this module for each lookup of a name and
each list of models, so that routes need no checks of their own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING

from modelpack.artifacts.reference import DEFAULT_REGISTRY, DEFAULT_TAG, Reference
from modelpack.errors import InvalidReferenceError, ModelpackError, NotFoundError
from modelpack_server.pool.adapters import base_of
from modelpack_server.pool.catalogue import Catalogue, StoredModel

if TYPE_CHECKING:
    from modelpack_server.gateway.caller import Caller

_HUB = "huggingface.co/"
_caller: ContextVar[Caller | None] = ContextVar("modelpack_caller", default=None)


@contextmanager
def acting_for(caller: Caller) -> Iterator[None]:
    """Make `caller` the caller of the current request in the block and in tasks that it starts."""
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)


def owner() -> str | None:
    """Return the name of the current request's API key, or None."""
    caller = _caller.get()
    return None if caller is None else caller.owner


def is_restricted() -> bool:
    """Return whether the current request may use only some models and may not manage models."""
    caller = _caller.get()
    return caller is not None and caller.is_restricted


def view_of(model: StoredModel, aliases: Iterable[str] = ()) -> StoredModel | None:
    """Return the model with the names that the current request may see; None if it may use none.

    `aliases` are additional names that the server gives the model. A name matches if any of its
    spellings matches a pattern of the API key. An id matches only a pattern equal to it.
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
    """Return the spellings of a name: with and without registry, `ai/` and `latest`.

    Source: the rules of `modelpack.artifacts.reference`.
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


_log = logging.getLogger(__name__)

#: The limit of characters in a name.
MAX_NAME = 1024
# The limit of cached names, since one model has many spellings.
_MOST_FOUND = 4096


class Names:
    """Lookup of a catalogue's models by name, including aliases."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._given: dict[str, str] = {}
        self._found: dict[str, StoredModel] = {}
        self._version: object = None

    def give(self, name: str, target: str) -> None:
        """Add the alias `name` for the model `target`."""
        self._given[name] = target

    async def given(self) -> dict[str, StoredModel]:
        """Return the aliases and their models that the current request may see.

        Aliases of removed models are omitted.
        """
        found = {}
        for name in self._given:
            try:
                model = self.view_of(await self._resolved(name))
            except ModelpackError:
                continue
            if model is not None and (name in model.names or not is_restricted()):
                found[name] = model
        return found

    async def find(self, name: str) -> StoredModel:
        """Return the model if the current request may use it; raise `NotFoundError`.

        For a restricted API key, every failure is the same error: other errors would reveal ids and
        names of other models.
        """
        try:
            model = await self._resolved(name)
        except ModelpackError as error:
            if not is_restricted():
                raise
            _log.info("a restricted API key named a model that cannot be found: %s", error)
        else:
            if self.view_of(model) is not None:
                return model
        raise NotFoundError(f"no such model: {name}")

    async def base_of(self, adapter: StoredModel) -> StoredModel:
        """Return the base of an adapter, even if the request may only use the adapter."""
        return await self._resolved(adapter.base)

    def view_of(self, model: StoredModel) -> StoredModel | None:
        """Return the model with the names that the current request may see, or None."""
        return view_of(model, self._names_given_to(model))

    def _names_given_to(self, model: StoredModel) -> list[str]:
        named = []
        for name, target in self._given.items():
            found = self._found.get(name)
            if model.key == target or (found is not None and found.key == model.key):
                named.append(name)
        return named

    async def _resolved(self, name: str) -> StoredModel:
        version = self._catalogue.version()
        if version != self._version:
            self._found.clear()
            self._version = version
        found = self._found.get(name)
        if found is None:
            if len(name) > MAX_NAME:
                raise NotFoundError(f"no such model: {name[:100]}…")
            target = self._given.get(name, name)
            base, adapter = base_of(name)
            if target == name and base in self._given:
                target = f"{self._given[base]}:{adapter}"
            found = await asyncio.to_thread(self._catalogue.find, target)
            if version == self._version:  # otherwise the model may be outdated
                if len(self._found) >= _MOST_FOUND:
                    self._found = {n: m for n, m in self._found.items() if n in self._given}
                self._found[name] = found
        return found
