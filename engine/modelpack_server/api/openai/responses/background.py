"""Responses that are generated in the background: they go on when the client disconnects."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

from starlette.exceptions import HTTPException

from modelpack.errors import ModelpackError
from modelpack_engine.errors import QueueFullError
from modelpack_server.api.errors import problem_of
from modelpack_server.api.openai.responses.event_log import EventLog
from modelpack_server.api.openai.responses.memory import Remembered
from modelpack_server.api.openai.responses.replies import Reply
from modelpack_server.api.openai.responses.requests import Item

#: The limits of responses that run at the same time, for each API key and in all.
MAX_RUNNING_OF_OWNER = 64
MAX_RUNNING = 256
#: The limit of bytes of all running responses' events. The longest logs drop their oldest events.
MAX_EVENT_BYTES = 64 * 1024 * 1024
_RETRY_AFTER = 5.0  # seconds

_log = logging.getLogger(__name__)


class BackgroundResponse:
    """A response that its own task generates; `inputs` are all items before its output.

    `events` are the events of its stream if the client may read these again.
    """

    def __init__(self, reply: Reply, inputs: Sequence[Item], events: EventLog | None) -> None:
        self.reply = reply
        self.events = events
        self.is_deleted = False
        self._inputs = tuple(inputs)
        self._since = time.monotonic()
        self._task: asyncio.Task[None] | None = None
        self._is_cancelled = False
        self._is_uninterrupted = True  # a task that is cancelled before it begins would not end

    def remembered(self) -> Remembered:
        """Return the response as it is now, in the form of stored responses."""
        return Remembered(self.reply.json(), self._inputs, self._since, self.events)

    def begin(self, work: Awaitable[None]) -> None:
        """Start the task, which runs `work` in the context of the current request."""
        self._task = asyncio.ensure_future(work)

    def cancel(self) -> None:
        """Cancel the response unless it has ended."""
        if self._is_cancelled or self.reply.has_ended:
            return
        self._is_cancelled = True
        if self._task is not None and not self._is_uninterrupted:
            self._task.cancel()

    async def until_end(self) -> None:
        """Wait until the response has ended and is stored."""
        if self._task is not None:
            await asyncio.wait({self._task})

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Delay cancellation to the end of the block, in which a thread changes the reply."""
        self._is_uninterrupted = True
        try:
            yield
        finally:
            self._is_uninterrupted = False
        if self._is_cancelled and not self.reply.has_ended:
            raise asyncio.CancelledError


class BackgroundResponses:
    """The running background responses by owner and id, limited in number and bytes of events.

    Use it on one event loop.
    """

    def __init__(
        self,
        *,
        most: int = MAX_RUNNING,
        most_of_owner: int = MAX_RUNNING_OF_OWNER,
        max_event_bytes: int = MAX_EVENT_BYTES,
    ) -> None:
        self._most = most
        self._most_of_owner = most_of_owner
        self._max_event_bytes = max_event_bytes
        self._running: dict[str | None, dict[str, BackgroundResponse]] = {}
        self._event_bytes = 0
        self._is_closed = False

    def __len__(self) -> int:
        return sum(map(len, self._running.values()))

    def start(
        self,
        owner: str | None,
        reply: Reply,
        inputs: Sequence[Item],
        generate: Callable[[BackgroundResponse, Callable[[list[str]], None]], Awaitable[None]],
        store: Callable[[BackgroundResponse], Awaitable[None]],
        *,
        keeps_events: bool,
    ) -> BackgroundResponse:
        """Start `generate` in a task, which is called with a function that takes its events.

        `store` is called once the response has ended; until then, `find` returns it. Raises
        `QueueFullError` if too many responses run, and a 503 if the server stops.
        """
        if self._is_closed:
            raise HTTPException(503, "the server is stopping")
        mine = self._running.get(owner, {})
        for count, most, whose in (
            (len(mine), self._most_of_owner, "of this API key"),
            (len(self), self._most, "in all"),
        ):
            if count >= most:
                raise QueueFullError(
                    f"{count} background responses {whose} are running, the limit is {most}",
                    retry_after=_RETRY_AFTER,
                )
        response = BackgroundResponse(reply, inputs, EventLog() if keeps_events else None)

        def emit(texts: list[str]) -> None:
            if response.events is not None:
                self._add(response.events, texts)

        async def run() -> None:
            try:
                await self._generate(response, generate, emit)
                if not response.is_deleted and not self._is_closed:
                    await store(response)
            finally:
                self._end(owner, response)

        emit(reply.begin())
        self._running.setdefault(owner, {})[reply.id] = response
        response.begin(run())
        return response

    def find(self, owner: str | None, name: str) -> BackgroundResponse | None:
        """Return the owner's running response with this id, or None."""
        found = self._running.get(owner, {}).get(name)
        return None if found is None or found.is_deleted else found

    def close(self) -> None:
        """Cancel all responses, and start no others."""
        self._is_closed = True
        for mine in self._running.values():
            for response in mine.values():
                response.cancel()

    @staticmethod
    async def _generate(
        response: BackgroundResponse,
        generate: Callable[[BackgroundResponse, Callable[[list[str]], None]], Awaitable[None]],
        emit: Callable[[list[str]], None],
    ) -> None:
        try:
            with response.uninterrupted():
                pass
            await generate(response, emit)
        except asyncio.CancelledError:
            emit(response.reply.cancel())
        except Exception as error:  # noqa: BLE001 - report every error to the client
            if not isinstance(error, ModelpackError):
                _log.exception("a background response failed")
            emit(response.reply.fail(problem_of(error)))

    def _add(self, events: EventLog, texts: list[str]) -> None:
        before = events.size
        events.add(texts)
        self._event_bytes += events.size - before
        while self._event_bytes > self._max_event_bytes:
            logs = [r.events for mine in self._running.values() for r in mine.values() if r.events]
            longest = max((*logs, events), key=lambda log: log.size)
            before = longest.size
            longest.drop(before - before // 8 - 1)
            self._event_bytes += longest.size - before

    def _end(self, owner: str | None, response: BackgroundResponse) -> None:
        mine = self._running[owner]
        del mine[response.reply.id]
        if not mine:
            del self._running[owner]
        if response.events is not None:
            self._event_bytes -= response.events.size
            response.events.end()
