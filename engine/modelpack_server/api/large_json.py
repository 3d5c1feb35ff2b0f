"""A JSON encoder for large values, such as log-probabilities, that lets other requests run.

`json.dumps` is one call into C, during which no other thread runs, the event loop included. So
values like these are made and written in a thread, in steps of microseconds.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from starlette.responses import Response

from modelpack_engine.worker.threads import in_executor

P = ParamSpec("P")
T = TypeVar("T")

# Few: they take turns with the event loop.
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="modelpack-large-json")


def written(value: Any) -> str:
    """Return a value as compact JSON; raise `ValueError` for a number that JSON does not have."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_small(key)}:{written(value[key])}" for key in value) + "}"
    if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return "[" + ",".join(map(written, value)) + "]"
    return _small(value)


async def large_response(make: Callable[[], Any]) -> Response:
    """Return a response with the JSON of what `make` returns, called in a thread."""
    return await call(True, lambda: _response(make()))


def _response(value: Any) -> Response:
    return Response(written(value).encode(), media_type="application/json")


async def call(large: bool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what `function` returns, called in a thread where it makes something `large`."""
    if not large:
        return function(*args, **kwargs)
    return await in_executor(_threads, functools.partial(function, *args, **kwargs))


def _small(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
