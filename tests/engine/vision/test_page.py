"""The chat page sends pictures: chosen, pasted and dropped."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.engine.interactive.browser import GIVE, chromium
from tests.engine.interactive.test_console import ask
from tests.engine.serving.tiny import tiny_server
from tests.engine.vision import tiny
from tests.engine.vision.media import file_of, url
from tests.engine.vision.sound_files import wav
from tests.engine.vision.tiny import picture
from tests.engine.vision.video_files import plain

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.long

ONE = file_of(picture(1))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with tiny_server(lambda: tiny.tiny_engine("llava", max_num_batched_tokens=256)) as url:
        yield url


@pytest.fixture
def page(address: str) -> Iterator[Page]:
    with chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(20_000)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.locator("#model option").first.wait_for(state="attached")
        page.click("#more")
        page.fill("#max_tokens", "4")
        yield page
        page.context.close()
        assert problems == []


def sent(page: Page, question: str) -> list[Any]:
    """Send a question; return the content of its message as the server gets it."""
    with page.expect_request("**/v1/chat/completions") as caught:
        ask(page, question)
    data = caught.value.post_data
    assert data is not None
    content: list[Any] = json.loads(data)["messages"][-1]["content"]
    return content


def expected(question: str, count: int = 1) -> list[Any]:
    picture = {"type": "image_url", "image_url": {"url": url(ONE)}}
    return [*[picture] * count, {"type": "text", "text": question}]


def test_pictures_are_chosen_pasted_and_dropped(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(ONE)
    page.set_input_files("#attach", path)
    data = base64.b64encode(ONE).decode()
    page.locator("#files img").wait_for()
    assert page.evaluate(GIVE, ["#question", "paste", data])
    page.locator("#files li:nth-child(2) img").wait_for()
    assert page.evaluate(GIVE, ["#log", "drop", data])
    page.locator("#files li:nth-child(3) img").wait_for()
    page.locator("#files button").first.click()
    assert sent(page, "Which one?") == expected("Which one?", 2)
    assert page.locator(".error").count() == 0
    assert page.locator("#files li").count() == 0
    shown = page.locator(".user img")
    assert shown.count() == 2
    assert shown.first.evaluate("(node) => node.naturalWidth") == 30
    page.reload()  # the conversation is kept with its pictures
    page.locator(".user img").first.wait_for()
    page.locator("text=Edit").click()
    assert page.input_value("#question") == "Which one?"
    assert page.locator("#files img").count() == 2


def test_a_picture_that_is_refused_stays_with_its_question(page: Page, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"bad")
    page.set_input_files("#attach", bad)
    page.locator("#files li").wait_for()
    sent(page, "What is it?")
    assert "unknown format" in page.locator(".error").inner_text()
    assert page.input_value("#question") == "What is it?"
    assert page.locator("#files img").count() == 1


def test_sounds_are_chosen(page: Page, tmp_path: Path) -> None:
    """The part is OpenAI's; this model has no audio tower, and the question stays."""
    path = tmp_path / "clip.wav"
    path.write_bytes(wav(np.zeros(99, np.int16)))
    page.set_input_files("#attach", path)
    page.locator("#files .sound").wait_for()
    sound = {"data": base64.b64encode(path.read_bytes()).decode(), "format": "wav"}
    assert sent(page, "What is said?") == [
        {"type": "input_audio", "input_audio": sound},
        {"type": "text", "text": "What is said?"},
    ]
    assert "this model reads no sound" in page.locator(".error").inner_text()
    assert page.input_value("#question") == "What is said?"
    assert page.locator("#files .sound").count() == 1


def test_videos_are_chosen(page: Page, tmp_path: Path) -> None:
    """The part is vLLM's; this model reads no videos, and the question stays."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(plain())
    page.set_input_files("#attach", path)
    page.locator("#files .video").wait_for()
    data = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    assert sent(page, "What happens?") == [
        {"type": "video_url", "video_url": {"url": data}},
        {"type": "text", "text": "What happens?"},
    ]
    assert "this model reads no video" in page.locator(".error").inner_text()
    assert page.input_value("#question") == "What happens?"
    assert page.locator("#files .video").count() == 1
