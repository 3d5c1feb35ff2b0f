"""The loop of `modelpack run` without a terminal: its commands, and errors that do not end it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from modelpack.cli.options import Settings
from modelpack.errors import NotFoundError
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.repl import loop
from modelpack_server.repl.chat import Chat
from modelpack_server.repl.loop import Loop
from tests.engine.scripted import scripted


class Session:
    """A loop with given input lines; `types` returns the prompts in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, _ = scripted("Paris")
        self.model._defaults["temperature"] = 0.7
        self.chat = Chat(self.model)
        self.asked: list[str] = []
        self.loaded: list[str] = []
        self._monkeypatch = monkeypatch

    def types(self, *lines: str | type[BaseException]) -> list[str]:
        rest = iter([*lines, EOFError])

        def read() -> str:
            line = next(rest)
            if isinstance(line, str):
                return line
            raise line

        self._monkeypatch.setattr(loop, "read_question", read)
        self._monkeypatch.setattr(loop, "line_editing", _no_editing)
        Loop(Settings(), self.chat, self.asked.append, self._load).run()
        return self.asked

    def _load(self, name: str) -> ServedModel:
        self.loaded.append(name)
        if name == "evil":
            raise NotFoundError("\x1b]0;owned\x07\nerror: forged", hint="\x9b2J")
        if name == "missing":
            raise NotFoundError("there is no model 'missing'", hint="pull it")
        return ServedModel(name, self.model.engine)


def _no_editing(_words: object) -> object:
    from contextlib import nullcontext

    return nullcontext()


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Session:
    return Session(monkeypatch)


def test_questions_are_asked_and_commands_are_not(session: Session) -> None:
    asked = session.types("hello", "/show", "/etc/hosts holds what?", "/system", "/bye", "never")
    assert asked == ["hello", "/etc/hosts holds what?"]


def test_ctrl_c_at_the_prompt_begins_a_line_with_a_hint(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    assert session.types("one", KeyboardInterrupt, "two") == ["one", "two"]
    assert capsys.readouterr().err.endswith("\nend the chat with Ctrl-D or /bye\n")


def test_the_system_message(session: Session) -> None:
    session.types("/system Be brief.")
    assert session.chat.system == "Be brief."
    session.types("/system")
    assert session.chat.system == ""


def test_clearing(session: Session) -> None:
    session.chat.turns.append({"role": "user", "content": "x"})
    session.types("/clear")
    assert session.chat.turns == []


def test_another_model(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    session.chat.turns.append({"role": "user", "content": "x"})
    session.types("/load other")
    assert (session.loaded, session.chat.model.name) == (["other"], "other")
    assert len(session.chat.turns) == 1
    assert "other is ready" in capsys.readouterr().err


def test_a_model_that_does_not_load_leaves_the_one_before(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    assert session.types("/load missing", "/load", "on") == ["on"]
    assert session.loaded == ["missing", "m"]
    assert session.chat.model.name == "m"
    said = capsys.readouterr().err
    assert "there is no model 'missing'" in said
    assert "hint: pull it" in said
    assert "/load requires the name of a model" in said


def test_errors_hold_no_commands_for_the_terminal(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    session.types("/load evil")
    said = capsys.readouterr().err
    assert "owned" in said
    assert not [c for c in said if not c.isprintable() and c not in "\n\ufffd"]
    assert "\nerror: forged" not in said


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/help", "/set NAME VALUE"),
        ("/?", "Ctrl-C"),
        ("/set", "top_p"),
        ("/show", "temperature  default (0.7)"),
        ("/show", "top_p  default (0.5)"),
    ],
)
def test_what_is_shown(
    session: Session, capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    session.types(line)
    shown = " ".join(capsys.readouterr().out.split())
    assert " ".join(says.split()) in shown


def test_interrupts_end_nothing(
    session: Session, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_question: str) -> None:
        raise KeyboardInterrupt

    ask: Callable[[str], None] = interrupted
    monkeypatch.setattr(session, "asked", type("Asked", (), {"append": staticmethod(ask)})())
    session.types("long", KeyboardInterrupt, "/show")
    captured = capsys.readouterr()
    assert "(stopped)" in captured.err
    assert "/bye" in captured.err
    assert "temperature" in captured.out
