"""Recent requests and their responses: recorded by a middleware, served at /engines/requests.

A streamed response is recorded as the object that the same request returns without streaming.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelpack.errors import ModelpackError
from modelpack_server.api import sse
from modelpack_server.api.model_runner.answers import TextRoute
from modelpack_server.api.model_runner.engines import config_shown
from modelpack_server.gateway.caller import caller_of
from modelpack_server.gateway.json_bodies import BodyError, document_in, in_worker, parse
from modelpack_server.gateway.traces import trace_of
from modelpack_server.pool.pool import ModelPool

# The characters that are kept of an image or a sound in base64.
_MEDIA = 100


def joined(reply: str) -> tuple[str, str]:
    """Return the response and the error of a reply; one of them is "".

    A stream of server-sent events or JSON lines becomes the object that the same request returns
    without streaming. Any other reply is unchanged.
    """
    events = list(_events(reply))
    if not events:
        return reply, ""
    for event in events:
        if event.get("error") or event.get("type") == "error":
            return "", json.dumps(event, ensure_ascii=False)
    if any(event.get("type") == "message_start" for event in events):
        whole = _anthropic(events)
    elif any(str(event.get("type", "")).startswith("response.") for event in events):
        whole = _responses(events)
    elif "choices" in events[0]:
        whole = _openai(events)
    else:
        whole = _ollama(events)
    return json.dumps(whole, ensure_ascii=False), ""


def without_media(value: Any) -> Any:
    """Return decoded JSON with images and sound cut short."""
    if isinstance(value, Mapping):
        return {key: without_media(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_media(item) for item in value]
    if isinstance(value, str) and len(value) > 10 * _MEDIA and " " not in value[: 10 * _MEDIA]:
        head, comma, data = value.partition(",") if value.startswith("data:") else ("", "", value)
        return f"{head}{comma}{data[:_MEDIA]}...[truncated {len(data) - _MEDIA} chars]"
    return value


def _events(reply: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a stream, or nothing if the reply is not a stream."""
    is_sse = reply.startswith(("data: ", "event: ", ": "))
    if not is_sse and '}\n{"' not in reply:
        return
    for line in reply.splitlines():
        if is_sse and not line.startswith("data: "):
            continue
        try:
            value = json.loads(line.removeprefix("data: "))
        except ValueError:
            continue  # [DONE], or incomplete
        if isinstance(value, dict):
            yield value


