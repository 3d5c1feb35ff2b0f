"""Upstream servers of a gateway: their addresses, their health, and the choice among them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import re
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import httpx

from modelpack.errors import UsageError

Policy = Literal["least-busy", "prefix", "round-robin"]

#: By the policy "prefix", an upstream gets another prompt's requests until it runs this many, or
#: this many times the mean (consistent hashing with bounded loads, arXiv 1608.01350).
FEW_RUNNING = 8
MOST_OF_MEAN = 1.25

#: Seconds between probes of GET /health, while an upstream is down, and the limit for a probe.
PROBE_INTERVAL = 5.0
PROBE_INTERVAL_DOWN = 1.0
PROBE_TIMEOUT = 2.0
_LONGEST_REST = 30.0
#: Before a URL: each address of its host name is an upstream; they are looked up with each probe.
DNS = "dns+"
_LOOKUP_TIMEOUT = 5.0
_HOST_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
_LOG = logging.getLogger("modelpack_server.gateway")


@dataclass(slots=True)
class Upstream:
    """One upstream server; `running` counts the gateway's current requests to it.

    `leaves` is set while its own health check fails, as that of a server that drains does.
    `late` is set if it did not respond to the last probe in time.
    """

    url: httpx.URL
    name: str
    healthy: bool = True
    leaves: bool = False
    late: bool = False
    running: int = 0
    failures: int = 0
    rests_until: float = 0.0

    def target(self, raw_path: bytes, query: bytes) -> httpx.URL:
        """Return the URL on this server for a request's path, in the client's encoding."""
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


#: Returns the addresses of a host name; raises `OSError`.
Lookup = Callable[[str, int], Awaitable[Collection[str]]]


async def addresses_of(host: str, port: int) -> Collection[str]:
    """Return the addresses of a host name by the system's resolver; raise `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return {str(address[0]) for *_, address in found}


@dataclass(slots=True)
class _Discovered:
    """The upstreams behind a host name, by address; `url` has the name."""

    url: httpx.URL
    members: dict[str, Upstream] = field(default_factory=dict)
    is_known: bool = True

    def update(self, addresses: Collection[str]) -> None:
        """Replace the members; those that stay keep their state."""
        before, self.members = self.members, {}
        for address in sorted(addresses):
            if (upstream := before.pop(address, None)) is None:
                url = self.url.copy_with(host=address)
                # It gets requests once a probe succeeds, and not before.
                upstream = Upstream(url, str(url).rstrip("/"), healthy=False)
            self.members[address] = upstream
        for upstream in before.values():
            _LOG.warning("upstream %s is gone from %s", upstream.name, self.url.host)


