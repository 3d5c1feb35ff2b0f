"""The page of `modelpack catalog` in headless Chromium, from a file, with and without scripts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import Reference
from modelpack.operations.catalog import CatalogEntry, write_catalog
from modelpack.operations.model_list import Summary
from tests.engine.interactive.browser import chromium

pytestmark = pytest.mark.long

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOST = "registry.example/team"
CARD = "# About\n\nIt knows <b>nothing</b>." + "\n\nThe same again, in a long line." * 60


def entry(name: str, summary: Summary | None = None, **more: str) -> CatalogEntry:
    reference = Reference.parse(f"{HOST}/{name}")
    return CatalogEntry(reference, Digest.of(name.encode()), summary, **more)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three models, of which `a` has a card, and a tag that cannot be read."""
    a = Summary(5_000_000, "gguf", "1 B", "Q4_K_M", "llama", 8192, "2026-01-01T00:00:00Z")
    b = Summary(9_000_000, "gguf", "2 B", "Q8_0", "llama", 4096, "2026-03-01T00:00:00Z")
    c = Summary(1_000_000, "safetensors", "", "", "", None, None)
    entries = [
        entry("a:v1", a, title="The first", description="Translates.", card=CARD),
        entry("b:v1", b),
        entry("broken:v1", problem="is not JSON"),
        entry("c:v1", c, title="A-very-long-name-without-a-space" * 5),
    ]
    page, _ = write_catalog(entries, tmp_path_factory.mktemp("site"), name=HOST)
    return page.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The page; it fails the test if it reports an error or loads anything else."""
    page = browser.new_page(permissions=["clipboard-read", "clipboard-write"])
    page.set_default_timeout(20_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: problems.extend({request.url} - {url}))
    page.goto(url)
    yield page
    page.context.close()
    assert problems == []


def shown(page: Page) -> list[str]:
    names = page.locator("h2:visible").all_inner_texts()
    return [name.removeprefix(f"{HOST}/").removesuffix(":v1") for name in names]


def test_models_are_searched_also_in_their_cards(page: Page) -> None:
    page.focus("#search")
    page.keyboard.type("LLAMA gguf")
    assert shown(page) == []
    page.fill("#search", "GGUF q4")
    assert shown(page) == ["a"]
    assert page.locator("[role=status]").inner_text() == "1 of 4 listed"
    page.fill("#search", "knows <b>nothing")
    assert shown(page) == ["a"]
    page.fill("#search", "")
    assert shown(page) == ["a", "b", "broken", "c"]
    assert page.locator("[role=status]").inner_text() == "4 listed"


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ("newest", ["b", "a", "broken", "c"]),
        ("smallest", ["c", "a", "b", "broken"]),
        ("largest", ["b", "a", "c", "broken"]),
        ("context", ["a", "b", "broken", "c"]),
    ],
)
def test_models_are_sorted(page: Page, order: str, names: list[str]) -> None:
    page.select_option("#order", order)
    assert shown(page) == names
    page.select_option("#order", "name")
    assert shown(page) == ["a", "b", "broken", "c"]


def test_a_pull_command_is_copied_by_keyboard(page: Page) -> None:
    page.focus("#order")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("button:text-is('Copied')").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == f"modelpack pull {HOST}/a:v1"
    assert page.locator("[role=status]").inner_text() == f"Copied {copied}"
    assert page.locator("button").count() == 3  # none for the tag that cannot be read


def test_without_a_clipboard_the_command_is_selected(page: Page) -> None:
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.locator("button").nth(1).click()
    page.locator("[role=status]:has-text('selected')").wait_for()
    assert page.evaluate("getSelection().toString()") == f"modelpack pull {HOST}/b:v1"


def test_a_card_is_shown_as_text(page: Page) -> None:
    page.focus("summary")
    page.keyboard.press("Enter")
    card = page.locator(".card:visible")
    card.wait_for()
    assert card.inner_text() == CARD
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "card"


def test_without_scripts_it_is_a_list(browser: Browser, url: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(url)
    assert shown(page) == ["a", "b", "broken", "c"]
    assert page.locator(".pull code:visible").count() == 3
    assert page.locator("input:visible, select:visible, button:visible").count() == 0
    page.click("summary")
    assert page.locator(".card").inner_text() == CARD
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_axe_finds_nothing(browser: Browser, url: str, scheme: str, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = browser.new_page(
        viewport={"width": width, "height": 800},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    page.goto(url)
    page.click("summary")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.context.close()
