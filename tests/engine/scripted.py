"""An engine that says what it was told to: for everything above engines."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace

from modelpack_engine.async_engine import Abort, EngineState, RequestStream
from modelpack_engine.errors import EngineError
from modelpack_engine.models import Tokenizer
from modelpack_engine.models.chat_template import ChatTemplate
from modelpack_engine.outputs import (
    EngineStats,
    FinishReason,
    RequestEvent,
    Timing,
    TokenLogprob,
    Usage,
)
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_server.conversation.served_model import ServedModel
from tests.engine.serving.tiny import TEMPLATE, tiny_tokenizer

HERMES = TEMPLATE + "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
THINKING = TEMPLATE + "{% if enable_thinking is not false %}<think>\n{% endif %}"


class ScriptedEngine:
    """Each request's choices say `pieces`, a piece an event; a piece counts as one token.

    Ends with `ends`, or with what a stop string demands. `wait` holds events back from the second
    piece on until it is set.
    """

    def __init__(
        self,
        pieces: Sequence[str] = ("Hello", " world"),
        *,
        template: str = TEMPLATE,
        ends: FinishReason = FinishReason.STOP,
        max_model_len: int = 4096,
    ) -> None:
        self.pieces = list(pieces)
        self.ends = ends
        self.max_model_len = max_model_len
        self.vocab_size = 257
        self.picture_processor, self.no_vision = None, ""
        self.memory_bytes = 1000
        self.state, self.failure = EngineState.READY, ""
        self.wait: asyncio.Event | None = None
        self.submitted: list[tuple[list[int], SamplingParams, int]] = []
        self.salts: list[bytes] = []
        self.requests: list[EngineRequest] = []
        self.aborted: list[Abort] = []
        self.tokenizer: Tokenizer = tiny_tokenizer()
        self.tokenizer._chat_template = ChatTemplate(template)
        self._numbers = itertools.count()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._streams: dict[str, RequestStream] = {}

    @property
    def prompt(self) -> str:
        """The text of the last request's prompt."""
        return self.tokenizer.decode(self.submitted[-1][0], skip_special_tokens=False)

    @property
    def params(self) -> SamplingParams:
        """The last request's parameters."""
        return self.submitted[-1][1]

    def check_queue(self) -> None:
        """There is always room."""

    async def submit(self, request: EngineRequest) -> RequestStream:
        token_ids, params, n = list(request.prompt_token_ids), request.params, request.n
        params.check(self.vocab_size)
        self.submitted.append((token_ids, params, n))
        self.salts.append(request.cache_salt)
        self.requests.append(request)
        name = f"request-{next(self._numbers)}"
        stream = RequestStream(name, len(token_ids), n, self._abort)
        self._streams[name] = stream
        self._tasks[name] = asyncio.create_task(self._say(stream, len(token_ids), params, n))
        return stream

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self._tasks))

    def close(self) -> None:
        self.state = EngineState.STOPPED
        for stream in list(self._streams.values()):
            stream.loop.call_soon_threadsafe(stream.put, EngineError("the engine was stopped"))

    def release(self) -> None:
        """Set `wait`, from whatever thread."""
        assert self.wait is not None
        for stream in list(self._streams.values()):
            stream.loop.call_soon_threadsafe(self.wait.set)

    async def _say(
        self, stream: RequestStream, prompt: int, params: SamplingParams, n: int
    ) -> None:
        pieces = self.pieces[: params.max_tokens]
        for at, piece in enumerate(pieces):
            if at and self.wait is not None:
                await self.wait.wait()
            else:
                await asyncio.sleep(0)
            for index in range(n):
                if Abort(stream.request_id, index) in self.aborted:
                    continue
                event = RequestEvent(stream.request_id, index, (at % 256,), piece)
                event.cached_tokens = None if at else 1
                if params.logprobs is not None:
                    top = tuple((token, -1.0) for token in range(params.logprobs))
                    ids = self.tokenizer.encode(piece, add_special_tokens=False)
                    event = replace(event, logprobs=tuple(TokenLogprob(i, -0.5, top) for i in ids))
                if at == len(pieces) - 1:
                    event = _last(event, self.ends, prompt, len(pieces))
                stream.put(event)
        self._forget(stream.request_id)

    def _abort(self, abort: Abort) -> None:
        self.aborted.append(abort)
        stream = self._streams.get(abort.request_id)
        if abort.index is None:
            task = self._tasks.get(abort.request_id)
            if task is not None:
                task.cancel()
            self._forget(abort.request_id)
        elif stream is not None:
            event = RequestEvent(abort.request_id, abort.index)
            stream.put(_last(event, FinishReason.ABORT, stream.prompt_tokens, 99))

    def _forget(self, name: str) -> None:
        self._tasks.pop(name, None)
        self._streams.pop(name, None)


def _last(event: RequestEvent, reason: FinishReason, prompt: int, count: int) -> RequestEvent:
    timing = Timing(0.0, 1.0, 2.0, 3.0)
    return replace(event, finish_reason=reason, usage=Usage(prompt, count, 1), timing=timing)


def scripted(*pieces: str, **settings: object) -> tuple[ServedModel, ScriptedEngine]:
    """Return a model that says `pieces`, and its engine."""
    engine = ScriptedEngine(pieces, **settings)  # type: ignore[arg-type]
    presets = {"creative": {"temperature": 1.5}}
    return ServedModel("m", engine, defaults={"top_p": 0.5}, presets=presets), engine
