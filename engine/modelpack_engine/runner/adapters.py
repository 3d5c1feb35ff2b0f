"""AdapterSet: the LoRA adapters that an engine knows, of which a limited number is in memory.

Requests acquire an adapter by name. If it is not in memory, it is loaded in place of the one that
was used least recently; adapters of unfinished requests stay, even if they are removed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn

from modelpack.errors import NotFoundError
from modelpack.formats.adapter import Adapter
from modelpack_engine.attention.metadata import AdapterRows
from modelpack_engine.errors import RETRY_AFTER, QueueFullError
from modelpack_engine.models.adapter import read_layers
from modelpack_engine.patches.lora import LoRALayers, nbytes


@dataclass(slots=True)
class _Known:
    adapter: Adapter
    identity: str
    slot: int | None = None
    nbytes: int = 0
    #: The requests that use it; finished ones are removed when a slot is needed.
    requests: set[str] = field(default_factory=set)


class AdapterSet:
    """The adapters of one model, of which at most `max_loaded` are in memory.

    `config` is the model's; `is_running` returns whether a request is unfinished.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        rows: AdapterRows,
        max_loaded: int,
        is_running: Callable[[str], bool],
    ) -> None:
        self._model, self._config = model, config
        self._max_loaded, self._is_running = max_loaded, is_running
        self._layers = LoRALayers(model, rows)
        self._known: dict[str, _Known] = {}  # the least recently used one first
        self._removed: list[_Known] = []  # those that unfinished requests use

    @property
    def nbytes(self) -> int:
        """The bytes of the matrices in memory, which are held twice while rows differ."""
        return 2 * sum(known.nbytes for known in (*self._known.values(), *self._removed))

    def loaded(self) -> list[str]:
        """Return the names of the adapters in memory, the least recently used one first."""
        return [name for name, known in self._known.items() if known.slot is not None]

    @property
    def has_removed(self) -> bool:
        """Whether unfinished requests may use a removed adapter."""
        return bool(self._removed)

    def names(self) -> list[str]:
        """Return the names of all adapters, sorted."""
        return sorted(self._known)

    def add(self, name: str, adapter: Adapter, identity: str) -> None:
        """Add an adapter, in place of one of this name, and load it if there is room.

        `identity` stands for its content in the prefix cache. Raises `AdapterError` if it does not
        fit the model.
        """
        known = _Known(adapter, identity)
        layers = read_layers(adapter, self._model, self._config)
        if name in self._known:
            self.remove(name)
        slot = self._free_slot()
        self._known[name] = known
        if slot is not None:
            self._layers.set(slot, layers)
            known.slot, known.nbytes = slot, nbytes(layers.values())

    def remove(self, name: str) -> None:
        """Forget an adapter: unfinished requests keep it, new ones cannot acquire it.

        Raises `NotFoundError` if it is unknown.
        """
        self._removed.append(self._find(name))
        del self._known[name]
        self.unload_removed()

    def unload_removed(self) -> None:
        """Free the memory of removed adapters whose last request has ended."""
        used = []
        for known in self._removed:
            if self._used(known):
                used.append(known)
            else:
                self._unload(known)
        self._removed = used

    def acquire(self, name: str, request_id: str) -> tuple[int, str]:
        """Return the slot and the identity of an adapter for a request, loading it if needed.

        Raises `NotFoundError` for an unknown name, and `QueueFullError` if unfinished requests use
        as many other adapters as fit.
        """
        known = self._find(name)
        self._known[name] = self._known.pop(name)
        if known.slot is None:
            slot = self._free_slot()
            if slot is None:
                idle = [one for one in self._known.values() if one.slot and not self._used(one)]
                if not idle:
                    text = f"requests use {self._max_loaded} other adapters"
                    raise QueueFullError(text, retry_after=RETRY_AFTER)
                slot = idle[0].slot
                assert slot is not None, "it is in memory"
                self._unload(idle[0])
            layers = read_layers(known.adapter, self._model, self._config)
            self._layers.set(slot, layers)
            known.slot, known.nbytes = slot, nbytes(layers.values())
        known.requests.add(request_id)
        return known.slot, known.identity

    def release(self, name: str, request_id: str) -> None:
        """Undo `acquire` for a request that was not accepted."""
        self._find(name).requests.discard(request_id)

    def _find(self, name: str) -> _Known:
        known = self._known.get(name)
        if known is None:
            raise NotFoundError(f"no such adapter: {name}")
        return known

    def _free_slot(self) -> int | None:
        taken = {known.slot for known in (*self._known.values(), *self._removed)}
        return next((s for s in range(1, self._max_loaded + 1) if s not in taken), None)

    def _used(self, known: _Known) -> bool:
        known.requests = {one for one in known.requests if self._is_running(one)}
        return bool(known.requests)

    def _unload(self, known: _Known) -> None:
        if known.slot is not None:
            self._layers.set(known.slot, {})
            known.slot, known.nbytes = None, 0
