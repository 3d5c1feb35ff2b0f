"""AdapterSet: the LoRA adapters that an engine knows, of which a limited number is in memory.

Requests name an adapter when they are queued. When the scheduler admits one, its adapter is loaded,
if it is not in memory, in place of the one that was used least recently and that no started request
uses. Adapters of unfinished requests stay, even if they are removed meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import mlx.nn as nn

from modelpack.errors import ModelpackError, NotFoundError
from modelpack.formats.adapter import Adapter, AdapterError
from modelpack_engine.attention.metadata import AdapterRows
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.layers.cross_attention import SHARED
from modelpack_engine.models.adapter import read_layers
from modelpack_engine.patches.lora import Layers, LoRALayers, nbytes


@dataclass(slots=True, eq=False)
class KnownAdapter:
    """An adapter, and the unfinished sequences that use it."""

    #: None for the model's own.
    adapter: Adapter | None
    identity: str
    #: Those that wait for their first step, and those that have started: it stays in memory.
    waiting: set[Sequence] = field(default_factory=set)
    started: set[Sequence] = field(default_factory=set)
    slot: int | None = None
    nbytes: int = 0
    #: Its matrices, read when it was removed, since its files may be gone later.
    layers: Layers | None = None


class AdapterSet:
    """The adapters of one model, of which at most `max_loaded` are in memory.

    `config` is the model's. `own` are the matrices of an adapter that the model has for prompts
    with files. It stays in memory beside the others; the engine gives `for_files` to sequences with
    such prompts.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        rows: AdapterRows,
        max_loaded: int,
        own: Layers = MappingProxyType({}),
    ) -> None:
        self._model, self._config, self._max_loaded = model, config, max_loaded
        self._layers = LoRALayers(model, rows)
        self.for_files: KnownAdapter | None = None
        if own:
            self.for_files = KnownAdapter(None, "for files", slot=1)
            self.place(1, own)
        self._known: dict[str, KnownAdapter] = {}  # the least recently used one first
        self._removed: list[KnownAdapter] = []  # those that unfinished requests use
        self._failures: dict[Sequence, ModelpackError] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of the matrices in memory, which are held twice while rows differ."""
        return 2 * sum(known.nbytes for known in self._all())

    def loaded(self) -> list[str]:
        """Return the names of the adapters in memory, the least recently used one first."""
        return [name for name, known in self._known.items() if known.slot is not None]

    def close(self) -> None:
        """Restore the model's layers, and free the memory of all adapters."""
        self._layers.undo()

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
        layers = self.read(adapter)
        for path in layers:
            if path.endswith(SHARED):
                raise AdapterError(
                    f"{path} cannot have adapters of requests: its outputs are kept with pictures",
                    path=str(adapter.weights),
                    hint="merge the adapter (--merge), or train it on other layers",
                )
        if name in self._known:
            self.remove(name)
        slot = self._free_slot()
        known = KnownAdapter(adapter, identity)
        if slot is not None:
            self._load(known, slot, layers)
        self._known[name] = known

    def remove(self, name: str) -> None:
        """Forget an adapter: unfinished requests keep it, new ones cannot name it.

        Raises `NotFoundError` if it is unknown, and `AdapterError` if waiting sequences need files
        of it that cannot be read.
        """
        known = self.find(name)
        if _unfinished(known.waiting):
            known.layers = self._read(known)
        self._removed.append(known)
        del self._known[name]
        self.unload_removed()

    def unload_removed(self) -> None:
        """Free the memory of removed adapters whose last request has ended."""
        used = []
        for known in self._removed:
            if _unfinished(known.waiting) or _unfinished(known.started):
                used.append(known)
            else:
                self._unload(known)
        self._removed = used

    def find(self, name: str) -> KnownAdapter:
        """Return an adapter, for `Sequence.adapter`; raise `NotFoundError` if it is unknown."""
        known = self._known.get(name)
        if known is None:
            raise NotFoundError(f"no such adapter: {name}")
        return known

    # Admission, as `core.scheduler.AdapterSlots`

    def queue(self, sequence: Sequence) -> None:
        """Keep the sequence's adapter until it has ended."""
        if isinstance(sequence.adapter, KnownAdapter):
            sequence.adapter.waiting.add(sequence)

    def can_admit(self, sequence: Sequence) -> bool:
        """Return whether the sequence's adapter is in memory, or can be loaded, which is done.

        If it cannot be read, `take_failures` returns the sequence.
        """
        known = sequence.adapter
        if not isinstance(known, KnownAdapter) or known.slot is not None:
            return True
        slot = self._free_slot()
        idle = None if slot is not None else next(self._idle(), None)
        if (slot is None and idle is None) or sequence in self._failures:
            return False
        try:
            layers = self._read(known)
            if idle is not None:
                slot = idle.slot
                self._unload(idle)
            assert slot is not None, "it is free, or an adapter gave it up"
            self._load(known, slot, layers)
        except ModelpackError as error:
            self._failures[sequence] = error
            return False
        return True

    def may_overtake(self, sequence: Sequence) -> bool:
        """Return whether a sequence needs no slot for which another waits.

        New requests do not get the adapter that was used least recently: its slot becomes free when
        those that started have ended.
        """
        known = sequence.adapter
        if not isinstance(known, KnownAdapter) or sequence in known.started:
            return True
        oldest = next((one for one in self._known.values() if one.slot is not None), None)
        return known.slot is not None and known is not oldest

    def admit(self, sequence: Sequence) -> None:
        """Set the sequence's slot; its adapter stays in memory until it has ended."""
        known = sequence.adapter
        if not isinstance(known, KnownAdapter):
            return
        assert known.slot is not None, "`can_admit` or `may_overtake` has returned True"
        sequence.adapter_slot = known.slot
        known.waiting.discard(sequence)
        known.started.add(sequence)
        for name, one in self._known.items():
            if one is known:
                self._known[name] = self._known.pop(name)
                break

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        if isinstance(sequence.adapter, KnownAdapter):
            sequence.adapter.waiting.discard(sequence)
            sequence.adapter.started.discard(sequence)

    def take_failures(self) -> list[tuple[Sequence, ModelpackError]]:
        """Return the sequences whose adapters could not be read, each of them once."""
        failures, self._failures = self._failures, {}
        return list(failures.items())

    # Details

    def _all(self) -> Iterator[KnownAdapter]:
        yield from self._known.values()
        yield from self._removed

    def _free_slot(self) -> int | None:
        taken = {known.slot for known in self._all()}
        first = 1 if self.for_files is None else 2
        slots = range(first, first + self._max_loaded)
        return next((slot for slot in slots if slot not in taken), None)

    def _idle(self) -> Iterator[KnownAdapter]:
        """Yield the adapters in memory that no started sequence uses, the oldest one first."""
        return (
            known
            for known in self._all()
            if known.slot is not None and not _unfinished(known.started)
        )

    def _read(self, known: KnownAdapter) -> Layers:
        if known.layers is not None:
            return known.layers
        assert known.adapter is not None, "the model's own is in memory"
        return self.read(known.adapter)

    def _load(self, known: KnownAdapter, slot: int, layers: Layers) -> None:
        known.nbytes = self.place(slot, layers)
        known.slot = slot

    def _unload(self, known: KnownAdapter) -> None:
        if known.slot is not None:
            self.place(known.slot, {})
            known.slot, known.nbytes = None, 0

    # `distributed.adapters.DividedAdapters`, over several devices, overrides these two methods.

    def read(self, adapter: Adapter) -> Layers:
        """Return the matrices of an adapter; raise `AdapterError` if it does not fit the model."""
        return read_layers(adapter, self._model, self._config)

    def place(self, slot: int, layers: Layers) -> int:
        """Put matrices into a slot, {} for none; return the bytes that they take on this device."""
        self._layers.set(slot, layers)
        return nbytes(layers.values())


def _unfinished(sequences: set[Sequence]) -> bool:
    """Return whether a sequence is unfinished, and forget those that are not."""
    sequences.difference_update([one for one in sequences if one.is_finished])
    return bool(sequences)
