"""Answer: one choice of a conversation, from the engine's events to deltas."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelpack_engine.outputs import FinishReason, RequestEvent, Usage
from modelpack_server.conversation.spec import ChatDelta, ChatUsage, Finish
from modelpack_server.conversation.stops import TextStops
from modelpack_server.tool_parsers.parts import Part, Text

if TYPE_CHECKING:
    from modelpack_server.tool_parsers.parser import OutputParser

_FINISHES: dict[FinishReason, Finish] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
}


class Answer:
    """Takes text apart into parts where there is a parser, ends it at stop strings, counts.

    Without a parser the engine looks for stop strings itself. With one they are looked for here, in
    the text that is no reasoning and no call; `is_over` then says that the engine is to end the
    choice. With `calls_only` the answer has calls and no text.
    """

    def __init__(
        self,
        index: int,
        parser: OutputParser | None = None,
        stops: tuple[str, ...] = (),
        *,
        min_tokens: int = 0,
        calls_only: bool = False,
    ) -> None:
        self._index = index
        self._parser = parser
        self._stops = TextStops(stops) if stops else None
        self._min_tokens = min_tokens
        self._tokens = 0
        self._calls_only = calls_only
        #: Whether the answer is complete, and only the engine's last event is missing.
        self.is_over = False

    def take(self, event: RequestEvent) -> ChatDelta:
        """Return what an event adds."""
        if self.is_over:
            if event.finish_reason is None:
                return ChatDelta(self._index)
            return self._ended(event, (), FinishReason.STOP)
        self._tokens += len(event.token_ids)
        if self._parser is None:
            parts: tuple[Part, ...] = (Text(event.text),) if event.text else ()
        else:
            parts = tuple(self._parsed(event))
        if event.finish_reason is None:
            return ChatDelta(self._index, parts, event.token_ids, event.logprobs)
        return self._ended(event, parts, FinishReason.STOP if self.is_over else event.finish_reason)

    def _parsed(self, event: RequestEvent) -> list[Part]:
        """Return the parts of an answer that are final, up to what ends it."""
        assert self._parser is not None
        parts = self._parser.feed(event.text, event.token_ids)
        self.is_over = self._parser.done
        if event.finish_reason is not None:
            parts = [*parts, *self._parser.finish()]
        if self._calls_only:  # the markup of a call that was cut, which nobody wants to read
            parts = [part for part in parts if not isinstance(part, Text)]
        if self._stops is not None:
            parts = self._stops.pass_on(parts, may_stop=self._tokens > self._min_tokens)
            if event.finish_reason is not None:
                parts += self._stops.finish()
            self.is_over = self.is_over or self._stops.found is not None
        return parts

    def _ended(
        self, event: RequestEvent, parts: tuple[Part, ...], reason: FinishReason
    ) -> ChatDelta:
        stopped_by = self._stops.found if self._stops is not None else None
        if stopped_by is None and isinstance(event.stop_reason, str):
            stopped_by = event.stop_reason
        finish = _FINISHES.get(reason, "stop")
        if finish == "stop" and self._parser is not None and self._parser.tool_calls:
            finish = "tool_calls"
        counted = event.usage or Usage(0, 0)
        reasoned = self._parser.reasoning_tokens if self._parser is not None else 0
        usage = ChatUsage(
            counted.prompt_tokens, self._tokens, counted.cached_tokens,
            counted.accepted_tokens, counted.rejected_tokens, reasoned,
        )  # fmt: skip
        return ChatDelta(
            self._index, parts, event.token_ids, event.logprobs, finish, stopped_by, usage,
            event.timing,
        )  # fmt: skip
