"""The store of past responses, which `previous_response_id` continues."""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelpack_server.api.openai.responses.requests import Item

MAX_RESPONSES = 1024
MAX_BYTES = 64 * 1024 * 1024
#: The seconds for which responses are kept, as in Docker Model Runner.
KEPT_FOR = 3600.0

_ENTRY = 320  # bytes of the dictionary entries for an item's id and identity
_REFERENCE = 8  # bytes of an item's reference in a conversation


@dataclass(frozen=True, slots=True)
class Remembered:
    """A response; `inputs` are all items before its output, including earlier turns."""

    response: dict[str, Any]
    inputs: tuple[Item, ...]
    since: float

    @property
    def conversation(self) -> tuple[Item, ...]:
        """The items up to and including the output; instructions belong to their request only."""
        return (*self.inputs, *self.response["output"])


@dataclass(slots=True)
class _Held:
    """An item, its size in bytes, and the number of conversations that contain it."""

    item: Item
    size: int
    count: int = 0


class ResponseMemory:
    """An in-memory store of responses, limited in number, bytes and age.

    Each response belongs to the owner of a request (`gateway.caller`), and other owners can neither
    find nor remove it. The limits apply to all owners together. When one is exceeded, the owner
    with the largest share loses its least recently used response, so that no owner can displace
    the responses of an owner with a smaller share.

    Sizes are bytes of memory. The turns of a conversation share items, which count once. A
    conversation that exceeds the byte limit alone is not kept. All methods are thread-safe.
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
        self._shares: dict[str | None, _Share] = {}  # without empty shares
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return sum(len(share.kept) for share in self._shares.values())

    def add(
        self,
        owner: str | None,
        response: dict[str, Any],
        earlier: Sequence[Item],
        own: Sequence[Item],
    ) -> None:
        """Keep a response to `own` input after `earlier` items; enforce the limits."""
        kept = Remembered(response, (*earlier, *own), self._clock())
        sizes = {id(item): _item_size(item) for item in (*own, *response["output"])}
        own_size = _size({**response, "output": None}) + _REFERENCE * len(kept.conversation)
        with self._lock:
            name = response["id"]
            self.remove(owner, name)
            share = self._shares.setdefault(owner, _Share())
            if share.add(kept, own, own_size, sizes) > self._max_bytes:
                self.remove(owner, name)
            while len(self) > self._most:
                self._forget_oldest(lambda share: len(share.kept))
            while sum(share.bytes for share in self._shares.values()) > self._max_bytes:
                self._forget_oldest(lambda share: share.bytes)

    def find(self, owner: str | None, name: str) -> Remembered | None:
        """Return the response with this id and mark it as used; None if there is none."""
        with self._lock:
            share = self._shares.get(owner)
            kept = share.kept.get(name) if share is not None else None
            if share is None or kept is None:
                return None
            if self._clock() - kept.since > self._kept_for:
                self.remove(owner, name)
                return None
            share.kept.move_to_end(name)
            return kept

    def item(self, owner: str | None, name: str) -> Item | None:
        """Return the item with this id, or None."""
        with self._lock:
            share = self._shares.get(owner)
            response, item = share.items.get(name, ("", {})) if share is not None else ("", {})
            return item if response and self.find(owner, response) is not None else None

    def remove(self, owner: str | None, name: str) -> bool:
        """Remove a response; return False if there is none."""
        with self._lock:
            share = self._shares.get(owner)
            if share is None or not share.remove(name):
                return False
            if not share.kept:
                del self._shares[owner]
            return True

    def _forget_oldest(self, amount: Callable[[_Share], int]) -> None:
        """Remove the least recently used response of the owner with the largest share."""
        owner = max(self._shares, key=lambda owner: amount(self._shares[owner]))
        self.remove(owner, next(iter(self._shares[owner].kept)))


class _Share:
    """The responses of one owner, least recently used first."""

    def __init__(self) -> None:
        self.kept: OrderedDict[str, Remembered] = OrderedDict()
        self.items: dict[str, tuple[str, Item]] = {}  # by item id: the response's id, and the item
        self.bytes = 0
        self._sizes: dict[str, int] = {}  # bytes of responses without their items
        self._held: dict[int, _Held] = {}  # by identity, since clients may choose equal ids

    def add(
        self, kept: Remembered, own: Sequence[Item], own_size: int, sizes: Mapping[int, int]
    ) -> int:
        """Keep a response; return the bytes of its conversation.

        `own_size` is the size of the response without its items, `sizes` those of new items.
        """
        name = kept.response["id"]
        self.kept[name] = kept
        self._sizes[name] = own_size
        self.bytes += own_size
        for item in kept.conversation:
            held = self._held.get(id(item))
            if held is None:
                size = sizes.get(id(item)) or _item_size(item)
                held = self._held[id(item)] = _Held(item, size)
                self.bytes += held.size
            held.count += 1
        for item in (*own, *kept.response["output"]):
            self.items[item["id"]] = (name, item)
        return own_size + sum(self._held[id(item)].size for item in kept.conversation)

    def remove(self, name: str) -> bool:
        """Remove a response; return False if there is none."""
        kept = self.kept.pop(name, None)
        if kept is None:
            return False
        self.bytes -= self._sizes.pop(name)
        for item in kept.conversation:
            held = self._held[id(item)]
            held.count -= 1
            if held.count == 0:
                self.bytes -= held.size
                del self._held[id(item)]
            if self.items.get(item["id"], ("",))[0] == name:
                del self.items[item["id"]]
        return True


def _item_size(item: Item) -> int:
    return _ENTRY + _size(item)


def _size(value: Any) -> int:
    """Return the bytes of memory of a JSON value; a shared string counts each time."""
    size, pending = 0, [value]
    while pending:
        value = pending.pop()
        size += sys.getsizeof(value)
        if isinstance(value, dict):
            pending += value
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return size
