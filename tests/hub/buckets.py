"""S3 by moto, and the parts of Google's and Azure's storage that obstore uses, on loopback."""

from __future__ import annotations

import hashlib
import threading
import xml.sax.saxutils
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import requests

KEYS = {"AWS_ACCESS_KEY_ID": "known", "AWS_SECRET_ACCESS_KEY": "secret-of-s3",
        "AWS_REGION": "us-east-1"}  # fmt: skip
TOKEN = "token-of-gcs"
_GOOGLE = (
    "<Contents><Key>{key}</Key><Size>{size}</Size><ETag>{etag}</ETag>"
    "<LastModified>2026-01-02T03:04:05Z</LastModified></Contents>",
    "<ListBucketResult>{}</ListBucketResult>",
)
_AZURE = (
    "<Blob><Name>{key}</Name><Properties><Last-Modified>Fri, 02 Jan 2026 03:04:05 GMT"
    "</Last-Modified><Etag>{etag}</Etag><Content-Length>{size}</Content-Length>"
    "<Content-Type>application/octet-stream</Content-Type></Properties></Blob>",
    "<EnumerationResults><Blobs>{}</Blobs><NextMarker/></EnumerationResults>",
)


@dataclass
class Cloud:
    """A storage with one bucket; `url` is its endpoint, `scheme` that of addresses."""

    scheme: str
    url: str

    def put(self, key: str, content: bytes) -> None:
        """Write an object into the bucket `models`."""
        assert requests.put(f"{self.url}/models/{key}", data=content, timeout=10).ok

    def fill(self, directory: Path, prefix: str) -> None:
        """Write the files of a directory, with their paths under `prefix`."""
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(directory).as_posix()}", path.read_bytes())


@contextmanager
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """Run moto's server, with the bucket `models`, as the endpoint of the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        requests.post(f"{url}/moto-api/reset", timeout=10)
        requests.put(f"{url}/models", timeout=10)
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": url}.items():
            monkeypatch.setenv(name, value)
        yield Cloud("s3", url)
    finally:
        server.stop()


@dataclass
class Faults:
    """What the imitation does wrong: `cut` bytes of bodies, `replaced` before they are read."""

    cut: int | None = None
    replaced: bool = False
    denied: int | None = None
    ranges: list[str | None] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    """Google's XML API and Azure's Blob service, each as far as obstore uses it.

    https://docs.cloud.google.com/storage/docs/xml-api/get-bucket-list,
    https://learn.microsoft.com/en-us/rest/api/storageservices/list-blobs.
    """

    protocol_version = "HTTP/1.1"
    server: CloudServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_PUT(self) -> None:
        key = unquote(self.path.removeprefix("/models/"))
        self.server.objects[key] = self.rfile.read(int(self.headers["Content-Length"]))
        self._send(200, b"")

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).removeprefix("/").partition("/")
        faults = self.server.faults
        if faults.denied is not None:
            self._error(faults.denied, "AccessDenied")
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(401, "AuthenticationRequired")
        elif bucket != "models":
            self._error(404, "ContainerNotFound" if "comp=" in parts.query else "NoSuchBucket")
        elif not key:
            self._list(parse_qs(parts.query))
        elif key not in self.server.objects:
            self._error(404, "NoSuchKey")
        else:
            self._object(self.server.objects[key])

    def _list(self, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        entry, whole = _AZURE if "comp" in query else _GOOGLE
        entries = "".join(
            entry.format(key=xml.sax.saxutils.escape(key), size=len(content), etag=_etag(content))
            for key, content in sorted(self.server.objects.items())
            if key.startswith(prefix)
        )
        self._send(200, whole.format(entries).encode())

    def _object(self, content: bytes) -> None:
        faults = self.server.faults
        faults.ranges.append(self.headers.get("Range"))
        if faults.replaced:
            content = b"another" + content
        if self.headers.get("If-Match") not in (None, _etag(content)):
            self._error(412, "PreconditionFailed")
            return
        headers = {"ETag": _etag(content), "Last-Modified": "Fri, 02 Jan 2026 03:04:05 GMT"}
        size, start, status = len(content), 0, 200
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            content, status = content[start:], 206
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self._send(status, content, headers, cut=faults.cut)

    def _error(self, status: int, code: str) -> None:
        self._send(status, f"<Error><Code>{code}</Code></Error>".encode())

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cut is not None and len(body) > cut:
            self.wfile.write(body[:cut])
            self.close_connection = True
        else:
            self.wfile.write(body)


class CloudServer(ThreadingHTTPServer):
    """An imitation of Google Cloud Storage and Azure with the bucket `models`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.faults = Faults()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def _served(scheme: str) -> Iterator[tuple[Cloud, CloudServer]]:
    server = CloudServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield Cloud(scheme, server.url), server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cloud, CloudServer]]:
    """Run the imitation as Google's endpoint of the environment."""
    with _served("gs") as (cloud, server):
        monkeypatch.setenv("GOOGLE_BASE_URL", server.url)
        monkeypatch.setenv("GOOGLE_BEARER_TOKEN", TOKEN)
        yield cloud, server


@contextmanager
def azure(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cloud, CloudServer]]:
    """Run the imitation as Azure's endpoint of the environment."""
    with _served("az") as (cloud, server):
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", server.url)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "known")
        monkeypatch.setenv("AZURE_STORAGE_TOKEN", TOKEN)
        yield cloud, server


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'
