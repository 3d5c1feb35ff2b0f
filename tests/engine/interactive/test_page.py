"""The chat page: which clients get it, its permissions, and its behaviour in headless Chromium."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import requests
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from modelpack_server.api.app import ModelServer, create_app
from modelpack_server.pool.catalogue import StoredModel
from modelpack_server.pool.pool import ModelPool
from tests.engine.interactive.browser import chromium
from tests.engine.pool.shelf import Shelf
from tests.engine.scripted import THINKING, ScriptedEngine
from tests.engine.serving.conftest import ScriptedCatalogue

pytestmark = pytest.mark.long

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "html"),
    [
        (BROWSER, True),
        ("text/html", True),
        ("*/*", False),
        ("", False),
        ("application/json", False),
        ("text/plain, text/html;q=0", False),
        ("TEXT/HTML;q=0.5", True),
    ],
)
def test_who_gets_the_page(accept: str, html: bool) -> None:
    with TestClient(create_app(ModelPool(Shelf(m=1)))) as client:
        response = client.get("/", headers={"Accept": accept})
        head = client.head("/", headers={"Accept": accept})
    assert response.headers["content-type"].startswith("text/html" if html else "text/plain")
    assert response.headers["vary"] == "Accept"
    assert head.status_code == response.status_code == 200
    assert html or response.text == "Modelpack is running\n"
    assert html == ("content-security-policy" in response.headers)


def test_the_page_needs_nothing_from_elsewhere_and_parses_no_html() -> None:
    with TestClient(create_app(ModelPool(Shelf(m=1)))) as client:
        response = client.get("/", headers={"Accept": BROWSER})
    page = response.text
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert not re.findall(r"@import|url\(", page)
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert unsafe not in page
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.count("<script>") == page.count("<style>") == 1


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


class Keyed:
    """A server that requires the key "secret" below /v1."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.required = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keys = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        if self.required and scope.get("path", "").startswith("/v1") and keys != [b"Bearer secret"]:
            from starlette.responses import JSONResponse

            body = {"error": {"message": "this server wants a key", "type": "auth"}}
            await JSONResponse(body, 401)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class Site:
    """A page on a server whose model generates a given text."""

    def __init__(self, browser: Browser) -> None:
        self.engine = ScriptedEngine(template=THINKING)
        self.gates: list[Keyed] = []
        self.problems: list[str] = []
        self._browser = browser

    def gate(self, app: ASGIApp) -> ASGIApp:
        self.gates.append(Keyed(app))
        return self.gates[-1]

    def reset(self) -> None:
        """Reset the state of earlier tests."""
        self.engine.wait = None
        self.engine.pieces = []
        self.engine.aborted.clear()
        self.gates[-1].required = False
        self.problems.clear()

    def open(self, url: str, **options: Any) -> Page:
        page = self._browser.new_page(**options)
        page.set_default_timeout(20_000)
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.goto(url)
        page.locator("#model option").first.wait_for(state="attached")
        return page

    def _note(self, message: Any) -> None:
        # Chromium logs failed requests, such as a 401.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.problems.append(message.text)


@pytest.fixture(scope="module")
def served(browser: Browser) -> Iterator[tuple[Site, str]]:
    site = Site(browser)
    catalogue = ScriptedCatalogue(site.engine)
    server = ModelServer(
        lambda: ModelPool(catalogue, memory=100, grace=0.0), address="127.0.0.1:0", wrap=site.gate
    )
    with server:
        yield site, server.url


@pytest.fixture
def site(browser: Browser, served: tuple[Site, str]) -> Iterator[Site]:
    site, _ = served
    site.reset()
    yield site
    for context in browser.contexts:
        context.close()
    assert site.problems == []


@pytest.fixture
def url(served: tuple[Site, str]) -> str:
    return served[1]


def say(site: Site, *pieces: str) -> None:
    site.engine.pieces = ["</think>", *pieces]


