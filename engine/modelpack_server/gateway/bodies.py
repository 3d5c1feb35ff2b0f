"""Request bodies: read within limits, inspected for model and token counts, and passed on
unchanged.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from modelpack_server.gateway.json_bodies import BodyError, ComplexityError, Parsed, parse

#: Memory that the bodies of all requests in flight may take, in bytes.
MAX_IN_FLIGHT = 256 * 1024 * 1024
#: Bytes of each body that do not count: small requests pass whatever others send.
FREE_BYTES = 64 * 1024
#: A body has to come at this rate, in bytes a second, once these seconds are over.
SLOWEST_RATE = 8 * 1024
SLOW_START = 30.0

_DRAIN_SECONDS = 5.0
DEFAULT_ANSWER = 256  # tokens reserved where a request does not say how many it wants
_LEAST_MEDIA = 4096  # characters of base64 that count as an image, not as text
_DATA_URL = re.compile(r"(?:data:[^,\s]{0,256},)?")
_BASE64 = re.compile(r"[A-Za-z0-9+/_=-]*+")
_BLOCK = 1024 * 1024  # characters that are looked at before other threads get their turn
_BYTES_PER_TOKEN = 4
_MEDIA_BYTES_PER_TOKEN = 256


class ReadError(Exception):
    """A body was not read to its end; `size` bytes of it were."""

    def __init__(self, size: int = 0) -> None:
        super().__init__()
        self.size = size


class TooLargeError(ReadError):
    """A body is larger than the limit."""


class TooSlowError(ReadError):
    """A body came more slowly than `SLOWEST_RATE`."""


class TooComplexError(ReadError):
    """A body holds more than JSON may; `why` names the limit."""

    def __init__(self, size: int, why: str) -> None:
        super().__init__(size)
        self.why = why


class NoRoomError(ReadError):
    """The bodies in flight take as much memory as they may."""


class DisconnectedError(ReadError):
    """The client went away before its body was complete."""


class BodyBudget:
    """Counts the memory that bodies in flight take together, `limit` bytes at most."""

    def __init__(self, limit: int = MAX_IN_FLIGHT) -> None:
        self.limit = limit
        self.taken = 0


class BodyShare:
    """What one body takes of a budget, as a context manager that gives it back."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._wanted = 0
        self._taken = 0

    def __enter__(self) -> BodyShare:
        return self

    def __exit__(self, *exception: object) -> None:
        self._budget.taken -= self._taken
        self._taken = 0

    def add(self, count: int) -> None:
        """Take `count` bytes more. Raises `NoRoomError`."""
        self._wanted += count
        more = max(0, self._wanted - FREE_BYTES) - self._taken
        if more > 0 and self._budget.taken + more > self._budget.limit:
            raise NoRoomError(self._wanted)
        self._taken += more
        self._budget.taken += more


