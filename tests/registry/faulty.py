"""A registry in this process that misbehaves on demand, for tests at every level.

    with FaultyRegistry() as registry:
        blob = registry.put_blob(b"weights")
        manifest = registry.put_manifest(raw, tag="v1")
        registry.faults.add("GET", "/blobs/", cut_after(3), times=2)
        ...                                     # a client of registry.host, repository REPOSITORY
        assert registry.count("GET", "/blobs/") == 3

Without faults it is a small, correct registry: manifests, tags with paging, blobs with ranges,
uploads by POST, PATCH and PUT, mounts, deletes. It listens on a free loopback port and keeps
everything in memory, by repository: see `content`. `requests` has every request that it got.

A fault is looked up by method (`*` is any) and a regular expression found in the path with its
query; the first that fits and is not used up gets the request instead of the registry. Those of
`tests.registry.faults` cover the usual ones, and a test may write its own. Redirects and upload
locations may lead to a second FaultyRegistry, whose `requests` show what arrived there.
Authentication is `auth=`, see `tests.registry.faulty_auth`; `tls=` is a server-side SSLContext.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Protocol

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.media_types import OCI_MANIFEST
from tests.registry.faults import Exchange, Faults, Recorded
from tests.registry.faulty_content import Content, Reply

REPOSITORY = "team/model"


class Authentication(Protocol):
    """Authorises requests; see `tests.registry.faulty_auth`."""

    def refusal(self, exchange: Exchange) -> Reply | None:
        """Return the response to a request that is refused, or that asks for a token."""
        ...


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    disable_nagle_algorithm = True
    wbufsize = -1

    def _serve(self) -> None:
        registry = self.server.registry
        exchange = Exchange(registry, self)
        registry.record(exchange.recorded)
        try:
            fault = registry.faults.take(self.command, self.path)
            refusal = registry.auth.refusal(exchange) if registry.auth and not fault else None
            if fault is not None:
                fault(exchange)
            elif refusal is not None:
                exchange.receive()
                exchange.send(refusal)
            else:
                exchange.send(exchange.reply())
        except (ConnectionError, ValueError, OSError):
            self.close_connection = True  # the client disconnected

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for the threads
    request_queue_size = 64
    registry: FaultyRegistry

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        if isinstance(request, ssl.SSLSocket) and request.version() is None:
            _linger(request)
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the connection ended during a read or a write


def _linger(refused: ssl.SSLSocket) -> None:
    """Read the rest of a refused request: otherwise the client would not see the reason.

    In TLS 1.3, a client assumes that its certificate is accepted and sends its request at once.
    """
    with contextlib.suppress(OSError):
        refused.settimeout(5)
        refused.shutdown(socket.SHUT_WR)
        while refused.recv(4096):
            pass


@dataclass
class FaultyRegistry:
    """The server; a context manager."""

    auth: Authentication | None = None
    tls: ssl.SSLContext | None = None
    page_size: int = 1000
    relative_locations: bool = False
    referrers_api: bool = False
    faults: Faults = field(default_factory=Faults)
    requests: list[Recorded] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> FaultyRegistry:
        self.content = Content(self)
        self._lock = threading.Lock()
        self._server = _Server()
        self._server.registry = self
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{'https' if self.tls else 'http'}://{self.host}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), name="faulty registry"
        )
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        for connection in list(self._server.connections):
            with contextlib.suppress(OSError):  # gone already
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    def record(self, request: Recorded) -> None:
        """Remember a request, before it is answered."""
        with self._lock:
            self.requests.append(request)

    def seen(self, method: str, path: str = "") -> list[Recorded]:
        """Return the requests with this method and the regular expression `path` in their path."""
        with self._lock:
            return [r for r in self.requests if r.method == method and re.search(path, r.path)]

    def count(self, method: str, path: str = "") -> int:
        """Return the number of requests that `seen` returns."""
        return len(self.seen(method, path))

    def put_blob(
        self,
        content: bytes,
        repository: str = REPOSITORY,
        media_type: str = "application/octet-stream",
    ) -> Descriptor:
        """Add a blob and return its descriptor."""
        digest = Digest.of(content)
        self.content.blobs[repository, str(digest)] = content
        return Descriptor(media_type, digest, len(content))

    def put_manifest(
        self,
        raw: bytes,
        tag: str | None = None,
        repository: str = REPOSITORY,
        media_type: str = OCI_MANIFEST,
    ) -> Descriptor:
        """Add a manifest, with a tag if given, and return its descriptor."""
        digest = Digest.of(raw)
        self.content.manifests[repository, str(digest)] = (media_type, raw)
        if tag is not None:
            self.content.tags[repository, tag] = str(digest)
        return Descriptor(media_type, digest, len(raw))

    def put_tags(self, tags: Iterable[str], digest: Digest, repository: str = REPOSITORY) -> None:
        """Let tags point at a manifest."""
        for tag in tags:
            self.content.tags[repository, tag] = str(digest)

    def blob(self, digest: Digest, repository: str = REPOSITORY) -> bytes | None:
        """Return a blob's content, None if there is none."""
        return self.content.blobs.get((repository, str(digest)))

    @property
    def open_uploads(self) -> list[str]:
        """The upload sessions that were neither finished nor cancelled."""
        return sorted(self.content.sessions)
