"""Names: which model a name stands for, remembered until the store changes."""

from __future__ import annotations

import asyncio
import logging

from modelpack.errors import ModelpackError, NotFoundError
from modelpack_server.pool import access
from modelpack_server.pool.catalogue import Catalogue, StoredModel

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
            if model is not None and (name in model.names or not access.is_restricted()):
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
            if not access.is_restricted():
                raise
            _log.info("a restricted API key named a model that cannot be found: %s", error)
        else:
            if self.view_of(model) is not None:
                return model
        raise NotFoundError(f"no such model: {name}")

    def view_of(self, model: StoredModel) -> StoredModel | None:
        """Return the model as the current request may see it; None if it may not use it."""
        return access.view_of(model, self._names_given_to(model))

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
