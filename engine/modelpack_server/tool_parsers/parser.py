"""OutputParser: streamed model output to text, reasoning and tool calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from modelpack_server.tool_parsers.calls import Enough, Found, Reader
from modelpack_server.tool_parsers.families import FAMILIES, Family, OutputFormat
from modelpack_server.tool_parsers.harmony import read_harmony
from modelpack_server.tool_parsers.parts import Part, Tool
from modelpack_server.tool_parsers.source import Broken, NotACall, Reading, Source, stops

# Special tokens that end a turn. The engine stops at them, so they can only be last.
END_TOKENS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|eot|>",
    "<|eom|>", "<|end|>", "<|return|>", "<|call|>", "<|user|>", "<|observation|>", "<|stop|>",
    "<|end_of_role|>", "<|endofprompt|>", "<|tool_response>", "<turn|>", "<end_of_turn>",
    "<start_function_response>", "<eos>", "</s>", "[EOS]", "[e~[", "<｜end▁of▁sentence｜>",
)  # fmt: skip


class OutputParser:
    """Parses one reply, with the same result however its text is divided into pieces.

    Text that is not a valid call of one of `tools` remains text, including its markers. A call is
    emitted as soon as its tool is known and its arguments begin. If it ends early after that, its
    arguments are completed to an object, unless the limit of tokens has cut the reply. The parser
    never raises, for any output of a model.

    Markers are found by their text rather than by token ids, which would need each model's
    vocabulary. That is safe: a model does not spell special tokens out, and no tokenizer produces
    them from the text of a prompt.

    `starts_reasoning` says that the prompt opened a block of reasoning: see the function of this
    name. If reasoning is switched off, pass `format.without_reasoning()`. Without `parallel`, the
    parser reads nothing after the first call, and `done` is True.
    """

    def __init__(
        self,
        format: OutputFormat,
        tools: Sequence[Tool] = (),
        *,
        starts_reasoning: bool,
        parallel: bool = True,
    ) -> None:
        family = FAMILIES[format.family] if format.family is not None else Family()
        self._source = Source()
        self._found = Found(tools, parallel=parallel, mistral_ids=family.mistral_ids)
        self._parallel = parallel
        self._markers = format.reasoning
        self._family = family
        dropped = family.layout + (END_TOKENS if format.keeps_special_tokens else ())
        markers = tuple(family.markers) if tools else ()
        within = markers if family.in_reasoning else ()
        if self._markers is not None:
            within += (self._markers.closing,)
            markers += (self._markers.opening,) if self._markers.anywhere else ()
        self._stops = stops(*markers, *dropped)
        self._thought_stops = stops(*within, *dropped)
        self._broken_ends = stops(*family.ends, *family.markers)
        self.reasoning_tokens = 0
        self._reading: Reading[None] | None = (
            read_harmony(self._source, self._found, starts_reasoning=starts_reasoning)
            if format.family == "harmony"
            else self._answer(starts_reasoning)
        )
        self._advance()

    @property
    def tool_calls(self) -> int:
        """The number of calls begun."""
        return self._found.calls

    @property
    def in_reasoning(self) -> bool:
        """Whether the next text is reasoning."""
        return self._found.thinking

    @property
    def done(self) -> bool:
        """Whether the parser ignores all further text."""
        return self._reading is None

    def feed(self, text: str, token_ids: Sequence[int] = ()) -> list[Part]:
        """Return the parts that are final after `text`.

        `token_ids` are its tokens, which only count towards `reasoning_tokens` during reasoning.
        """
        if self.in_reasoning:
            self.reasoning_tokens += len(token_ids)
        if text:
            self._source.push(text)
            self._advance()
        return self._found.take()

    def finish(self, *, cut: bool = False) -> list[Part]:
        """Return the parts held back, since the reply has ended, or was `cut` at its limit."""
        self._found.cut = cut
        self._source.ended = True
        self._advance()
        self._reading = None
        self._found.finish()
        return self._found.take()

    def _advance(self) -> None:
        if self._reading is not None:
            try:
                next(self._reading)
            except (StopIteration, Enough):
                self._reading = None

    def _answer(self, starts_reasoning: bool) -> Reading[None]:
        if starts_reasoning and self._markers is not None:
            yield from self._thoughts()
        may_open = True
        while True:
            if may_open and (yield from self._opening()):
                return
            stop = yield from self._source.hand_out(self._stops, self._found.text)
            if stop is None:
                return
            may_open = True
            if stop in self._family.markers:
                if (yield from self._call(stop, self._found.text)):
                    return
            elif self._markers is not None and stop == self._markers.opening:
                self._source.advance(len(stop))
                yield from self._thoughts()
            else:
                yield from self._drop(stop, self._found.text)
                may_open = False

    def _opening(self) -> Reading[bool]:
        """Read parts that may only begin a reply: reasoning in plain tags, calls without a marker.

        Returns True if the rest of the reply must be ignored.
        """
        source, found = self._source, self._found
        while True:
            source.forget()
            spaces = yield from source.spaces()
            if self._markers is None or not (yield from source.accept(self._markers.opening)):
                break
            yield from self._thoughts()
        found.text(spaces)
        source.forget()
        if self._family.bare is None or not found.tools or found.calls or found.any_text:
            return False
        return (yield from self._read_call(self._family.bare, found.text))

    def _thoughts(self) -> Reading[None]:
        """Read reasoning through the marker that ends it."""
        source, found, markers = self._source, self._found, self._markers
        assert markers is not None
        found.begin_reasoning()
        source.forget()
        spaces = yield from source.spaces()
        if not (yield from source.accept(markers.opening)):  # the prompt has opened the block
            found.reasoning(spaces)
        while True:
            stop = yield from source.hand_out(self._thought_stops, found.reasoning)
            if stop is None:
                return
            if stop == markers.closing:
                source.advance(len(stop))
                found.end_reasoning()
                return
            if stop in self._family.markers:
                if (yield from self._call(stop, found.reasoning)):
                    raise Enough
            else:
                yield from self._drop(stop, found.reasoning)

    def _call(self, marker: str, hand_out: Callable[[str], None]) -> Reading[bool]:
        self._source.advance(len(marker))
        return (yield from self._read_call(self._family.markers[marker], hand_out))

    def _read_call(self, reader: Reader, hand_out: Callable[[str], None]) -> Reading[bool]:
        """Read calls with `reader`; pass text that is not a call to `hand_out`.

        Returns True after a call if parallel calls are not allowed.
        """
        source, found = self._source, self._found
        try:
            yield from reader(source, found)
        except NotACall:
            hand_out(source.read)
        except Broken:
            stop = yield from source.hand_out(self._broken_ends)
            if stop is not None and stop in self._family.ends:
                source.advance(len(stop))
        source.forget()
        return found.calls > 0 and not self._parallel

    def _drop(self, token: str, hand_out: Callable[[str], None]) -> Reading[None]:
        """Drop a special token. One that looks like an HTML tag is dropped only at the end: within
        a reply, </s> is HTML."""
        self._source.advance(len(token))
        if "|" not in token and "｜" not in token and (yield from self._source.peek()):
            hand_out(token)
        self._source.forget()
