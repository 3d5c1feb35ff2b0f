"""The one way to talk HTTP to a registry: authorised, redirected, bounded and retried.

Answers are `requests.Response`s with a success status; all else is raised as an error of Modelpack.
"""

from __future__ import annotations

import json as json_text
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import urlencode

import requests
from requests.utils import get_environ_proxies, select_proxy

from modelpack._version import __version__
from modelpack.errors import RegistryError
from modelpack.progress import ProgressCallback, Stop
from modelpack.registry.addresses import Reach
from modelpack.registry.auth import Authorizer
from modelpack.registry.auth_challenge import NOTHING, Scopes
from modelpack.registry.credentials import CredentialSource
from modelpack.registry.http_errors import (
    MAX_ERROR_BODY,
    NETWORK_ERRORS,
    failed_answer,
    network_error,
)
from modelpack.registry.limits import BlobOptions, Timeouts
from modelpack.registry.oras_client import OrasClient
from modelpack.registry.retry import FailedTry, Retries, RetryPolicy
from modelpack.registry.sockets import Inflow, PatientAdapter, waiting
from modelpack.registry.tls import TlsContexts, TlsOptions
from modelpack.registry.urls import (
    Origin,
    api_host,
    is_loopback,
    joined_url,
    origin_of,
    uses_plain_http,
)

MAX_REDIRECTS: Final = 10
#: Bytes of an answer that is read whole; distribution-spec wants no larger manifests.
MAX_BODY: Final = 4 * 1024 * 1024
T = TypeVar("T")
#: Bytes of a reply besides its body: status lines, interim ones included, headers and trailers.
MAX_HEAD: Final = 256 * 1024
_STEP: Final = 64 * 1024
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NUMBER: Final = re.compile(r"[0-9]{1,18}\Z")


