"""The text of an answer: stop strings, reasoning and tool calls from the engine's output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from modelpack_engine.core.detokenizer import stop_strings
from modelpack_engine.outputs import FinishReason, RequestEvent, Usage
from modelpack_server.conversation.spec import ChatDelta, ChatUsage, Finish
from modelpack_server.tool_parsers.parts import Part, Text

if TYPE_CHECKING:
    from modelpack_server.tool_parsers.parser import OutputParser


class TextStops:
    """Passes parts on up to the first stop string in their text; holds back what may become one."""

    __slots__ = ("_automaton", "_held", "_state", "found")

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._automaton = stop_strings(strings)
        self._state = 0
        self._held = ""
        #: The stop string that ended the text.
        self.found: str | None = None

    def pass_on(self, parts: Iterable[Part], *, may_stop: bool = True) -> list[Part]:
        """Return what is final of `parts` and of what was held back; nothing after the end."""
        passed: list[Part] = []
        for part in parts:
            if self.found is not None:
                break
            if isinstance(part, Text):
                if text := self._cut(part.text, may_stop):
                    passed.append(Text(text))
            else:
                passed += self.finish()
                passed.append(part)
        return passed

    def finish(self) -> list[Part]:
        """Return what was held back, now that the text goes on no more."""
        held, self._held, self._state = self._held, "", 0
        return [Text(held)] if held and self.found is None else []

    def _cut(self, text: str, may_stop: bool) -> str:
        automaton, state = self._automaton, self._state
        for end, character in enumerate(text, 1):
            state = automaton.step(state, character)
            if may_stop and (found := automaton.found(state)) is not None:
                self.found = found
                kept = self._held + text[:end]
                return kept[: len(kept) - len(found)]
        self._state = state
        whole = self._held + text
        final = len(whole) - automaton.depth(state)
        self._held = whole[final:]
        return whole[:final]


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
