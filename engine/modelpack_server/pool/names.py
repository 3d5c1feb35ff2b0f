"""Model names in a pool, and which models the caller of the current request may use.

The server sets the caller for the time of each request; the pool asks here whenever a name becomes
a model and whenever it lists models, so that no route decides by itself.
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
from modelpack_server.pool.catalogue import Catalogue, StoredModel

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

#: Characters of a name; what is longer names no model.
MAX_NAME = 1024
# Names that are remembered: clients choose among many spellings of one.
_MOST_FOUND = 4096


class Names:
    """The names of a catalogue's models, and further ones that were given."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._given: dict[str, str] = {}
        self._found: dict[str, StoredModel] = {}
        self._version: object = None

    def give(self, name: str, target: str) -> None:
        """Have `name` stand for the model `target` as well."""
        self._given[name] = target

    async def given(self) -> dict[str, StoredModel]:
        """Return the models behind the names that `give` gave, as far as the request may see them.

        Names whose models are gone are left out.
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
        """Return the model, if the current request may use it; raise `NotFoundError`.

        A request that may only use some models gets the same error whatever is wrong: other errors
        tell of ids and names of models that it may not know of.
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

    def view_of(self, model: StoredModel) -> StoredModel | None:
        """Return the model as the current request may see it; None if it may not use it."""
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
            found = await asyncio.to_thread(self._catalogue.find, target)
            if version == self._version:  # else it may be what the name stood for before
                if len(self._found) >= _MOST_FOUND:
                    self._found = {n: m for n, m in self._found.items() if n in self._given}
                self._found[name] = found
        return found
