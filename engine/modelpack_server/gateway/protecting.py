"""protect: everything that stands before an application, in its order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp

from modelpack.errors import UsageError
from modelpack.hosts import is_loopback
from modelpack_server.gateway.checks import MAX_BODY, Checks
from modelpack_server.gateway.cors import Cors
from modelpack_server.gateway.host_check import HostCheck
from modelpack_server.gateway.key_file import KeyFile
from modelpack_server.gateway.limits import Limiter
from modelpack_server.gateway.observing import Traced
from modelpack_server.gateway.paths import CanonicalPath
from modelpack_server.gateway.spans import default_report
from modelpack_server.gateway.traces import Trace


@dataclass(frozen=True, slots=True)
class Protection:
    """How a server is protected.

    `host` is the address it listens on, without the port; `keys` the file of its API keys, None for
    no keys; `cors` the origins whose pages may use it; `allowed_hosts` names that requests may use
    for it, besides loopback ones and the address that they arrived at; `max_body` bytes; `report`
    is called with the trace of each request (None: log it). `forwarded_callers`: a gateway before
    this server may name the caller of a request.
    """

    host: str = "127.0.0.1"
    keys: KeyFile | None = None
    cors: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body: int = MAX_BODY
    allow_anonymous: bool = False
    forwarded_callers: bool = True
    report: Callable[[Trace], None] | None = None

    def __post_init__(self) -> None:
        """Raises `UsageError` where others could reach the server, and no key is asked for."""
        if not is_loopback(self.host) and self.keys is None and not self.allow_anonymous:
            raise UsageError(
                f"{self.host!r} is not a loopback address, and no API key would be asked for",
                hint="give --keys FILE, or --allow-anonymous if all who reach the port may use it",
            )


def protect(
    app: ASGIApp,
    settings: Protection,
    *,
    clock: Callable[[], float] = time.monotonic,
    resolves: bool = False,
) -> ASGIApp:
    """Return `app` behind request ids, traces, host and origin checks, keys and limits.

    `clock` returns seconds, for limits and traces. `resolves` says that the application itself
    refuses models that the caller may not use (see `gateway.caller`). The application gets the
    trace of a request from `gateway.traces.trace_of(scope)` and may add to it.
    """
    keys = settings.keys.current if settings.keys is not None else None
    checked: ASGIApp = Checks(
        app,
        keys=keys,
        max_body=settings.max_body,
        limiter=Limiter(clock),
        forwarded_callers=settings.forwarded_callers,
        resolves=resolves,
    )
    checked = Cors(checked, settings.cors)
    checked = HostCheck(checked, (settings.host, *settings.allowed_hosts))
    return CanonicalPath(Traced(checked, settings.report or default_report(), clock))
