"""HttpClient: HTTP requests to one server, for the registry and the hub alike.

The client authenticates, follows redirects, retries, limits time and bytes, and ends early for a
`Stop`. It returns the `requests.Response` of a success and raises everything else as an error of
Modelpack. An `Authenticator` knows how its server authenticates and what its errors mean.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from types import MappingProxyType
from typing import Final, Protocol, TypeVar

import requests
from requests.utils import get_environ_proxies, select_proxy

from modelpack._version import __version__
from modelpack.artifacts.json_document import MAX_DOCUMENT_BYTES
from modelpack.errors import RegistryError
from modelpack.progress import ProgressCallback, Stop
from modelpack.registry.auth import NOTHING, Authenticator, Scopes, TokenRequest
from modelpack.registry.http_errors import (
    MAX_ERROR_BODY,
    NETWORK_ERRORS,
    failed_response,
    network_error,
)
from modelpack.registry.limits import BlobOptions, FailedTry, Retries, RetryPolicy, Timeouts
from modelpack.registry.sockets import Inflow, InterruptibleAdapter, waiting
from modelpack.registry.tls import TlsContexts, TlsOptions
from modelpack.registry.urls import Origin, Reach, is_local, joined_url, origin_of

MAX_REDIRECTS: Final = 10
#: Bytes of a response besides its body: status lines, interim responses, headers and trailers.
MAX_HEAD: Final = 256 * 1024
_STEP: Final = 64 * 1024
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_NUMBER: Final = re.compile(r"[0-9]{1,18}\Z")
#: Sent with every request. A digest is of the bytes as they are stored, so none are compressed.
_HEADERS: Final = {"User-Agent": f"modelpack/{__version__}", "Accept-Encoding": "identity"}
T = TypeVar("T")


class Body(Protocol):
    """The body of a request; iterating it again starts from its first byte."""

    def __len__(self) -> int:
        """Return the length in bytes."""

    def __iter__(self) -> Iterator[bytes | memoryview]:
        """Yield the content."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request; `what` names its object in errors.

    With `stream`, the caller reads the body of the response. Otherwise the client reads it, up to
    `limit` bytes. `answer_time` is the time in seconds to wait for the response, by default the
    idle timeout. An `anonymous` request carries no credentials. Without `see_other`, a 303 is not
    followed but a failure: it leads to another resource, such as a page for people.
    """

    what: str
    method: str
    url: str
    headers: Mapping[str, str]
    body: Body | None = None
    scopes: Scopes = NOTHING
    stream: bool = False
    limit: int = MAX_DOCUMENT_BYTES
    stop: Stop | None = None
    answer_time: float | None = None
    anonymous: bool = False
    see_other: bool = True


class HttpClient:
    """Requests to the server at one origin; several threads may use it at once."""

    def __init__(
        self,
        origin: Origin,
        authenticator: Callable[[TokenRequest], Authenticator],
        *,
        timeouts: Timeouts,
        retry: RetryPolicy,
        stop: Stop,
        report: ProgressCallback,
        tls: TlsOptions,
        blobs: BlobOptions,
    ) -> None:
        """`authenticator` makes the authenticator, given how to send a request for a token."""
        self.origin = origin
        self.timeouts = timeouts
        self.retry = retry
        self.stop = stop
        self.report = report
        self.blobs = blobs
        #: Connections for segments of blobs, besides the one that each blob has.
        self.segment_slots = threading.BoundedSemaphore(max(1, blobs.connections - 1))
        self._reach = Reach(origin.host, tls.allow_private)
        self._adapter = InterruptibleAdapter(TlsContexts(tls, origin.netloc), self._reach)
        self._authenticator = authenticator(self._request_token)

    def close(self) -> None:
        """Close the idle connections."""
        self._adapter.close()

    def request(
        self,
        url: str,
        method: str = "GET",
        *,
        what: str,
        headers: Mapping[str, str] = MappingProxyType({}),
        data: bytes | None = None,
        scopes: Scopes = NOTHING,
        limit: int = MAX_DOCUMENT_BYTES,
        anonymous: bool = False,
        see_other: bool = True,
    ) -> requests.Response:
        """Return the response with its body, after as many tries as the retry policy allows."""
        body = None if data is None else _BytesBody(data)
        call = Call(
            what,
            method,
            url,
            headers,
            body,
            scopes=scopes,
            limit=limit,
            anonymous=anonymous,
            see_other=see_other,
        )
        return self.retried(lambda: self.attempt(call))

    def retried(self, try_once: Callable[[], T], stop: Stop | None = None) -> T:
        """Return what `try_once` returns, after as many tries as the retry policy allows."""
        retries = self.retries(stop)
        while True:
            try:
                return try_once()
            except FailedTry as failed:
                retries.wait_after(failed)

    def retries(self, stop: Stop | None = None) -> Retries:
        """Return a new count of failed tries."""
        return Retries(self.retry, stop or self.stop, self.report)

    def attempt(self, call: Call) -> requests.Response:
        """Return the response to one try; raise `FailedTry` if another may succeed."""
        (call.stop or self.stop).check()
        sent = None if call.anonymous else self._authenticator.header(call.scopes)
        response = self._follow_redirects(call, sent)
        is_own = self._is_own(response.url) and not call.anonymous
        if is_own and self._authenticator.is_challenge(response):
            challenge = response.headers.get("WWW-Authenticate", "")
            self._read_error(call, response)
            sent = self._authenticator.answer(challenge, sent, call.scopes)
            response = self._follow_redirects(call, sent)
            if response.status_code == 401 and self._is_own(response.url):
                self._read_error(call, response)
                raise self._authenticator.refused()
        if 200 <= response.status_code < 300:
            if not call.stream:
                response.raw = BytesIO(self._read(call, response))
            return response
        raise self._failure(call, response, self._read_error(call, response))

    def _failure(
        self, call: Call, response: requests.Response, body: bytes
    ) -> RegistryError | FailedTry:
        is_own = self._is_own(response.url)
        if is_own and not call.anonymous:
            error = self._authenticator.error(call.what, response)
            if error is not None:
                return error
        return failed_response(
            call.what,
            response,
            origin_of(response.url).netloc,
            body,
            self.retry.now(),
            own=call.anonymous or is_own,
        )

    def location(self, response: requests.Response, what: str) -> str:
        """Return the absolute URL in the `Location` of a response."""
        location = response.headers.get("Location", "")
        if not location:
            raise RegistryError(
                f"{what}: {origin_of(response.url).netloc} answered {response.status_code} "
                "without a Location",
                host=self.origin.netloc,
                status_code=response.status_code,
            )
        return joined_url(response.url, location, what)

    def _is_own(self, url: str) -> bool:
        return origin_of(url) == self.origin

    def _follow_redirects(self, call: Call, authorization: str | None) -> requests.Response:
        url = call.url
        for _ in range(MAX_REDIRECTS + 1):
            headers = {**_HEADERS, **call.headers}
            if origin_of(url) != origin_of(call.url):
                headers.pop("Authorization", None)  # of a token request
            if authorization and self._is_own(url):
                headers["Authorization"] = authorization
            response = self._send(call, url, headers)
            status = response.status_code
            if status not in _REDIRECTS or "Location" not in response.headers:
                return response
            if status == 303 and not call.see_other:
                return response
            self._read_error(call, response)
            url = self.location(response, f"{call.what}: redirect")
            keeps_method = status in (307, 308) or call.method in ("GET", "HEAD")
            if not keeps_method or (call.anonymous and call.body is not None):
                raise RegistryError(
                    f"{call.what}: refused to follow a redirect ({status}) of a {call.method}",
                    host=self.origin.netloc,
                    status_code=status,
                )
        raise RegistryError(
            f"{call.what}: more than {MAX_REDIRECTS} redirects", host=self.origin.netloc
        )

    def _send(self, call: Call, url: str, headers: Mapping[str, str]) -> requests.Response:
        # Without a `requests.Session`, which would add headers from .netrc, cookies and its
        # defaults, and would read the whole body of a redirect.
        request = requests.PreparedRequest()
        answer_time = call.answer_time or self.timeouts.idle
        origin = origin_of(url)
        proxies = {} if is_local(origin.host) else get_environ_proxies(url)
        if select_proxy(url, proxies):
            self._reach.check_name(origin.host, origin.port)
        inflow = Inflow(self.timeouts, max_bytes=MAX_HEAD, seconds=self.timeouts.reply)
        with self.guarded(call.what, url, call.stop, inflow):
            request.prepare(call.method, url, headers=dict(headers))
            request.url = url  # not normalised: the query may be signed
            if call.body is not None:
                request.body = call.body  # type: ignore[assignment]  # any iterable will do
                request.headers["Content-Length"] = str(len(call.body))
            return self._adapter.send(
                request,
                stream=True,
                timeout=(min(self.timeouts.connect, answer_time), answer_time),
                proxies=proxies,
            )

    @contextmanager
    def guarded(
        self, what: str, url: str, stop: Stop | None = None, inflow: Inflow | None = None
    ) -> Iterator[None]:
        """Run network calls to `url`: a stop ends them, and their exceptions become ours.

        `inflow` limits the received bytes, by default only to the minimum speed.
        """
        with waiting(stop or self.stop, self.timeouts.idle, inflow or Inflow(self.timeouts)):
            try:
                yield
            except NETWORK_ERRORS as error:
                raise network_error(what, origin_of(url).netloc, error) from error

    def inflow(self, length: int, seconds: float = math.inf) -> Inflow:
        """Return the limit on received bytes while `length` bytes of a body are read."""
        # A chunk of one byte takes six bytes; trailers may follow the last chunk.
        return Inflow(self.timeouts, max_bytes=8 * length + MAX_HEAD, seconds=seconds)

    def _read(self, call: Call, response: requests.Response) -> bytes:
        declared = (stated_number(response) or 0) if call.method != "HEAD" else 0
        body = b"" if declared > call.limit else self._read_up_to(call, response, call.limit + 1)
        if max(declared, len(body)) <= call.limit:
            return body
        response.close()
        host = origin_of(response.url).netloc
        raise RegistryError(f"{call.what}: {host} sends more than {call.limit} bytes", host=host)

    def _read_error(self, call: Call, response: requests.Response) -> bytes:
        """Return the body of a failed response with secrets masked, b"" if it cannot be read."""
        if response.status_code == 416:  # docker-registry 2.8.2 states a length but sends no body
            response.close()
            return b""
        try:
            return self._authenticator.scrubbed(self._read_up_to(call, response, MAX_ERROR_BODY))
        except (FailedTry, RegistryError):
            return b""
        finally:
            response.close()

    def _read_up_to(self, call: Call, response: requests.Response, length: int) -> bytes:
        body = bytearray()
        inflow = self.inflow(_STEP, self.timeouts.reply)
        try:
            with self.guarded(call.what, response.url, call.stop, inflow):
                while part := response.raw.read(min(length - len(body), _STEP)):
                    body += part
                    inflow.renew()
                    if len(body) == length:
                        break
        except BaseException:
            response.close()
            raise
        return bytes(body)

    def _request_token(
        self, url: str, *, method: str, headers: Mapping[str, str], body: bytes | None
    ) -> bytes:
        what = f"token for {self.origin.netloc}"
        return self.request(
            url, method, what=what, headers=headers, data=body, anonymous=True
        ).content


def stated_number(response: requests.Response, name: str = "Content-Length") -> int | None:
    """Return the number in a header; None if it is missing, not decimal or has over 18 digits."""
    value = response.headers.get(name, "")
    return int(value) if _NUMBER.match(value) else None


class _BytesBody:
    """A body in memory."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __len__(self) -> int:
        return len(self._content)

    def __iter__(self) -> Iterator[bytes]:
        return iter((self._content,))
