"""OutputParser: streamed model output to text, reasoning and tool calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from modelpack_server.tool_parsers.calls import Enough, Found
from modelpack_server.tool_parsers.families import FAMILIES, Family, OutputFormat, Reader
from modelpack_server.tool_parsers.harmony import read_harmony
from modelpack_server.tool_parsers.parts import Part, Tool
from modelpack_server.tool_parsers.source import Broken, NotACall, Reading, Source, Stops, stops

# Special tokens that end a turn. They come last, if at all: the engine stops at them.
END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|eot|>",
    "<|eom|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|user|>",
    "<|observation|>",
    "<|stop|>",
    "<|end_of_role|>",
    "<|endofprompt|>",
    "<|tool_response>",
    "<turn|>",
    "<end_of_turn>",
    "<start_function_response>",
    "<eos>",
    "</s>",
    "[EOS]",
    "[e~[",
    "<｜end▁of▁sentence｜>",
)


class OutputParser:
    """Reads one answer. How its text is cut into pieces makes no difference to what is found.

    What cannot be read as a call of one of `tools` is text, markers and all. A call is handed out
    from where it is certain: its tool is known and its arguments begin. The arguments of a call
    that breaks off after that are completed to an object. Never raises, whatever the model writes.

    Markers are found by their text. Those that are special tokens no tokenizer makes of a prompt's
    words, and models do not spell them; ids would need the vocabulary of every model.

    `starts_reasoning` says that the prompt opened a block of reasoning: see the function of this
    name. Where thinking was switched off, pass `format.without_reasoning()`.
    Without `parallel`, nothing is read after the first call, and `done` says so.
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
        opening: tuple[str, ...] = ()
        closing: tuple[str, ...] = ()
        if self._markers is not None:
            closing = (self._markers.closing,)
            opening = (self._markers.opening,) if self._markers.anywhere else ()
        self._stops = stops(*markers, *opening, *dropped)
        within = markers if family.in_reasoning else ()
        self._thought_stops = stops(*within, *closing, *dropped)
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
        """How many calls were begun."""
        return self._found.calls

    @property
    def in_reasoning(self) -> bool:
        """Whether the text that comes next is reasoning."""
        return self._found.thinking

    @property
    def done(self) -> bool:
        """Whether nothing that still comes will be read."""
        return self._reading is None

    def feed(self, text: str, token_ids: Sequence[int] = ()) -> list[Part]:
        """Return what `text` makes certain. `token_ids`, its tokens, are counted only: those that
        come while the model reasons are `reasoning_tokens`."""
        if self.in_reasoning:
            self.reasoning_tokens += len(token_ids)
        if text:
            self._source.push(text)
            self._advance()
        return self._found.take()

    def finish(self) -> list[Part]:
        """Return what was held back, now that the answer is over."""
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
            stop = yield from self._hand_out(self._stops, self._found.text)
            if stop is None:
                return
            may_open = True
            if stop in self._family.markers:
                if (yield from self._call(stop)):
                    return
            elif self._markers is not None and stop == self._markers.opening:
                self._source.advance(len(stop))
                yield from self._thoughts()
            else:
                yield from self._drop(stop, self._found.text)
                may_open = False

    def _opening(self) -> Reading[bool]:
        """Read what may only begin an answer: reasoning in plain tags, calls without a marker.

        Returns True if nothing after it is to be read.
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
        """Read reasoning, up to and over the marker that ends it."""
        source, found, markers = self._source, self._found, self._markers
        assert markers is not None
        found.begin_reasoning()
        source.forget()
        spaces = yield from source.spaces()
        if not (yield from source.accept(markers.opening)):  # the prompt opened it before
            found.reasoning(spaces)
        while True:
            stop = yield from self._hand_out(self._thought_stops, found.reasoning)
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

    def _hand_out(self, ends: Stops, hand_out: Callable[[str], None]) -> Reading[str | None]:
        """Hand out text up to a stop, which stays; None if the answer ends first."""
        source = self._source
        while True:
            at, stop = ends.find(source.rest, 0, ended=source.ended)
            hand_out(source.rest[:at])
            source.advance(at)
            source.forget()
            if stop is not None or source.ended:
                return stop
            yield from source.more()

    def _call(self, marker: str, hand_out: Callable[[str], None] | None = None) -> Reading[bool]:
        self._source.advance(len(marker))
        return (
            yield from self._read_call(self._family.markers[marker], hand_out or self._found.text)
        )

    def _read_call(self, reader: Reader, hand_out: Callable[[str], None]) -> Reading[bool]:
        """Have `reader` read calls; what it says is none goes to `hand_out`.

        Returns True if it was a call, and no other is wanted.
        """
        source, found = self._source, self._found
        try:
            yield from reader(source, found)
        except NotACall:
            hand_out(source.read)
        except Broken:
            yield from self._skip_broken()
        source.forget()
        return found.calls > 0 and not self._parallel

    def _skip_broken(self) -> Reading[None]:
        source = self._source
        while True:
            at, stop = self._broken_ends.find(source.rest, 0, ended=source.ended)
            source.advance(at)
            source.forget()
            if stop is not None:
                if stop in self._family.ends:
                    source.advance(len(stop))
                return
            if source.ended:
                return
            yield from source.more()

    def _drop(self, token: str, hand_out: Callable[[str], None]) -> Reading[None]:
        """Drop a special token that is none of the text. What looks like HTML is one at the end
        only: in the midst of an answer, </s> is somebody's page."""
        self._source.advance(len(token))
        if "|" not in token and "｜" not in token and (yield from self._source.peek()):
            hand_out(token)
        self._source.forget()
