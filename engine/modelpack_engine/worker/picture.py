"""Decode a picture file to pixels, within limits: the part that a worker process runs.

Files come from clients. Some that are small take minutes or gigabytes to decode, so the process
that decodes them has limits of its own (`Workers`); the limits here give better messages.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

MAX_PIXELS = 33_177_600  # of one picture: 8K, 7680 x 4320
MAX_SIDE = 16_384
#: The formats that OpenAI's and Anthropic's APIs take.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
ACCEPTED = "expected PNG, JPEG, WebP or GIF"


class BadPictureError(Exception):
    """A file that is no picture within the limits; the text continues "the picture is"."""


def decode(data: bytes) -> tuple[int, int, bytes]:
    """Return width, height and the pixels of a file, RGB of 8 bits, upright.

    Raises `BadPictureError`.
    """
    from PIL import Image, UnidentifiedImageError

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
    try:
        if getattr(image, "is_animated", False):
            raise BadPictureError("refused: it is animated; send one frame")
        return _upright(image)
    except (BadPictureError, MemoryError):
        raise
    except Exception as error:
        raise _damaged(error) from error


def _upright(image: Any) -> tuple[int, int, bytes]:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    # The byte of 16 bits of grey that is kept; Pillow would cut them off at 255.
    step = {"I;16": 2, "I;16L": 2, "I": 4}.get(image.mode)
    if step is not None:
        image = Image.frombytes("L", image.size, image.tobytes()[1::step])
    elif image.mode == "I;16B":
        image = Image.frombytes("L", image.size, image.tobytes()[::2])
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return (*rgb.size, rgb.tobytes())


def _damaged(error: Exception) -> BadPictureError:
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return BadPictureError(f"damaged: {why}")
