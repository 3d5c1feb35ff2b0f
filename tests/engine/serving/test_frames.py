"""Other sites cannot show responses of our servers in a frame."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import HTMLResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from modelpack.http.listener import AppServer
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from modelpack_engine.config import EngineConfig
from modelpack_server.api.app import ModelServer, create_app
from modelpack_server.gateway.app import GatewayServer, GatewaySettings
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue

BROWSER = {"Accept": "text/html"}


async def framable(scope: Scope, receive: Receive, send: Send) -> None:
    """An upstream that allows any frame."""
    headers = {"Content-Security-Policy": "frame-ancestors *", "X-Frame-Options": "ALLOWALL"}
    await HTMLResponse("<p>hello", headers=headers)(scope, receive, send)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The addresses of a model server, an embedded registry and gateways to both."""
    path = tmp_path_factory.mktemp("frames")
    store = LayoutStore(path / "store")
    with ExitStack() as stack:

        def started(server: AppServer) -> str:
            return stack.enter_context(server).url

        pool = lambda: ModelPool(StoreCatalogue(store, EngineConfig(device="cpu")))  # noqa: E731
        models = started(ModelServer(pool, address="127.0.0.1:0", grace=1))
        upstream = started(AppServer(lambda: framable, "127.0.0.1:0", name="upstream", grace=1))
        yield {
            "models": models,
            "registry": f"http://{stack.enter_context(registry(path / 'registry')).host}",
            "gateway": started(GatewayServer(GatewaySettings((models,)), grace=1)),
            "gateway to pages": started(GatewayServer(GatewaySettings((upstream,)), grace=1)),
        }


def paths_of(app: FastAPI) -> list[str]:
    found = [route for route in app.routes if isinstance(route, Route)]
    found = [route for route in found if "GET" in (route.methods or ())]
    return [route.path for route in found if "{" not in route.path]


def check(response: httpx.Response) -> None:
    policies = response.headers.get_list("content-security-policy")
    assert "frame-ancestors 'none'" in policies, response.url
    assert response.headers.get_list("x-frame-options") == ["DENY"], response.url


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["models", "gateway"])
def test_every_page_of_a_model_server(servers: dict[str, str], name: str, tmp_path: Path) -> None:
    app = create_app(ModelPool(StoreCatalogue(LayoutStore(tmp_path))))
    pages = set()
    with httpx.Client(base_url=servers[name], headers=BROWSER, timeout=60) as client:
        for path in [*paths_of(app), "/nothing", "/v1/nothing", "/models/none"]:
            with client.stream("GET", path) as response:
                check(response)
                if response.headers.get("content-type", "").startswith("text/html"):
                    pages.add(path)
        check(client.post("/v1/chat/completions", content=b"no JSON"))
        check(client.get("/", headers={"Host": "evil.example"}))
    if name == "models":
        assert pages >= {"/", "/docs", "/redoc"}


@pytest.mark.parametrize("path", ["/", "/v2/", "/v2/_catalog", "/v2/x/manifests/v1", "/metrics"])
def test_every_response_of_a_registry(servers: dict[str, str], path: str) -> None:
    check(httpx.get(servers["registry"] + path, headers=BROWSER))


def test_a_gateway_lets_no_upstream_be_framed(servers: dict[str, str]) -> None:
    response = httpx.get(servers["gateway to pages"] + "/", headers=BROWSER)
    check(response)
    assert response.text == "<p>hello"
    assert "frame-ancestors *" in response.headers.get_list("content-security-policy")
