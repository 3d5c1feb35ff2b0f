"""Checks: who asks, for which model, how much; what fails is answered in the client's own API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from modelpack.gateway.bodies import (
    Asked,
    DisconnectedError,
    TooLargeError,
    look_into,
    read_body,
    replayed,
)
from modelpack.gateway.families import error_response
from modelpack.gateway.keys import Key, Keys
from modelpack.gateway.limits import Exceeded, Grant, Limiter, Limits, Subject
from modelpack.gateway.observing import family_in
from modelpack.gateway.routes import Route, is_plain, model_in, route_of
from modelpack.gateway.traces import trace_of
from modelpack.hosts import is_loopback

#: 64 MiB: images come inside the JSON, in base64.
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
    """ASGI middleware; `protect` puts it behind what makes traces and checks hosts and origins.

    `keys` gives the keys as they are now; None: everybody may ask. A body of JSON is read as a
    whole, `max_body` bytes at most, before the application is called; uploads of files are not.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Callable[[], Keys] | None = None,
        max_body: int = MAX_BODY,
        limiter: Limiter | None = None,
    ) -> None:
        self._app = app
        self._keys = keys
        self._max_body = max_body
        self._limiter = Limiter() if limiter is None else limiter

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
            try:
                if scope["method"] == "OPTIONS":
                    await Response(status_code=204)(scope, receive, send)
                    return
                route = self._route(scope)
                key = self._authenticate(scope, route)
                if _has_body(scope) and route is not Route.UPLOAD:
                    body = await read_body(receive, Headers(scope=scope), self._max_body)
                    receive = replayed(body, receive)
                    asked = look_into(body) if body else asked
                self._check_model(scope, route, key, asked)
                grant = self._admit(scope, key, asked)
            except _Refusal as refusal:
                await self._refuse(scope, receive, send, refusal)
                return
            except TooLargeError:
                most = f"the limit is {self._max_body} bytes"
                refused = _Refusal(
                    413, f"the request's body is too large: {most}", "body_too_large"
                )
                await self._refuse(scope, receive, send, refused)
                return
            except DisconnectedError:
                return
            await self._app(scope, receive, send)
        finally:
            if grant is not None:
                trace = trace_of(scope)
                grant.finish(trace.spent(asked.prompt_tokens) if trace else None)

    def _route(self, scope: Scope) -> Route:
        if not is_plain(scope["path"]):
            raise _Refusal(400, "the path has a segment '.' or '..'", "bad_path")
        return route_of(scope["method"], scope["path"])

    def _authenticate(self, scope: Scope, route: Route) -> Key | None:
        if self._keys is None:
            # What a server tells of its load is nobody's business beyond the machine.
            if scope["path"] == "/metrics" and not _is_local(scope):
                raise _Refusal(403, "metrics are for this machine only", "metrics_not_allowed")
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
            raise _Refusal(401, "this API key is not known", "invalid_api_key")
        raise _Refusal(
            401,
            "no API key was given: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
            "missing_api_key",
        )

    def _check_model(self, scope: Scope, route: Route, key: Key | None, asked: Asked) -> None:
        if asked.models and (trace := trace_of(scope)):
            trace.model = asked.models[0][:256]
        if key is None or key.models is None or route in (Route.OPEN, Route.LISTING):
            return
        models = asked.models
        if route is Route.ONE_MODEL:
            models = (model_in(scope["path"]),)
        elif route is not Route.INFERENCE:
            raise _Refusal(
                403,
                f"the key {key.name!r} is for using models; this needs a key without 'models'",
                "route_not_allowed",
            )
        elif not asked.valid:
            raise _Refusal(400, "the request's body is no JSON object", "invalid_json")
        elif asked.ambiguous or not models:
            raise _Refusal(400, "model: one name is needed", "model_required")
        for model in models:
            if not key.allows(model):
                raise _Refusal(
                    403,
                    f"the key {key.name!r} may not use the model {model[:200]!r}",
                    "model_not_allowed",
                )

    def _admit(self, scope: Scope, key: Key | None, asked: Asked) -> Grant | None:
        if key is None:
            return None
        trace = trace_of(scope)
        subjects: list[tuple[Subject, Limits]] = [((key.name, None), key.limits)]
        if key.per_caller is not None:
            caller = (trace.caller if trace else None) or ""
            subjects.append(((key.name, caller), key.per_caller))
        grant = self._limiter.admit(subjects, asked.tokens)
        if isinstance(grant, Exceeded):
            name, whose = grant.subject
            who = f"the key {name!r}" + ("" if whose is None else f" and its caller {whose!r}")
            may = _WORDS[grant.limit].format(grant.allowed)
            raise _Refusal(429, f"{who} may make {may}", f"{grant.limit}_exceeded",
                           grant.retry_after)  # fmt: skip
        return grant

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, refusal: _Refusal) -> None:
        trace = trace_of(scope)
        if trace:
            trace.refused = refusal.code
        response = error_response(
            family_in(scope),
            refusal.status,
            refusal.message,
            code=refusal.code,
            retry_after=refusal.retry_after,
            request_id=trace.id if trace else None,
        )
        await response(scope, receive, send)


def _secrets(headers: Headers) -> Iterator[str]:
    """Give all credentials of a request; Anthropic's client sends a key in either place."""
    for value in headers.getlist("authorization"):
        scheme, _, secret = value.strip().partition(" ")
        if scheme.lower() == "bearer" and secret.strip():
            yield secret.strip()
    for name in _CREDENTIALS:
        for value in headers.getlist(name):
            if value.strip():
                yield value.strip()


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _is_local(scope: Scope) -> bool:
    client = scope.get("client")
    return client is not None and is_loopback(client[0])
