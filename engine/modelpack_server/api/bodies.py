"""JSON bodies of requests and responses, handled within limits and off the event loop.

Routes that take JSON are `BodyRoute`s, and their bodies are `Body`s. `large_response` and `call`
write large values, such as log-probabilities, in a thread.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar, get_type_hints

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, PydanticCustomError
from starlette.exceptions import HTTPException

from modelpack_engine.worker.threads import in_executor, in_thread
from modelpack_server.gateway.json_bodies import (
    INLINE,
    BodyError,
    ComplexityError,
    document_in,
    in_worker,
    parse,
)

_UNPARSED = object()
_is_large: ContextVar[bool] = ContextVar("the body of the current request is large", default=False)


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            _fail_fast(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part)


class Body(BaseModel):
    """The base of request bodies. Validation of a list stops at its first invalid item.

    Otherwise a million invalid items would produce a million errors on the event loop.
    """

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema


class SparseBody(Body):
    """A body in which a null field counts as missing."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None}


_OTHER_TYPES = frozenset({"array", "boolean", "integer", "null", "number", "string"})


def object_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a function's arguments; refuse other types.

    Text of other types would follow the schema, but is no call.
    """
    kind = schema.get("type")
    if isinstance(kind, str) and kind in _OTHER_TYPES:
        raise PydanticCustomError("object_schema", 'the type must be "object"')
    return schema


class JsonRequest(Request):
    """A request whose JSON is parsed once, by the gateway's checks or by this class.

    With a `body_type`, `json` returns large bodies as validated instances, because FastAPI's own
    validation would block the event loop.
    """

    body_type: type[Body] | None = None

    async def body(self) -> bytes:
        """Return the whole body, without a copy if it arrived in one piece."""
        if not hasattr(self, "_body"):
            async with aclosing(self.stream()) as pieces:
                self._body = b"".join([piece async for piece in pieces if piece])
        return self._body

    async def json(self) -> Any:
        """Return the parsed body.

        Raises `json.JSONDecodeError`, `RequestValidationError`, and `HTTPException` (400) for JSON
        that exceeds a limit.
        """
        if not hasattr(self, "_json"):
            value = document_in(self.scope, _UNPARSED)
            if value is _UNPARSED:
                value = await self._parsed()
            if self.body_type is not None:
                value = await self._validated(self.body_type, value)
            self._json = value
        return self._json

    async def _validated(self, body_type: type[Body], value: Any) -> Any:
        """Return a large body as an instance of `body_type`, a small one unchanged."""
        body = await self.body()
        if len(body) <= INLINE:
            return value
        _is_large.set(True)
        # Use the one thread that parses: several threads would only wait for the interpreter.
        return await in_worker([body], lambda: _validated(body_type, value))

    async def _parsed(self) -> Any:
        try:
            body = await self.body()
            return (await in_worker([body], lambda: parse(body))).value
        except ComplexityError as error:
            raise HTTPException(400, f"the request body is too complex: {error}") from None
        except BodyError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


def _validated(body_type: type[Body], value: Any) -> Body:
    try:
        return body_type.model_validate(value)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise RequestValidationError(
            [{**one, "loc": ("body", *one["loc"])} for one in errors]
        ) from None


async def read_json(request: Request) -> Any:
    """Return the parsed body of a request. Raises `RequestValidationError`, `HTTPException`."""
    if not isinstance(request, JsonRequest):
        request = JsonRequest(request.scope, request.receive)
    try:
        return await request.json()
    except json.JSONDecodeError as error:
        raise RequestValidationError(
            [{"loc": ("body",), "type": "json_invalid", "ctx": {"error": error.msg}}]
        ) from None


class BodyRoute(APIRoute):
    """A route whose JSON bodies are parsed by `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()
        hints = get_type_hints(self.endpoint).values()
        bodies = [hint for hint in hints if isinstance(hint, type) and issubclass(hint, Body)]
        body_type = bodies[0] if len(bodies) == 1 else None

        async def handle(request: Request) -> Response:
            parsed = JsonRequest(request.scope, request.receive)
            parsed.body_type = body_type
            try:
                return await answer(parsed)
            except (HTTPException, RequestValidationError) as error:
                raise _without_frames(error) from None

        return handle


def _without_frames(
    error: HTTPException | RequestValidationError,
) -> HTTPException | RequestValidationError:
    """Return the error to respond with, without references to the frames that have the body.

    FastAPI's frames refer to the errors that they raise: the body of an invalid request would stay
    in memory until the next collection.
    """
    found, cause = error, error.__cause__
    # FastAPI raises an `HTTPException` for any error of `JsonRequest.json`.
    if isinstance(error, HTTPException) and isinstance(cause, RequestValidationError):
        found = cause
    error.__traceback__ = error.__cause__ = error.__context__ = None
    found.__traceback__ = found.__cause__ = found.__context__ = None
    return found


P = ParamSpec("P")
T = TypeVar("T")

# Few threads, since they compete with the event loop for the interpreter.
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="modelpack-large-json")


def written(value: Any) -> str:
    """Return a value as compact JSON; raise `ValueError` for NaN and infinities.

    `json.dumps` is one call into C, during which no other thread runs. This function encodes large
    values in many short calls instead.
    """
    if isinstance(value, dict):
        return "{" + ",".join(f"{_small(key)}:{written(value[key])}" for key in value) + "}"
    if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return "[" + ",".join(map(written, value)) + "]"
    return _small(value)


async def large_response(make: Callable[[], Any]) -> Response:
    """Call `make` in a thread and return a response with its result as JSON."""
    content = await call(True, lambda: written(make()).encode())
    return Response(content, media_type="application/json")


async def call(large: bool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function`, in a thread if its result is `large`, and return the result."""
    if not large:
        return function(*args, **kwargs)
    return await in_executor(_threads, functools.partial(function, *args, **kwargs))


_computing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="modelpack-large-bodies")


async def compute(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function`, which only computes, in a thread and return the result.

    Requests with large bodies share one thread: each further thread that computes delays the event
    loop whenever it waits for the interpreter. Requests with small bodies do not wait for them.
    """
    if _is_large.get():
        return await in_executor(_computing, functools.partial(function, *args, **kwargs))
    return await in_thread(function, *args, **kwargs)


def _small(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
