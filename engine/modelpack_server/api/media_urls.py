"""MediaUrls: fetch pictures and videos from URLs in requests, from hosts that the operator allows.

A URL makes the server connect to where a client says (server-side request forgery). Therefore the
operator lists hosts, a name must resolve to public addresses only, and the connection goes to the
very address that was checked. Redirects pass the same checks. Nothing of the environment or of the
client's request is sent, and errors show neither addresses nor content.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal
from urllib.parse import urlsplit, urlunsplit

import httpx

from modelpack import __version__
from modelpack.errors import RegistryError, UsageError
from modelpack.registry.tls import default_context
from modelpack.registry.urls import (
    Origin,
    Scope,
    checked_url,
    joined_url,
    literal_scope,
    origin_of,
    scope_of,
)
from modelpack_engine.errors import RETRY_AFTER, QueueFullError, RequestError
from modelpack_engine.worker.threads import Cancellation, current_cancellation, in_loop

MAX_REDIRECTS: Final = 3
#: Seconds for one URL with its redirects, and for each connection.
MAX_SECONDS: Final = 10.0
CONNECT_SECONDS: Final = 5.0
#: URLs of pictures that are fetched, or whose file is decoded, at a time: in all, and of one owner.
MAX_FETCHES: Final = 16
MAX_FETCHES_OF_OWNER: Final = 4
MAX_WAITING: Final = 64
#: The same of videos, which are larger.
MAX_VIDEO_FETCHES: Final = 4
MAX_VIDEO_FETCHES_OF_OWNER: Final = 2
MAX_VIDEOS_WAITING: Final = 16
_MAX_ADDRESSES = 4  # of a host, to which connections are tried
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = {
    "User-Agent": f"modelpack/{__version__}",
    "Accept-Encoding": "identity",
    "Connection": "close",
}
#: What is asked for, by kind: the first part of its content type.
_ACCEPTED = {
    "image": "image/png, image/jpeg, image/webp, image/gif",
    "video": "video/mp4, video/webm, video/quicktime, video/x-matroska",
}
_NAMES = {"image": "picture", "video": "video"}
_LOG = logging.getLogger(__name__)
_resolvers = ThreadPoolExecutor(4, "modelpack-resolver")  # a lookup may hang for a minute


@dataclass(frozen=True, slots=True)
class MediaHost:
    """A host that `--allow-media-url` names; without a port, those of http and https.

    `scope` is set for an address and `localhost`: they may be private, a name may not.
    """

    host: str
    port: int | None
    scope: Scope | None

    @classmethod
    def parse(cls, text: str) -> MediaHost:
        """Read `HOST[:PORT]`; raise `UsageError` for anything else, and link-local addresses."""
        try:
            checked_url(f"http://{text}/", "")
            parts = urlsplit(f"//{text}")
            host, port = parts.hostname or "", parts.port
        except (RegistryError, ValueError):
            host, port, parts = "", None, urlsplit("")
        if not host or parts.netloc != text:
            raise UsageError(
                f"{text!r} is not a valid host", hint="expected HOST or HOST:PORT, without a scheme"
            )
        scope = literal_scope(host)
        if scope is Scope.SPECIAL:
            raise UsageError(f"{text!r} is a link-local or reserved address")
        if scope is not None and host != "localhost" and _address(host) != host:
            raise UsageError(
                f"{text!r} is not a valid host", hint="write the address in its usual notation"
            )
        return cls(host, port, scope)

    def allows(self, origin: Origin) -> bool:
        """Return whether this is the host and the port of a URL."""
        host = _address(origin.host) or origin.host
        standard = {"http": 80, "https": 443}[origin.scheme]
        return host == self.host and origin.port == (self.port or standard)


def _address(host: str) -> str | None:
    """Return the usual notation of an address, None for a name."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None


class _RefusedError(Exception):
    """A URL that is not fetched; the text continues "the URL cannot be fetched: "."""


