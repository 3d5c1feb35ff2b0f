"""Rules: a Lark grammar while it is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modelpack_engine.errors import RequestError
from modelpack_server.structured_output.constraint import Constraint
from modelpack_server.structured_output.schemas import prepared
from modelpack_server.structured_output.vocabulary import quoted

#: Characters of a grammar. Schemas grow as they are written: what two of their parts refer to is
#: written twice, which doubles at each level.
MAX_TEXT = 1 << 20


class Rules:
    """Collects rules; every method returns an expression that stands for what it is asked for.

    Raises `RequestError` once the grammar has more than `MAX_TEXT` characters.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._markup: dict[str, str] = {}  # texts by their rules
        self._until: dict[str, str] = {}
        self._size = 0

    def charge(self, characters: int) -> None:
        """Count what is written, and what takes as long as writing so much."""
        self._size += characters
        if self._size > MAX_TEXT:
            raise RequestError(
                f"its schema makes a grammar of more than {MAX_TEXT} characters",
                param="tools",
                hint="refer to fewer parts, and make properties required",
            )

    def text(self, text: str) -> str:
        """This text; special tokens of the vocabulary in it stand for themselves."""
        return _name(self._markup, text, "m") if text else ""

    def plain(self, text: str) -> str:
        """This text, letter by letter: what callers name is never markup."""
        return quoted(text)

    def until(self, closing: str) -> str:
        """Any text up to `closing`, and `closing`, which is markup as well."""
        return _name(self._until, closing, "u")

    def rule(self, expression: str) -> str:
        """A rule of its own."""
        self.charge(len(expression))
        self._lines.append(f"r{len(self._lines)}: {expression or EMPTY}")
        return f"r{len(self._lines) - 1}"

    def terminal(self, expression: str) -> str:
        """A terminal of its own: regular expressions, joined by `&`."""
        self.charge(len(expression))
        self._lines.append(f"T{len(self._lines)}: {expression}")
        return f"T{len(self._lines) - 1}"

    def json(self, schema: Mapping[str, Any]) -> str:
        """JSON that follows a schema."""
        return self.rule(f"%json {json.dumps(prepared(schema))}")

    def one_of(self, expressions: Iterable[str]) -> str:
        """Any of them, of which there is at least one."""
        found = list(dict.fromkeys(expression or EMPTY for expression in expressions))
        return found[0] if len(found) == 1 else self.rule(" | ".join(found))

    def members(self, members: Sequence[tuple[str, bool]], separator: str) -> str:
        """Members in this order, each with whether it is required; `separator` between two."""

        def rest(start: int) -> str:
            parts = []
            for member, required in members[start:]:
                parts.append(f"{separator} {member}" if required else f"({separator} {member})?")
            return " ".join(parts)

        if not separator:
            each = (member if required else f"{member}?" for member, required in members)
            return self.rule(" ".join(each))
        firsts = []
        for at, (member, required) in enumerate(members):
            firsts.append(f"{member} {rest(at + 1)}")
            self.charge(len(firsts[-1]))
            if required:
                break
        else:
            firsts.append(EMPTY)
        return self.one_of(firsts)

    def constraint(self, start: str) -> Constraint:
        """The whole grammar."""
        source = "\n".join([f"start: {start}", *self._lines])
        markup = {name: text for text, name in self._markup.items()}
        until = {name: text for text, name in self._until.items()}
        return Constraint("grammar", source, markup, until)


EMPTY = '""'


def _name(names: dict[str, str], text: str, prefix: str) -> str:
    return names.setdefault(text, f"{prefix}{len(names)}")
