"""Decode a picture file to pixels, within limits: the part that a worker process runs.

Files come from clients. Some that are small take minutes or gigabytes to decode, so the process
that decodes them has limits of its own (`Workers`); the limits here give better messages.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

MAX_PIXELS = 33_177_600  # of one picture: 8K, 7680 x 4320
MAX_SIDE = 16_384
#: How many times longer one side may be than the other. Processors that scale the shorter side to
#: some hundred pixels would make gigabytes of a line of pixels.
MAX_RATIO = 100
#: The formats that OpenAI's and Anthropic's APIs take.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
#: The most chunks, segments and blocks of a file, which Pillow reads one by one, and scans of a
#: JPEG. An encoder writes some hundreds, or one for each 255 bytes of a GIF.
MAX_PARTS = 100_000
MAX_SCANS = 100
ACCEPTED = "expected PNG, JPEG, WebP or GIF"


class BadPictureError(Exception):
    """A file that is no picture within the limits; the text continues "the picture is"."""


def decode(data: bytes, max_side: int | None = None) -> tuple[int, int, bytes]:
    """Return width, height and the pixels of a file, RGB of 8 bits, upright.

    A picture with more than `max_side` pixels on its longer side is made smaller. Raises
    `BadPictureError`.
    """
    from PIL import Image, UnidentifiedImageError

    _check_parts(data)
    warnings.simplefilter("ignore")  # Pillow warns of each damaged piece of metadata
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
    except Image.DecompressionBombError:
        raise BadPictureError(f"refused: it has more than {MAX_PIXELS} pixels") from None
    except UnidentifiedImageError:
        raise BadPictureError(f"refused: unknown format, {ACCEPTED}") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise _damaged(error) from error
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadPictureError(
            f"refused: it has {width} x {height} pixels, the limit is {MAX_PIXELS} pixels and"
            f" {MAX_SIDE} a side"
        )
    if not width or not height:
        raise BadPictureError(f"refused: it has {width} x {height} pixels")
    check_ratio(width, height)
    try:
        # Cameras add previews and maps of brightness to a JPEG (MPO); the picture is the first.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise BadPictureError("refused: it is animated; send one frame")
        return _upright(image, max_side)
    except (BadPictureError, MemoryError):
        raise
    except Exception as error:
        raise _damaged(error) from error


def check_ratio(width: float, height: float) -> None:
    """Raise `BadPictureError` for a picture or a page that is all too long."""
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadPictureError(
            f"refused: it has {width:g} x {height:g} pixels, one side may be {MAX_RATIO} times as"
            " long as the other"
        )


def _check_parts(data: bytes) -> None:
    """Refuse a file of so many parts that reading them, in Python, takes seconds."""
    if data.startswith(b"\xff\xd8"):
        parts = _jpeg_parts(data)
        if data.count(b"\xff\xda") > MAX_SCANS:  # the data of a scan has no markers
            raise BadPictureError(f"refused: it has more than {MAX_SCANS} scans")
    elif data.startswith(b"\x89PNG"):
        parts = _png_parts(data)
    elif data.startswith(b"GIF8"):
        parts = _gif_parts(data)
    else:
        return
    with suppress(IndexError):  # a damaged file, of which Pillow says more
        if next(islice(parts, MAX_PARTS, None), None) is not None:
            raise BadPictureError(f"refused: it has more than {MAX_PARTS} parts")


def _png_parts(data: bytes) -> Iterator[int]:
    """Yield the end of each chunk."""
    at = 8
    while at < len(data):
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        yield at


def _jpeg_parts(data: bytes) -> Iterator[int]:
    """Yield the end of each segment before the first scan, and of each byte between them."""
    at = 2
    while data[at : at + 2] != b"\xff\xda" and at < len(data):
        if data[at] != 0xFF or data[at + 1] in (0x00, 0xFF):
            at += 1
        elif 0xD0 <= data[at + 1] <= 0xD9:  # markers without a segment
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield at


def _gif_parts(data: bytes) -> Iterator[int]:
    """Yield the end of each block within extensions and images, and of each byte between them."""
    at = 13 + _gif_colours(data[10])
    while at < len(data):
        kind = data[at]
        at += 1
        if kind == 0x2C:  # an image: its place and colours, and the size of its codes
            at += 10 + _gif_colours(data[at + 8])
        elif kind == 0x21:  # an extension and its kind
            at += 1
        else:
            yield at
            continue
        while data[at]:
            at += 1 + data[at]
            yield at
        at += 1
        yield at


def _gif_colours(flags: int) -> int:
    """Return the bytes of a table of colours."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _upright(image: Any, max_side: int | None) -> tuple[int, int, bytes]:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    # The byte of 16 bits of grey that is kept; Pillow would cut them off at 255.
    step = {"I;16": 2, "I;16L": 2, "I": 4}.get(image.mode)
    if step is not None:
        image = Image.frombytes("L", image.size, image.tobytes()[1::step])
    elif image.mode == "I;16B":
        image = Image.frombytes("L", image.size, image.tobytes()[::2])
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if max_side is not None:
        rgb.thumbnail((max_side, max_side))
    return (*rgb.size, rgb.tobytes())


def _damaged(error: Exception) -> BadPictureError:
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return BadPictureError(f"damaged: {why}")
