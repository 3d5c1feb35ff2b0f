"""The path that is authorised is the path that the application routes, in any spelling."""

from __future__ import annotations

import asyncio
from urllib.parse import unquote

import pytest
from starlette.types import Receive, Scope, Send

from modelpack_server.gateway.protection import CanonicalPath


def seen(raw: str) -> tuple[str, str]:
    """Return `path` and `raw_path` behind the middleware, of a request for `raw`."""
    scopes = []

    async def app(scope: Scope, _: Receive, __: Send) -> None:
        scopes.append(scope)

    scope = {"type": "http", "path": unquote(raw), "raw_path": raw.encode()}
    asyncio.run(CanonicalPath(app)(scope, None, None))  # type: ignore[arg-type]
    return scopes[0]["path"], scopes[0]["raw_path"].decode()


@pytest.mark.parametrize(
    ("raw", "path", "encoded"),
    [
        ("/v1/models", "/v1/models", "/v1/models"),
        ("//metrics", "/metrics", "/metrics"),
        ("/%2Fmetrics", "/metrics", "/metrics"),
        ("/%6d%65trics", "/metrics", "/metrics"),
        ("/v1///chat//completions/", "/v1/chat/completions/", "/v1/chat/completions/"),
        ("/exp/vDD4.40/models", "/models", "/models"),
        ("/exp/vDD4.40/exp/vDD4.40//models", "/models", "/models"),
        ("//exp/vDD4.40/models", "/models", "/models"),
        ("/exp/vDD4.40", "/exp/vDD4.40", "/exp/vDD4.40"),
        ("/v1/models/ai%2Fx:latest", "/v1/models/ai/x:latest", "/v1/models/ai%2Fx:latest"),
        ("/v1/models/ai%2F%2Fx", "/v1/models/ai/x", "/v1/models/ai/x"),
        ("/a%252Fb", "/a%2Fb", "/a%252Fb"),
        ("/a%3Fb%23c", "/a?b#c", "/a%3Fb%23c"),
        ("/a%20%C3%A9", "/a \u00e9", "/a%20%C3%A9"),
        ("/a b", "/a b", "/a%20b"),
    ],
)
def test_each_path_has_one_spelling(raw: str, path: str, encoded: str) -> None:
    assert seen(raw) == (path, encoded)
    assert seen(encoded) == (path, encoded)
    assert unquote(encoded) == path
