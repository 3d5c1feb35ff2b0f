"""Message order that chat templates accept: system messages first, roles that alternate.

Newer clients add instructions after the user's turns. To move them to the front would change the
beginning of every prompt, and nothing would be found in the prefix cache; so they stay where they
are: as a message of the system where the template shows one there, else within the user's turn.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from modelpack_engine.errors import RequestError
from modelpack_engine.models.chat_template import ChatTemplate

_MARK = "0d9b4e1c"


def fit_turns(
    messages: Sequence[Mapping[str, Any]], chat_template: str | None
) -> list[dict[str, Any]]:
    """Return `messages` with instructions where `chat_template` shows them.

    Neighbours of the same role become one message, except results of tools, and what follows calls.
    """
    shown_first, shown_within = _shows_system(chat_template or "")
    turns: list[list[dict[str, Any]]] = []  # the messages of each
    has_text = False  # in the last turn
    for message in messages:
        part = dict(message)
        first = not turns or (len(turns) == 1 and turns[0][0]["role"] == "system")
        if part["role"] == "system" and not (shown_first if first else shown_within):
            part = {"role": "user", "content": _as_reminder(part["content"])}
        if turns and _is_same_turn(turns[-1][-1], part, has_text=has_text):
            turns[-1].append(part)
        else:
            turns.append([part])
            has_text = False
        has_text = has_text or bool(part.get("content"))
    return [turn[0] if len(turn) == 1 else _joined(turn) for turn in turns]


def _as_reminder(text: str) -> str:
    return f"<system-reminder>\n{text}\n</system-reminder>"


def _is_same_turn(last: Mapping[str, Any], other: Mapping[str, Any], *, has_text: bool) -> bool:
    """Tell whether `other` goes on with the turn whose last message is `last`."""
    return (
        last["role"] == other["role"]
        and last["role"] != "tool"
        and not last.get("tool_calls")
        and not (has_text and other.get("reasoning_content"))
    )


def _joined(turn: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the messages of a turn as one, in time that grows with their texts."""
    texts = [part["content"] for part in turn if part.get("content")]
    thoughts = [part["reasoning_content"] for part in turn if part.get("reasoning_content")]
    joined = {key: value for part in turn for key, value in part.items()}
    joined["content"] = "\n\n".join(texts)
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
