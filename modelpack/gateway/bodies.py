"""Request bodies: read up to a limit, looked into, and handed on as they were."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Receive

_DRAIN_SECONDS = 5.0
_DEFAULT_ANSWER = 256  # tokens reserved where a request does not say how many it wants
_LONGEST_TEXT = 4096  # characters without a blank: rather an image in base64


class TooLargeError(Exception):
    """A body is larger than the limit."""


class DisconnectedError(Exception):
    """The client went away before its body was complete."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a JSON body says about the request.

    `models` are the names of models in it, in all spellings that a reader could take; `ambiguous`
    tells that two readers could take different ones. `tokens` estimates prompt and answer.
    """

    models: tuple[str, ...] = ()
    ambiguous: bool = False
    valid: bool = False
    prompt_tokens: int = 0
    answer_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Estimate of what the request will take in all."""
        return self.prompt_tokens + self.answer_tokens


async def read_body(receive: Receive, headers: Headers, limit: int) -> bytes:
    """Return the whole body. Raises `TooLargeError`, `DisconnectedError`.

    No more than `limit` bytes are kept. The rest of a body that is too large is thrown away for a
    while, so that a client that sends before it listens gets to see the answer.
    """
    announced = headers.get("content-length", "")
    expecting = headers.get("expect", "").lower() == "100-continue"
    too_large = announced.isascii() and announced.isdigit() and int(announced) > limit
    if too_large and expecting:
        raise TooLargeError
    pieces: list[bytes] = []
    size = 0
    while not too_large:
        message = await _next(receive)
        piece = message.get("body", b"")
        size += len(piece)
        if size > limit:
            too_large = True
            pieces.clear()
        elif piece:
            pieces.append(piece)
        if not message.get("more_body", False):
            break
    if too_large:
        await _drain(receive, limit, message_left=size <= limit or message.get("more_body", False))
        raise TooLargeError
    return b"".join(pieces)


async def _next(receive: Receive) -> Message:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise DisconnectedError
    return message


async def _drain(receive: Receive, most: int, *, message_left: bool) -> None:
    async def drain() -> None:
        thrown, more = 0, message_left
        while more and thrown <= most:
            message = await _next(receive)
            thrown += len(message.get("body", b""))
            more = message.get("more_body", False)

    try:
        await asyncio.wait_for(drain(), _DRAIN_SECONDS)
    except TimeoutError:
        return


def replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives `body` at once, then whatever the client does."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


def look_into(body: bytes) -> Asked:
    """Return what a JSON body says; of what is no JSON object, that it is not valid."""
    repeated = False

    def noticing(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal repeated
        # Go's decoder ignores case, so `Model` after `model` replaces it there; the outermost
        # object is the last to come by here.
        names = [name.casefold() for name, _ in pairs]
        repeated = names.count("model") > 1 or names.count("name") > 1
        return dict(pairs)

    try:
        document = json.loads(body, object_pairs_hook=noticing)
    except (ValueError, RecursionError):
        return Asked()
    if not isinstance(document, dict):
        return Asked()
    models = []
    for name, value in document.items():
        if name.casefold() in ("model", "name") and isinstance(value, str) and value:
            models.append(value)
    return Asked(
        models=tuple(models),
        ambiguous=repeated,
        valid=True,
        prompt_tokens=sum(map(_length, _texts(document))) // 4 + 1,
        answer_tokens=_answer_tokens(document),
    )


def _texts(document: dict[str, Any]) -> Iterator[str]:
    """Give all strings of `document`, those of its keys left out."""
    pending: list[Any] = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def _length(text: str) -> int:
    if len(text) > _LONGEST_TEXT and " " not in text[:_LONGEST_TEXT]:
        return 0
    return len(text)


def _answer_tokens(document: dict[str, Any]) -> int:
    options = document.get("options")
    asked = [document.get(name) for name in
             ("max_tokens", "max_completion_tokens", "max_output_tokens")]  # fmt: skip
    asked.append(options.get("num_predict") if isinstance(options, dict) else None)
    limits = [value for value in asked if isinstance(value, int) and 0 < value <= 2**31]
    count = document.get("n")
    several = count if isinstance(count, int) and 0 < count <= 1024 else 1
    if limits:
        return max(limits) * several
    generates = any(name in document for name in ("messages", "prompt", "stream"))
    return _DEFAULT_ANSWER * several if generates else 0
