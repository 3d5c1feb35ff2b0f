"""Write docs/chat-page.png: `python -m tests.engine.interactive.make_screenshot`.

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

TARGET = Path(__file__).parents[3] / "docs" / "chat-page.png"
QUESTIONS = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers, and explain it in a list.",
)


def main() -> None:
    """Send two prompts and write the picture."""
    with tempfile.TemporaryDirectory() as directory, chromium() as browser:
        store = LayoutStore(directory)
        modelpack.package("ai/smollm2", PackageRequest(gguf=smollm2_gguf()), store=store)
        config = EngineConfig(device="cpu", max_model_len=2048)
        with ModelServer(
            lambda: ModelPool(StoreCatalogue(store, config)), address="127.0.0.1:0"
        ) as server:
            page = browser.new_page(
                viewport={"width": 960, "height": 760}, device_scale_factor=1.5,
                color_scheme="light",
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
            page.screenshot(path=TARGET)


if __name__ == "__main__":
    main()
