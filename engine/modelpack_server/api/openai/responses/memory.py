"""The store of past responses and of conversations, both lists of items in memory."""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Any

from modelpack_engine.errors import RequestError
from modelpack_server.api.openai.responses.event_log import EventLog
from modelpack_server.api.openai.responses.requests import Item, new_id

#: The limit of responses and conversations together.
MAX_RESPONSES = 1024
MAX_BYTES = 64 * 1024 * 1024
#: The seconds for which responses are kept, as in Docker Model Runner; conversations are kept for
#: as long after their last change.
KEPT_FOR = 3600.0

_ENTRY = 560  # bytes of the dictionary entries for an item's id and identity
_REFERENCE = 8  # bytes of an item's reference in a conversation


@dataclass(frozen=True, slots=True)
class Remembered:
    """A response; `inputs` are all items before its output, including earlier turns.

    `events` are the events of its stream, if clients may read them again.
    """

    response: dict[str, Any]
    inputs: tuple[Item, ...]
    since: float
    events: EventLog | None = None

    @property
    def conversation(self) -> tuple[Item, ...]:
        """The items up to and including the output; instructions belong to their request only."""
        return (*self.inputs, *self.response["output"])


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as it was when it was looked up; its items have different ids."""

    id: str
    created_at: int
    metadata: dict[str, str]
    items: tuple[Item, ...]
    since: float

    def json(self) -> dict[str, Any]:
        """Return the object that clients see."""
        return {"id": self.id, "object": "conversation", "created_at": self.created_at,
                "metadata": self.metadata}  # fmt: skip

    def item(self, name: str) -> Item | None:
        """Return the item with this id, or None."""
        return next((item for item in self.items if item["id"] == name), None)


@dataclass(slots=True)
class _Held:
    """An item, its size in bytes, and the number of conversations that contain it."""

    item: Item
    size: int
    count: int = 0


@dataclass(frozen=True, slots=True)
class _Entry:
    """A response or a conversation with its items.

    `own` are the items that are found by id, `size` are the bytes of the rest.
    """

    value: Remembered | Conversation
    items: tuple[Item, ...]
    own: tuple[Item, ...]
    size: int


class ResponseMemory:
    """An in-memory store of responses and conversations, limited in number, bytes and age.

    Each entry belongs to the owner of a request (`gateway.caller`), and other owners can neither
    find nor remove it. The limits apply to all owners together. When one is exceeded, the owner
    with the largest share loses its least recently used entry, so that no owner can displace
    the entries of an owner with a smaller share.

    Sizes are bytes of memory. Responses and conversations share items, which count once. A
    response that exceeds the byte limit alone is not kept; a conversation is not changed if it
    would exceed it. All methods are thread-safe.
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

    # Responses

    def add(
        self,
        owner: str | None,
        response: dict[str, Any],
        earlier: Sequence[Item],
        own: Sequence[Item],
        events: EventLog | None = None,
    ) -> None:
        """Keep a response to `own` input after `earlier` items; enforce the limits."""
        kept = Remembered(response, (*earlier, *own), self._clock(), events)
        new = (*own, *response["output"])
        size = _size({**response, "output": None}) + _REFERENCE * len(kept.conversation)
        size += events.size if events is not None else 0
        entry = _Entry(kept, kept.conversation, new, size)
        self._put(owner, response["id"], entry, _sizes(new))

    def find(self, owner: str | None, name: str) -> Remembered | None:
        """Return the response with this id and mark it as used; None if there is none."""
        found = self._find(owner, name)
        return found if isinstance(found, Remembered) else None

    def remove(self, owner: str | None, name: str) -> bool:
        """Remove a response; return False if there is none."""
        return self._remove(owner, name, Remembered)

    # Conversations

    def create(
        self, owner: str | None, metadata: dict[str, str], items: Sequence[Item]
    ) -> Conversation:
        """Keep a new conversation and return it; enforce the limits.

        Raises `RequestError` if it exceeds the byte limit.
        """
        made = Conversation(new_id("conv"), int(time.time()), metadata, tuple(items), self._clock())
        if not self._put(owner, made.id, _entry(made), _sizes(items)):
            raise self._too_large()
        return made

    def conversation(self, owner: str | None, name: str) -> Conversation | None:
        """Return the conversation with this id and mark it as used; None if there is none."""
        found = self._find(owner, name)
        return found if isinstance(found, Conversation) else None

    def extend(self, owner: str | None, name: str, items: Sequence[Item]) -> Conversation | None:
        """Append items to a conversation and return it; None if there is none.

        An item whose id the conversation has got in the meantime gets a new id. Raises
        `RequestError` if the conversation would exceed the byte limit.
        """

        def extended(before: Conversation) -> Conversation:
            ids = {item["id"] for item in before.items}
            new = [item | {"id": new_id("item")} if item["id"] in ids else item for item in items]
            return replace(before, items=(*before.items, *new))

        return self._change(owner, name, extended, _sizes(items))

    def remove_item(self, owner: str | None, name: str, item: str) -> Conversation | None:
        """Remove an item from a conversation and return it; None if there is no such item."""

        def without(before: Conversation) -> Conversation | None:
            rest = tuple(one for one in before.items if one["id"] != item)
            return replace(before, items=rest) if len(rest) < len(before.items) else None

        return self._change(owner, name, without)

    def describe(
        self, owner: str | None, name: str, metadata: dict[str, str]
    ) -> Conversation | None:
        """Replace the metadata of a conversation and return it; None if there is none."""
        return self._change(owner, name, lambda before: replace(before, metadata=metadata))

    def remove_conversation(self, owner: str | None, name: str) -> bool:
        """Remove a conversation; return False if there is none. Responses keep its items."""
        return self._remove(owner, name, Conversation)

    # Both

    def item(self, owner: str | None, name: str) -> Item | None:
        """Return the item with this id, or None."""
        with self._lock:
            while (share := self._shares.get(owner)) is not None and name in share.items:
                entry, item = next(reversed(share.items[name].items()))
                if self._find(owner, entry) is not None:
                    return item
        return None

    def _find(self, owner: str | None, name: str) -> Remembered | Conversation | None:
        with self._lock:
            share = self._shares.get(owner)
            entry = share.kept.get(name) if share is not None else None
            if share is None or entry is None:
                return None
            if self._clock() - entry.value.since > self._kept_for:
                self._remove(owner, name)
                return None
            share.kept.move_to_end(name)
            return entry.value

    def _change(
        self,
        owner: str | None,
        name: str,
        changed: Callable[[Conversation], Conversation | None],
        sizes: Mapping[int, int] | None = None,
    ) -> Conversation | None:
        with self._lock:
            before = self.conversation(owner, name)
            after = changed(before) if before is not None else None
            if before is None or after is None:
                return None
            after = replace(after, since=self._clock())
            if not self._put(owner, name, _entry(after), sizes or {}):
                self._put(owner, name, _entry(before), {})
                raise self._too_large()
            return after

    def _put(self, owner: str | None, name: str, entry: _Entry, sizes: Mapping[int, int]) -> bool:
        """Keep an entry in place of any with its name; drop it and return False if it is too large.

        `sizes` are those of new items.
        """
        with self._lock:
            share = self._shares.setdefault(owner, _Share())
            if share.put(name, entry, sizes) > self._max_bytes:
                self._remove(owner, name)
                return False
            while len(self) > self._most:
                self._forget_oldest(lambda share: len(share.kept))
            while sum(share.bytes for share in self._shares.values()) > self._max_bytes:
                self._forget_oldest(lambda share: share.bytes)
            return True

    def _remove(
        self,
        owner: str | None,
        name: str,
        kind: type[Remembered | Conversation] | UnionType = Remembered | Conversation,
    ) -> bool:
        with self._lock:
            share = self._shares.get(owner)
            entry = share.kept.get(name) if share is not None else None
            if share is None or entry is None or not isinstance(entry.value, kind):
                return False
            share.remove(name)
            if not share.kept:
                del self._shares[owner]
            return True

    def _forget_oldest(self, amount: Callable[[_Share], int]) -> None:
        """Remove the least recently used entry of the owner with the largest share."""
        owner = max(self._shares, key=lambda owner: amount(self._shares[owner]))
        self._remove(owner, next(iter(self._shares[owner].kept)))

    def _too_large(self) -> RequestError:
        return RequestError(
            f"the conversation exceeds {self._max_bytes} bytes",
            param="conversation",
            hint="create another conversation",
        )


