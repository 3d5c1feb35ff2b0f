"""The loop of `modelpack run`: questions, and commands that begin with a slash."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from modelpack.cli.options import Settings
from modelpack.cli.output import note, show, show_error, table
from modelpack.errors import ModelpackError, UsageError
from modelpack_server.repl.line_editor import line_editing, read_question
from modelpack_server.repl.settings import DEFAULT, SETTINGS, set_value, values

if TYPE_CHECKING:
    from modelpack_server.conversation.served import ServedModel
    from modelpack_server.repl.chat import Chat

# A slash and a word: a question may begin with a path.
_COMMAND = re.compile(r"/([a-z?]+)(?:\s+(.*))?", re.DOTALL)

_HELP = (
    ("/set NAME VALUE", f"set what /show shows; the value {DEFAULT} takes it back"),
    ("/show", "show the settings, and how much was said"),
    ("/system [TEXT]", "set the system message; without a text, take it away"),
    ("/clear", "forget what was said"),
    ("/load MODEL", "go on with another model"),
    ("/help", "show this"),
    ("/bye", "end, as Ctrl-D does"),
    ('"""', "begin and end a question of several lines; a backslash continues a line"),
    ("Ctrl-C", "stop the answer"),
)


class Loop:
    """Reads until the user has enough. `ask` answers a question, `load` loads another model."""

    def __init__(
        self,
        settings: Settings,
        chat: Chat,
        ask: Callable[[str], None],
        load: Callable[[str], ServedModel],
    ) -> None:
        self._settings = settings
        self._chat = chat
        self._ask = ask
        self._load = load
        self._commands: dict[str, Callable[[str], None]] = {
            "set": self._set,
            "show": self._show,
            "system": self._system,
            "clear": self._clear,
            "load": self._change,
            "help": self._help,
            "?": self._help,
        }

    def run(self) -> None:
        """Return at the end of input, or when the user says so."""
        note(self._settings, f"{self._chat.model.name} is ready; /help lists the commands")
        words = [f"/{name}" for name in (*self._commands, "bye")] + list(SETTINGS)
        with line_editing(words):
            while True:
                try:
                    question = read_question()
                except EOFError:
                    click.echo()
                    return
                except KeyboardInterrupt:
                    note(self._settings, "\nend with Ctrl-D or /bye")
                    continue
                if question in ("/bye", "/exit", "/quit"):
                    return
                if question:
                    self._take(question)

    def _take(self, question: str) -> None:
        command = _COMMAND.fullmatch(question)
        try:
            if command is None:
                self._ask(question)
                return
            name, rest = command[1], (command[2] or "").strip()
            if name not in self._commands:
                raise UsageError(f"there is no command /{name}", hint="/help lists them")
            self._commands[name](rest)
        except KeyboardInterrupt:
            note(self._settings, "(stopped)")
        except ModelpackError as error:
            show_error(error)

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not name:
            rows = [(name, setting.expects) for name, setting in SETTINGS.items()]
            click.echo(table(("NAME", "VALUE"), rows))
            return
        set_value(self._chat, name, value.strip())

    def _show(self, _rest: str) -> None:
        chat = self._chat
        now: dict[str, object] = {"model": chat.model.name, "context": chat.model.max_model_len}
        now |= values(chat) | {"turns": len(chat.turns)}
        params = chat.params()
        rows = []
        for name, value in now.items():
            text = str(value)
            if value in (None, "", ()):
                own = None if _is_ours(name) or not chat.knows_defaults else getattr(params, name)
                text = DEFAULT if own in (None, ()) else f"{DEFAULT} ({own})"
            rows.append((name, text))
        show(self._settings, now, table(("NAME", "VALUE"), rows))

    def _system(self, rest: str) -> None:
        set_value(self._chat, "system", rest or DEFAULT)

    def _clear(self, _rest: str) -> None:
        self._chat.clear()

    def _change(self, rest: str) -> None:
        if not rest:
            raise UsageError("/load expects the name of a model")
        before = self._chat.model.name
        try:
            self._chat.model = self._load(rest)
        except BaseException:  # also of Ctrl-C: there is to be a model to go on with
            self._chat.model = self._load(before)
            raise
        note(self._settings, f"{self._chat.model.name} is ready")

    def _help(self, _rest: str) -> None:
        width = max(len(usage) for usage, _ in _HELP)
        click.echo("\n".join(f"{usage.ljust(width)}  {text}" for usage, text in _HELP))


def _is_ours(name: str) -> bool:
    """Whether a row of /show is none of the sampling parameters."""
    return name not in SETTINGS or SETTINGS[name].field is not None