class MediaUrls:
    """Fetches files from the URLs of `hosts`, as `MediaHost.parse` reads them."""

    def __init__(self, hosts: Iterable[str]) -> None:
        """Raises `UsageError` for an invalid host."""
        self._hosts = tuple(MediaHost.parse(host) for host in hosts)
        self._slots = {
            "image": _Slots(MAX_FETCHES, MAX_FETCHES_OF_OWNER, MAX_WAITING),
            "video": _Slots(MAX_VIDEO_FETCHES, MAX_VIDEO_FETCHES_OF_OWNER, MAX_VIDEOS_WAITING),
        }

    def check(self, url: str, param: str) -> None:
        """Raise `RequestError` for a URL that `fetched` would refuse before it connects."""
        try:
            self._checked(url)
        except _RefusedError as error:
            raise _failed(param, error) from None

    @contextmanager
    def fetched(
        self,
        url: str,
        param: str,
        *,
        owner: str,
        seconds: float,
        max_bytes: int,
        kind: Literal["image", "video"] = "image",
    ) -> Iterator[bytes]:
        """Yield the file at a URL, whose content type has this kind; call it in `in_thread`.

        It counts as being fetched until the block ends, so that few files are in memory. Raises
        `RequestError`, which names `param`, and `QueueFullError` if too many URLs wait.
        """
        with self._slots[kind].taken(owner, param):
            limit = min(seconds, MAX_SECONDS)
            try:
                data = in_loop(self._fetch(url, limit, max_bytes, kind))
            except _RefusedError as error:
                raise _failed(param, error) from None
            except TimeoutError:
                raise _failed(param, f"it takes longer than {limit:g} s") from None
            except CancelledError:
                raise _failed(param, "the request was cancelled") from None
            yield data

    async def _fetch(self, url: str, seconds: float, max_bytes: int, kind: str) -> bytes:
        async with asyncio.timeout(seconds):
            url, host = self._checked(url)
            for _ in range(MAX_REDIRECTS + 1):
                found = await self._get(url, host, max_bytes, kind)
                if isinstance(found, bytes):
                    return found
                try:
                    url = joined_url(url, found, "")
                except RegistryError:
                    raise _RefusedError("it redirects to a URL that is not allowed") from None
                url, host = self._checked(url, redirected=True)
            raise _RefusedError(f"it redirects more than {MAX_REDIRECTS} times")

    def _checked(self, url: str, *, redirected: bool = False) -> tuple[str, MediaHost]:
        """Return a URL without its fragment, and the allowed host that it names."""
        try:
            url = checked_url(url, "")
        except RegistryError as error:
            raise _RefusedError(str(error).removeprefix(": ")) from None
        origin = origin_of(url)
        for host in self._hosts:
            if host.allows(origin):
                return url, host
        if redirected:
            raise _RefusedError("it redirects to a URL that is not allowed")
        raise _RefusedError(f"{origin.netloc[:100]!r} is not one of the server's --allow-media-url")

    async def _get(self, url: str, host: MediaHost, max_bytes: int, kind: str) -> bytes | str:
        """Return the file at a URL, or the location that it redirects to."""
        origin = origin_of(url)
        for address in (await _addresses(origin, host))[:_MAX_ADDRESSES]:
            try:
                request = _request(url, origin, address, kind)
            except httpx.InvalidURL:
                raise _RefusedError("the URL is not valid") from None
            # One for each connection: a pool would use one for all names of an address.
            async with httpx.AsyncHTTPTransport(
                verify=default_context(), trust_env=False
            ) as transport:
                try:
                    response = await transport.handle_async_request(request)
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    continue
                except httpx.HTTPError:
                    raise _RefusedError("the server sends no valid response") from None
                try:
                    return await _read(response, max_bytes, kind)
                except httpx.HTTPError:
                    raise _RefusedError("the server closed the connection") from None
                finally:
                    await response.aclose()
        raise _RefusedError("no connection to its host")


