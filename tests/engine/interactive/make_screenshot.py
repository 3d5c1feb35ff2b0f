"""Write the pictures of docs/console.md and docs/pictures.md.

Run `python -m tests.engine.interactive.make_screenshot`, with `console` or `picture` for one of the
two. Real models answer, in a headless Chromium.
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

import modelpack
from fixtures.pictures import model, samples
from modelpack.operations.package import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.config import EngineConfig
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.interactive.browser import GIVE, chromium

if TYPE_CHECKING:
    from playwright.sync_api import Page

DOCS = Path(__file__).parents[3] / "docs"
QUESTIONS = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers, and explain it in a list.",
)


@contextmanager
def page_of(name: str, request: PackageRequest) -> Iterator[Page]:
    """Show the console of a server with one model, which answers greedily."""
    with tempfile.TemporaryDirectory() as directory, chromium() as browser:
        store = LayoutStore(directory)
        modelpack.package(name, request, store=store)
        config = EngineConfig(device="cpu", max_model_len=2048)
        with ModelServer(
            lambda: ModelPool(StoreCatalogue(store, config)), address="127.0.0.1:0"
        ) as server:
            page = browser.new_page(
                viewport={"width": 1100, "height": 720}, color_scheme="light"
            )  # fmt: skip
            page.goto(server.url)
            page.locator("#model option").first.wait_for(state="attached")
            page.click("#more")
            page.fill("#temperature", "0")
            page.click("#more")
            yield page


def ask(page: Page, question: str) -> None:
    """Send a question and wait for the end of the reply."""
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.locator("#send:text-is('Send')").wait_for(timeout=300_000)


def write_console() -> None:
    """Send two prompts, and write a picture of each part of the console."""
    with page_of("ai/smollm2", PackageRequest(gguf=smollm2_gguf())) as page:
        for question in QUESTIONS:
            ask(page, question)
        page.screenshot(path=DOCS / "chat-page.png")
        page.click("#tab-models")
        page.locator("#stored >> text=Details").click()
        page.locator("#details h2").wait_for()
        page.screenshot(path=DOCS / "console-models.png")
        page.click("#tab-requests")
        page.locator("#listed tr").first.wait_for()
        page.screenshot(path=DOCS / "console-requests.png")
        page.click("#tab-metrics")
        page.click("#tab-chat")
        page.fill("#question", "Tell me a story about a lighthouse.")
        page.press("#question", "Enter")
        page.click("#tab-metrics")
        page.wait_for_timeout(14_000)
        page.screenshot(path=DOCS / "console-metrics.png")


def drop(page: Page, sample: samples.Sample) -> None:
    """Drop a picture on the chat."""
    file = io.BytesIO()
    Image.fromarray(sample.pixels).resize((256, 256)).save(file, "PNG")
    page.evaluate(GIVE, ["#log", "drop", base64.b64encode(file.getvalue()).decode()])
    page.locator("#files img").wait_for()


def write_picture() -> None:
    """Ask about a dropped picture, drop another one, and write a picture of the chat."""
    digit, star = samples.held_out(4, 4)[3::4]
    with tempfile.TemporaryDirectory() as directory:
        model.write(Path(directory))
        with page_of("ai/reader", PackageRequest(safetensors_dir=Path(directory))) as page:
            drop(page, star)
            ask(page, samples.WHAT)
            assert page.locator("text=A red star.").count() == 1
            drop(page, digit)
            page.fill("#question", "Which digit is this?")
            page.screenshot(path=DOCS / "chat-page-picture.png")


if __name__ == "__main__":
    parts = {"console": write_console, "picture": write_picture}
    for part in sys.argv[1:] or parts:
        parts[part]()
