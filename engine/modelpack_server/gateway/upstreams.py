"""Upstreams: the servers behind the gateway, which of them are well, and whose turn it is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import httpx

from modelpack.errors import UsageError

Policy = Literal["least-busy", "round-robin"]

#: Seconds between probes of GET /health, while one is down, and how long one may take.
PROBE_INTERVAL = 5.0
PROBE_INTERVAL_DOWN = 1.0
PROBE_TIMEOUT = 2.0
_LONGEST_REST = 30.0
_LOG = logging.getLogger("modelpack_server.gateway")


@dataclass(slots=True)
class Upstream:
    """One server; `running` counts the gateway's own requests to it."""

    url: httpx.URL
    name: str
    healthy: bool = True
    running: int = 0
    failures: int = 0
    rests_until: float = 0.0

    def target(self, raw_path: bytes, query: bytes) -> httpx.URL:
        """Return the URL of a request's path, as the client wrote it, on this server."""
        path = self.url.raw_path.rstrip(b"/") + raw_path
        return self.url.copy_with(raw_path=path + b"?" + query if query else path)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count a request as running in the block."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


class Upstreams:
    """All upstreams of a gateway.

    One that cannot be reached is passed over until a probe, or a request that had no other choice,
    finds it well again. One that says it is busy is passed over for as long as it asked for.
    """

    def __init__(
        self,
        urls: Iterable[str],
        *,
        policy: Policy = "least-busy",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `UsageError` for a URL that is none, and where there is none."""
        self.all = tuple(_parse(url) for url in urls)
        if not self.all:
            raise UsageError("a gateway needs an upstream", hint="give --upstream URL")
        self._policy = policy
        self._clock = clock
        self._turn = 0

    def choose(self, tried: Collection[str] = ()) -> Upstream | None:
        """Return whose turn it is among those not `tried` (by name); None when all were."""
        turn, self._turn = self._turn, (self._turn + 1) % len(self.all)
        inline = [u for u in self.all[turn:] + self.all[:turn] if u.name not in tried]
        now = self._clock()
        least_busy = self._policy == "least-busy"
        return min(
            inline,
            key=lambda u: (not u.healthy, u.rests_until > now, u.running if least_busy else 0),
            default=None,
        )

    def failed(self, upstream: Upstream, why: str) -> None:
        """Note that `upstream` could not be reached, or broke off."""
        upstream.failures += 1
        if upstream.healthy:
            _LOG.warning("upstream %s is down: %s", upstream.name, why)
        upstream.healthy = False

    def answered(self, upstream: Upstream) -> None:
        """Note that `upstream` answered."""
        if not upstream.healthy:
            _LOG.warning("upstream %s is up", upstream.name)
        upstream.healthy = True

    def rests(self, upstream: Upstream, retry_after: str) -> None:
        """Note that `upstream` asked to be spared, by its Retry-After header."""
        seconds = float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 1.0
        upstream.rests_until = self._clock() + min(seconds, _LONGEST_REST)

    async def probe(self, transport: httpx.AsyncBaseTransport, upstream: Upstream) -> None:
        """Ask one upstream for its health; a server that has no such route is well, too."""
        request = httpx.Request(
            "GET",
            upstream.target(b"/health", b""),
            extensions={"timeout": httpx.Timeout(PROBE_TIMEOUT).as_dict()},
        )
        try:
            response = await transport.handle_async_request(request)
            await response.aclose()
        except httpx.HTTPError as error:
            self.failed(upstream, type(error).__name__)
            return
        if response.status_code >= 500:
            self.failed(upstream, f"/health says {response.status_code}")
        else:
            self.answered(upstream)

    async def probe_all(self, transport: httpx.AsyncBaseTransport) -> None:
        """Ask all upstreams for their health, at once."""
        await asyncio.gather(*(self.probe(transport, upstream) for upstream in self.all))

    async def watch(
        self, transport: httpx.AsyncBaseTransport, interval: float = PROBE_INTERVAL
    ) -> None:
        """Probe for ever, every `interval` seconds; more often while one is down."""
        while True:
            await self.probe_all(transport)
            well = all(upstream.healthy for upstream in self.all)
            await asyncio.sleep(interval if well else min(interval, PROBE_INTERVAL_DOWN))


def _parse(text: str) -> Upstream:
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, TypeError):
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise UsageError(
            f"{_without_secrets(text)!r} is no URL of a server", hint="like http://127.0.0.1:12434"
        )
    if url.userinfo:
        raise UsageError(
            f"the URL of {url.host!r} holds a password, which would show in logs",
            hint="set MODELPACK_UPSTREAM_KEY to the key of the upstreams",
        )
    return Upstream(url, str(url).rstrip("/"))


def _without_secrets(text: str) -> str:
    return text.rpartition("@")[2][:200]
