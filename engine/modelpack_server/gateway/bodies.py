"""Request bodies: read within limits, inspected for model and tokens, and forwarded unchanged."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from modelpack_server.gateway.forms import Form, FormError
from modelpack_server.gateway.json_bodies import BodyError, ComplexityError, Parsed, parse

#: The limit of memory for the bodies of all requests in flight, in bytes.
MAX_IN_FLIGHT = 256 * 1024 * 1024
#: The bytes of each body that do not count, so that large bodies never block small requests.
FREE_BYTES = 64 * 1024
#: The minimum rate of a body in bytes per second, and the seconds before it applies.
SLOWEST_RATE = 8 * 1024
SLOW_START = 30.0

_SCOPE_KEY = "modelpack.body_share"
_DRAIN_SECONDS = 5.0
DEFAULT_ANSWER = 256  # tokens reserved for a request without a limit
_LEAST_MEDIA = 4096  # characters from which base64 counts as an image, not as text
_DATA_URL = re.compile(r"(?:data:[^,\s]{0,256},)?")
_BASE64 = re.compile(r"[A-Za-z0-9+/_=-]*+")
_BLOCK = 1024 * 1024  # characters processed before other threads may run
_BYTES_PER_TOKEN = 4
_MEDIA_BYTES_PER_TOKEN = 256
# A model sees frames of a video with 33.6 million pixels together, and a token is two squares of
# 28 pixels a side.
_VIDEO_TOKENS = 21_400


class ReadError(Exception):
    """A body was not read completely, only `size` bytes of it; `why` names the exceeded limit."""

    def __init__(self, size: int = 0, why: str = "") -> None:
        super().__init__()
        self.size = size
        self.why = why


class TooLargeError(ReadError):
    """A body is larger than the limit."""


class TooSlowError(ReadError):
    """A body arrived more slowly than `SLOWEST_RATE`."""


class TooComplexError(ReadError):
    """The JSON of a body exceeds a limit."""


class NoRoomError(ReadError):
    """The memory limit for bodies in flight is reached."""


class DisconnectedError(ReadError):
    """The client disconnected before its body was complete."""


@dataclass(slots=True)
class BodyBudget:
    """Counts the memory of all bodies in flight, up to `limit` bytes."""

    limit: int = MAX_IN_FLIGHT
    taken: int = 0


class BodyShare:
    """One body's share of a budget; the context manager returns it."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._wanted = 0
        self._taken = 0

    def __enter__(self) -> BodyShare:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Return the share to the budget: nothing holds the body any more."""
        self._budget.taken -= self._taken
        self._taken = 0

    def add(self, count: int) -> None:
        """Add `count` bytes to the share. Raises `NoRoomError`."""
        self._wanted += count
        more = max(0, self._wanted - FREE_BYTES) - self._taken
        if more > 0 and self._budget.taken + more > self._budget.limit:
            raise NoRoomError(self._wanted)
        self._taken += more
        self._budget.taken += more


@dataclass(frozen=True, slots=True)
class Asked:
    """The model and the token counts in a JSON body.

    `models` are the values of all keys that some JSON reader could take as the model's name;
    `ambiguous` says that two readers could take different ones. `fields` are those of `model` and
    `name` that occur in exactly this spelling. `tokens` estimates prompt and reply. `background`
    says that the reply may come after the response to the request (OpenAI's Responses API).
    """

    models: tuple[str, ...] = ()
    ambiguous: bool = False
    fields: frozenset[str] = frozenset()
    valid: bool = False
    prompt_tokens: int = 0
    answer_tokens: int = 0
    background: bool = False

    @property
    def tokens(self) -> int:
        """The estimated total number of tokens of the request."""
        return self.prompt_tokens + self.answer_tokens


async def read_body(
    receive: Receive,
    headers: Headers,
    limit: int,
    share: BodyShare,
    clock: Callable[[], float] = time.monotonic,
    give_back: Callable[[bytes], None] = lambda _: None,
) -> list[bytes]:
    """Return the whole body in pieces, to be joined later. Raises `ReadError`.

    It keeps at most `limit` bytes, and no more than `share` allows. It calls `give_back` with each
    message's bytes once they are copied (see `http.connection`). It reads and drops the rest of a
    refused body for a limited time, so that a client that first sends its whole body sees the
    response.
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
            piece = message.pop("body", b"")
            more = message.get("more_body", False)
            size += len(piece)
            if size > limit:
                raise TooLargeError(size)
            if piece:
                share.add(len(piece))
                pieces.append(bytes(piece))  # joining bytes objects releases the GIL
                give_back(piece)
            piece = b""  # see below
    except (TooLargeError, NoRoomError) as error:
        pieces.clear()
        error.size = size + await _drain(receive, limit, message_left=more)
        raise
    except BaseException:
        # The traceback, and so this frame, is in a cycle of references until a collection.
        pieces.clear()
        raise
    return pieces


async def _next(receive: Receive) -> Message:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise DisconnectedError
    return message


async def _drain(receive: Receive, most: int, *, message_left: bool) -> int:
    """Read and drop the rest of a body for a limited time; return the number of bytes."""
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
    """Return a `receive` that returns `body` first, then the client's further messages.

    It does not keep `body` after that.
    """
    left = [body]

    async def replay() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return replay


def put_share(scope: Scope, share: BodyShare) -> None:
    """Keep a body's share, for an application that is done with the body before the request."""
    scope[_SCOPE_KEY] = share


def release_body(scope: Scope) -> None:
    """Return the share of a request's body to the budget.

    For applications that hold neither the body nor its parsed value any more, and that limit
    themselves what they made of it.
    """
    share = scope.get(_SCOPE_KEY)
    if share is not None:
        share.release()


def look_into(body: bytes, *, is_counted: bool = True) -> tuple[Parsed | None, Asked]:
    """Return the parsed body, or None if it is not a JSON object, and its model and tokens.

    Unless the request `is_counted`, its prompt has no estimate, for which all media are read.
    Raises `ComplexityError`.
    """
    try:
        parsed = parse(body)
    except ComplexityError:
        raise
    except BodyError:
        return None, Asked(prompt_tokens=tokens_in(len(body)))
    document = parsed.value
    if not isinstance(document, dict):
        return parsed, Asked(prompt_tokens=tokens_in(len(body)))
    # Go's decoder ignores case, so that `Model` after `model` replaces its value.
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
        prompt_tokens=_prompt_tokens(document) if is_counted else 0,
        answer_tokens=_answer_tokens(document),
        background=document.get("background") is True,
    )


