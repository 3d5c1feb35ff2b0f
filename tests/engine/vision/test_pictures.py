"""Decoding pictures: good files of every kind, and at least 25 bad ones."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modelpack_engine.errors import RequestError
from modelpack_server.conversation import pictures
from modelpack_server.conversation.pictures import PictureFile, PictureReader, take_pictures
from tests.engine.vision import media
from tests.engine.vision.media import BAD_FILES, BAD_URLS, file_of, saved, url
from tests.engine.vision.tiny import picture

GRADIENT = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(6, 8, 3)


def decoded(data: bytes) -> np.ndarray:
    part = PictureReader().url(url(data), "here")
    return part["picture"].decode().pixels


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
        part = PictureReader().url(given, "here")
        assert np.array_equal(part["picture"].decode().pixels, GRADIENT)


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
