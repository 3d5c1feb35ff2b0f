"""The console in headless Chromium: models, requests, metrics, code, and accessibility."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import requests

import modelpack
from modelpack.builder.request import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from modelpack_engine.config import EngineConfig
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.embedding.models import write_model
from tests.engine.interactive.browser import chromium
from tests.engine.serving.tiny import write_tiny

pytestmark = pytest.mark.long

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CONFIG = EngineConfig(device="cpu", max_num_seqs=4, max_num_batched_tokens=32, kv_cache_bytes=2**21)
TABS = ("chat", "models", "requests", "metrics", "code")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LayoutStore:
    """A store with the models `tiny`, which has a card and a license, and `vectors`."""
    root = tmp_path_factory.mktemp("console")
    files = write_tiny(root / "files", temperature=0.0)
    (files / "README.md").write_text("# About tiny\n\nIt knows **nothing**.\n")
    (files / "LICENSE").write_text("Do what you want.\n")
    (root / "vectors").mkdir()
    store = LayoutStore(root / "store")
    modelpack.package("tiny", PackageRequest(safetensors_dir=files), store=store)
    vectors = write_model(root / "vectors", "bert")
    modelpack.package("ai/vectors", PackageRequest(safetensors_dir=vectors), store=store)
    return store


@pytest.fixture(scope="module")
def url(store: LayoutStore) -> Iterator[str]:
    with ModelServer(
        lambda: ModelPool(StoreCatalogue(store, CONFIG), grace=5.0),
        address="127.0.0.1:0",
        show_content=True,
    ) as server:
        yield server.url


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.set_default_timeout(20_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(url)
    page.locator("#model option").first.wait_for(state="attached")
    yield page
    page.context.close()
    assert problems == []


def ask(page: Page, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.locator("#send:text-is('Send')").wait_for()


def test_a_conversation_is_kept_edited_and_regenerated(page: Page) -> None:
    page.click("#more")
    page.fill("#max_tokens", "4")
    page.press("#max_tokens", "Tab")
    ask(page, "One?")
    ask(page, "Two?")
    page.reload()
    page.locator(".assistant").nth(1).wait_for()
    assert page.locator(".user").all_inner_texts() == ["One?", "Two?"]
    page.locator(".assistant >> text=Regenerate").first.click()
    page.locator("#send:text-is('Send')").wait_for()
    page.locator(".assistant").wait_for()
    assert page.locator(".user").all_inner_texts() == ["One?"]
    page.locator("text=Edit").click()
    assert page.input_value("#question") == "One?"
    assert page.locator(".turn").count() == 0


def test_a_text_file_goes_with_the_question(page: Page, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("seven")
    (tmp_path / "data.bin").write_bytes(b"\x7fELF\x00\x01")
    page.set_input_files("#attach", [tmp_path / "notes.txt", tmp_path / "data.bin"])
    page.locator(".error:has-text('data.bin is not a text file, a picture')").wait_for()
    ask(page, "What number?")
    assert page.locator(".user").inner_text() == "notes.txt:\n```\nseven\n```\n\nWhat number?"


def test_models_are_loaded_pinned_unloaded_and_described(page: Page) -> None:
    page.click("#tab-models")
    row = page.locator("#stored tr:has-text('tiny')")
    row.locator("text=Load").first.click()
    row.locator("td:text-is('ready')").wait_for()
    row.locator("text=Pin").click()
    row.locator("td:text-is('ready, pinned')").wait_for()
    row.locator("text=Unload").click()
    row.locator("td:text-is('stored')").wait_for()
    row.locator("text=Details").click()
    details = page.locator("#details")
    details.locator("h2:text-is('tiny:latest')").wait_for()
    assert "model.safetensors" in details.inner_text()
    details.locator("summary:text-is('Card')").click()
    assert details.locator("strong").inner_text() == "nothing"
    details.locator("summary:text-is('License')").click()
    assert "Do what you want." in details.inner_text()


def test_models_are_pulled_and_deleted(page: Page, store: LayoutStore, tmp_path: Path) -> None:
    with registry() as server:
        name = f"{server.host}/team/other:v1"
        origin = LayoutStore(tmp_path / "origin")
        request = PackageRequest(safetensors_dir=write_tiny(tmp_path / "files"))
        modelpack.package(name, request, push=True, store=origin)
        page.click("#tab-models")
        page.fill("#pulled", name)
        page.press("#pulled", "Enter")
        page.locator(f"#pulls:has-text('{name} is here.')").wait_for()
        page.fill("#pulled", f"{server.host}/team/none:v1")
        page.press("#pulled", "Enter")
        page.locator("#pulls .error").wait_for()
    row = page.locator("#stored tr:has-text('team/other')")
    row.locator("text=Delete").click()
    page.locator("#confirm button:text-is('Keep')").click()
    assert row.count() == 1
    row.locator("text=Delete").click()
    page.locator("#confirm button:text-is('Delete')").click()
    row.wait_for(state="detached")
    assert {model.names for model in store.models() if "other" in str(model.names)} == set()


def test_requests_are_listed_filtered_and_shown(page: Page, url: str) -> None:
    ask(page, "Do you hear me?")
    body = {"model": "absent", "messages": [{"role": "user", "content": "x"}]}
    assert requests.post(f"{url}/v1/chat/completions", json=body, timeout=20).status_code == 404
    page.click("#tab-requests")
    page.locator("#listed tr:has-text('absent')").first.wait_for()
    page.check("#failed")
    assert set(page.locator("#listed tr").evaluate_all("rows => rows.map(r => r.className)")) == {
        "bad"
    }
    page.uncheck("#failed")
    page.fill("#filter", "tiny 200")
    row = page.locator("#listed tr").first
    row.locator("text=Content").click()
    page.locator("#content:has-text('Do you hear me?')").wait_for()


def test_metrics_are_drawn_from_the_servers_own(page: Page) -> None:
    ask(page, "Count.")
    page.click("#tab-metrics")
    page.locator("figure svg[aria-label^='Prefix cache hits']").wait_for()
    assert page.locator("figure").count() == 6
    page.locator("figure path[d*='L']").first.wait_for(state="attached")


def test_the_last_question_as_a_program_sends_it(page: Page, url: str) -> None:
    ask(page, 'It\'s "quoted" here.')
    page.click("#tab-code")
    sources = page.locator("#examples code").all_text_contents()
    assert len(sources) == 3
    assert f"{url}/v1/chat/completions" in sources[0]
    assert "It'\\''s" in sources[0]
    compile(sources[1], "example", "exec")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_axe_finds_nothing(browser: Browser, url: str, scheme: str, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = browser.new_page(
        viewport={"width": width, "height": 800},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    page.goto(url)
    page.locator("#model option").first.wait_for(state="attached")
    ask(page, "# Say\n\n```\nsomething\n```")
    for tab in TABS:
        page.click(f"#tab-{tab}")
        page.locator(f"#{tab}:not([hidden])").wait_for()
        if tab == "models":
            page.locator("#stored >> text=Details").first.click()
            page.locator("#details h2").wait_for()
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.context.close()


def test_the_tabs_by_keyboard(page: Page) -> None:
    page.focus("#tab-chat")
    for tab in (*TABS[1:], TABS[0]):
        page.keyboard.press("ArrowRight")
        page.locator(f"#{tab}:not([hidden])").wait_for()
        assert page.evaluate("document.activeElement.id") == f"tab-{tab}"
    assert page.locator("main > section:not([hidden])").count() == 1