def ask(page: Page, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")


def answered(page: Page) -> None:
    page.locator("#send:text-is('Send')").wait_for()


def test_a_conversation(site: Site, url: str) -> None:
    page = site.open(url)
    assert page.locator("#model option").all_text_contents() == ["m"]
    say(site, "The capital ", "is **Par", "is**.")
    page.click("#more")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.3")
    ask(page, "France?")
    answered(page)
    assert page.locator(".assistant .text").inner_html() == (
        "<p>The capital is <strong>Paris</strong>.</p>"
    )
    assert site.engine.params.temperature == 0.3
    say(site, "Rome")
    ask(page, "Italy?")
    answered(page)
    expected = (
        "system: Be brief.\nuser: France?\nassistant: The capital is **Paris**.\nuser: Italy?\n"
    )
    assert site.engine.prompt.startswith(expected)
    assert "4 tokens" in page.locator(".facts").first.inner_text()
    page.click("#clear")
    assert page.locator(".turn").count() == 0
    ask(page, "Spain?")
    answered(page)
    assert site.engine.prompt.startswith("system: Be brief.\nuser: Spain?\n")


class WithEmbeddings(ScriptedCatalogue):
    """A catalogue with an embedding model before the chat model."""

    def stored(self) -> list[StoredModel]:
        return [StoredModel("sha256:e", ("a-vectors",), purpose="embedding"), *super().stored()]

    def find(self, name: str) -> StoredModel:
        return next(model for model in self.stored() if name in model.names)


def test_embedding_models_are_not_offered(site: Site) -> None:
    catalogue = WithEmbeddings(site.engine)
    with ModelServer(lambda: ModelPool(catalogue), address="127.0.0.1:0") as server:
        page = site.open(server.url)
        assert page.locator("#model option").all_inner_texts() == ["m"]
        assert page.locator("#model").input_value() == "m"


def test_reasoning_is_apart(site: Site, url: str) -> None:
    page = site.open(url)
    site.engine.pieces = ["They want ", "Paris.", "</think>", "Paris"]
    ask(page, "France?")
    answered(page)
    assert page.locator("details p").text_content() == "They want Paris."
    assert page.locator("details").get_attribute("open") is None
    assert page.locator(".text").inner_text() == "Paris"


MARKDOWN = """\
# Title <b>x</b>

Text with `a < b`, *em*, ~~old~~ and [a link](https://example.org/x).
Second line, [bad](javascript:alert(1)), https://example.org/y.

1. one
   - inner
2. two

```html
<p>code</p>
```

| a | b |
|---|---|
| 1 | **2** |

> said

---
"""
HTML = (
    "<h2>Title &lt;b&gt;x&lt;/b&gt;</h2>"
    "<p>Text with <code>a &lt; b</code>, <em>em</em>, <s>old</s> and "
    '<a href="https://example.org/x" target="_blank" rel="noopener noreferrer">a link</a>.\n'
    "Second line, bad), "
    '<a href="https://example.org/y" target="_blank" rel="noopener noreferrer">'
    "https://example.org/y</a>.</p>"
    "<ol><li>one<ul><li>inner</li></ul></li><li>two</li></ol>"
    '<div class="block"><pre tabindex="0"><code>&lt;p&gt;code&lt;/p&gt;</code></pre>'
    '<button type="button">Copy</button></div>'
    '<div class="scroll" tabindex="0"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
    "<tbody><tr><td>1</td><td><strong>2</strong></td></tr></tbody></table></div>"
    "<blockquote>said</blockquote><hr>"
)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_markdown_in_pieces_of_any_size(site: Site, url: str, size: int) -> None:
    page = site.open(url)
    say(site, *(MARKDOWN[at : at + size] for at in range(0, len(MARKDOWN), size)))
    ask(page, "Show all.")
    answered(page)
    html = page.locator(".text").inner_html()
    assert html.replace(' start="1"', "") == HTML


ATTACKS = (
    '<img src=x onerror="window.hit = 1">',
    "<script>window.hit = 1</script>",
    "<svg/onload=window.hit=1>",
    '**<img src=x onerror="window.hit=1">**',
    "`<img src=x onerror=window.hit=1>`",
    "```\n<img src=x onerror=window.hit=1>\n```",
    "| <img src=x onerror=window.hit=1> |\n|---|\n| <b>x</b> |",
    "- <img src=x onerror=window.hit=1>",
    "[x](javascript:window.hit=1)",
    "[x](data:text/html,<script>window.hit=1</script>)",
    '[<img src=x onerror="window.hit=1">](https://example.org)',
    '[x](https://example.org"onmouseover="window.hit=1)',
)


def test_what_a_model_writes_stays_text(site: Site, url: str) -> None:
    page = site.open(url)
    for attack in ATTACKS:
        site.engine.pieces = [attack, "</think>", attack]
        ask(page, attack)
        answered(page)
    assert page.locator(".assistant").count() == len(ATTACKS)
    assert page.locator("#log").locator("img, script, svg, b, iframe").count() == 0
    assert page.evaluate("window.hit") is None
    addresses = page.locator("#log a").evaluate_all("nodes => nodes.map(node => node.protocol)")
    assert set(addresses) == {"https:"}
    assert page.locator("#log [onmouseover], #log [onerror]").count() == 0
    assert page.locator(".user").first.inner_text() == ATTACKS[0]
    assert page.locator(".assistant .text").first.inner_text() == ATTACKS[0]


@pytest.mark.parametrize("how", ["button", "key"])
def test_stopping(site: Site, url: str, how: str) -> None:
    page = site.open(url)
    site.engine.wait = asyncio.Event()  # no code sets the event
    site.engine.pieces = ["</think>begun", " ended"]
    ask(page, "Go on for ever.")
    page.wait_for_selector(".text p:has-text('begun')")
    if how == "button":
        page.click("#send")
    else:
        page.keyboard.press("Escape")
    answered(page)
    assert "stopped" in page.locator(".facts").inner_text()
    assert page.locator(".text").inner_text() == "begun"
    deadline = time.monotonic() + 20
    while not site.engine.aborted:
        requests.get(f"{url}/version", timeout=20)
        assert time.monotonic() < deadline
    site.engine.wait = None
    say(site, "again")
    ask(page, "More?")
    answered(page)
    assert "assistant: begun\nuser: More?" in site.engine.prompt


def test_a_key(site: Site, url: str) -> None:
    site.gates[-1].required = True
    page = site._browser.new_page()
    page.set_default_timeout(20_000)
    page.goto(url)
    page.wait_for_selector(".error:has-text('this server wants a key')")
    assert page.evaluate("document.activeElement.id") == "key"
    page.fill("#key", "secret")
    page.press("#key", "Tab")
    page.locator("#model option").first.wait_for(state="attached")
    assert page.locator(".error").count() == 0
    assert page.evaluate("JSON.stringify(localStorage)") == "{}"
    page.reload()
    page.locator("#model option").first.wait_for(state="attached")
    say(site, "yes")
    ask(page, "Known?")
    answered(page)
    assert page.locator(".text").inner_text() == "yes"


def test_errors_are_told_and_the_question_kept(site: Site, url: str) -> None:
    page = site.open(url)
    ask(page, "x" * 5000)
    answered(page)
    assert "context" in page.locator(".error").inner_text()
    assert page.input_value("#question") == "x" * 5000
    assert page.locator(".assistant").count() == 0


def test_themes(site: Site, url: str) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    page = site.open(url, color_scheme="dark")
    dark = page.evaluate(background)
    page.click("#more")
    page.select_option("#theme", "light")
    light = page.evaluate(background)
    assert light != dark
    page.reload()
    assert page.evaluate(background) == light


def test_by_keyboard_alone_and_on_a_phone(site: Site, url: str) -> None:
    page = site.open(url, viewport={"width": 360, "height": 640})
    say(site, "wide " * 50, "\n\n```\n" + "long" * 100 + "\n```")
    page.locator("#question:focus").wait_for()  # when it has the list of models
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#question") == "one\ntwo"
    page.keyboard.press("Enter")
    answered(page)
    assert page.locator(".user").inner_text() == "one\ntwo"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
