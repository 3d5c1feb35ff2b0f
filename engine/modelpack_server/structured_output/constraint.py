"""What a text has to follow, as a request says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Constraint:
    """A constraint on the whole of an answer.

    `value` is nothing for "json_object", a JSON schema (an object or its text) for "json_schema", a
    regular expression that the answer matches from end to end for "regex" (Rust's syntax, without
    look-around; `\\d` is 0 to 9), and Lark or llama.cpp's GBNF for "grammar".

    `markup` defines further rules of a Lark grammar by their text: special tokens of the model's
    vocabulary in it stand for themselves, all else is plain text. `until` defines rules that are
    any text up to and including such a text. A grammar with markup brings all that an answer has.
    """

    kind: Literal["json_object", "json_schema", "regex", "grammar"]
    value: str | Mapping[str, Any] = ""
    markup: Mapping[str, str] = field(default_factory=dict)
    until: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReasoningBlock:
    """What may come before the part of an answer that is constrained.

    The block ends with `closing`. It may begin with `opening`, or be left out; without an `opening`
    the prompt has begun it already. `answer` is markup between it and the constrained part, which
    is there without a block as well, but not where the constraint brings its own markup. Special
    tokens in these texts stand for themselves.
    """

    closing: str
    opening: str | None = None
    answer: str = ""
