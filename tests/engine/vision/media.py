"""Picture files for tests, good and bad."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from modelpack_engine.vision.processor import Picture


def file_of(picture: Picture, format: str = "PNG", **options: Any) -> bytes:
    """Return a picture as a file."""
    file = io.BytesIO()
    Image.fromarray(picture.pixels).save(file, format, **options)
    return file.getvalue()


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Return a picture of Pillow as a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def url(data: bytes, kind: str = "image/png") -> str:
    """Return a file as a data: URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, pixels: bytes = b"", extra: bytes = b"") -> bytes:
    """Return a PNG of RGB whose header says `width` x `height`, whatever the `pixels` are."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra
        + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    )  # fmt: skip


_PLAIN = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
_NOISE = Image.effect_noise((99, 99), 9)
_GOOD = saved(_PLAIN)
_WEBP = saved(_PLAIN, "WEBP", lossless=True)


def _frames(format: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 120, 240)]
    return saved(frames[0], format, save_all=True, append_images=frames[1:])


def _bad_gif() -> bytes:
    data = saved(_PLAIN, "GIF")
    return data[:-20] + b"\xff" * 18 + data[-2:]


def _large_webp() -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\x3f\0" * 2 + bytes(80)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def slow_jpeg(scans: int = 90) -> bytes:
    """Return an 8K picture with so many scans that decoding takes a second."""
    data = saved(Image.new("L", (7680, 4320)), "JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + data[-2:]


def _with(kind: bytes, body: bytes) -> bytes:
    """Return a good PNG with a chunk."""
    return png(8, 8, b"\0" * 200, chunk(kind, body))


def _header(data: bytes, at: int, value: bytes) -> bytes:
    """Return a file with other bytes at a place."""
    return data[:at] + value + data[at + len(value) :]


def _jpeg_size(value: bytes) -> bytes:
    """Return a JPEG whose header has another height and width."""
    data = saved(_PLAIN, "JPEG")
    return _header(data, data.find(b"\xff\xc0") + 5, value)


def _jpeg_of_12_bits() -> bytes:
    data = saved(_PLAIN, "JPEG")
    return _header(data, data.find(b"\xff\xc0") + 4, b"\x0c")


def _bomb() -> bytes:
    """Return 80 kB that become 80 MB."""
    return zlib.compress(b"a" * 80_000_000)


#: Files that are refused: a name, the file, and a part of the message.
BAD_FILES: list[tuple[str, Callable[[], bytes], str]] = [
    ("empty", lambda: b"", "the picture is empty"),
    ("text", lambda: b"hello, this is no picture", "unknown format, expected PNG"),
    ("html", lambda: b"<html><img src=x></html>", "unknown format"),
    ("svg", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unknown format"),
    ("pdf", lambda: b"%PDF-1.7\n1 0 obj\n", "unknown format"),
    ("zeros", lambda: bytes(1000), "unknown format"),
    ("tiff", lambda: saved(_PLAIN, "TIFF"), "unknown format"),
    ("bmp", lambda: saved(_PLAIN, "BMP"), "unknown format"),
    ("eps", lambda: saved(_PLAIN, "EPS"), "unknown format"),
    ("ico", lambda: saved(_PLAIN, "ICO"), "unknown format"),
    ("only the signature", lambda: _GOOD[:8], "the picture is"),
    ("half a png", lambda: saved(_NOISE)[:2000], "is damaged"),
    ("half a jpeg", lambda: saved(_NOISE, "JPEG")[:900], "is damaged"),
    ("half a webp", lambda: saved(_NOISE, "WEBP", lossless=True)[:2000], "is damaged"),
    ("half a gif", lambda: saved(_PLAIN, "GIF")[:20], "the picture is"),
    ("a wrong checksum", lambda: _GOOD[:20] + b"\xff" + _GOOD[21:], "the picture is"),
    ("wrong pixels", lambda: png(8, 8, b"\x09" * 200), "is damaged"),
    ("too few pixels", lambda: png(64, 64, b"\0" * 100), "is damaged"),
    ("zero width", lambda: png(0, 8), "the picture is"),
    ("zero height", lambda: png(8, 0), "the picture is"),
    ("36 megapixels", lambda: png(6000, 6000), "it has 6000 x 6000 pixels, the limit"),
    ("100 megapixels", lambda: png(10_000, 10_000), "33177600"),
    ("a bomb", lambda: png(60_000, 60_000), "has more than 33177600 pixels"),
    ("one long line", lambda: png(20_000, 1), "16384 a side"),
    ("a line", lambda: saved(Image.new("RGB", (16_384, 1))), "it has 16384 x 1 pixels, one side"),
    ("a column", lambda: saved(Image.new("RGB", (1, 101))), "100 times as long as the other"),
    ("a bomb of text", lambda: _with(b"zTXt", b"Comment\0\0" + _bomb()), "is damaged"),
    ("a bomb of a profile", lambda: _with(b"iCCP", b"a\0\0" + _bomb()), "is damaged"),
    ("a bomb of utf-8", lambda: _with(b"iTXt", b"a\0\1\0\0\0" + _bomb()), "is damaged"),
    ("no data", lambda: _GOOD[:33] + _GOOD[-12:], "is damaged"),
    ("an unknown type of colours", lambda: _header(_GOOD, 25, b"\7"), "unknown format"),
    (
        "half an interlaced png",
        lambda: _header(png(99, 99, b"\0" * 99), 28, b"\1"),
        "the picture is",
    ),
    ("half a cmyk jpeg", lambda: saved(_PLAIN.convert("CMYK"), "JPEG")[:300], "is damaged"),
    ("a jpeg of no height", lambda: _jpeg_size(b"\0\0"), "unknown format"),
    ("a jpeg of 4 gigapixels", lambda: _jpeg_size(b"\xff\xff\xff\xff"), "33177600 pixels"),
    ("a jpeg without an end", lambda: saved(_PLAIN, "JPEG")[:-2], "is damaged"),
    ("a jpeg of 12 bits", _jpeg_of_12_bits, "unknown format"),
    ("a jpeg of many scans", lambda: slow_jpeg(101), "more than 100 scans"),
    ("a gif of 4 gigapixels", lambda: _header(saved(_PLAIN, "GIF"), 6, b"\xff" * 4), "33177600"),
    ("a gif without a frame", lambda: saved(_PLAIN, "GIF")[:13] + b";", "unknown format"),
    ("wrong codes of a gif", _bad_gif, "is damaged"),
    ("a webp of 16384 pixels a side", _large_webp, "33177600"),
    ("a webp of a wrong size", lambda: _header(_WEBP, 4, b"\xff\xff\xff\x7f"), "is damaged"),
    ("jpeg 2000", lambda: saved(_PLAIN, "JPEG2000"), "unknown format"),
    ("heic", lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "unknown format"),
    ("a video", lambda: b"\0\0\0\x18ftypisom" + bytes(99), "unknown format"),
    ("a sound", lambda: b"RIFF\x24\0\0\0WAVEfmt " + bytes(99), "unknown format"),
    ("an archive", lambda: b"PK\3\4" + bytes(99), "unknown format"),
    ("an animated gif", lambda: _frames("GIF"), "it is animated"),
    ("an animated webp", lambda: _frames("WEBP"), "it is animated"),
    ("an animated png", lambda: _frames("PNG"), "it is animated"),
]

#: URLs and values in place of a URL that are refused, with a part of the message.
BAD_URLS: list[tuple[Any, str]] = [
    (
        "http://127.0.0.1/a.png",
        "not fetched from the network: the server was started without --allow",
    ),
    ("https://example.com/a.png", "not fetched from the network"),
    ("HTTP://169.254.169.254/latest/meta-data/", "not fetched from the network"),
    ("file:///etc/passwd", "is not a data: URL"),
    ("ftp://example.com/a.png", "is not a data: URL"),
    ("/etc/passwd", "is not a data: URL"),
    ("gopher://localhost:70/", "is not a data: URL"),
    ("data:image/png,abc", "the data: URL has no base64"),
    ("data:image/png;base64", "the data: URL has no base64"),
    ("data:", "the data: URL has no base64"),
    ("data:text/plain;base64,aGk=", "'text/plain' is not a picture"),
    ("data:application/pdf;base64,aGk=", "'application/pdf' is not a picture"),
    ("data:image/png;base64,a", "the base64 is not valid"),
    ("data:image/png;base64,a!b=", "the base64 is not valid"),
    ("data:image/png;base64,", "the picture is empty"),
    ("", "is not a string"),
    (None, "is not a string"),
    (7, "is not a string"),
    (["data:"], "is not a string"),
]