def look_into_form(body: bytes, content_type: str) -> Asked:
    """Return the model and tokens in a form with a file.

    Parsers of forms differ in the case of names, and in which of several fields counts.
    """
    tokens = len(body) // _MEDIA_BYTES_PER_TOKEN + 1
    try:
        form = Form(content_type)
        for start in range(0, len(body), _BLOCK):
            form.feed(body[start : start + _BLOCK])
            form.content.clear()
        form.end()
    except FormError:
        return Asked(prompt_tokens=tokens)
    fields = [(name, value) for name, value in form.fields if name.casefold() == "model"]
    named = [(name, value) for name, value in fields if value]
    return Asked(
        models=tuple(value for _, value in named),
        ambiguous=len(fields) > 1,
        fields=frozenset(name for name, _ in named) & {"model"},
        valid=True,
        prompt_tokens=tokens,
        answer_tokens=DEFAULT_ANSWER,
    )


def tokens_in(size: int) -> int:
    """Return an estimate of the tokens in a text of `size` bytes."""
    return size // _BYTES_PER_TOKEN + 1


def _prompt_tokens(document: dict[str, Any]) -> int:
    """Return an estimate of the tokens in the texts, images and token id lists of `document`."""
    size = ids = media = 0
    pending: list[Any] = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            if _is_media(value):
                tokens = len(value) // _MEDIA_BYTES_PER_TOKEN
                is_video = value[:11].lower() == "data:video/"
                media += min(tokens, _VIDEO_TOKENS) if is_video else tokens
            else:
                size += len(value)
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list):
            if value and type(value[0]) is int:
                ids += len(value)
            else:
                pending.extend(value)
    return tokens_in(size) + ids + media


def _is_media(text: str) -> bool:
    """Return whether a whole text is probably an image, a sound or a video in base64."""
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
