"""Decoding pictures: good files of every kind, and at least 25 bad ones."""

from __future__ import annotations

import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modelpack_engine.errors import RequestError
from modelpack_engine.worker.workers import Workers
from modelpack_server.conversation import pictures
from modelpack_server.conversation.pictures import (
    PictureFile,
    PictureFiles,
    PictureReader,
    take_pictures,
)
from tests.engine.vision import media
from tests.engine.vision.media import BAD_FILES, BAD_URLS, file_of, saved, slow_jpeg, url
from tests.engine.vision.tiny import picture
from tests.engine.worker.test_workers import until

GRADIENT = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(6, 8, 3)


def pixels_of(part: dict[str, Any]) -> np.ndarray:
    with PictureFiles([part["picture"]]) as files:
        [found] = files
    return found.pixels


def decoded(data: bytes) -> np.ndarray:
    return pixels_of(PictureReader().url(url(data), "here"))


@pytest.mark.parametrize(("name", "make", "message"), BAD_FILES, ids=[b[0] for b in BAD_FILES])
def test_bad_files(name: str, make: Callable[[], bytes], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        decoded(make())
    assert message in str(caught.value)
    assert str(caught.value).startswith("here: ")
    assert caught.value.param == "here"


@pytest.mark.parametrize(("given", "message"), BAD_URLS)
def test_bad_urls(given: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        PictureReader().url(given, "here")
    assert message in str(caught.value)
    assert caught.value.param == "here"


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP"])
def test_lossless_formats(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    flat = np.zeros((6, 8, 3), np.uint8) + np.array([10, 200, 30], np.uint8)
    assert np.array_equal(decoded(saved(Image.fromarray(flat), format, **options)), flat)


def test_a_jpeg() -> None:
    found = decoded(file_of(picture(1), "JPEG", quality=95))
    assert found.shape == (20, 30, 3)
    assert np.abs(found.astype(int) - picture(1).pixels).mean() < 20


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_modes(mode: str) -> None:
    image = Image.fromarray(GRADIENT).convert(mode)
    data = saved(image, "JPEG" if mode == "CMYK" else "PNG")
    found = decoded(data)
    assert (found.shape, found.dtype) == ((6, 8, 3), np.uint8)


def test_transparency_is_dropped_as_by_mlx_vlm() -> None:
    image = Image.fromarray(np.dstack([GRADIENT, np.zeros((6, 8), np.uint8)]))
    assert np.array_equal(decoded(saved(image)), GRADIENT)


def test_grey_of_16_bits() -> None:
    grey = np.array([[0, 255], [256, 65535]], np.uint16)
    found = decoded(saved(Image.fromarray(grey)))
    assert found[..., 0].tolist() == [[0, 0], [1, 255]]


def test_rotation_in_exif() -> None:
    image = Image.fromarray(GRADIENT)
    exif = image.getexif()
    exif[0x0112] = 6  # the top is at the right
    assert np.array_equal(decoded(saved(image, exif=exif)), np.rot90(GRADIENT, -1))


def test_data_urls_are_read_loosely() -> None:
    data = saved(Image.fromarray(GRADIENT))
    text = base64.b64encode(data).decode()
    for given in (
        f"data:;base64,{text}", f"DATA:IMAGE/PNG;BASE64,{text}",
        f"data:image/jpeg;name=a.png;base64,{text}",
        f"data:image/png;base64,{text[:20]}\n{text[20:]}",
        "data:image/png;base64," + text.replace("+", "%2B").replace("=", "%3D"),
    ):  # fmt: skip
        assert np.array_equal(pixels_of(PictureReader().url(given, "here")), GRADIENT)


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_BYTES", 100)
    reader = PictureReader()
    with pytest.raises(RequestError, match="more than 100 bytes"):
        reader.base64(base64.b64encode(bytes(101)).decode(), "here")
    with pytest.raises(RequestError, match="more than 100 bytes"):
        reader.base64("A" * 1000, "here")
    reader = PictureReader()
    for _ in range(pictures.MAX_PICTURES):
        reader.base64("aGk=", "here")
    with pytest.raises(RequestError, match="more than 32 pictures"):
        reader.base64("aGk=", "here")


def test_only_one_picture_is_decoded_at_a_time() -> None:
    """The second file is bad, and decoded only after the first was taken."""
    good = PictureFile(saved(Image.fromarray(GRADIENT)), "first")
    both = iter(pictures.PictureFiles([good, PictureFile(b"bad", "second")]))
    assert np.array_equal(next(both).pixels, GRADIENT)
    with pytest.raises(RequestError, match="second: the picture"):
        next(both)


def test_pictures_leave_the_messages() -> None:
    part = PictureReader().base64("aGk=", "here")
    text = {"type": "text", "text": "what?"}
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": [part, text]}]
    changed, files = take_pictures(messages, None)
    assert changed[1]["content"] == [{"type": "image"}, text]
    assert files == [part["picture"]]
    changed, _ = take_pictures(messages, "<image>")
    assert [message["content"] for message in changed] == ["hi", "<image>what?"]
    assert messages[1]["content"] == [part, text]


def test_data_urls_for_other_servers() -> None:
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        file = PictureFile(saved(Image.fromarray(GRADIENT), kind), "here")
        assert file.data_url == media.url(file.data, f"image/{kind.lower()}")


def _comments_of_gif(count: int) -> bytes:
    data = saved(Image.new("P", (8, 8)), "GIF")
    start = 13 + 3 * (2 << (data[10] & 7))  # after the header and the table of colours
    return data[:start] + b"\x21\xfe\x01a\x00" * count + data[start:]


#: Files within all limits on bytes and pixels that take Pillow seconds or minutes.
SLOW_FILES: dict[str, Callable[[], bytes]] = {
    "chunks of png": lambda: media.png(8, 8, b"\0" * 200, media.chunk(b"abCd", b"") * 1_500_000),
    "comments of gif": lambda: _comments_of_gif(4_000_000),
    "comments of jpeg": lambda: JPEG[:2] + b"\xff\xfe\x00\x03a" * 4_000_000 + JPEG[2:],
    "padding of jpeg": lambda: JPEG[:2] + b"\xff" * 20_000_000 + JPEG[2:],
    "scans of jpeg": slow_jpeg,
}
JPEG = saved(Image.new("RGB", (8, 8)), "JPEG")


@pytest.mark.parametrize("name", SLOW_FILES)
def test_slow_files_are_given_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_SECONDS", 0.2)
    data = SLOW_FILES[name]()
    assert len(data) <= pictures.MAX_BYTES
    with pytest.raises(RequestError, match=r"here: the picture is refused: .* longer than 0.2 s"):
        decoded(data)
    monkeypatch.undo()
    assert decoded(saved(Image.fromarray(GRADIENT))).shape == GRADIENT.shape


def test_the_pictures_of_a_request_have_a_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_SECONDS_ALL", 1e-9)
    good = saved(Image.fromarray(GRADIENT))
    files = [PictureFile(good, "first"), PictureFile(good, "second")]
    monkeypatch.setattr(pictures, "MAX_SECONDS", 10.0)
    with (
        PictureFiles(files) as reading,
        pytest.raises(RequestError, match="take longer than 1e-09 s"),
    ):
        list(reading)


def test_one_owner_leaves_a_worker_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pictures wait for each other, however many requests they are in."""
    monkeypatch.setattr(pictures, "MAX_SECONDS", 60.0)
    workers = Workers(memory=2 << 30, purpose="picture")
    monkeypatch.setattr(pictures, "shared_workers", lambda _: workers)
    slow, good = PictureFile(slow_jpeg(), "slow"), saved(Image.fromarray(GRADIENT))

    def read(owner: bytes, file: PictureFile) -> int:
        with PictureFiles([file], owner) as files:
            return len(list(files))

    with ThreadPoolExecutor(4) as threads:
        try:
            waiting = [threads.submit(read, b"a", slow) for _ in range(3)]
            until(lambda: any(workers._busy.values()) and workers._waiters == 2)
            assert read(b"b", PictureFile(good, "good")) == 1
            assert list(workers._busy) == [b"a".hex()]
        finally:
            until(lambda: workers.close() or all(future.done() for future in waiting))
    for future in waiting:
        with pytest.raises(RequestError, match="slow: the picture is refused: its worker"):
            future.result()


def test_a_worker_is_free_after_a_picture_that_fails() -> None:
    good = PictureFile(saved(Image.fromarray(GRADIENT)), "good")

    def read() -> None:
        with PictureFiles([good]) as files:
            for _ in files:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        read()
    assert caught.value.__traceback__ is not None  # which holds on to the iteration
    assert not pictures.shared_workers("picture")._busy
