"""The read-eval loop of `modelpack run`: line editing, history, /commands and settings."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import platformdirs

from modelpack.cli.options import Settings
from modelpack.cli.output import note, show, show_error, table
from modelpack.errors import ModelpackError, UsageError

if TYPE_CHECKING:
    from modelpack_server.conversation.served_model import ServedModel
    from modelpack_server.repl.chat import Chat

_QUOTES = '"""'
_KEPT = 1000  # lines of history
_FIRST, _MORE = ">>> ", "... "


def read_question() -> str:
    """Read a prompt from the terminal and return it.

    A prompt is one line, several lines joined by a backslash at the end of each but the last, or
    the text between two triple quotes. Raises `EOFError` at the end of input, and
    `KeyboardInterrupt` for Ctrl-C.
    """
    line = input(_FIRST)
    if line.lstrip().startswith(_QUOTES):
        return _quoted(line.lstrip()[len(_QUOTES) :])
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(_MORE))
    return "\n".join(lines).strip()


def _quoted(line: str) -> str:
    lines = []
    while not line.rstrip().endswith(_QUOTES):
        lines.append(line)
        line = input(_MORE)
    lines.append(line.rstrip()[: -len(_QUOTES)])
    return "\n".join(lines).strip("\n")


@contextmanager
def line_editing(words: Sequence[str], path: Path | None = None) -> Iterator[None]:
    """Enable line editing, history and completion of `words`, if Python has readline.

    The history is kept in `path`, which only its owner can read.
    """
    try:
        import readline
    except ImportError:  # this Python lacks readline; input() works without it
        yield
        return
    path = path or Path(platformdirs.user_state_dir("modelpack")) / "run-history"

    def complete(typed: str, at: int) -> str | None:
        found = [word for word in words if word.startswith(typed)] if typed else []
        return found[at] if at < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")
    readline.set_history_length(_KEPT)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        # Ignore a history that cannot be written.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            path.chmod(0o600)
            readline.write_history_file(path)
            path.chmod(0o600)
        readline.set_completer(None)
        readline.clear_history()


#: The value that resets a setting to the default of the model or the preset.
DEFAULT = "default"

_SWITCH = {"on": True, "off": False}


def _switch(text: str) -> bool:
    if text not in _SWITCH:
        raise ValueError
    return _SWITCH[text]


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise ValueError
    return count


@dataclass(frozen=True, slots=True)
class Setting:
    """`field` is an attribute of `Chat`, or None for one of its `given` sampling fields."""

    parse: Callable[[str], Any]
    expects: str
    field: str | None = None
    default: Any = None


SETTINGS: dict[str, Setting] = {
    "temperature": Setting(float, "0 (greedy) to 2"),
    "top_p": Setting(float, "above 0, up to 1"),
    "top_k": Setting(int, "a count; 0: all"),
    "min_p": Setting(float, "0 to 1"),
    "repetition_penalty": Setting(float, "above 0; 1: none"),
    "presence_penalty": Setting(float, "-2 to 2"),
    "frequency_penalty": Setting(float, "-2 to 2"),
    "seed": Setting(int, "a whole number"),
    "stop": Setting(lambda text: tuple(shlex.split(text)), 'strings, like "###" END'),
    "max_tokens": Setting(_count, "the maximum number of tokens of a response", "max_tokens"),
    "preset": Setting(str, "code, chat, creative or long-context", "preset"),
    "system": Setting(str, "the system message", "system", ""),
    "think": Setting(_switch, "on or off", "reasoning"),
}


def set_value(chat: Chat, name: str, text: str) -> None:
    """Set `name` to the value `text`; raise `UsageError`, without a change, if it is invalid."""
    setting = SETTINGS.get(name)
    if setting is None:
        raise UsageError(f"no such setting: {name!r}", hint=f"choose one of {', '.join(SETTINGS)}")
    if not text:
        raise UsageError(f"/set {name} requires a value: {setting.expects}, or {DEFAULT}")
    try:
        value = setting.default if text == DEFAULT else setting.parse(text)
    except ValueError:
        raise UsageError(f"{name} {text!r}: expected {setting.expects}") from None
    from modelpack_engine.errors import RequestError

    given, kept = chat.given, getattr(chat, setting.field) if setting.field else None
    if setting.field:
        setattr(chat, setting.field, value)
    else:
        chat.given = {key: old for key, old in given.items() if key != name}
        if text != DEFAULT:
            chat.given[name] = value
    try:
        chat.check()
    except RequestError as error:
        chat.given = given
        if setting.field:
            setattr(chat, setting.field, kept)
        raise UsageError(str(error)) from None


def values(chat: Chat) -> dict[str, Any]:
    """Return all settings; None means the default of the model or the preset."""
    return {
        name: getattr(chat, setting.field) if setting.field else chat.given.get(name)
        for name, setting in SETTINGS.items()
    }


# A slash and a lower-case word; a prompt may begin with a path.
_COMMAND = re.compile(r"/([a-z?]+)(?:\s+(.*))?", re.DOTALL)

_HELP = (
    ("/set NAME VALUE", f"change a setting; the value {DEFAULT} resets it"),
    ("/show", "show the settings and the number of messages"),
    ("/system [TEXT]", "set the system message; without TEXT, remove it"),
    ("/clear", "delete all messages"),
    ("/load MODEL", "continue with another model"),
    ("/help", "show this help"),
    ("/bye", "end the chat, like Ctrl-D"),
    ('"""', "begin and end a prompt of several lines; a backslash continues a line"),
    ("Ctrl-C", "stop the response"),
)


class Loop:
    """Reads prompts and commands. `ask` sends a prompt, `load` loads another model."""

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
            "system": lambda text: set_value(chat, "system", text or DEFAULT),
            "clear": lambda _: chat.clear(),
            "load": self._change,
            "help": self._help,
            "?": self._help,
        }

    def run(self) -> None:
        """Run until the end of input or /bye."""
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
                    click.echo(err=True)  # the terminal shows ^C on the line of the prompt
                    note(self._settings, "end the chat with Ctrl-D or /bye")
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
                raise UsageError(f"no such command: /{name}", hint="run /help to list the commands")
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
                is_sampling = name in SETTINGS and SETTINGS[name].field is None
                own = getattr(params, name) if is_sampling and chat.knows_defaults else None
                text = DEFAULT if own in (None, ()) else f"{DEFAULT} ({own})"
            rows.append((name, text))
        show(self._settings, now, table(("NAME", "VALUE"), rows))

    def _change(self, rest: str) -> None:
        if not rest:
            raise UsageError("/load requires the name of a model")
        before = self._chat.model.name
        try:
            self._chat.model = self._load(rest)
        except BaseException:  # including Ctrl-C: the chat needs a model to continue
            self._chat.model = self._load(before)
            raise
        note(self._settings, f"{self._chat.model.name} is ready")

    def _help(self, _rest: str) -> None:
        width = max(len(usage) for usage, _ in _HELP)
        click.echo("\n".join(f"{usage.ljust(width)}  {text}" for usage, text in _HELP))
