"""RequestStream: the events of one request, from the engine's thread to an event loop.

Events that wait are read together: what a slow reader missed comes as one event for each choice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from types import TracebackType

from modelpack_engine.errors import EngineError, RequestError
from modelpack_engine.outputs import FinishReason, RequestEvent


@dataclass(frozen=True, slots=True)
class Abort:
    """The wish to end a request, or one of its choices."""

    request_id: str
    index: int | None = None


class RequestStream:
    """Iterate over it for events; leaving its context aborts what has not ended.

    `finals` are the last events of choices that have ended and were read, `num_tokens` counts the
    generated tokens that were read.
    """

    def __init__(
        self, request_id: str, prompt_tokens: int, choices: int, call: Callable[[Abort], object]
    ) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.finals: list[RequestEvent] = []
        self.num_tokens = 0
        self.loop = asyncio.get_running_loop()
        self._call = call
        self._open = set(range(choices))
        self._waiting: list[RequestEvent | Exception] = []
        self._reader: asyncio.Future[None] | None = None

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()

    def __aiter__(self) -> AsyncIterator[RequestEvent]:
        return self._read()

    def abort(self) -> None:
        """End the request: its blocks are free within a step. Does nothing after its end."""
        if self._open:
            self._open.clear()
            self._call(Abort(self.request_id))

    def cancel(self) -> None:
        """End all choices; their last events still come."""
        for index in tuple(self._open):
            self.abort_choice(index)

    def abort_choice(self, index: int) -> None:
        """End one choice; its last event still comes."""
        if index in self._open:
            self._call(Abort(self.request_id, index))

    def put(self, event: RequestEvent | Exception) -> None:
        """Hand an event over; called on the event loop."""
        self._waiting.append(event)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def _read(self) -> AsyncIterator[RequestEvent]:
        while self._open:
            if not self._waiting:
                self._reader = self.loop.create_future()
                await self._reader
                self._reader = None
            waiting, self._waiting = self._waiting, []
            for event in waiting if len(waiting) == 1 else _merged(waiting):
                if isinstance(event, Exception):
                    self._open.clear()
                    raise event
                if event.index not in self._open:
                    continue
                self.num_tokens += len(event.token_ids)
                if event.finish_reason is not None:
                    self._open.discard(event.index)
                    self.finals.append(event)
                    if event.finish_reason is FinishReason.ERROR:
                        self.abort()
                        raise _failure(event)
                yield event


def _failure(event: RequestEvent) -> EngineError:
    message = event.error or "the request failed"
    if event.error_param is not None:
        return RequestError(message, param=event.error_param)
    return EngineError(message)


def _merged(events: list[RequestEvent | Exception]) -> list[RequestEvent | Exception]:
    """Return one event for each choice, in the order of their first."""
    merged: dict[int, RequestEvent] = {}
    rest: list[Exception] = []
    for event in events:
        if isinstance(event, Exception):
            rest.append(event)
            continue
        before = merged.get(event.index)
        merged[event.index] = event if before is None else _joined(before, event)
    return [*merged.values(), *rest]


def _joined(first: RequestEvent, second: RequestEvent) -> RequestEvent:
    logprobs = first.logprobs
    if second.logprobs is not None:
        logprobs = (*(logprobs or ()), *second.logprobs)
    return replace(
        second,
        token_ids=first.token_ids + second.token_ids,
        text=first.text + second.text,
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs,
    )