class Upstreams:
    """All upstreams of a gateway.

    `choose` skips an unreachable upstream until a probe, or a request without another choice,
    succeeds. It skips a busy upstream for the time in its Retry-After header. A URL that begins
    with `dns+` stands for every address of its host name, such as that of a headless Service of
    Kubernetes: `look_up` adds and removes upstreams.
    """

    def __init__(
        self,
        urls: Iterable[str],
        *,
        policy: Policy = "least-busy",
        lookup: Lookup = addresses_of,
    ) -> None:
        """Raises `UsageError` for an invalid URL, and without any URL."""
        self._fixed: list[Upstream] = []
        self._discovered: list[_Discovered] = []
        for text in urls:
            if text.startswith(DNS):
                self._discovered.append(_Discovered(_parse_name(text)))
            else:
                url = _parse(text)
                self._fixed.append(Upstream(url, str(url).rstrip("/")))
        if not self._fixed and not self._discovered:
            raise UsageError("a gateway needs an upstream", hint="pass --upstream URL")
        self.all: tuple[Upstream, ...] = _distinct(self._fixed)
        self._lookup = lookup
        self._policy = policy
        self._turn = 0

    @property
    def by_prefix(self) -> bool:
        """Whether the beginning of a prompt decides."""
        return self._policy == "prefix" and len(self.all) > 1

    @property
    def home(self) -> Upstream | None:
        """The upstream that keeps files and batches: the first with a fixed address."""
        return self._fixed[0] if self._fixed else None

    async def look_up(self) -> None:
        """Look up the addresses of all host names; a failure leaves what was found before."""
        if not self._discovered:
            return
        await asyncio.gather(*(self._look_up(each) for each in self._discovered))
        found = [upstream for each in self._discovered for upstream in each.members.values()]
        self.all = _distinct((*self._fixed, *found))

    async def _look_up(self, discovered: _Discovered) -> None:
        url = discovered.url
        try:
            async with asyncio.timeout(_LOOKUP_TIMEOUT):
                addresses = await self._lookup(url.host, url.port or 80)
        except OSError as error:  # also a timeout
            if discovered.is_known:
                why = str(error) or type(error).__name__
                _LOG.warning("cannot look up %s: %s", url.host, why)
            discovered.is_known = False
        else:
            discovered.is_known = True
            discovered.update(addresses)

    def choose(
        self,
        tried: Collection[str] = (),
        prefix: bytes | None = None,
        *,
        only: str | None = None,
    ) -> Upstream | None:
        """Return the next upstream whose name is not in `tried`, by the policy, or None.

        `prefix` is a hash of the prompt's beginning, for the policy of that name. `only` is the
        name of the one upstream that may be chosen: others may appear between two calls.
        """
        if not self.all:
            return None
        turn = self._turn % len(self.all)
        self._turn = turn + 1
        inline = [
            upstream
            for upstream in self.all[turn:] + self.all[:turn]
            if upstream.name not in tried and only in (None, upstream.name)
        ]
        now = time.monotonic()
        if self._policy == "prefix" and prefix is not None:
            usable = [u for u in inline if u.healthy and u.rests_until <= now]
            running = 1 + sum(u.running for u in usable)
            most = max(FEW_RUNNING, math.ceil(MOST_OF_MEAN * running / max(1, len(usable))))
            usable = [u for u in usable if u.running < most]
            if usable:  # the same one each time, and no other prompt's moves when one is gone
                return max(usable, key=lambda u: hashlib.sha256(prefix + u.name.encode()).digest())
        least_busy = self._policy != "round-robin"
        return min(
            inline,
            key=lambda u: (not u.healthy, u.rests_until > now, u.running if least_busy else 0),
            default=None,
        )

    def failed(self, upstream: Upstream, why: str) -> None:
        """Record that `upstream` was unreachable or closed the connection."""
        upstream.failures += 1
        if upstream.healthy:
            _LOG.warning("upstream %s is down: %s", upstream.name, why)
        upstream.healthy = False

    def answered(self, upstream: Upstream) -> None:
        """Record that `upstream` responded to a request."""
        if upstream.leaves:
            return
        if not upstream.healthy:
            _LOG.warning("upstream %s is up", upstream.name)
        upstream.healthy = True

    def rests(self, upstream: Upstream, retry_after: str) -> None:
        """Record the Retry-After header of a busy upstream."""
        seconds = float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 1.0
        upstream.rests_until = time.monotonic() + min(seconds, _LONGEST_REST)

    async def probe(self, transport: httpx.AsyncBaseTransport, upstream: Upstream) -> None:
        """Probe the health of one upstream; a server without this route counts as healthy.

        One late response changes nothing, since a busy server may be slow: its prompts would move
        to others. A second one in a row is a failure.
        """
        request = httpx.Request(
            "GET",
            upstream.target(b"/health", b""),
            extensions={"timeout": httpx.Timeout(PROBE_TIMEOUT).as_dict()},
        )
        try:
            response = await transport.handle_async_request(request)
            await response.aclose()
        except httpx.HTTPError as error:
            was_late, upstream.late = upstream.late, isinstance(error, httpx.ReadTimeout)
            if was_late or not upstream.late:
                self.failed(upstream, type(error).__name__)
            return
        upstream.late = False
        upstream.leaves = response.status_code >= 500
        if upstream.leaves:
            self.failed(upstream, f"/health returned {response.status_code}")
        else:
            self.answered(upstream)

    async def watch(
        self, transport: httpx.AsyncBaseTransport, interval: float = PROBE_INTERVAL
    ) -> None:
        """Look up and probe all every `interval` seconds.

        That is more often while one is down or late, and after addresses changed: more pods of an
        update follow soon, and other gateways may know them already.
        """
        before = [upstream.name for upstream in self.all]
        while True:
            await self.look_up()
            await asyncio.gather(*(self.probe(transport, upstream) for upstream in self.all))
            names = [upstream.name for upstream in self.all]
            well = bool(self.all) and all(each.healthy and not each.late for each in self.all)
            steady = well and names == before
            before = names
            await asyncio.sleep(interval if steady else min(interval, PROBE_INTERVAL_DOWN))


def _distinct(upstreams: Iterable[Upstream]) -> tuple[Upstream, ...]:
    """Return the first upstream of each name; an address may be given and found in DNS too."""
    first: dict[str, Upstream] = {}
    for upstream in upstreams:
        first.setdefault(upstream.name, upstream)
    return tuple(first.values())


def _parse_name(text: str) -> httpx.URL:
    """Return the URL behind `dns+`; raise `UsageError` unless it is http with a host name.

    The names in certificates are no addresses, so https is for fixed URLs.
    """
    url = _parse(text.removeprefix(DNS), text)
    if not _HOST_NAME.fullmatch(url.host):
        raise UsageError(
            f"{url.host[:200]!r} is not a valid host name",
            hint=f"expected a URL like {DNS}http://servers.example:12434",
        )
    if url.scheme != "http":
        raise UsageError(
            f"{text[:200]!r} is not a valid upstream: addresses from DNS are reached by http only",
            hint=f"expected a URL like {DNS}http://servers.example:12434",
        )
    return url


def _parse(text: str, given: str | None = None) -> httpx.URL:
    try:
        url = httpx.URL(text)
        url.host.encode("idna")  # as a lookup does
    except (httpx.InvalidURL, TypeError, UnicodeError):
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        shown = (given or text).rpartition("@")[2][:200]  # without passwords
        raise UsageError(
            f"{shown!r} is not a valid server URL",
            hint="expected a URL like http://127.0.0.1:12434",
        )
    if url.userinfo:
        raise UsageError(
            f"the URL of {url.host!r} contains a password, which would appear in logs",
            hint="set MODELPACK_UPSTREAM_KEY to the API key of the upstreams",
        )
    return url
