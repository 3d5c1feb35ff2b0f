"""ResponseMemory: what was answered, so that a conversation can go on from there."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from modelpack_engine.server.openai.responses.items import Item

MAX_RESPONSES = 1024
MAX_BYTES = 64 * 1024 * 1024
#: Seconds; Docker Model Runner keeps them as long.
KEPT_FOR = 3600.0


@dataclass(frozen=True, slots=True)
class Remembered:
    """A response; `inputs` is all that came before its output, earlier turns included."""

    response: dict[str, Any]
    inputs: tuple[Item, ...]
    since: float

    @property
    def conversation(self) -> tuple[Item, ...]:
        """All that was said, the answer included; instructions are each request's own."""
        return (*self.inputs, *self.response["output"])


@dataclass(slots=True)
class _Held:
    """An item, how large it is, and in how many conversations it stands."""

    item: Item
    size: int
    count: int = 0


class ResponseMemory:
    """Keeps the responses that were used last, in memory: so many, so large, for so long.

    The turns of a conversation share their items, which count once. A conversation that is larger
    than all that may be kept is not remembered.
    """

    def __init__(
        self,
        *,
        most: int = MAX_RESPONSES,
        max_bytes: int = MAX_BYTES,
        kept_for: float = KEPT_FOR,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._max_bytes = max_bytes
        self._kept_for = kept_for
        self._clock = clock
        self._kept: OrderedDict[str, Remembered] = OrderedDict()
        self._held: dict[int, _Held] = {}  # by identity: clients choose ids as they like
        self._owners: dict[str, tuple[str, Item]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, response: dict[str, Any], earlier: Sequence[Item], own: Sequence[Item]) -> None:
        """Remember a response to `own` input after `earlier` turns; forget what is too much."""
        name = response["id"]
        self.remove(name)
        kept = self._kept[name] = Remembered(response, (*earlier, *own), self._clock())
        for item in kept.conversation:
            held = self._held.get(id(item))
            if held is None:
                held = self._held[id(item)] = _Held(item, _size(item))
                self._bytes += held.size
            held.count += 1
        for item in (*own, *response["output"]):
            self._owners[item["id"]] = (name, item)
        if sum(self._held[id(item)].size for item in kept.conversation) > self._max_bytes:
            self.remove(name)
        while len(self._kept) > self._most or self._bytes > self._max_bytes:
            self.remove(next(iter(self._kept)))

    def find(self, name: str) -> Remembered | None:
        """Return what is remembered under an id, which then counts as used; None if nothing is."""
        kept = self._kept.get(name)
        if kept is None:
            return None
        if self._clock() - kept.since > self._kept_for:
            self.remove(name)
            return None
        self._kept.move_to_end(name)
        return kept

    def item(self, name: str) -> Item | None:
        """Return the item of an id; None if it is not remembered."""
        owner, item = self._owners.get(name, ("", {}))
        return item if owner and self.find(owner) is not None else None

    def remove(self, name: str) -> bool:
        """Forget a response; False if there is none."""
        kept = self._kept.pop(name, None)
        if kept is None:
            return False
        for item in kept.conversation:
            held = self._held[id(item)]
            held.count -= 1
            if held.count == 0:
                self._bytes -= held.size
                del self._held[id(item)]
            if self._owners.get(item["id"], ("",))[0] == name:
                del self._owners[item["id"]]
        return True


def _size(item: Item) -> int:
    return len(json.dumps(item, ensure_ascii=False).encode(errors="replace"))
