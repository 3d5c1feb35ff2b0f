"""Headers in which a gateway names the caller to a server, and whether the server trusts them.

A gateway authenticates its clients but sends its own key upstream, so that the server would see one
caller only. `X-Modelpack-Owner` has the name of the client's key and `X-Modelpack-Models` the
patterns of its models, as a JSON array. A sender of these headers can act as any caller, so the
server accepts them only from trusted gateways.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Scope

from modelpack.http.hosts import is_loopback
from modelpack_server.gateway.caller import ANYONE, Caller
from modelpack_server.gateway.keys import Key

#: The headers that only a gateway may send.
CALLER_HEADERS = frozenset((b"x-modelpack-owner", b"x-modelpack-models"))

_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@/-]{0,255}")
_MOST_MODELS = 16 * 1024  # bytes


@dataclass(eq=False)
class ForwardingError(Exception):
    """The headers that name a caller were refused; `status` is the HTTP status."""

    status: int
    message: str


def is_local(scope: Scope) -> bool:
    """Return whether the connection is from this machine, regardless of headers."""
    client = scope.get("client")
    return client is not None and is_loopback(client[0])


def is_direct(scope: Scope) -> bool:
    """Return whether a request is from this machine and was not forwarded by a local proxy."""
    headers = Headers(scope=scope)
    return is_local(scope) and "x-forwarded-for" not in headers and "forwarded" not in headers


def caller_headers(caller: Caller) -> list[tuple[bytes, bytes]]:
    """Return the headers in which a gateway names `caller` to a server."""
    if caller.owner is None:
        return []
    headers = [(b"x-modelpack-owner", caller.owner.encode())]
    if caller.models is not None:
        headers.append((b"x-modelpack-models", json.dumps(caller.models).encode()))
    return headers


def names_callers(host: str, upstream_key: str | None) -> bool:
    """Return whether a gateway names its callers to the upstream on `host`.

    An upstream without keys on another machine rejects requests that name a caller.
    """
    return bool(upstream_key) or is_loopback(host)


def without_caller(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return `headers` without those that name a caller."""
    return [(name, value) for name, value in headers if name.lower() not in CALLER_HEADERS]


def forwarded_caller(scope: Scope, key: Key | None, *, has_keys: bool) -> Caller | None:
    """Return the caller named in a gateway's headers, or None if the request has no such headers.

    `key` is the API key of the request. On a server with keys, the owner is prefixed with the name
    of the gateway's key, so that it never equals the owner of another key.

    Raises `ForwardingError` unless the key is marked `gateway`, or the server has no keys and the
    request came from this machine and not from a web page. Ignoring the headers instead would merge
    all callers of the gateway into one.
    """
    headers = Headers(scope=scope)
    owners = headers.getlist("x-modelpack-owner")
    models = headers.getlist("x-modelpack-models")
    if not owners and not models:
        return None
    if has_keys and (key is None or not key.gateway):
        name = "no key" if key is None else f"the key {key.name!r}"
        raise ForwardingError(
            403, f"X-Modelpack-Owner is for gateways: {name} is not marked 'gateway = true'"
        )
    if not has_keys and ("origin" in headers or not is_local(scope)):
        raise ForwardingError(
            403,
            "X-Modelpack-Owner is for gateways: this server has no keys, and trusts those of this "
            "machine only",
        )
    if len(owners) != 1 or not _OWNER.fullmatch(owners[0]):
        raise ForwardingError(400, "X-Modelpack-Owner: expected the name of one key")
    owner = owners[0] if key is None else f"{key.name}/{owners[0]}"
    return Caller(owner, _models(models))


def caller_for(scope: Scope, key: Key | None, *, has_keys: bool) -> Caller:
    """Return the caller of an authenticated request; raises what `forwarded_caller` raises."""
    if (named := forwarded_caller(scope, key, has_keys=has_keys)) is not None:
        return named
    if key is not None:
        return Caller(key.name, key.models)
    return Caller(models=()) if has_keys else ANYONE  # an open route of a server with keys


def _models(values: list[str]) -> tuple[str, ...] | None:
    if not values:
        return None
    try:
        found = json.loads(values[0]) if len(values) == 1 else None
    except (ValueError, RecursionError):
        found = None
    if (
        len(values[0]) > _MOST_MODELS
        or not isinstance(found, list)
        or not found
        or not all(isinstance(glob, str) and glob for glob in found)
    ):
        raise ForwardingError(400, "X-Modelpack-Models: expected a JSON array of patterns")
    return tuple(found)
