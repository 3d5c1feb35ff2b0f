"""The behaviour of oras, requests and urllib3 that the HTTP client relies on."""

from __future__ import annotations

import inspect

import pytest
from oras.container import Container
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.poolmanager import PoolManager, ProxyManager
from urllib3.response import HTTPResponse

from modelpack.registry import Registry
from tests.registry.faulty import FaultyRegistry


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "namespace"), [("a/b", "a"), ("b", ""), ("localhost/b", "localhost")]
)
def test_container_urls_are_those_of_the_specification(name: str, namespace: str) -> None:
    container = Container("x", registry="h:1")
    container.namespace, container.repository = namespace, "b"
    assert container.manifest_url("v1") == f"h:1/v2/{name}/manifests/v1"
    assert container.get_blob_url("sha256:x") == f"h:1/v2/{name}/blobs/sha256:x"
    assert container.upload_blob_url() == f"h:1/v2/{name}/blobs/uploads/"
    assert container.tags_url() == f"h:1/v2/{name}/tags/list"


def test_the_hooks_of_requests_and_urllib3_are_there() -> None:
    """`modelpack.registry.sockets` overrides these methods, and every connection uses them."""
    assert parameters(HTTPConnection._new_conn) == []
    assert parameters(HTTPSConnection.connect) == []
    assert HTTPConnectionPool.ConnectionCls is HTTPConnection
    for manager in (PoolManager(), ProxyManager("http://localhost")):
        assert set(manager.pool_classes_by_scheme) == {"http", "https"}
    for name in ("init_poolmanager", "proxy_manager_for", "cert_verify", "send"):
        assert callable(getattr(HTTPAdapter, name))
    assert parameters(HTTPResponse.read1)[0] == "amt"


def test_every_request_carries_our_headers_and_no_cookie(registry: FaultyRegistry) -> None:
    with Registry(registry.host) as client:
        client.ping()
        client.ping()
    first, second = registry.requests
    for request in (first, second):
        assert request.headers["user-agent"].startswith("modelpack/")
        assert request.headers["accept-encoding"] == "identity"
        assert "cookie" not in request.headers
