"""Names: which model a name stands for, remembered until the store changes."""

from __future__ import annotations

import asyncio

from modelpack_engine.pool.catalogue import Catalogue, StoredModel


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

    def given(self) -> tuple[str, ...]:
        """Return the names that `give` gave."""
        return tuple(self._given)

    async def find(self, name: str) -> StoredModel:
        """Return the model; raise `NotFoundError`."""
        version = self._catalogue.version()
        if version != self._version:
            self._found.clear()
            self._version = version
        found = self._found.get(name)
        if found is None:
            target = self._given.get(name, name)
            found = await asyncio.to_thread(self._catalogue.find, target)
            self._found[name] = found
        return found
