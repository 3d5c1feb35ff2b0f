"""Checks of every request: routes, API keys, models, body size and rate limits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from modelpack.http import REUSE
from modelpack_server.gateway.bodies import (
    DEFAULT_ANSWER,
    MAX_IN_FLIGHT,
    Asked,
    BodyBudget,
    BodyShare,
    DisconnectedError,
    NoRoomError,
    ReadError,
    TooComplexError,
    TooSlowError,
    look_into,
    look_into_form,
    put_share,
    read_body,
    replayed,
    tokens_in,
)
from modelpack_server.gateway.caller import Background, Caller, background_of, put_caller
from modelpack_server.gateway.families import Family, error_response, family_in, retry_headers
from modelpack_server.gateway.forwarding import (
    ForwardingError,
    caller_for,
    is_direct,
    without_caller,
)
from modelpack_server.gateway.json_bodies import (
    ComplexityError,
    Parsed,
    drop_document,
    in_worker,
    put_document,
)
from modelpack_server.gateway.keys import Key, Keys
from modelpack_server.gateway.limits import Exceeded, Grant, Limiter, Limits, Subject
from modelpack_server.gateway.lists import filtering
from modelpack_server.gateway.traces import Trace, trace_of

_PREFIX = r"(?:/engines(?:/[A-Za-z0-9._-]+)?|/anthropic)?(?:/v1)?"
_INFERENCE = re.compile(
    _PREFIX + r"/(?:chat/completions|completions|embeddings|responses|responses/input_tokens"
    r"|messages|messages/count_tokens|rerank|score|tokenize|detokenize|images/generations)"
    r"|/v2/rerank|/api/(?:generate|chat|embed|embeddings|show)"
)
_SPEECH = re.compile(_PREFIX + r"/audio/(?:transcriptions|translations)")
_MODELS = re.compile(_PREFIX + r"/models/?|/api/(?:tags|ps)")
_LISTING = re.compile(
    _MODELS.pattern + r"|/api/version"
    r"|" + _PREFIX + r"/responses/[A-Za-z0-9_.-]+(?:/input_items)?"
    r"|" + _PREFIX + r"/conversations/[A-Za-z0-9_.-]+(?:/items(?:/[A-Za-z0-9_.-]+)?)?"
)
_V1 = r"(?:/engines(?:/[A-Za-z0-9._-]+)?)?/v1"
_FILES = re.compile(_V1 + r"/files")
_BATCHES = re.compile(_V1 + r"/batches")
_STORED = re.compile(_V1 + r"/(?:files|batches)(?:/[A-Za-z0-9_-]+(?:/content|/cancel)?)?")
_OWN = _PREFIX + r"/(?:responses|requests)/[A-Za-z0-9_.:-]+"
_CONVERSATIONS = _PREFIX + r"/conversations"
_CONVERSATION = _CONVERSATIONS + r"/[A-Za-z0-9_.-]+"
# Other POST requests below /responses use models (`/v1/responses/compact`).
_CHANGES_OWN = {
    "DELETE": re.compile(
        rf"{_OWN}|{_CONVERSATION}(?:/items/[A-Za-z0-9_.-]+)?|{_V1}/files/[A-Za-z0-9_-]+"
    ),
    "POST": re.compile(
        rf"{_OWN}/cancel|{_CONVERSATIONS}|{_CONVERSATION}(?:/items)?"
        rf"|{_V1}/batches/[A-Za-z0-9_-]+/cancel"
    ),
}
_ONE_MODEL = re.compile(r"(?:/engines(?:/[A-Za-z0-9._-]+)?|/anthropic)?/v1/models/(?P<model>.+)")
_OPEN = frozenset(("/", "/health", "/v1/health", "/ping", "/version"))
# vLLM accepts every path with this beginning, and some servers ignore case.
_METRICS = re.compile(r"/metrics.*", re.IGNORECASE | re.DOTALL)
_UPLOADS = re.compile(r"/models/load|/api/blobs/[^/]+")


class Route(Enum):
    """The kind of a request, which determines its checks."""

    OPEN = auto()  # requires no key
    INFERENCE = auto()  # uses the model in its JSON body
    SPEECH = auto()  # uses the model in its form, which has a sound
    LISTING = auto()  # reads lists; reads or changes what the server stores for the caller
    ONE_MODEL = auto()  # reads the model in its path
    METRICS = auto()  # reads metrics, which name all models and keys
    UPLOAD = auto()  # its body is a file of any size
    FILE = auto()  # uploads a file of the caller's own, whose size the application limits
    BATCH = auto()  # runs the requests of a file, which name their models
    MANAGEMENT = auto()  # everything else


def route_of(method: str, path: str) -> Route:
    """Return the kind of a request; unknown requests count as management.

    `path` is canonical: see `modelpack_server.gateway.protection`.
    """
    if _METRICS.fullmatch(path):
        return Route.METRICS
    if method in ("GET", "HEAD"):
        if path in _OPEN:
            return Route.OPEN
        if _LISTING.fullmatch(path) or _STORED.fullmatch(path):
            return Route.LISTING
        if _ONE_MODEL.fullmatch(path):
            return Route.ONE_MODEL
        return Route.MANAGEMENT
    if method == "POST" and _INFERENCE.fullmatch(path):
        return Route.INFERENCE
    if method == "POST" and _SPEECH.fullmatch(path):
        return Route.SPEECH
    if method == "POST" and _FILES.fullmatch(path):
        return Route.FILE
    if method == "POST" and _BATCHES.fullmatch(path):
        return Route.BATCH
    if method in ("POST", "PUT") and _UPLOADS.fullmatch(path):
        return Route.UPLOAD
    if method in _CHANGES_OWN and _CHANGES_OWN[method].fullmatch(path):
        return Route.LISTING
    return Route.MANAGEMENT


def is_stored_on_server(path: str) -> bool:
    """Return whether a path is of files or batches, which only the server that has them knows."""
    return _STORED.fullmatch(path) is not None


def is_plain(path: str) -> bool:
    """Return whether all servers interpret a path alike: it has no segment `.` or `..`."""
    parts = re.split(r"[/\\]", path)
    return path.startswith("/") and not {".", ".."} & set(parts) and "\x00" not in path


#: 64 MiB, since JSON bodies may contain images in base64.
MAX_BODY = 64 * 1024 * 1024

_CREDENTIALS = ("x-api-key", "api-key")
_WORDS = {
    "requests_per_minute": "{} requests a minute",
    "tokens_per_minute": "{} tokens a minute",
    "concurrency": "{} requests at a time",
}


@dataclass(eq=False)
class _Refusal(Exception):
    status: int
    message: str
    code: str
    retry_after: float | None = None


class Checks:
    """ASGI middleware for API keys, limits and bodies; `protect` adds traces and checks of hosts.

    `keys` returns the current keys; None: the server has no keys. A JSON body is read completely,
    up to `max_body` bytes, before the application is called; an upload is not.

    With `resolves`, the application itself refuses and hides the models that the `Caller` may not
    use, since it knows which model a name refers to. Otherwise the names in requests are checked.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Callable[[], Keys] | None = None,
        max_body: int = MAX_BODY,
        limiter: Limiter | None = None,
        resolves: bool = False,
        forwarded_callers: bool = True,
        remote_metrics: bool = False,
    ) -> None:
        self._app = app
        self._keys = keys
        self._max_body = max_body
        self._limiter = Limiter() if limiter is None else limiter
        self._budget = BodyBudget(max(MAX_IN_FLIGHT, 2 * max_body))
        self._resolves = resolves
        self._forwarded_callers = forwarded_callers
        self._remote_metrics = remote_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        grant: Grant | None = None
        asked = Asked()
        try:
            with BodyShare(self._budget) as share:
                try:
                    if scope["method"] == "OPTIONS":
                        await Response(status_code=204)(scope, receive, send)
                        return
                    route = self._route(scope)
                    key = self._authenticate(scope, route)
                    caller = self._caller(scope, key)
                    put_caller(scope, caller, key.name if key is not None else None)
                    grant = self._admit(scope, key)
                    if _has_body(scope) and route not in (Route.UPLOAD, Route.FILE):
                        # Requests without a key may not use memory.
                        limit = 0 if route is Route.OPEN else self._max_body
                        reuse = scope.get("extensions", {}).get(REUSE, {})
                        pieces = await read_body(
                            receive, Headers(scope=scope), limit, share, **reuse
                        )
                        body, asked = await self._look_into(
                            scope, pieces, share, route, is_counted=grant is not None
                        )
                        receive = replayed(body, receive)
                        body = b""  # only the application holds it now
                        put_share(scope, share)
                    self._check_model(scope, route, caller, asked)
                    exceeded = grant.reserve(asked.tokens) if grant is not None else None
                    if exceeded is not None:
                        raise _exceeded(exceeded)
                    narrow = caller.is_restricted and not self._resolves
                    if narrow and route is Route.LISTING and _MODELS.fullmatch(scope["path"]):
                        send = filtering(scope, send, caller.allows_unresolved)
                except _Refusal as refusal:
                    await self._refuse(scope, receive, send, refusal)
                    return
                except DisconnectedError:
                    return
                except ReadError as error:
                    asked = Asked(prompt_tokens=tokens_in(error.size))
                    await self._refuse(scope, receive, send, self._unread(error, route))
                    return
                await self._app(scope, receive, send)
        finally:
            drop_document(scope)
            if grant is not None:
                _settle(grant, trace_of(scope), asked)

    async def _look_into(
        self,
        scope: Scope,
        pieces: list[bytes],
        share: BodyShare,
        route: Route,
        *,
        is_counted: bool,
    ) -> tuple[bytes, Asked]:
        """Return the joined body with its model and tokens; keep its JSON in `scope`."""
        size = sum(map(len, pieces))

        def work() -> tuple[bytes, tuple[Parsed | None, Asked]]:
            body = b"".join(pieces)
            pieces.clear()
            if route is Route.SPEECH:
                content_type = Headers(scope=scope).get("content-type", "")
                return body, (None, look_into_form(body, content_type))
            return body, look_into(body, is_counted=is_counted)

        if not size:
            return b"", Asked()
        try:
            body, (parsed, asked) = await in_worker(pieces, work)
        except ComplexityError as error:
            raise TooComplexError(size, str(error)) from None
        if not scope["path"].endswith("/responses"):
            asked = replace(asked, background=False)
        elif not asked.answer_tokens:
            asked = replace(asked, answer_tokens=DEFAULT_ANSWER)  # probably an embedding request
        if parsed is not None:
            share.add(parsed.memory)
            put_document(scope, parsed.value)
        return body, asked

    def _unread(self, error: ReadError, route: Route) -> _Refusal:
        """Return the refusal for a body that was not read completely."""
        match error:
            case NoRoomError():
                text = "too many large requests are in flight: their memory limit is reached"
                return _Refusal(503, text, "bodies_in_flight", 1.0)
            case TooComplexError():
                text = f"the request body is too complex: {error.why}"
                return _Refusal(400, text, "body_too_complex")
            case TooSlowError():
                return _Refusal(408, "the request body arrived too slowly", "body_too_slow")
        if route is Route.OPEN:
            return _Refusal(413, "requests to this path must not have a body", "body_too_large")
        text = f"the request body is too large: the limit is {self._max_body} bytes"
        return _Refusal(413, text, "body_too_large")

    def _route(self, scope: Scope) -> Route:
        if not is_plain(scope["path"]):
            raise _Refusal(400, "the path has a segment '.' or '..'", "bad_path")
        return route_of(scope["method"], scope["path"])

    def _authenticate(self, scope: Scope, route: Route) -> Key | None:
        if (background := background_of(scope)) is not None:
            return self._key_of(background, scope)
        if self._keys is None:
            # Without keys, the load of the server is visible to this machine only, by default.
            if route is Route.METRICS and not (self._remote_metrics or is_direct(scope)):
                raise _Refusal(
                    403, "metrics are served to clients on this machine only", "metrics_not_allowed"
                )
            return None
        if route is Route.OPEN:
            return None
        keys, given = self._keys(), False
        for secret in _secrets(Headers(scope=scope)):
            given = True
            if (key := keys.find(secret)) is not None:
                if trace := trace_of(scope):
                    trace.key = key.name
                return key
        if given:
            raise _Refusal(401, "the API key is not valid", "invalid_api_key")
        raise _Refusal(
            401,
            "no API key was given: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
            "missing_api_key",
        )

    def _key_of(self, background: Background, scope: Scope) -> Key | None:
        """Return the current key of a request that the server makes itself."""
        if self._keys is None and background.key is None:
            return None
        key = self._keys().named(background.key) if self._keys is not None else None
        if key is None:
            raise _Refusal(401, "the API key of the batch does not exist", "invalid_api_key")
        if trace := trace_of(scope):
            trace.key = key.name
        return key

    def _caller(self, scope: Scope, key: Key | None) -> Caller:
        if not self._forwarded_callers:
            scope["headers"] = without_caller(scope["headers"])
        try:
            return caller_for(scope, key, has_keys=self._keys is not None)
        except ForwardingError as error:
            raise _Refusal(error.status, error.message, "owner_not_trusted") from error

    def _check_model(self, scope: Scope, route: Route, caller: Caller, asked: Asked) -> None:
        if asked.models and (trace := trace_of(scope)):
            trace.model = asked.models[0][:256]
        if not caller.is_restricted or route in (Route.OPEN, Route.LISTING, Route.FILE):
            return
        if route is Route.BATCH and not self._resolves:
            raise _Refusal(
                403,
                f"the key {caller.owner!r} may only use some models, and those of a batch are "
                "named in its file; creating batches here requires a key without 'models'",
                "route_not_allowed",
            )
        if route not in (Route.INFERENCE, Route.SPEECH, Route.ONE_MODEL, Route.BATCH):
            raise _Refusal(
                403,
                f"the key {caller.owner!r} may only use models; "
                "managing them requires a key without 'models'",
                "route_not_allowed",
            )
        if self._resolves:
            return
        models = asked.models
        if route is Route.ONE_MODEL and (found := _ONE_MODEL.fullmatch(scope["path"])):
            models = (found["model"],)
        elif not asked.valid:
            if route is Route.SPEECH:
                raise _Refusal(400, "the request body is not a valid form", "invalid_form")
            raise _Refusal(400, "the request body is not a JSON object", "invalid_json")
        elif asked.ambiguous or not asked.fields & _model_fields(scope):
            raise _Refusal(400, "model: expected exactly one name", "model_required")
        for model in models:
            if not caller.allows_unresolved(model):
                raise _Refusal(
                    403,
                    f"the key {caller.owner!r} may not use the model {model[:200]!r}",
                    "model_not_allowed",
                )

    def _admit(self, scope: Scope, key: Key | None) -> Grant | None:
        """Count the request before its body is read."""
        if key is None:
            return None
        trace = trace_of(scope)
        subjects: list[tuple[Subject, Limits]] = [((key.name, None), key.limits)]
        if key.per_caller is not None:
            caller = (trace.caller if trace else None) or ""
            subjects.append(((key.name, caller), key.per_caller))
        grant = self._limiter.admit(subjects, 0)
        if isinstance(grant, Exceeded):
            raise _exceeded(grant)
        return grant

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, refusal: _Refusal) -> None:
        trace = trace_of(scope)
        if trace:
            trace.refused = refusal.code
        headers = {} if refusal.retry_after is None else retry_headers(refusal.retry_after)
        if refusal.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        response = error_response(
            family_in(scope),
            refusal.status,
            refusal.message,
            code=refusal.code,
            headers=headers,
            request_id=trace.id if trace else None,
        )
        await response(scope, receive, send)


