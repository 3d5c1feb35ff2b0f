"""Decoding pictures: good files of every kind, and at least 25 bad ones."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
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
from tests.engine.vision.test_documents import page
from tests.engine.vision.tiny import picture
from tests.engine.worker.test_workers import until

GRADIENT = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(6, 8, 3)


def pixels_of(part: dict[str, Any]) -> np.ndarray:
    with PictureFiles([part["picture"]]) as files:
        [found] = (file.decode() for file in files)
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


def test_colours_of_cmyk() -> None:
    """Red, green, blue and black, as inks that are subtracted from white."""
    inks = np.array([[[0, 255, 255, 0], [255, 0, 255, 0]], [[255, 255, 0, 0], [0, 0, 0, 255]]])
    inks = np.repeat(np.repeat(inks, 16, 0), 16, 1).astype(np.uint8)  # no block of JPEG has two
    found = decoded(saved(Image.fromarray(inks, "CMYK"), "JPEG", quality=95))[8::16, 8::16]
    colours = [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 0]]]
    assert np.abs(found.astype(int) - colours).max() <= 3


def test_transparency_is_dropped_as_by_mlx_vlm() -> None:
    image = Image.fromarray(np.dstack([GRADIENT, np.zeros((6, 8), np.uint8)]))
    assert np.array_equal(decoded(saved(image)), GRADIENT)


def test_grey_of_16_bits() -> None:
    grey = np.array([[0, 255], [256, 65535]], np.uint16)
    found = decoded(saved(Image.fromarray(grey)))
    assert found[..., 0].tolist() == [[0, 0], [1, 255]]


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, GRADIENT), (2, GRADIENT[:, ::-1]), (3, GRADIENT[::-1, ::-1]), (4, GRADIENT[::-1]),
        (5, GRADIENT.swapaxes(0, 1)), (6, np.rot90(GRADIENT, -1)),
        (7, GRADIENT[::-1, ::-1].swapaxes(0, 1)), (8, np.rot90(GRADIENT)), (9, GRADIENT),
    ],
)  # fmt: skip
def test_rotation_in_exif(orientation: int, turned: np.ndarray) -> None:
    image = Image.fromarray(GRADIENT)
    exif = image.getexif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(saved(image, exif=exif)), turned)


@pytest.mark.parametrize("exif", [
    b"Exif\0\0" + b"\xff" * 200, b"Exif\0\0II*\0", b"Exif\0\0MM\0*\xff\xff\xff\xff",
    b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\xff\xff\xff\xff\6\0\0\0" * 100,
])  # fmt: skip
def test_damaged_exif_is_left_out(exif: bytes) -> None:
    data = saved(Image.fromarray(GRADIENT), "JPEG", exif=exif)
    assert decoded(data).shape == GRADIENT.shape


def test_photos_of_cameras_with_a_preview() -> None:
    """JPEGs with more pictures (MPO): phones add maps of brightness to photos."""
    image, preview = Image.fromarray(GRADIENT), Image.new("RGB", (4, 4))
    data = saved(image, "MPO", save_all=True, append_images=[preview])
    assert data[:2] == b"\xff\xd8"
    assert decoded(data).shape == GRADIENT.shape


def test_colours_of_16_bits() -> None:
    """The upper 8 are kept."""
    rows = b"".join(b"\0" + bytes([10, 99, 20, 99, 30, 99]) * 8 for _ in range(8))
    data = media.png(8, 8, rows)
    header = b"IHDR" + data[16:24] + b"\x10" + data[25:29]
    deep = data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]
    assert decoded(deep)[0, 0].tolist() == [10, 20, 30]


def test_data_urls_are_read_loosely() -> None:
    data = saved(Image.fromarray(GRADIENT))
    text = base64.b64encode(data).decode()
    for given in (
        f"data:;base64,{text}", f"DATA:IMAGE/PNG;BASE64,{text}",
        f"data:image/jpeg;name=a.png;base64,{text}",
        f"data:image/png;base64,{text[:20]}\n{text[20:]}",
        f"data:image/png;base64, {text[:20]}\r\n\u00a0{text[20:]}\n",
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
    assert np.array_equal(next(both).decode().pixels, GRADIENT)
    with pytest.raises(RequestError, match="second: the picture"):
        next(both).decode()


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
    return _with_blocks(b"\x21\xfe\x01a\x00" * count)


def _comment_of_gif(count: int) -> bytes:
    return _with_blocks(b"\x21\xfe" + b"\x01a" * count + b"\x00")


def _with_blocks(blocks: bytes) -> bytes:
    data = saved(Image.new("P", (8, 8)), "GIF")
    start = 13 + 3 * (2 << (data[10] & 7))  # after the header and the table of colours
    return data[:start] + blocks + data[start:]


#: Files within the limits on bytes and pixels whose metadata took Pillow 2 to 10 s.
MANY_PARTS: dict[str, Callable[[], bytes]] = {
    "chunks of png": lambda: media.png(8, 8, b"\0" * 200, media.chunk(b"abCd", b"") * 1_500_000),
    "texts of png": lambda: media.png(8, 8, b"\0" * 200, media.chunk(b"tEXt", b"k\0v") * 500_000),
    "comments of gif": lambda: _comments_of_gif(4_000_000),
    "blocks of a comment of gif": lambda: _comment_of_gif(9_000_000),
    "comments of jpeg": lambda: JPEG[:2] + b"\xff\xfe\x00\x03a" * 4_000_000 + JPEG[2:],
    "padding of jpeg": lambda: JPEG[:2] + b"\xff" * 20_000_000 + JPEG[2:],
    "junk in jpeg": lambda: JPEG[:2] + bytes(20_000_000) + JPEG[2:],
}
JPEG = saved(Image.new("RGB", (8, 8)), "JPEG")


@pytest.mark.parametrize("name", MANY_PARTS)
def test_files_of_many_parts_are_refused(name: str) -> None:
    data = MANY_PARTS[name]()
    assert len(data) <= pictures.MAX_BYTES
    with pytest.raises(RequestError, match=r"here: the picture is refused: .* 100000 parts"):
        pixels_of(PictureReader().file(data, "here"))


def test_large_files_have_few_parts() -> None:
    """None of noise, whose files have the most bytes, is refused."""
    noise = Image.effect_noise((1500, 1000), 99)
    kinds: dict[str, dict[str, Any]] = {
        "PNG": {"compress_level": 1}, "GIF": {}, "JPEG": {"progressive": True}
    }  # fmt: skip
    for kind, options in kinds.items():
        data = saved(noise, kind, **options)
        assert pixels_of(PictureReader().file(data, "here")).shape == (1000, 1500, 3)


@pytest.mark.long
def test_slow_files_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_SECONDS", 0.1)
    with pytest.raises(RequestError, match=r"here: the picture is refused: .* longer than 0.1 s"):
        decoded(slow_jpeg())
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
        next(iter(reading)).decode()


def test_time_between_pictures_is_not_that_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model may encode a picture for minutes before the next is decoded."""
    now = [0.0]
    monkeypatch.setattr(pictures, "time", SimpleNamespace(monotonic=lambda: now[0]))
    file = PictureFile(saved(Image.fromarray(GRADIENT)), "here")
    with PictureFiles([file, file]) as reading:
        for each in reading:
            each.decode()
            now[0] += 2 * pictures.MAX_SECONDS_ALL


