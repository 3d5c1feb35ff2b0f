"""The parts of `modelpack run`: input, settings and display."""

from __future__ import annotations

import asyncio
import builtins
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.markdown import Markdown

from modelpack.cli.output import visible
from modelpack.errors import UsageError
from modelpack_server.conversation.spec import ChatDelta
from modelpack_server.repl.chat import Chat
from modelpack_server.repl.loop import SETTINGS, read_question, set_value, values
from modelpack_server.repl.view import TerminalView, split_blocks
from modelpack_server.tool_parsers.parts import Reasoning, Text
from tests.engine.scripted import THINKING, scripted


@pytest.mark.parametrize(
    ("typed", "question"),
    [
        (["hello"], "hello"),
        (["  hello "], "hello"),
        (["one \\", "two"], "one \ntwo"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""one"""'], "one"),
        (['"""one', "", "  two", 'three"""'], "one\n\n  two\nthree"),
        (['"""', "one", '"""'], "one"),
        (['say """ once'], 'say """ once'),
    ],
)
def test_questions(monkeypatch: pytest.MonkeyPatch, typed: list[str], question: str) -> None:
    lines = iter(typed)
    monkeypatch.setattr(builtins, "input", lambda _prompt: next(lines))
    assert read_question() == question
    assert list(lines) == []


@pytest.fixture
def chat() -> Chat:
    model, _ = scripted("<think>", "hm", "</think>", "Paris", template=THINKING)
    return Chat(model)


def ask(chat: Chat, text: str, *, stop_after: int | None = None) -> list[ChatDelta]:
    async def read() -> list[ChatDelta]:
        deltas = []
        stream = chat.ask(text)
        async for delta in stream:
            deltas.append(delta)
            if len(deltas) == stop_after:
                break
        await stream.aclose()
        return deltas

    return asyncio.run(read())


def test_an_answer_is_remembered_with_its_reasoning(chat: Chat) -> None:
    parts = [part for delta in ask(chat, "France?") for part in delta.parts]
    assert Reasoning("hm") in parts
    assert Text("Paris") in parts
    answered = {"role": "assistant", "content": "Paris", "reasoning_content": "hm"}
    assert chat.turns == [{"role": "user", "content": "France?"}, answered]
    chat.clear()
    assert chat.turns == []


def test_what_was_said_comes_before() -> None:
    model, engine = scripted("Paris")
    chat = Chat(model, system="Be brief.")
    ask(chat, "France?")
    ask(chat, "Italy?")
    assert engine.prompt == (
        "system: Be brief.\nuser: France?\nassistant: Paris\nuser: Italy?\nassistant:"
    )


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_came() -> None:
    model, engine = scripted("one ", "two ", "three ")
    chat = Chat(model)
    ask(chat, "Count!", stop_after=2)
    assert chat.turns[1]["content"] == "one two "
    assert engine.aborted


def test_a_model_without_a_template_goes_on_with_the_text() -> None:
    model, engine = scripted("Paris")
    engine.tokenizer._chat_template = None
    ask(Chat(model, system="Facts."), "The capital of France is")
    assert engine.prompt == "Facts.\n\nThe capital of France is"


def test_temperature_is_the_users_the_presets_or_the_models() -> None:
    model, engine = scripted("x")
    model._defaults["temperature"] = 0.6
    chat = Chat(model)
    for setting, value, expected in (
        ("seed", "1", 0.6),
        ("preset", "creative", 1.5),
        ("temperature", "0.1", 0.1),
        ("temperature", "default", 1.5),
        ("preset", "default", 0.6),
    ):
        set_value(chat, setting, value)
        ask(chat, "?")
        assert engine.params.temperature == expected, setting


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.25", 0.25),
        ("top_k", "40", 40),
        ("seed", "-1", -1),
        ("stop", "'a b' c", ("a b", "c")),
        ("max_tokens", "9", 9),
        ("system", "You are terse.", "You are terse."),
        ("think", "off", False),
        ("preset", "creative", "creative"),
    ],
)
def test_settings_are_set_and_taken_back(chat: Chat, name: str, text: str, value: object) -> None:
    before = values(chat)
    assert set(before) == set(SETTINGS)
    set_value(chat, name, text)
    assert values(chat) == before | {name: value}
    set_value(chat, name, "default")
    assert values(chat) == before


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("volume", "11", "temperature"),
        ("temperature", "hot", "greedy"),
        ("temperature", "-1", "0 or more"),
        ("temperature", "nan", "0 or more"),
        ("temperature", "", "requires a value"),
        ("top_p", "2", "above 0"),
        ("max_tokens", "0", "maximum number of tokens"),
        ("preset", "loud", "creative"),
        ("think", "maybe", "on or off"),
        ("stop", "'open", "strings"),
    ],
)
def test_settings_that_make_no_sense_change_nothing(
    chat: Chat, name: str, text: str, says: str
) -> None:
    before = values(chat)
    with pytest.raises(UsageError) as caught:
        set_value(chat, name, text)
    assert says in f"{caught.value} {caught.value.hint}"
    assert values(chat) == before


def test_a_model_cannot_command_the_terminal() -> None:
    assert (
        visible("a\x1b]0;title\x07\x9b2J\tb\r\nc\r") == "a\ufffd]0;title\ufffd\ufffd2J\tb\nc\ufffd"
    )


MARKDOWN = """\
# A title

Some *text* with `code`,
on two lines
---

- one
- two

  still two

1. first
2. second

```python
print("a")

# no title
1
2
3
4
5
6
```
| a | b |
|---|---|
| 1 | 2 |

The end.
"""


def shown(view: TerminalView, out: io.StringIO, pieces: list[str], height: int) -> list[str]:
    for piece in pieces:
        view.text(piece)
    view.end()
    return [line.rstrip() for line in screen(out.getvalue(), height) if line.strip()]


def screen(written: str, height: int = 100) -> list[str]:
    """Return all lines of a terminal after this output, including scrolled lines."""
    import re

    lines, row, column = [""], 0, 0
    for match in re.finditer(r"\x1b\[([0-9;?]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)", written):
        argument, command, back, down, text = match.groups()
        if text is not None:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + text + line[column + len(text) :]
            column += len(text)
        elif back is not None:
            column = 0
        elif down is not None:
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif command == "A":
            row = max(row - int(argument or 1), len(lines) - height, 0)
        elif command == "K":
            assert argument == "2"
            lines[row] = ""
        else:
            assert command in "mhl", command
    return lines


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(4, 40))
def test_an_answer_in_pieces_looks_as_the_whole(sizes: list[int], height: int) -> None:
    pieces, at = [], 0
    while at < len(MARKDOWN):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(MARKDOWN[at : at + size])
        at += size
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, height=height, highlight=False)
    clock = iter(range(10**6))
    whole = io.StringIO()
    Console(file=whole, force_terminal=True, width=60, highlight=False).print(Markdown(MARKDOWN))
    expected = [line.rstrip() for line in screen(whole.getvalue()) if line.strip()]
    assert shown(TerminalView(console, lambda: next(clock)), out, pieces, height) == expected


def test_blocks_that_are_complete_are_left_alone() -> None:
    assert split_blocks("one\ntwo") == ("", "one\ntwo")
    assert split_blocks("one\n\ntwo") == ("one\n\n", "two")
    assert split_blocks("```\na\n\nb") == ("", "```\na\n\nb")
    assert split_blocks("```\na\n```\nb") == ("```\na\n```\n", "b")


def test_reasoning_is_dimmed_and_apart() -> None:
    out = io.StringIO()
    view = TerminalView(Console(file=out, force_terminal=True, width=60))
    view.thought("let me ")
    view.thought("see [b]\n")
    view.text("Paris")
    view.end()
    assert "\x1b[2mlet me \x1b[0m" in out.getvalue()
    lines = [line.strip() for line in screen(out.getvalue()) if line.strip()]
    assert lines == ["let me see [b]", "Paris"]
