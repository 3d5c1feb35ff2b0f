"""Pins: the models that are to stay, from the start on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from modelpack_server.pool.entry import Entry, ModelState
from modelpack_server.pool.settings import ModelSettings


@dataclass(slots=True)
class Pin:
    """One of them; `failure` is why it could not even be found."""

    settings: ModelSettings | None
    entry: Entry | None = None
    failure: Exception | None = None


class Pins:
    """Those of a pool, by the names that were given."""

    def __init__(self) -> None:
        self._pins: dict[str, Pin] = {}

    def __iter__(self) -> Iterator[tuple[str, Pin]]:
        return iter(list(self._pins.items()))

    def add(self, name: str, settings: ModelSettings | None) -> None:
        """Have a model stay."""
        self._pins[name] = Pin(settings)

    def remove(self, entry: Entry) -> None:
        """Let a model go."""
        entry.pinned = False
        self._pins = {name: pin for name, pin in self._pins.items() if pin.entry is not entry}

    def readiness(self) -> tuple[bool, str]:
        """Return whether all are loaded, and if not, why."""
        for name, pin in self._pins.items():
            entry = pin.entry
            if entry is not None and entry.state is ModelState.READY:
                continue
            failure = pin.failure or (entry.failure if entry is not None else None)
            if failure is not None:
                return False, f"the model {name} could not be loaded: {told(failure)}"
            return False, f"the model {name} is being loaded"
        return True, ""


def told(failure: Exception) -> str:
    """Return what an error says, with what to do about it where it knows."""
    hint = getattr(failure, "hint", None)
    return f"{failure}. {hint}" if hint else str(failure)
