"""The API reference at /docs and /redoc: all operations, and nothing from another host."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from modelpack_server.api.app import ModelServer, create_app
from modelpack_server.pool.pool import ModelPool
from tests.engine.interactive.browser import chromium
from tests.engine.pool.shelf import Shelf

PATHS = ("/docs", "/redoc")


class Page(HTMLParser):
    """The tags of a page, and what it links to or loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        self.ids.add(given.get("id") or "")
        self.links += [given[name] or "" for name in ("href", "src") if name in given]


@pytest.mark.parametrize("path", PATHS)
def test_every_operation_is_there_and_nothing_of_another_host(path: str) -> None:
    with TestClient(create_app(ModelPool(Shelf(m=1)))) as client:
        response = client.get(path)
        document = client.get("/openapi.json").json()
    page = Page(response.text)
    for name, operations in document["paths"].items():
        for method in operations:
            assert f"<code>{method.upper()} {name}</code>" in response.text
    assert "script" not in page.tags
    assert not re.findall(r"@import|url\(", response.text)
    assert {urlsplit(link).netloc for link in page.links} == {""}
    anchors = {link[1:] for link in page.links if link.startswith("#")}
    assert anchors <= page.ids
    assert {f"schema-{name}" for name in document["components"]["schemas"]} <= page.ids
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'none'; style-src 'sha256-" in policy
    assert "unsafe" not in policy


def test_texts_of_the_document_are_not_html() -> None:
    from modelpack_server.api.page.reference import reference

    evil = '<img src=x onerror="alert(1)">'
    schema = {"type": "object", "description": evil, "properties": {evil: {"default": evil}}}
    operation = {
        "description": evil, "tags": [evil], "responses": {"200": {"description": evil}},
        "parameters": [{"name": evil, "in": "query", "schema": {"enum": [evil]}}],
    }  # fmt: skip
    document: dict[str, Any] = {
        "info": {"title": evil, "version": evil},
        "paths": {f"/{evil}": {"get": operation}},
        "components": {"schemas": {evil: schema}},
    }
    assert "img" not in Page(reference(document)).tags


@pytest.mark.long
def test_both_pages_render_in_a_browser_without_another_host() -> None:
    with (
        ModelServer(lambda: ModelPool(Shelf(m=1)), address="127.0.0.1:0") as server,
        chromium() as browser,
    ):
        for path in PATHS:
            page, asked, complaints = browser.new_page(), [], []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("console", lambda message, said=complaints: said.append(message.text))
            page.goto(server.url + path)
            assert page.locator("h1").inner_text().startswith("Modelpack")
            assert page.locator("h3", has_text="POST /v1/chat/completions").is_visible()
            page.locator("a", has_text="ChatRequest").first.click()
            assert page.locator("#schema-ChatRequest").is_visible()
            border = page.locator("section").first.evaluate("e => getComputedStyle(e).borderStyle")
            assert border == "solid"  # the policy lets the style apply
            assert {urlsplit(url).netloc for url in asked} == {urlsplit(server.url).netloc}
            assert complaints == []
