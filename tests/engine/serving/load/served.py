"""A complete server on a port, with a scripted engine and an empty store.

Nothing that it does gets beyond this machine: other hosts' names do not resolve.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp

from modelpack.operations.remote import RemoteOptions
from modelpack.store.layout import LayoutStore
from modelpack_server.api.app import ModelServer
from modelpack_server.gateway.protection import Protection, protect
from modelpack_server.pool.pool import ModelPool
from tests.engine.scripted import HERMES, ScriptedEngine
from tests.engine.serving.conftest import ScriptedCatalogue

# Paths with plain-text errors, which Docker's command line prints.
_TEXT_PATHS = re.compile(
    r"/models(/.*)?|/engines/([^/]+/)?_configure"
    r"|/engines/(ps|df|status|unload|requests|install-backend|uninstall-backend)"
)
METHODS = ("get", "post", "put", "patch", "delete", "head", "options")


class StoringCatalogue(ScriptedCatalogue):
    """A catalogue with a scripted model, and a store for routes that change it."""

    def __init__(self, engine: ScriptedEngine, store: LayoutStore) -> None:
        super().__init__(engine)
        self.store = store
        self.remote = RemoteOptions()


@dataclass(frozen=True)
class Served:
    """The address of a server, and its OpenAPI document."""

    port: int
    document: Mapping[str, Any]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def operations(self) -> list[tuple[str, str]]:
        """All (METHOD, path) in the document."""
        return [
            (method.upper(), path)
            for path, item in self.document["paths"].items()
            for method in METHODS
            if method in item
        ]

    def posts(self, *, json_only: bool = False) -> list[str]:
        """The paths of POST routes that require JSON, with parameters replaced by a name."""
        return [
            path.format_map(_Anything())
            for method, path in self.operations()
            if method == "POST" and (not json_only or self._needs_json(path))
        ]

    def connect(self) -> http.client.HTTPConnection:
        """Open a connection, which the caller must close."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def _needs_json(self, path: str) -> bool:
        body = self.document["paths"][path]["post"].get("requestBody", {})
        return bool(body.get("required")) and "application/json" in body["content"]


class _Anything(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return "m"


def is_error(path: str, content: bytes) -> bool:
    """Return whether `content` is an error in the format of a path's API."""
    if _TEXT_PATHS.fullmatch(path):
        return len(content) > 1 and content.decode().endswith(("\n", "}"))
    body = json.loads(content)
    error = body["error"]
    if path.startswith("/api/"):
        return body.keys() == {"error"} and isinstance(error, str) and error != ""
    if "/messages" in path or path.startswith("/anthropic"):
        known = body["type"] == "error" and error.keys() == {"type", "message"}
    else:
        known = body.keys() == {"error"} and error.keys() == {"message", "type", "param", "code"}
    return known and bool(error["message"]) and bool(error["type"])


def alone(patch: pytest.MonkeyPatch) -> None:
    """Resolve no host names except this machine's."""
    resolve = socket.getaddrinfo

    def local(host: Any, *arguments: Any, **options: Any) -> Any:
        if host not in ("127.0.0.1", "localhost", b"localhost", None):
            raise socket.gaierror(socket.EAI_NONAME, "no such host in tests")
        return resolve(host, *arguments, **options)

    patch.setattr(socket, "getaddrinfo", local)


@contextmanager
def serving(store: Path, *, protected: bool) -> Iterator[Served]:
    """Serve all APIs; `protected` like `modelpack serve`."""
    engine = ScriptedEngine(template=HERMES)
    catalogue = StoringCatalogue(engine, LayoutStore(store))

    def wrap(app: ASGIApp) -> ASGIApp:
        return protect(app, Protection(report=lambda trace: None)) if protected else app

    with (
        pytest.MonkeyPatch.context() as patch,
        ModelServer(
            lambda: ModelPool(catalogue, memory=100, grace=0.0), address="127.0.0.1:0", wrap=wrap
        ) as server,
    ):
        alone(patch)
        port = int(server.url.rpartition(":")[2])
        yield Served(port, document_of(port))


def document_of(port: int) -> dict[str, Any]:
    """Return the OpenAPI document of a server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/openapi.json")
    document: dict[str, Any] = json.load(connection.getresponse())
    connection.close()
    return document
