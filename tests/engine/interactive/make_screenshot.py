"""Write the pictures of docs/console.md: `python -m tests.engine.interactive.make_screenshot`.

A real model answers, in a headless Chromium.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import modelpack
from modelpack.operations.package import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.config import EngineConfig
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.interactive.browser import chromium

DOCS = Path(__file__).parents[3] / "docs"
QUESTIONS = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers, and explain it in a list.",
)


def main() -> None:
    """Send two prompts and write the pictures."""
    with tempfile.TemporaryDirectory() as directory, chromium() as browser:
        store = LayoutStore(directory)
        modelpack.package("ai/smollm2", PackageRequest(gguf=smollm2_gguf()), store=store)
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
            for question in QUESTIONS:
                page.fill("#question", question)
                page.press("#question", "Enter")
                page.locator("#send:text-is('Send')").wait_for(timeout=300_000)
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


if __name__ == "__main__":
    main()
