"""Which stored response or conversation a request names, and which upstream has it.

A server keeps the responses and conversations that it stored. A gateway with several upstreams asks
all of them for an object that it does not know yet, and remembers who has it.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from starlette.types import Scope

from modelpack_server.gateway.json_bodies import document_in

#: The number of objects whose upstream is remembered; the least recently used are forgotten.
MAX_LOCATIONS = 10_000

_NAME = r"[A-Za-z0-9_.-]{1,256}"
_PATH = re.compile(
    r"(?:/engines(?:/[A-Za-z0-9._-]+)?|/anthropic)?(?:/v1)?"
    rf"/(responses|conversations)(?:/({_NAME})(?:/.*)?)?",
    re.DOTALL,
)
# Routes of new requests, not names of responses.
_ROUTES = ("input_tokens", "compact")


def stored_object(scope: Scope) -> str | None:
    """Return the path at which an upstream has the object that a request names, or None.

    The name is in the request's path, or in `previous_response_id` or `conversation` of its body.
    """
    found = _PATH.fullmatch(scope["path"])
    if found is None:
        return None
    kind, name = found.groups()
    if name is not None and name not in _ROUTES:
        return f"/v1/{kind}/{name}"
    return _named_in(document_in(scope)) if kind == "responses" else None


def _named_in(document: Any) -> str | None:
    if not isinstance(document, Mapping):
        return None
    conversation = document.get("conversation")
    if isinstance(conversation, Mapping):
        conversation = conversation.get("id")
    for kind, name in (
        ("responses", document.get("previous_response_id")),
        ("conversations", conversation),
    ):
        if isinstance(name, str) and re.fullmatch(_NAME, name):
            return f"/v1/{kind}/{name}"
    return None


class Locations:
    """The names of the upstreams that have objects, by the objects' paths."""

    def __init__(self, limit: int = MAX_LOCATIONS) -> None:
        self._limit = limit
        self._found: OrderedDict[str, str] = OrderedDict()

    def get(self, path: str) -> str | None:
        """Return the name of the upstream that has the object, or None if it is not known."""
        if path in self._found:
            self._found.move_to_end(path)
        return self._found.get(path)

    def put(self, path: str, upstream: str) -> None:
        """Remember which upstream has the object."""
        self._found[path] = upstream
        self._found.move_to_end(path)
        if len(self._found) > self._limit:
            self._found.popitem(last=False)
