"""Conversion of earlier tool calls from OpenAI's form to the form of a chat template."""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from modelpack_server.tool_parsers.calls import is_mistral_id
from modelpack_server.tool_parsers.families import OutputFormat
from modelpack_server.tool_parsers.json_text import JsonScanner, load_object

_KIMI_ID = re.compile(r"functions\..+:[0-9]+")
_ALPHANUMERIC = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# Signs that a template expects arguments as a string: it tests the type, or concatenates strings.
# All repetitions are bounded: templates are hostile input, and a search blocks all threads.
_ARGUMENTS = r"""[\w.'"\[\]]{0,60}arguments['"]?\]?"""
_S = r"\s{0,8}"
_TAKES_STRING = re.compile(
    rf"{_ARGUMENTS}\s{{1,8}}is\s{{1,8}}string"
    rf"|[+~]{_S}{_ARGUMENTS}{_S}(?:[+~)]|-?\}}\}})"
    rf"|{_ARGUMENTS}{_S}[+~]"
    rf"|\{{\{{-?{_S}{_ARGUMENTS}{_S}-?\}}\}}"
)
# A template that tests for a mapping treats strings differently (Gemma 4 adds braces).
_TAKES_MAPPING = re.compile(rf"{_ARGUMENTS}\s{{1,8}}is\s{{1,8}}mapping")
_BEFORE, _AFTER = 80, 48  # characters before and after the word that a pattern may match
_MAX_PLACES = 200


@functools.lru_cache(maxsize=64)
def takes_argument_strings(chat_template: str) -> bool:
    """Return whether a template expects a call's arguments as JSON text, as in OpenAI's API.

    Most templates dump or iterate over an object instead: given a string, they would quote it again
    or fail.
    """
    places = itertools.islice(re.finditer("arguments", chat_template), _MAX_PLACES)
    texts = [chat_template[max(0, m.start() - _BEFORE) : m.end() + _AFTER] for m in places]
    if any(map(_TAKES_MAPPING.search, texts)):
        return False
    return any(map(_TAKES_STRING.search, texts))


def template_messages(
    messages: Sequence[Mapping[str, Any]], format: OutputFormat, chat_template: str | None
) -> list[dict[str, Any]]:
    """Return `messages` with all `tool_calls` in the template's form, otherwise unchanged.

    Arguments become objects if the template expects objects; incomplete JSON is completed. The ids
    of calls and results get the form that the family requires: nine letters and digits for Mistral,
    functions.NAME:NUMBER for Kimi.
    """
    as_string = takes_argument_strings(chat_template or "")
    rename = _Ids(format.family)
    prepared = []
    for message in messages:
        changed = dict(message)
        if message.get("tool_calls"):
            changed["tool_calls"] = [_call(c, as_string, rename) for c in message["tool_calls"]]
        if isinstance(message.get("tool_call_id"), str):
            changed["tool_call_id"] = rename.result(message["tool_call_id"])
        prepared.append(changed)
    return prepared


def _call(call: Mapping[str, Any], as_string: bool, rename: _Ids) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str) or arguments is None:
        text = complete_object(arguments or "")
        function["arguments"] = text if as_string else load_object(text)
    changed = {**call, "type": call.get("type") or "function", "function": function}
    if isinstance(call.get("id"), str):
        changed["id"] = rename.call(call["id"], str(function.get("name", "")))
    return changed


def complete_object(text: str) -> str:
    """Return `text` if it is a JSON object, otherwise the completed object at its beginning."""
    try:
        load_object(text)
        return text
    except ValueError:
        pass
    scanner = JsonScanner()
    text = text.lstrip()
    if not text.startswith("{"):
        return "{}"
    scanner.scan(text)
    return scanner.take() + scanner.completion()


class _Ids:
    """Maps call ids to ids that a family's template accepts, the same for a call and its result."""

    def __init__(self, family: str | None) -> None:
        self._family = family
        self._new: dict[str, str] = {}
        self._calls = 0

    def call(self, call_id: str, name: str) -> str:
        if self._family == "kimi_k2":
            number = self._calls
            self._calls += 1
            if not _KIMI_ID.fullmatch(call_id):
                self._new[call_id] = f"functions.{name}:{number}"
                return self._new[call_id]
        return self.result(call_id)

    def result(self, call_id: str) -> str:
        if self._family in ("mistral", "mistral_v11", "mistral_v13"):
            return call_id if is_mistral_id(call_id) else _mistral_id(call_id)
        return self._new.get(call_id, call_id)


def _mistral_id(call_id: str) -> str:
    """Return nine letters and digits that depend only on the id, so that prompts stay cacheable."""
    number = int.from_bytes(hashlib.sha256(call_id.encode("utf-8", "replace")).digest()[:8], "big")
    digits = []
    for _ in range(9):
        number, digit = divmod(number, len(_ALPHANUMERIC))
        digits.append(_ALPHANUMERIC[digit])
    return "".join(digits)