@dataclass(slots=True)
class _Share:
    """The entries of one owner, least recently used first.

    `items` are the items by id, each by the name of the entry that has it.
    """

    kept: OrderedDict[str, _Entry] = field(default_factory=OrderedDict)
    items: dict[str, dict[str, Item]] = field(default_factory=dict)
    bytes: int = 0
    _held: dict[int, _Held] = field(default_factory=dict)  # by identity: clients choose equal ids

    def put(self, name: str, entry: _Entry, sizes: Mapping[int, int]) -> int:
        """Keep an entry; return its bytes with all items. `sizes` are those of new items."""
        for item in entry.items:
            held = self._held.get(id(item))
            if held is None:
                size = sizes.get(id(item)) or _item_size(item)
                held = self._held[id(item)] = _Held(item, size)
                self.bytes += held.size
            held.count += 1
        self.remove(name)  # afterwards, so that items of both keep their sizes
        self.kept[name] = entry
        self.bytes += entry.size
        for item in entry.own:
            self.items.setdefault(item["id"], {})[name] = item
        return entry.size + sum(self._held[id(item)].size for item in entry.items)

    def remove(self, name: str) -> None:
        """Remove an entry, if there is one with this name."""
        entry = self.kept.pop(name, None)
        if entry is None:
            return
        self.bytes -= entry.size
        for item in entry.items:
            held = self._held[id(item)]
            held.count -= 1
            if held.count == 0:
                self.bytes -= held.size
                del self._held[id(item)]
        for item in entry.own:
            entries = self.items.get(item["id"], {})
            entries.pop(name, None)
            if not entries:
                self.items.pop(item["id"], None)


def _entry(value: Conversation) -> _Entry:
    size = _size(value.json()) + _REFERENCE * len(value.items)
    return _Entry(value, value.items, value.items, size)


def _sizes(items: Iterable[Item]) -> dict[int, int]:
    """Return the sizes of items by identity."""
    return {id(item): _item_size(item) for item in items}


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
