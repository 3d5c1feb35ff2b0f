"""The last requests for text and what was answered, for GET /engines/requests.

Source: Docker Model Runner, pkg/metrics/openai_recorder.go.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from modelpack_server.api.runner.joining import joined

# As many as Docker Model Runner keeps of a model.
_KEPT = 10
_GROUPS = 256
_WAITING = 100


@dataclass(frozen=True, slots=True)
class Record:
    """One request that has ended; `owner` is its caller's, None without keys.

    `request` is JSON, `response` the reply as it was sent, or `error` is in its place. Streams are
    joined when they are shown: few ever are, and it takes as long as streaming them.
    """

    id: str
    key: str
    model: str
    method: str
    url: str
    request: str
    response: str
    error: str
    timestamp: int
    status_code: int
    user_agent: str
    origin: str
    owner: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the object that clients see."""
        response, error = joined(self.response) if self.response else ("", self.error)
        shown: dict[str, Any] = {
            "id": self.id, "model": self.model, "method": self.method, "url": self.url,
            "request": self.request, "response": response, "error": error,
            "timestamp": self.timestamp, "status_code": self.status_code,
            "user_agent": self.user_agent, "origin": self.origin,
        }  # fmt: skip
        optional = ("response", "error", "user_agent", "origin")
        return {name: value for name, value in shown.items() if value or name not in optional}


class Records:
    """The last records of each model and owner, and the followers of new ones; of one event loop.

    Owners do not displace each other's records: of most groups of a model and an owner, the one
    used least recently is dropped as a whole.
    """

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, str | None], deque[Record]] = OrderedDict()
        self._followers: set[tuple[str | None, asyncio.Queue[Record]]] = set()

    def add(self, record: Record) -> None:
        """Keep a record and pass it to its owner's followers."""
        name = (record.key, record.owner)
        self._groups.setdefault(name, deque(maxlen=_KEPT)).append(record)
        self._groups.move_to_end(name)
        if len(self._groups) > _GROUPS:
            self._groups.popitem(last=False)
        for owner, queue in self._followers:
            if owner == record.owner:
                with suppress(asyncio.QueueFull):  # who reads too slowly misses some
                    queue.put_nowait(record)

    def kept(self, key: str | None, owner: str | None) -> dict[str, list[Record]]:
        """Return an owner's records of the model `key`, or of all, by model."""
        return {
            model: list(records)
            for (model, whose), records in self._groups.items()
            if whose == owner and key in (None, model)
        }

    async def follow(self, key: str | None, owner: str | None) -> AsyncGenerator[Record, None]:
        """Yield an owner's records as they come."""
        queue: asyncio.Queue[Record] = asyncio.Queue(_WAITING)
        follower = (owner, queue)
        self._followers.add(follower)
        try:
            while True:
                record = await queue.get()
                if key in (None, record.key):
                    yield record
        finally:
            self._followers.discard(follower)
