"""Turns as a template takes them: instructions in the midst of a conversation, repeated roles.

Newer clients add instructions after the user's turns. To move them to the front would change the
beginning of every prompt, and nothing would be found in the prefix cache; so they stay where they
are: as a message of the system where the template shows one there, else within the user's turn.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from modelpack_engine.errors import RequestError
from modelpack_engine.loaders.chat_template import ChatTemplate

_MARK = "0d9b4e1c"


def fit_turns(
    messages: Sequence[Mapping[str, Any]], chat_template: str | None
) -> list[dict[str, Any]]:
    """Return `messages` with instructions where `chat_template` shows them.

    Neighbours of the same role become one message, except results of tools, and what follows calls.
    """
    shown_first, shown_within = _shows_system(chat_template or "")
    fitted: list[dict[str, Any]] = []
    for message in messages:
        turn = dict(message)
        first = not fitted or (len(fitted) == 1 and fitted[0]["role"] == "system")
        if turn["role"] == "system" and not (shown_first if first else shown_within):
            turn = {"role": "user", "content": _as_reminder(turn["content"])}
        if fitted and _is_same_turn(fitted[-1], turn):
            fitted[-1] = _joined(fitted[-1], turn)
        else:
            fitted.append(turn)
    return fitted


def _as_reminder(text: str) -> str:
    return f"<system-reminder>\n{text}\n</system-reminder>"


def _is_same_turn(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (
        one["role"] == other["role"]
        and one["role"] != "tool"
        and not one.get("tool_calls")
        and not (one.get("content") and other.get("reasoning_content"))
    )


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    texts = [text for text in (one.get("content"), other.get("content")) if text]
    thoughts = [m["reasoning_content"] for m in (one, other) if m.get("reasoning_content")]
    joined = {**one, **other, "content": "\n\n".join(texts)}
    return joined | ({"reasoning_content": "\n\n".join(thoughts)} if thoughts else {})


@functools.lru_cache(maxsize=64)
def _shows_system(chat_template: str) -> tuple[bool, bool]:
    """Tell whether a template shows instructions at the beginning, and later ones in their place.

    It is tried out: templates refuse, leave out or move what they do not expect.
    """
    system, user = f"{_MARK}-s", f"{_MARK}-u"
    answer, more = f"{_MARK}-a", f"{_MARK}-v"
    turns = [("user", user), ("assistant", answer), ("user", more)]
    first = _places(chat_template, [("system", system), *turns], [system, user, answer, more])
    within = _places(
        chat_template, [turns[0], ("system", system), *turns[1:]], [user, system, answer, more]
    )
    return first, within


def _places(chat_template: str, turns: list[tuple[str, str]], expected: list[str]) -> bool:
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = ChatTemplate(chat_template).render(
            {"messages": messages, "tools": None, "documents": None, "bos_token": "",
             "eos_token": "", "add_generation_prompt": True}
        )  # fmt: skip
    except RequestError:
        return False
    places = [text.find(part) for part in expected]
    return -1 not in places and places == sorted(places)
