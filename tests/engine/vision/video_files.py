"""Video files for tests, good and bad, written by PyAV."""

from __future__ import annotations

import io
import struct
import tempfile
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from modelpack_engine.worker.video import Sampling

#: What the tiny models of `tiny` sample.
TINY = Sampling(2.0, 4, 768, 1024, 2048, 8)

_PIXELS = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}


def frames(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Return pictures that change slowly from one corner to another."""
    y, x = np.mgrid[:height, :width]
    made = []
    for index in range(count):
        red = 255 * index / max(1, count - 1)
        colours = [np.full_like(x, red), 255 * y / height, 255 * x / width]
        made.append(np.stack(colours, -1).astype(np.uint8))
    return made


def written(
    pictures: Iterable[np.ndarray],
    rate: int = 10,
    *,
    container: str = "mp4",
    codec: str = "mpeg4",
    times: Callable[[int], int] | None = None,
    flags: str = "",
) -> bytes:
    """Return a video of pictures; `times` are those of each in 1/`rate` s."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "video"
        options = {"movflags": flags} if flags else {}
        with av.open(str(path), "w", format=container, options=options) as target:
            stream: Any = target.add_stream(codec, rate=rate)
            stream.pix_fmt = _PIXELS.get(codec, "yuv420p")
            for index, pixels in enumerate(pictures):
                if not index:
                    stream.height, stream.width = pixels.shape[:2]
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                if times is not None:
                    frame.pts = times(index)
                target.mux(stream.encode(frame))
            target.mux(stream.encode())
        return path.read_bytes()


def sound_alone() -> bytes:
    """Return an MP4 of a second of silence."""
    made = io.BytesIO()
    with av.open(made, "w", format="mp4") as target:
        stream: Any = target.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), "fltp", "mono")
        frame.sample_rate = 16_000
        target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return made.getvalue()


def growing() -> bytes:
    """Return a video whose second frame is larger than its header says, and than the limit."""
    made = io.BytesIO()
    with av.open(made, "w", format="matroska") as target:
        stream: Any = target.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
        for pixels in frames(4):
            target.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        picture = io.BytesIO()
        Image.new("RGB", (4096, 2400)).save(picture, "JPEG")
        packet = av.Packet(picture.getvalue())
        packet.stream, packet.pts, packet.dts = stream, 4, 4
        packet.time_base = Fraction(1, 10)
        target.mux(packet)
    return made.getvalue()


def rotated(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """Return an MP4 with another matrix (a, b, c, d) in the header of its track."""
    at = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


def _with(data: bytes, box: bytes, offset: int, number: int) -> bytes:
    """Return an MP4 with another number of 4 bytes at an offset from the name of a box."""
    at = data.index(box) + offset
    return data[:at] + struct.pack(">I", number) + data[at + 4 :]


def trimmed(data: bytes, start: int, duration: int) -> bytes:
    """Return an MP4 whose edit list shows so many ms of the video, from `start` (its units)."""
    at = data.index(b"elst") + 12
    (first,) = struct.unpack_from(">i", data, at + 4)
    return data[:at] + struct.pack(">Ii", duration, first + start) + data[at + 8 :]


def noise_within(data: bytes) -> bytes:
    """Return an MP4 with bytes of its frames replaced by noise."""
    random, changed = np.random.default_rng(0), bytearray(data)
    for at in random.integers(data.index(b"mdat") + 60, data.index(b"moov") - 8, 200):
        changed[at] = random.integers(256)
    return bytes(changed)


def plain() -> bytes:
    """Return a video of three seconds."""
    return written(frames(30))


#: Files that are refused, with a part of the message.
BAD_FILES: list[tuple[str, Callable[[], bytes], str]] = [
    ("text", lambda: b"hello", "unknown format, expected MP4, MOV, WebM or Matroska"),
    ("zeros", lambda: bytes(1000), "unknown format"),
    ("a gif", lambda: b"GIF89a" + bytes(99), "unknown format"),
    ("a sound", lambda: b"RIFF\x24\0\0\0WAVEfmt " + bytes(99), "unknown format"),
    ("avi", lambda: written(frames(4), container="avi"), "unknown format"),
    ("a transport stream", lambda: written(frames(4), container="mpegts"), "unknown format"),
    ("a playlist", lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "unknown format"),
    ("a list of files", lambda: b"ffconcat version 1.0\nfile /etc/passwd\n", "unknown format"),
    ("only the signature", lambda: b"\0\0\0\x18ftypisom" + bytes(99), "is damaged"),
    ("only the signature of webm", lambda: b"\x1aE\xdf\xa3" + bytes(99), "is damaged"),
    ("without its index", lambda: plain()[: plain().index(b"moov") - 4], "is damaged"),
    (
        "half of its frames",
        lambda: (data := written(frames(30), flags="faststart"))[: len(data) * 3 // 4],
        "is damaged: it ends after",
    ),
    ("the head of a webm", lambda: written(frames(4), container="webm", codec="libvpx")[:200],
     "is damaged"),
    ("noise", lambda: noise_within(written(frames(30), codec="libx264")), "is damaged"),
    ("a sound alone", sound_alone, "it has no video stream"),
    (
        "no frames",
        lambda: written(frames(1), flags="empty_moov+frag_keyframe").partition(b"moof")[0][:-4],
        "refused: it has no frame of at most 9437184 pixels",
    ),
    ("a million frames", lambda: _with(plain(), b"stts", 12, 10**6), "more than 108000 frames"),
    ("a million sizes", lambda: _with(plain(), b"stsz", 12, 10**6), "is damaged"),
    ("four billion frames", lambda: _with(plain(), b"stts", 12, 2**32 - 1), "the video is"),
    ("another codec", lambda: written(frames(4), container="matroska", codec="ffv1"),
     "its codec is ffv1, expected H.264"),
    ("an old codec", lambda: written(frames(4), 25, container="mov", codec="mpeg2video"),
     "its codec is mpeg2video"),
    ("half an hour", lambda: written(frames(3), 1, times=lambda index: index * 901),
     "it is longer than 1800 s"),
    (
        "larger than 4K",
        lambda: written([np.zeros((2400, 4096, 3), np.uint8)], container="mov", codec="mjpeg"),
        "it has no frame of at most 9437184 pixels",
    ),
    ("frames that grow", growing, "is damaged"),
    (
        "a line",
        lambda: written([np.zeros((16, 2048, 3), np.uint8)], container="mov", codec="mjpeg"),
        "it has 2048 x 16 pixels, one side may be 100 times as long as the other",
    ),
]  # fmt: skip