@dataclass(frozen=True, slots=True)
class Asked:
    """What a JSON body says about the request.

    `models` are the names of models in it, in all spellings that a reader could take; `ambiguous`
    tells that two readers could take different ones. `fields` are those of `model` and `name` that
    name a model and are spelled exactly so. `tokens` estimates prompt and answer.
    """

    models: tuple[str, ...] = ()
    ambiguous: bool = False
    fields: frozenset[str] = frozenset()
    valid: bool = False
    prompt_tokens: int = 0
    answer_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Estimate of what the request will take in all."""
        return self.prompt_tokens + self.answer_tokens


async def read_body(
    receive: Receive,
    headers: Headers,
    limit: int,
    share: BodyShare,
    clock: Callable[[], float] = time.monotonic,
) -> list[bytes]:
    """Return the whole body in pieces: joining them is work for a thread. Raises `ReadError`.

    No more than `limit` bytes are kept, and no more than `share` gives. The rest of a body that is
    refused is thrown away for a while, so that a client that sends before it listens gets to see
    the answer.
    """
    announced = headers.get("content-length", "")
    expecting = headers.get("expect", "").lower() == "100-continue"
    too_large = announced.isascii() and announced.isdigit() and int(announced) > limit
    if too_large and expecting:
        raise TooLargeError
    began = clock()
    pieces: list[bytes] = []
    size = 0
    more = True
    try:
        if too_large:
            raise TooLargeError
        while more:
            patience = SLOW_START + size / SLOWEST_RATE - (clock() - began)
            try:
                message = await asyncio.wait_for(_next(receive), patience)
            except TimeoutError:
                raise TooSlowError(size) from None
            piece = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(piece)
            if size > limit:
                raise TooLargeError(size)
            if piece:
                share.add(len(piece))
                pieces.append(bytes(piece))  # joined without the interpreter
    except (TooLargeError, NoRoomError) as error:
        pieces.clear()
        error.size = size + await _drain(receive, limit, message_left=more)
        raise
    return pieces


async def _next(receive: Receive) -> Message:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise DisconnectedError
    return message


async def _drain(receive: Receive, most: int, *, message_left: bool) -> int:
    """Throw away the rest of a body, for a while; return how many bytes came."""
    thrown = 0

    async def drain() -> None:
        nonlocal thrown
        more = message_left
        while more and thrown <= most:
            message = await _next(receive)
            thrown += len(message.get("body", b""))
            more = message.get("more_body", False)

    with suppress(TimeoutError):
        await asyncio.wait_for(drain(), _DRAIN_SECONDS)
    return thrown


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


def look_into(body: bytes) -> tuple[Parsed | None, Asked]:
    """Parse a body and return what it says; of one that is no JSON object, that it is not valid.

    Raises `ComplexityError`.
    """
    try:
        parsed = parse(body)
    except ComplexityError:
        raise
    except BodyError:
        return None, _unreadable(body)
    document = parsed.value
    if not isinstance(document, dict):
        return parsed, _unreadable(body)
    # Go's decoder ignores case, so `Model` after `model` replaces it there.
    names = [name.casefold() for name in parsed.keys]
    named = {
        name: value
        for name, value in document.items()
        if name.casefold() in ("model", "name") and isinstance(value, str) and value
    }
    return parsed, Asked(
        models=tuple(named.values()),
        ambiguous=names.count("model") > 1 or names.count("name") > 1,
        fields=frozenset(named) & {"model", "name"},
        valid=True,
        prompt_tokens=_prompt_tokens(document),
        answer_tokens=_answer_tokens(document),
    )


def _unreadable(body: bytes) -> Asked:
    return Asked(prompt_tokens=tokens_in(len(body)))


def tokens_in(size: int) -> int:
    """Return about how many tokens a text of `size` bytes has."""
    return size // _BYTES_PER_TOKEN + 1


def _prompt_tokens(document: dict[str, Any]) -> int:
    """Return about how many tokens the texts, images and lists of token ids in `document` have."""
    size = ids = media = 0
    pending: list[Any] = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            if _is_media(value):
                media += len(value)
            else:
                size += len(value)
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list):
            if value and type(value[0]) is int:
                ids += len(value)
            else:
                pending.extend(value)
    return tokens_in(size) + ids + media // _MEDIA_BYTES_PER_TOKEN


def _is_media(text: str) -> bool:
    """Return whether a text is rather an image in base64, from its beginning to its end."""
    start = _DATA_URL.match(text)
    if len(text) < _LEAST_MEDIA or start is None:
        return False
    blocks = range(start.end(), len(text), _BLOCK)
    return all(_BASE64.fullmatch(text, at, at + _BLOCK) for at in blocks)


def _answer_tokens(document: dict[str, Any]) -> int:
    options = document.get("options")
    asked = [document.get(name) for name in
             ("max_tokens", "max_completion_tokens", "max_output_tokens")]  # fmt: skip
    asked.append(options.get("num_predict") if isinstance(options, dict) else None)
    limits = [value for value in asked if isinstance(value, int) and 0 < value <= 2**31]
    count, prompt = document.get("n"), document.get("prompt")
    several = count if isinstance(count, int) and 0 < count <= 1024 else 1
    if isinstance(prompt, list) and prompt and type(prompt[0]) is not int:
        several *= len(prompt)
    if limits:
        return max(limits) * several
    generates = any(name in document for name in ("messages", "prompt", "stream"))
    return DEFAULT_ANSWER * several if generates else 0
