"""A headless Chromium that shows the chat page of a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.peers import missing, require

if TYPE_CHECKING:
    from playwright.sync_api import Browser

#: Gives an event of pasting or dropping a file, given in base64, to the element of a selector.
GIVE = """([selector, kind, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const given = new DataTransfer();
  given.items.add(new File([bytes], "given.png", { type: "image/png" }));
  const options = { bubbles: true, cancelable: true };
  const event = kind === "paste" ? new ClipboardEvent(kind, { ...options, clipboardData: given })
    : new DragEvent(kind, { ...options, dataTransfer: given });
  return !document.querySelector(selector).dispatchEvent(event);
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run Debian's Chromium; skip the test, or fail (see `missing`), if it is not installed."""
    program = require("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
        )
        yield browser
        browser.close()
