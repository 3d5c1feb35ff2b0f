"""What of oras is used, and that the installed oras is the one that this was decided for."""

from __future__ import annotations

import inspect

import oras.provider
import pytest
from oras.container import Container
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.poolmanager import PoolManager, ProxyManager
from urllib3.response import HTTPResponse

from modelpack.registry import Registry, oras_client
from modelpack.registry.oras_client import KEPT, REPLACED, SWITCHED_OFF
from modelpack.registry.transport import Transport

#: Of oras 0.2.43: name -> parameters after self.
SIGNATURES = {
    "__init__": ["hostname", "insecure", "tls_verify", "auth_backend"],
    "version": ["return_items"],
    "set_header": ["name", "value"],
    "get_container": ["name"],
    "do_request": ["url", "method", "data", "headers", "json", "stream"],
    "_get_location": ["r", "container"],
    "upload_blob": ["blob", "container", "layer", "do_chunked", "chunk_size"],
    "put_upload": ["blob", "container", "layer"],
    "chunked_upload": ["blob", "container", "layer", "chunk_size"],
    "download_blob": ["container", "digest", "outfile"],
    "blob_exists": ["layer", "container"],
    "get_manifest": ["container", "allowed_media_type", "validation_schema"],
    "upload_manifest": ["manifest", "container"],
    "delete_tag": ["container", "tag"],
    "get_tags": ["container", "N"],
}


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]  # type: ignore[arg-type]


def test_every_method_of_oras_is_kept_replaced_or_switched_off() -> None:
    methods = {
        name
        for name, value in vars(oras.provider.Registry).items()
        if inspect.isfunction(value) and name not in ("__repr__", "__str__")
    }
    assert methods == {*KEPT, *REPLACED, *SWITCHED_OFF}


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_signatures_are_those_that_were_replaced(name: str) -> None:
    assert parameters(getattr(oras.provider.Registry, name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", ["do_request", "_get_location"])
def test_replacements_take_the_same_arguments(name: str) -> None:
    ours = inspect.signature(getattr(Transport, name)).parameters.values()
    positional = [p.name for p in ours if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional[1:] == SIGNATURES[name]


@pytest.mark.parametrize("name", sorted(SWITCHED_OFF))
def test_what_is_switched_off_says_what_to_use(name: str) -> None:
    with Registry("localhost") as registry, pytest.raises(NotImplementedError) as caught:
        getattr(registry._transport, name)("anything")
    assert SWITCHED_OFF[name] in str(caught.value)


def test_what_is_kept_works() -> None:
    with Registry("localhost:5000") as registry:
        transport = registry._transport
        assert transport.prefix == "http"
        assert transport.headers["User-Agent"].startswith("modelpack/")
        assert isinstance(transport.get_container("localhost:5000/a/b"), Container)
        assert transport.session.cookies.get_policy().allowed_domains() == ()


def test_container_urls_are_those_of_the_specification() -> None:
    made = oras_client.container("h:1", "a/b")
    assert made.manifest_url("v1") == "h:1/v2/a/b/manifests/v1"
    assert made.get_blob_url("sha256:x") == "h:1/v2/a/b/blobs/sha256:x"
    assert made.upload_blob_url() == "h:1/v2/a/b/blobs/uploads/"
    assert made.tags_url() == "h:1/v2/a/b/tags/list"


def test_the_hooks_of_requests_and_urllib3_are_there() -> None:
    """`modelpack.registry.sockets` overrides these; none is on the way without them."""
    assert parameters(HTTPConnection._new_conn) == []
    assert parameters(HTTPSConnection.connect) == []
    assert HTTPConnectionPool.ConnectionCls is HTTPConnection
    for manager in (PoolManager(), ProxyManager("http://localhost")):
        assert set(manager.pool_classes_by_scheme) == {"http", "https"}
    for name in ("init_poolmanager", "proxy_manager_for", "cert_verify", "send"):
        assert callable(getattr(HTTPAdapter, name))
    assert parameters(HTTPResponse.read1)[0] == "amt"


def test_do_request_takes_what_oras_gives_it(registry: object) -> None:
    from tests.registry.faulty import FaultyRegistry

    assert isinstance(registry, FaultyRegistry)
    with Registry(registry.host) as client:
        transport = client._transport
        url = f"{registry.url}/v2/a/b/blobs/uploads/"
        response = transport.do_request(url, "POST", json={"a": 1}, headers={"X-Test": "1"})
        assert response.status_code == 202
        assert transport._get_location(response, "a/b").startswith(registry.url)
        transport.do_request(url, "POST", data={"a": "b c"})
        transport.do_request(url, "POST", data=b"raw")
        first, second, third = registry.requests
        assert first.headers["content-type"] == "application/json"
        assert first.headers["x-test"] == "1"
        assert second.headers["content-type"] == "application/x-www-form-urlencoded"
        assert (first.body_size, second.body_size, third.body_size) == (8, 5, 3)
        response = transport.do_request(f"{registry.url}/v2/")
        assert response.json() == {}
        assert response.text == "{}"
