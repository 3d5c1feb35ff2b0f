"""Requests whose prompts begin alike get the same key, and with it the same upstream.

The server that has computed a prompt keeps its keys and values (the prefix cache): the next turn of
the conversation is answered sooner there than by any other server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

#: The characters of a prompt that decide. Numbers, nulls and empty texts count as one, so that few
#: values are looked at: this runs on the event loop.
LENGTH = 4096

_ROLES = ("system", "developer")


def prefix_key(document: Any) -> bytes | None:
    """Return a hash of a request's model and the beginning of its prompt, None without a prompt.

    `document` is the parsed body of a completion, chat or response of any API. The beginning of a
    chat ends with the first message that is not the system's: all turns of a conversation have it,
    and conversations with one system prompt differ in it.
    """
    if not isinstance(document, dict):
        return None
    prompt = document.get("messages") or document.get("input") or document.get("prompt")
    if not prompt:
        return None
    if isinstance(prompt, list):
        prompt = _opening(prompt)
    hashed = hashlib.sha256()
    left = LENGTH
    for part in (*map(document.get, ("model", "system", "instructions")), prompt):
        for text in () if part is None else _texts(part):
            data = text[:left].encode(errors="surrogatepass")
            hashed.update(len(data).to_bytes(4, "big") + data)
            left -= max(1, len(data))
            if left <= 0:
                return hashed.digest()
        hashed.update(b"\xff" * 4)
    return hashed.digest()


def _opening(messages: list[Any]) -> list[Any]:
    """Return the messages up to the first that is not the system's, or all token ids."""
    for count, message in enumerate(messages, 1):
        if isinstance(message, dict) and message.get("role") not in _ROLES:
            return messages[:count]
    return messages


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts and numbers in a JSON value, in order; an empty text for null."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from _texts(value[key])
    else:
        yield "" if value is None else str(value)
