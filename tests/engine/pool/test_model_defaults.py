"""Model defaults in a package."""

from __future__ import annotations

import pytest

from modelpack_server.conversation.served_model import Preface
from modelpack_server.pool.model_defaults import ANNOTATION, ModelDefaults

USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "own"}


def test_it_is_read_as_it_was_written() -> None:
    made = ModelDefaults({"temperature": 0.5, "stop": ["a"]}, "be brief", (USER,))
    assert ModelDefaults.of(made.annotation()) == made
    assert made.sampling() == {"temperature": 0.5, "stop": ("a",)}
    assert ModelDefaults().annotation() == {}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "[" * 100_000, '{"parameters": [], "system": 1, "messages": {}}',
        '{"messages": [1, {}, {"role": "user"}, {"role": 1, "content": "x"}]}',
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_ignored(text: str) -> None:
    assert ModelDefaults.of({ANNOTATION: text}) == ModelDefaults()


def test_parameters_that_make_no_sense_are_ignored() -> None:
    assert ModelDefaults({"temperature": "hot"}).sampling() == {}


def test_what_comes_before_a_conversation() -> None:
    preface = Preface("theirs", (USER, USER))
    system = {"role": "system", "content": "theirs"}
    assert preface.before([USER]) == [system, USER, USER, USER]
    assert preface.before([SYSTEM, USER]) == [SYSTEM, USER, USER, USER]
    assert Preface().before([USER]) == [USER]
