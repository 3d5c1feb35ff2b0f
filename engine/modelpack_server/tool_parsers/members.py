"""Arguments that come one by one, each marked up by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modelpack_server.tool_parsers.calls import Found
from modelpack_server.tool_parsers.json_text import dump
from modelpack_server.tool_parsers.source import Broken, Reading, Source, Stops


@dataclass(slots=True)
class Members:
    """Hands arguments out as the members of an object: strings as they come, others whole.

    The call begins with its first argument, or where it ends without any: until then, what looks
    like a call may turn out to be text.
    """

    found: Found
    name: str
    call_id: str | None = None
    _count: int = 0
    begun: bool = False

    def begin(self) -> None:
        if not self.begun:
            self.found.start(self.name, self.call_id)
            self.found.arguments("{")
            self.begun = True

    def add(self, key: str, value: Any, raw: str) -> None:
        """Hand out one argument; `raw` is how the model wrote it, where JSON cannot say `value`."""
        try:
            spelled = dump(value)
        except ValueError:
            spelled = dump(raw)
        self._key(key)
        self.found.arguments(spelled)

    def _key(self, key: str) -> None:
        self.begin()
        separator = ", " if self._count else ""
        self.found.arguments(f"{separator}{dump(key)}: ")
        self._count += 1

    def end(self) -> None:
        self.begin()
        self.found.arguments("}")

    def read_string(
        self, source: Source, key: str, ends: Stops, *, trims: bool = False
    ) -> Reading[str]:
        """Read a string up to and over one of `ends`, hand it out as it comes; return the end.

        `trims`: a line break after the opening tag, and one before the end, are layout.
        Raises `Broken`, with the arguments completed, if the answer breaks off within.
        """
        self._key(key)
        self.found.arguments('"')
        held, at_start = "", trims
        while True:
            at, end = ends.find(source.rest, 0, ended=source.ended)
            text = held + source.rest[:at]
            source.advance(at)
            source.forget()
            if at_start and text:
                text, at_start = text.removeprefix("\n"), False
            kept = text.removesuffix("\n") if trims else text
            held = text[len(kept) :]
            self.found.arguments(dump(kept)[1:-1])
            if end is not None:
                source.advance(len(end))
                self.found.arguments('"')
                return end
            if source.ended:
                self.found.arguments('"')
                self.end()
                raise Broken
            yield from source.more()