def _openai(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the chunks of a chat or text completion, choice by choice."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for event in events:
        usage = event.get("usage") or usage
        for piece in event.get("choices") or ():
            choice = choices.setdefault(piece.get("index", 0), {"index": piece.get("index", 0)})
            choice["finish_reason"] = piece.get("finish_reason") or choice.get("finish_reason")
            if "text" in piece:
                choice["text"] = choice.get("text", "") + piece["text"]
            if "delta" in piece:
                message = choice.setdefault("message", {"role": "assistant", "content": ""})
                _add_delta(message, piece["delta"] or {})
    head = {key: value for key, value in events[0].items() if key not in ("choices", "usage")}
    head["object"] = str(head.get("object", "")).removesuffix(".chunk")
    whole = {**head, "choices": [choices[index] for index in sorted(choices)]}
    return whole | ({"usage": usage} if usage else {})


def _add_delta(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for name in ("content", "reasoning_content", "reasoning"):
        if isinstance(delta.get(name), str):
            message[name] = message.get(name, "") + delta[name]
    for call in delta.get("tool_calls") or ():
        calls = message.setdefault("tool_calls", [])
        while len(calls) <= call.get("index", 0):
            calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
        mine = calls[call.get("index", 0)]
        if call.get("id"):
            mine["id"] = call["id"]
        for name, text in (call.get("function") or {}).items():
            mine["function"][name] = mine["function"].get(name, "") + (text or "")


def _anthropic(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the events of a message."""
    message: dict[str, Any] = {}
    blocks: dict[int, dict[str, Any]] = {}
    for event in events:
        kind = event.get("type")
        if kind == "message_start":
            message = dict(event.get("message") or {})
        elif kind == "content_block_start":
            blocks[event["index"]] = dict(event.get("content_block") or {})
        elif kind == "content_block_delta":
            block = blocks.setdefault(event["index"], {})
            for name, text in event["delta"].items():
                if name != "type" and isinstance(text, str):
                    block[name] = (block.get(name) or "") + text
        elif kind == "message_delta":
            message |= event.get("delta") or {}
            message["usage"] = {**(message.get("usage") or {}), **(event.get("usage") or {})}
    return {**message, "content": [blocks[index] for index in sorted(blocks)]}


def _responses(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the response object of the last event that contains one."""
    found = [event["response"] for event in events if isinstance(event.get("response"), dict)]
    return found[-1] if found else events[-1]


def _ollama(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the lines of /api/chat or /api/generate."""
    whole = dict(events[-1])
    if "response" in whole:
        whole["response"] = "".join(str(event.get("response", "")) for event in events)
    if isinstance(whole.get("message"), dict):
        texts = [event["message"].get("content", "") for event in events if event.get("message")]
        whole["message"] = {**whole["message"], "content": "".join(texts)}
    return whole


# The number of records for each model, as in Docker Model Runner.
_KEPT = 10
_GROUPS = 256
_WAITING = 100


@dataclass(frozen=True, slots=True)
class Record:
    """One finished request; `owner` is the owner of its API key, None without keys.

    `request` is JSON and `request_id` the X-Request-ID. `response` is the reply as it was sent; for
    a failed request it is empty and `error` is set. Streams are joined only when a client asks for
    them, because joining is slow.
    """

    id: str
    key: str
    model: str
    method: str
    url: str
    request: str
    response: str
    error: str
    timestamp: int
    status_code: int
    user_agent: str
    origin: str
    owner: str | None
    request_id: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the object that clients see."""
        response, error = joined(self.response) if self.response else ("", self.error)
        shown = asdict(self) | {"response": response, "error": error}
        hidden = {"key", "owner"} | {
            name for name in ("response", "error", "user_agent", "origin") if not shown[name]
        }
        return {name: value for name, value in shown.items() if name not in hidden}


class Records:
    """The latest records for each model and owner, and the followers of new records.

    Records of one owner do not displace those of another: each pair of model and owner has its own
    group, and when there are too many groups, the least recently used one is dropped. Use it on
    one event loop.
    """

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, str | None], deque[Record]] = OrderedDict()
        self._followers: set[tuple[str | None, asyncio.Queue[Record]]] = set()

    def add(self, record: Record) -> None:
        """Keep a record and pass it to its owner's followers."""
        name = (record.key, record.owner)
        self._groups.setdefault(name, deque(maxlen=_KEPT)).append(record)
        self._groups.move_to_end(name)
        if len(self._groups) > _GROUPS:
            self._groups.popitem(last=False)
        for owner, queue in self._followers:
            if owner == record.owner:
                with suppress(asyncio.QueueFull):  # a slow follower misses records
                    queue.put_nowait(record)

    def kept(self, key: str | None, owner: str | None) -> dict[str, list[Record]]:
        """Return an owner's records for the model `key`, or for all models, by model."""
        return {
            model: list(records)
            for (model, whose), records in self._groups.items()
            if whose == owner and key in (None, model)
        }

    def find(self, request_id: str) -> Record | None:
        """Return the record of the request with this X-Request-ID, of any owner."""
        records = (record for group in self._groups.values() for record in group)
        return next((record for record in records if record.request_id == request_id), None)

    async def follow(self, key: str | None, owner: str | None) -> AsyncGenerator[Record, None]:
        """Yield an owner's new records as they arrive."""
        queue: asyncio.Queue[Record] = asyncio.Queue(_WAITING)
        follower = (owner, queue)
        self._followers.add(follower)
        try:
            while True:
                record = await queue.get()
                if key in (None, record.key):
                    yield record
        finally:
            self._followers.discard(follower)


_PATHS = re.compile(
    r".*/(?:v1/(?:chat/completions|completions|embeddings|messages)|responses|rerank|score"
    r"|api/(?:chat|generate|embed|embeddings))\Z"
)
# The characters that are kept of a request or a reply.
_KEPT_CHARACTERS = 256 * 1024
_ORIGINS = (("/messages", "anthropic/messages"), ("/api/", "ollama/completion"))


class Recording:
    """ASGI middleware that adds inference requests and their replies to `records`."""

    def __init__(self, app: ASGIApp, *, pool: ModelPool, records: Records) -> None:
        self._app = app
        self._pool = pool
        self._records = records

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not _PATHS.match(scope["path"]):
            await self._app(scope, receive, send)
            return
        asked: list[bytes] = []
        said: list[bytes] = []
        room = _KEPT_CHARACTERS
        status = 0
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        began = time.time()

        async def listen() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                asked.append(message.get("body", b""))
            return message

        async def tell(message: Message) -> None:
            nonlocal room, status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif room > 0 and (body := message.get("body")):
                said.append(body)
                room -= len(body)
            await send(message)

        try:
            await self._app(scope, listen, tell)
        finally:
            if b"x-preload-only" not in headers:
                await self._keep(scope, headers, b"".join(asked), b"".join(said), status, began)

    async def _keep(
        self,
        scope: Scope,
        headers: dict[bytes, str],
        asked: bytes,
        said: bytes,
        status: int,
        began: float,
    ) -> None:
        document = document_in(scope)
        if document is None and len(asked) <= _KEPT_CHARACTERS:
            with suppress(BodyError):
                document = (await in_worker([asked], lambda: parse(asked))).value
        name = document.get("model") if isinstance(document, dict) else None
        name = name if isinstance(name, str) else ""
        request, response, error = await asyncio.to_thread(_read, asked, document, said, status)
        try:
            key = (await self._pool.find(name)).key
        except ModelpackError:
            return
        path = scope["path"]
        self._records.add(
            Record(
                id=f"{key}_{int(began * 1e9)}",
                key=key,
                model=name,
                method=scope["method"],
                url=path,
                request=request,
                response=response,
                error=error,
                timestamp=int(began),
                status_code=status or 408,  # the client disconnected before the response
                user_agent=headers.get(b"user-agent", ""),
                origin=next((origin for part, origin in _ORIGINS if part in path), ""),
                owner=caller_of(scope).owner,
                request_id=trace.id if (trace := trace_of(scope)) else "",
            )
        )


def _read(asked: bytes, document: Any, said: bytes, status: int) -> tuple[str, str, str]:
    """Return the request, the reply as it was sent, and the error.

    A large request is truncated without removing media from it, since encoding it again is slow.
    """
    if len(asked) > _KEPT_CHARACTERS:
        text = asked[:_KEPT_CHARACTERS].decode(errors="replace")
    else:
        text = json.dumps(without_media(document), ensure_ascii=False)[:_KEPT_CHARACTERS]
    reply = said.decode(errors="replace")[:_KEPT_CHARACTERS]
    if status >= 400:
        return text, "", _as_json(reply)
    return text, reply, ""


def _as_json(error: str) -> str:
    try:
        json.loads(error)
    except ValueError:
        return json.dumps({"error": error})
    return error


def router(pool: ModelPool, records: Records) -> APIRouter:
    routes = APIRouter(prefix="/engines", tags=["Docker Model Runner"], route_class=TextRoute)

    @routes.get("/requests", response_model=None)
    async def requests(
        request: Request,
        model: Annotated[str, Query()] = "",
        include_existing: Annotated[str, Query()] = "",
    ) -> Response:
        """Return the latest requests of the caller's API key, by model. A client that accepts
        server-sent events gets new requests, after the earlier ones if `include_existing` is true.
        """
        key = (await pool.find(model)).key if model else None
        owner = caller_of(request.scope).owner
        kept = records.kept(key, owner)
        if request.headers.get("accept") != "text/event-stream":
            groups = await asyncio.to_thread(lambda: [_group(pool, *g) for g in kept.items()])
            return JSONResponse(groups)
        old = kept if include_existing == "true" else {}
        coming = records.follow(key, owner)
        return sse.LiveStream(_record_events(pool, old, coming), AsyncExitStack())

    return routes


async def _record_events(
    pool: ModelPool, old: Mapping[str, list[Record]], coming: AsyncGenerator[Record, None]
) -> AsyncGenerator[str, None]:
    # The first step of `coming` subscribes it, so no later record is missed.
    following = asyncio.ensure_future(anext(coming))
    await asyncio.sleep(0)
    try:
        for key, group in old.items():
            for record in group:
                yield sse.event([_group(pool, key, [record])], "existing_request")
        yield sse.event({"status": "connected"}, "connected")
        while True:
            record = await following
            following = asyncio.ensure_future(anext(coming))
            yield sse.event([_group(pool, record.key, [record])], "new_request")
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await coming.aclose()


def _group(pool: ModelPool, key: str, records: Iterable[Record]) -> dict[str, Any]:
    shown = [record.to_json() for record in records]
    settings = pool.configured().get(key)
    config = {} if settings is None else config_shown(settings)
    return {"count": len(shown), "model": key, "config": config, "records": shown}
