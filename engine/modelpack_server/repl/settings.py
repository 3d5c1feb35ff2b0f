"""What `/set` sets while `modelpack run` runs, and what `/show` shows."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelpack.errors import UsageError

if TYPE_CHECKING:
    from modelpack_server.repl.chat import Chat

#: What takes a setting back to what the model or the preset has.
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
    "temperature": Setting(float, "0 (always the likeliest) to 2"),
    "top_p": Setting(float, "above 0, up to 1"),
    "top_k": Setting(int, "a count; 0: all"),
    "min_p": Setting(float, "0 to 1"),
    "repetition_penalty": Setting(float, "above 0; 1: none"),
    "presence_penalty": Setting(float, "-2 to 2"),
    "frequency_penalty": Setting(float, "-2 to 2"),
    "seed": Setting(int, "a whole number"),
    "stop": Setting(lambda text: tuple(shlex.split(text)), 'strings, like "###" END'),
    "max_tokens": Setting(_count, "the most tokens of an answer", "max_tokens"),
    "preset": Setting(str, "code, chat, creative or long-context", "preset"),
    "system": Setting(str, "the system message", "system", ""),
    "think": Setting(_switch, "on or off", "reasoning"),
}


def set_value(chat: Chat, name: str, text: str) -> None:
    """Set `name` to what `text` says; raises `UsageError`, and then nothing has changed."""
    setting = SETTINGS.get(name)
    if setting is None:
        raise UsageError(f"there is no setting {name!r}", hint=f"there are {', '.join(SETTINGS)}")
    if not text:
        raise UsageError(f"/set {name} expects {setting.expects}, or {DEFAULT}")
    try:
        value = setting.default if text == DEFAULT else setting.parse(text)
    except ValueError:
        raise UsageError(f"{name} is {text!r}, expected {setting.expects}") from None
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
    """Return all settings; None is what the model or the preset has."""
    return {
        name: getattr(chat, setting.field) if setting.field else chat.given.get(name)
        for name, setting in SETTINGS.items()
    }
