"""The last requests for text and what was answered, for GET /engines/requests.

Source: Docker Model Runner, pkg/metrics/openai_recorder.go.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from modelpack_engine.server.runner.joining import joined

# As many as Docker Model Runner keeps of a model.
_KEPT = 10
_WAITING = 100


@dataclass(frozen=True, slots=True)
class Record:
    """One request that has ended; `owner` is the API key that it came with, None without keys.

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
    """The last records of each model, and those who wait for new ones; of one event loop."""

    def __init__(self) -> None:
        self._models: dict[str, deque[Record]] = {}
        self._followers: set[asyncio.Queue[Record]] = set()

    def add(self, record: Record) -> None:
        """Keep a record and tell it to followers."""
        self._models.setdefault(record.key, deque(maxlen=_KEPT)).append(record)
        for queue in self._followers:
            with suppress(asyncio.QueueFull):  # who reads too slowly misses some
                queue.put_nowait(record)

    def kept(self, key: str | None, owner: str | None) -> dict[str, list[Record]]:
        """Return the records of the model `key`, or of all, by model; only those of `owner`."""
        keys = list(self._models) if key is None else [key]
        mine = {k: [r for r in self._models.get(k, ()) if r.owner == owner] for k in keys}
        return {k: records for k, records in mine.items() if records}

    async def follow(self, key: str | None, owner: str | None) -> AsyncGenerator[Record, None]:
        """Yield records as they come."""
        queue: asyncio.Queue[Record] = asyncio.Queue(_WAITING)
        self._followers.add(queue)
        try:
            while True:
                record = await queue.get()
                if record.owner == owner and key in (None, record.key):
                    yield record
        finally:
            self._followers.discard(queue)