async def _addresses(origin: Origin, host: MediaHost) -> list[str]:
    """Return the addresses of a host; raise if one of them may not be connected to."""
    look_up = partial(socket.getaddrinfo, origin.host, origin.port, type=socket.SOCK_STREAM)
    try:
        found = await asyncio.get_running_loop().run_in_executor(_resolvers, look_up)
    except (OSError, UnicodeError):
        raise _RefusedError("its host has no address") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        if scope_of(address) not in (Scope.PUBLIC, host.scope):
            _LOG.warning("files are not fetched from %s: %s is not public", host.host, address)
            raise _RefusedError("its host has an address that is not public")
    return addresses


def _request(url: str, origin: Origin, address: str, kind: str = "image") -> httpx.Request:
    """Return a GET request to an address of the URL's host."""
    parts = urlsplit(url)
    netloc = f"[{address}]:{origin.port}" if ":" in address else f"{address}:{origin.port}"
    return httpx.Request(
        "GET",
        urlunsplit(parts._replace(netloc=netloc, path=parts.path or "/")),
        headers={"Host": origin.netloc, "Accept": _ACCEPTED[kind], **_HEADERS},
        extensions={
            "timeout": httpx.Timeout(MAX_SECONDS, connect=CONNECT_SECONDS).as_dict(),
            "sni_hostname": origin.host,  # whose certificate is expected
        },
    )


async def _read(response: httpx.Response, max_bytes: int, kind: str) -> bytes | str:
    headers = response.headers
    if response.status_code in _REDIRECTS and "location" in headers:
        return headers["location"]
    if response.status_code != 200:
        raise _RefusedError(f"the server responds with status {response.status_code}")
    if not headers.get("content-type", "").strip().lower().startswith(f"{kind}/"):
        raise _RefusedError(f"its content type is not that of a {_NAMES[kind]}")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise _RefusedError("its content is compressed")
    length = headers.get("content-length", "0")
    data = bytearray()
    if not length.isdigit() or int(length) <= max_bytes:
        async for piece in response.aiter_raw():
            data += piece
            if len(data) > max_bytes:
                break
        else:
            return bytes(data)
    raise _RefusedError(f"it has more than {max_bytes} bytes")


class _Slots:
    """Limits how many URLs are fetched at a time, in all and of one owner. Thread-safe."""

    def __init__(self, most: int, most_of_owner: int, most_waiting: int) -> None:
        self._most, self._most_of_owner, self._most_waiting = most, most_of_owner, most_waiting
        self._running: Counter[str] = Counter()
        self._waiting = 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, owner: str, param: str) -> Iterator[None]:
        """Wait for a slot, and hold it in the block. Raises `QueueFullError`."""
        self._take(owner, param)
        try:
            yield
        finally:
            with self._changed:
                self._running[owner] -= 1
                self._running += Counter()  # forget owners with none
                self._changed.notify_all()

    def _take(self, owner: str, param: str) -> None:
        cancellation = current_cancellation.get() or Cancellation()
        cancellation.set_end(self._wake)
        try:
            with self._changed:
                if self._must_wait(owner) and self._waiting >= self._most_waiting:
                    raise QueueFullError(
                        f"{self._waiting} requests wait for files to be fetched",
                        retry_after=RETRY_AFTER,
                        hint="try again later",
                    )
                self._waiting += 1
                try:
                    while self._must_wait(owner):
                        if cancellation.is_set:
                            raise _failed(param, "the request was cancelled")
                        self._changed.wait()
                    self._running[owner] += 1
                finally:
                    self._waiting -= 1
        finally:
            cancellation.set_end(None)

    def _must_wait(self, owner: str) -> bool:
        return self._running[owner] >= self._most_of_owner or self._running.total() >= self._most

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _failed(param: str, why: object) -> RequestError:
    return RequestError(f"{param}: the URL cannot be fetched: {why}", param=param)