def test_one_owner_leaves_a_worker_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pictures wait for each other, however many requests they are in."""
    monkeypatch.setattr(pictures, "MAX_SECONDS", 60.0)
    workers = Workers(memory=2 << 30, purpose="media")
    monkeypatch.setattr(pictures, "shared_workers", lambda _: workers)
    slow = PictureFile(page("0 0 700 700", b"0 0 700 700 re f* " * 100_000), "slow", page=0)
    good = saved(Image.fromarray(GRADIENT))

    def read(owner: bytes, file: PictureFile) -> int:
        with PictureFiles([file], owner) as files:
            return len([each.decode() for each in files])

    with ThreadPoolExecutor(4) as threads:
        try:
            waiting = [threads.submit(read, b"a", slow) for _ in range(3)]
            until(lambda: any(workers._busy.values()) and workers._waiters == 2)
            assert read(b"b", PictureFile(good, "good")) == 1
            assert list(workers._busy) == [b"a".hex()]
        finally:
            until(lambda: workers.close() or all(future.done() for future in waiting))
    for future in waiting:
        with pytest.raises(RequestError, match="slow: page 1 is refused: its worker"):
            future.result()


def test_a_worker_is_free_after_a_picture_that_fails() -> None:
    good = PictureFile(saved(Image.fromarray(GRADIENT)), "good")

    def read() -> None:
        with PictureFiles([good]) as files:
            for each in files:
                each.decode()
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        read()
    assert caught.value.__traceback__ is not None  # which holds on to the iteration
    assert not pictures.shared_workers("media")._busy
