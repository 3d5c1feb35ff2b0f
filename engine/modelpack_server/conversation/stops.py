"""Stop strings in what is answered, as opposed to what is thought or passed to tools."""

from __future__ import annotations

from collections.abc import Iterable

from modelpack_engine.stopping import stop_strings
from modelpack_server.tool_parsers.parts import Part, Text


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