def _exceeded(limit: Exceeded) -> _Refusal:
    name, whose = limit.subject
    who = f"the key {name!r}" + ("" if whose is None else f" and its caller {whose!r}")
    may = _WORDS[limit.limit].format(limit.allowed)
    return _Refusal(429, f"{who} may make {may}", f"{limit.limit}_exceeded", limit.retry_after)


def _settle(grant: Grant, trace: Trace | None, asked: Asked) -> None:
    """Charge a finished request."""
    if trace is None:
        grant.finish(None)
    elif trace.status == 429 and trace.refused is not None:
        grant.cancel()
    elif not trace.client_left and trace.status is not None and trace.status >= 400:
        grant.refuse(trace.spent(asked.prompt_tokens) or 0)
    elif asked.background and not trace.counts_known:
        # An upstream generates more than the response shows.
        grant.finish(max(asked.tokens, trace.spent(asked.prompt_tokens, asked.answer_tokens) or 0))
    else:
        grant.finish(trace.spent(asked.prompt_tokens, asked.answer_tokens))


def _secrets(headers: Headers) -> Iterator[str]:
    """Yield all credentials of a request; Anthropic's client uses either header."""
    for value in headers.getlist("authorization"):
        scheme, _, secret = value.strip().partition(" ")
        if scheme.lower() == "bearer" and secret.strip():
            yield secret.strip()
    for name in _CREDENTIALS:
        for value in headers.getlist(name):
            if value.strip():
                yield value.strip()


def _model_fields(scope: Scope) -> set[str]:
    """Return the fields of which one must contain the model of a request.

    Only Ollama's API reads `name`. Servers of the other APIs ignore it, like `Model`, and use a
    default model if `model` is missing (vLLM: its base model).
    """
    return {"model", "name"} if family_in(scope) is Family.OLLAMA else {"model"}


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
