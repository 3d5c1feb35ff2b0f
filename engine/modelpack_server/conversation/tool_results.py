"""Results of tools for templates that want them with the calls, not as messages of their own.

Gemma 4's first template is one: it reads `tool_responses` of the assistant's message, a list of
`{"name", "response"}`, and what the assistant says next goes on in the same turn. Its later ones
take messages of the role "tool" as well, as all others do.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from modelpack_server.tool_parsers.json_text import load_object

_TAKES_TOOL_ROLE = re.compile(r"""role['"]?\]?\s*[!=]=\s*['"]tool['"]""")


@functools.lru_cache(maxsize=64)
def wants_results_with_calls(chat_template: str) -> bool:
    """Tell whether a template reads `tool_responses`, and knows no messages of tools."""
    return "tool_responses" in chat_template and not _TAKES_TOOL_ROLE.search(chat_template)


def results_with_calls(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return `messages` with every tool's result in the message that called it.

    What was said before a call becomes a turn before it, and what was said after the results goes
    with them, which is where such a template puts it.
    """
    changed: list[dict[str, Any]] = []
    names: dict[Any, str] = {}  # of the calls in the last turn, by their ids
    for message in messages:
        turn = dict(message)
        last = changed[-1] if changed else {}
        calls = last.get("tool_calls")
        if turn.get("role") == "tool" and calls:
            last.setdefault("tool_responses", []).append(_result(turn, names))
            continue
        if turn.get("tool_calls") and turn.get("content"):
            changed.append({**turn, "tool_calls": None})
            turn["content"] = ""
        elif _goes_on(last, turn):
            last["content"] = turn.get("content")
            continue
        changed.append(turn)
        names = {c.get("id"): c["function"]["name"] for c in turn.get("tool_calls") or ()}
    return changed


def _goes_on(last: Mapping[str, Any], turn: Mapping[str, Any]) -> bool:
    """Tell whether `turn` is what the assistant says after the results in `last`."""
    has_results = bool(last.get("tool_responses")) and not last.get("content")
    return has_results and turn.get("role") == "assistant" and not turn.get("tool_calls")


def _result(message: Mapping[str, Any], names: Mapping[Any, str]) -> dict[str, Any]:
    name = names.get(message.get("tool_call_id")) or message.get("name") or "unknown"
    text = str(message.get("content") or "")
    try:
        return {"name": name, "response": load_object(text)}
    except ValueError:
        return {"name": name, "response": text}