class Body(Protocol):
    """What a request sends: as long as it says, and from the start whenever it is iterated."""

    def __len__(self) -> int:
        """Return the length in bytes."""
        ...

    def __iter__(self) -> Iterator[bytes | memoryview]:
        """Yield the content."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """One request as its caller means it; `what` names its object in errors.

    With `stream` the body of the answer is left to be read, otherwise it is read here, up to
    `limit` bytes. `answer_time` are the seconds to wait for the answer, if not the idle time.
    `anonymous` leaves the registry's credentials out.
    """

    what: str
    method: str
    url: str
    headers: Mapping[str, str]
    body: Body | None = None
    scopes: Scopes = NOTHING
    stream: bool = False
    limit: int = MAX_BODY
    stop: Stop | None = None
    answer_time: float | None = None
    anonymous: bool = False


class Transport(OrasClient):
    """Requests to one registry; several threads may use it at once."""

    def __init__(
        self,
        host: str,
        *,
        plain_http: bool | None,
        credentials: CredentialSource,
        timeouts: Timeouts,
        retry: RetryPolicy,
        stop: Stop,
        report: ProgressCallback,
        tls: TlsOptions = TlsOptions(),  # noqa: B008 - it is immutable
        blobs: BlobOptions = BlobOptions(),  # noqa: B008
    ) -> None:
        address = api_host(host)
        super().__init__(address, insecure=uses_plain_http(address, plain_http))
        self.set_header("User-Agent", f"modelpack/{__version__}")
        self.set_header("Accept-Encoding", "identity")  # a digest is of the bytes as they are
        self.origin: Origin = origin_of(f"{self.prefix}://{address}")
        self._reach = Reach(self.origin.host, tls.allow_private)
        self._adapter = PatientAdapter(TlsContexts(tls, self.origin.netloc), self._reach)
        self.session.mount("http://", self._adapter)
        self.session.mount("https://", self._adapter)
        self.timeouts = timeouts
        self.retry = retry
        self.stop = stop
        self.report = report
        self.blobs = blobs
        #: The connections for segments of blobs, beyond the one that each blob has anyway.
        self.lanes = threading.BoundedSemaphore(max(1, blobs.connections - 1))
        self.auth = Authorizer(
            host,
            credentials,
            self._request_token,
            plain_http=self.origin.scheme == "http",
            insecure=tls.insecure,
            report=report,
        )

    def close(self) -> None:
        """Close the connections that wait for reuse."""
        self.session.close()

    def do_request(
        self,
        url: str,
        method: str = "GET",
        data: Any = None,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
        stream: bool = False,
        *,
        what: str = "",
        scopes: Scopes = NOTHING,
        limit: int = MAX_BODY,
        stop: Stop | None = None,
        anonymous: bool = False,
    ) -> requests.Response:
        """Return the answer to a request, which is made again while that may help.

        The parameters are oras's, and those of `Call`.
        """
        headers = dict(headers or {})
        if json is not None:
            data = json_text.dumps(json).encode()
            headers.setdefault("Content-Type", "application/json")
        elif isinstance(data, Mapping):
            data = urlencode(data).encode()
            headers.setdefault("Content-Type", "application/x-www-form-urlencoded")
        body = None if data is None else _WholeBody(data)
        call = Call(
            what or f"{method} {url.partition('?')[0]}",
            method,
            url,
            headers,
            body,
            scopes,
            stream,
            limit,
            stop,
            anonymous=anonymous,
        )
        return self.retried(lambda: self.attempt(call), stop)

    def retried(self, try_once: Callable[[], T], stop: Stop | None = None) -> T:
        """Return what `try_once` returns, tried as often as the policy says."""
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
        """Return the answer to one try; raise `FailedTry` where another may succeed."""
        (call.stop or self.stop).check()
        sent = None if call.anonymous else self.auth.header(call.scopes)
        response = self._follow_redirects(call, sent)
        if not call.anonymous and self._is_challenge(response):
            challenge = response.headers.get("WWW-Authenticate", "")
            self._read_error(call, response)
            sent = self.auth.answer(challenge, sent, call.scopes)
            response = self._follow_redirects(call, sent)
            if response.status_code == 401 and self._is_own(response.url):
                self._read_error(call, response)
                raise self.auth.refused()
        if 200 <= response.status_code < 300:
            if not call.stream:
                response.raw = BytesIO(self._read(call, response))
            return response
        raise self.refusal(call, response, self._read_error(call, response))

    def refusal(
        self, call: Call, response: requests.Response, body: bytes
    ) -> RegistryError | FailedTry:
        """Return what to raise for an answer with this body that is no success."""
        return failed_answer(
            call.what,
            response,
            origin_of(response.url).netloc,
            body,
            self.retry.now(),
            own=call.anonymous or self._is_own(response.url),
        )

    def location(self, response: requests.Response, what: str) -> str:
        """Return where the `Location` of an answer leads."""
        location = response.headers.get("Location", "")
        if not location:
            raise RegistryError(
                f"{what}: {origin_of(response.url).netloc} answered {response.status_code} "
                "without a Location",
                host=self.origin.netloc,
                status_code=response.status_code,
            )
        return joined_url(response.url, location, what)

    def _get_location(self, r: requests.Response, container: Any) -> str:
        return self.location(r, str(container))

    def _is_own(self, url: str) -> bool:
        return origin_of(url) == self.origin

    def _is_challenge(self, response: requests.Response) -> bool:
        if not self._is_own(response.url):
            return False
        challenge = response.headers.get("WWW-Authenticate")
        if response.status_code == 401:
            return challenge is not None
        # RFC 6750 section 3.1; any other 403 is final.
        return response.status_code == 403 and "insufficient_scope" in (challenge or "")

    def _follow_redirects(self, call: Call, authorization: str | None) -> requests.Response:
        url = call.url
        for _ in range(MAX_REDIRECTS + 1):
            headers = {**self.headers, **call.headers}
            if origin_of(url) != origin_of(call.url):
                headers.pop("Authorization", None)  # what a token request brought along
            if authorization and self._is_own(url):
                headers["Authorization"] = authorization
            response = self._send(call, url, headers)
            status = response.status_code
            if status not in _REDIRECTS or "Location" not in response.headers:
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
        # By the adapter itself: a session would add what .netrc, cookies and its defaults say,
        # and read the body of a redirect whole.
        request = requests.PreparedRequest()
        answer_time = call.answer_time or self.timeouts.idle
        origin = origin_of(url)
        proxies = {} if is_loopback(origin.host) else get_environ_proxies(url)
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
        """Talk to `url`: heed a stop, and translate the exceptions of the network.

        What arrives is held to `inflow`, by default to the minimum speed.
        """
        with waiting(stop or self.stop, self.timeouts.idle, inflow or Inflow(self.timeouts)):
            try:
                yield
            except NETWORK_ERRORS as error:
                raise network_error(what, origin_of(url).netloc, error) from error

    def inflow(self, length: int, seconds: float = math.inf) -> Inflow:
        """Return what may arrive while `length` bytes of a body are read."""
        # A chunk of one byte takes six; after the last one may be trailers.
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
        """Return what an answer that is no success says, if it can be read."""
        if response.status_code == 416:  # docker-registry 2.8.2 names a length that never comes
            response.close()
            return b""
        try:
            return self.auth.scrubbed(self._read_up_to(call, response, MAX_ERROR_BODY))
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
        answer = self.do_request(
            url, method, body, headers, what=f"token for {self.origin.netloc}", anonymous=True
        )
        return answer.content


def stated_number(response: requests.Response, name: str = "Content-Length") -> int | None:
    """Return the number in a header; None if it is missing or not decimal, or too large for us."""
    value = response.headers.get(name, "")
    return int(value) if _NUMBER.match(value) else None


class _WholeBody:
    """A small body that is in memory."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __len__(self) -> int:
        return len(self._content)

    def __iter__(self) -> Iterator[bytes]:
        return iter((self._content,))
