"""Decode a video file to the frames that a model sees: the part that a worker process runs.

PyAV (the extra `video`) has FFmpeg's demuxers and decoders in C. Files come from clients: the few
formats and codecs below are read from memory, and none opens another file. The length and the
number of frames are those of the packets that an MP4's edit list, if it has one, shows.
"""

from __future__ import annotations

import errno
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: The longest video, and the most frames in a file: 30 minutes at 60 a second.
MAX_VIDEO_SECONDS = 1800
MAX_FILE_FRAMES = MAX_VIDEO_SECONDS * 60
#: The most pixels of a frame of a file: 4K, 4096 x 2304.
MAX_FRAME_PIXELS = 9_437_184
#: How many times longer one side of a frame may be than the other, as of pictures.
MAX_RATIO = 100
#: The most frames that a model sees, and their pixels together.
MAX_FRAMES = 768
MAX_SAMPLED_PIXELS = 33_554_432
ACCEPTED = "expected MP4, MOV, WebM or Matroska"
#: Names of FFmpeg's decoders: those of cameras, phones and browsers.
CODECS = (
    "av1", "h264", "hevc", "libdav1d", "libvpx", "libvpx-vp9", "mjpeg", "mpeg4", "vp8", "vp9",
)  # fmt: skip
#: The most packets of a file, with those of sounds, for each frame that it may have.
_PACKETS = 8


class BadVideoError(Exception):
    """A file that is no video within the limits; the text continues "the video is"."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which frames of a video a model sees, and how large.

    `fps` a second, at least `min_frames` and at most `max_frames`, a multiple of `group`. Their
    sides are multiples of `factor`; all of them have `min_pixels` to `max_pixels` together, or
    with `each`, every one has. With `frame_pixels`, each frame is scaled to at most so many
    instead, as Gemma 4's pictures are.
    """

    fps: float
    min_frames: int
    max_frames: int
    min_pixels: int
    max_pixels: int
    factor: int
    group: int = 2
    frame_pixels: int = 0
    each: bool = False

    def count(self, total: int, seconds: float) -> int:
        """Return the number of frames to take of `total` in so many seconds."""
        fit = self.max_pixels // (self.frame_pixels or self.factor**2)  # the smallest sides
        if self.each:
            fit = MAX_SAMPLED_PIXELS // self.max_pixels
        wanted = min(
            max(int(round(seconds * self.fps, 6)), self.min_frames), self.max_frames, total, fit
        )
        return max(wanted // self.group * self.group, min(total, self.group))

    def size(self, count: int, height: int, width: int) -> tuple[int, int]:
        """Return height and width of `count` frames, as Qwen's `smart_resize` has it."""
        factor = self.factor
        if self.frame_pixels:
            return self._scaled(height, width)
        count = 1 if self.each else count
        if min(height, width) < factor:
            scale = factor / min(height, width)
            height, width = max(factor, int(height * scale)), max(factor, int(width * scale))
        rows, columns = round(height / factor) * factor, round(width / factor) * factor
        padded = math.ceil(count / self.group) * self.group
        if padded * rows * columns > self.max_pixels:
            scale = math.sqrt(count * height * width / self.max_pixels)
            rows = math.floor(height / scale / factor) * factor
            columns = math.floor(width / scale / factor) * factor
            # A side that is too short takes from the other one.
            most = max(1, self.max_pixels // (padded * factor**2)) * factor
            if not rows:
                rows, columns = factor, max(factor, min(columns, most))
            elif not columns:
                rows, columns = min(rows, most), factor
        elif padded * rows * columns < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (count * height * width))
            rows = math.ceil(height * scale / factor) * factor
            columns = math.ceil(width * scale / factor) * factor
        return rows, columns

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """Return the largest multiples of `factor` that keep the ratio of a frame."""
        factor, most = self.factor, self.frame_pixels // self.factor**2
        scale = math.sqrt(self.frame_pixels / (height * width))
        rows = math.floor(scale * height / factor)
        columns = math.floor(scale * width / factor)
        if not rows:
            rows, columns = 1, min(width // height, most)
        elif not columns:
            rows, columns = min(height // width, most), 1
        return rows * factor, columns * factor


def decode(data: bytes, sampling: Sampling) -> tuple[float, list[float], NDArray[np.uint8]]:
    """Return the length in seconds, the times of the sampled frames from the first, and these.

    Frames are uint8 RGB [frames, height, width, 3], upright. Raises `BadVideoError`.
    """
    import av

    av.logging.set_level(None)
    try:
        seconds, wanted = _sampled(data, sampling)
        return seconds, *_frames(data, wanted, sampling)
    except (BadVideoError, MemoryError):
        raise
    except Exception as error:  # FFmpeg has many kinds for damaged files, and PyAV some more
        if getattr(error, "errno", None) == errno.ENOMEM:
            raise MemoryError from error
        why = getattr(error, "strerror", None) or str(error)
        why = " ".join(str(why).split())[:200] or type(error).__name__
        raise BadVideoError(f"damaged: {why}") from error


def _format(data: bytes) -> str | None:
    """Return the name of FFmpeg's demuxer for a file, by its first bytes."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mp4"
    if data.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    return None


def _refuse(url: str, *_: object) -> Any:
    raise BadVideoError("refused: it refers to another file")


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[Any, Any]]:
    """Open a file and its video stream, whose decoder has the limits."""
    import av

    kind = _format(data)
    if kind is None:
        raise BadVideoError(f"refused: unknown format, {ACCEPTED}")
    # To find the size of frames, opening runs the decoders of all streams, also of other codecs.
    # Frames may be larger than headers say.
    limit = {"max_pixels": str(MAX_FRAME_PIXELS), "codec_whitelist": ",".join(CODECS)}
    with av.open(io.BytesIO(data), format=kind, options=limit, io_open=_refuse) as container:
        if not container.streams.video:
            raise BadVideoError("refused: it has no video stream")
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None or context.codec.name not in CODECS:
            name = "unknown" if context is None else context.codec.name
            raise BadVideoError(
                f"refused: its codec is {name}, expected H.264, HEVC, VP8, VP9, AV1, MPEG-4 or"
                " Motion JPEG"
            )
        _check_size(context.width, context.height)
        if stream.frames > MAX_FILE_FRAMES:
            raise _too_many()
        context.thread_count = 1
        context.options = limit
        yield container, stream


def _check_size(width: int, height: int) -> None:
    if not width or not height:  # FFmpeg has looked for one within `max_pixels`
        raise BadVideoError(f"refused: it has no frame of at most {MAX_FRAME_PIXELS} pixels")
    if width * height > MAX_FRAME_PIXELS:
        raise BadVideoError(
            f"refused: it has {width} x {height} pixels, the limit is {MAX_FRAME_PIXELS}"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadVideoError(
            f"refused: it has {width} x {height} pixels, one side may be {MAX_RATIO} times as long"
            " as the other"
        )


def _too_many() -> BadVideoError:
    return BadVideoError(f"refused: it has more than {MAX_FILE_FRAMES} frames")


def _sampled(data: bytes, sampling: Sampling) -> tuple[float, list[int]]:
    """Return the length, and when the frames to take are shown, in the stream's units.

    Nothing is decoded.
    """
    import numpy as np

    shown: list[int] = []
    found = 0
    with _opened(data) as (container, stream):
        for number, packet in enumerate(container.demux()):
            if number == MAX_FILE_FRAMES * _PACKETS:
                raise _too_many()
            if packet.stream_index != stream.index or not packet.size:
                continue
            found += 1
            if packet.is_discard:  # decoded, but not shown: the edit list leaves it out
                continue
            if len(shown) == MAX_FILE_FRAMES:
                raise _too_many()
            if packet.pts is None:
                raise BadVideoError("damaged: a frame has no time")
            shown.append(packet.pts)
        if not shown:
            raise BadVideoError("damaged: it has no frames")
        # Fragments come without a number. The index lacks what the edit list leaves out.
        listed = len(stream.index_entries) if stream.frames else 0
        if found < listed:
            raise BadVideoError(f"damaged: it ends after {found} of {listed} frames")
        shown = sorted(set(shown))
        seconds = float((shown[-1] - shown[0]) * stream.time_base)
    if seconds > MAX_VIDEO_SECONDS:
        raise BadVideoError(f"refused: it is longer than {MAX_VIDEO_SECONDS} s")
    total = len(shown)
    seconds *= total / max(1, total - 1)  # the last frame is shown, too
    wanted = np.linspace(shown[0], shown[-1], sampling.count(total, seconds))
    places = np.interp(wanted, shown, np.arange(total)).round().astype(int)
    return seconds, [shown[place] for place in places]


def _frames(
    data: bytes, wanted: list[int], sampling: Sampling
) -> tuple[list[float], NDArray[np.uint8]]:
    """Return the frames that are shown at the times `wanted`, or right after one of these."""
    import numpy as np

    made: list[NDArray[np.uint8]] = []
    size = 0, 0
    with _opened(data) as (container, stream):
        unit = stream.time_base  # a fraction: times are those of its nearest floats
        last = None
        for frame in container.decode(stream):
            if frame.pts is None:
                continue
            last = frame
            if wanted[len(made)] <= frame.pts:
                pixels = _upright(frame)
                size = size if made else sampling.size(len(wanted), *pixels.shape[:2])
                pixels = _resized(pixels, size)
                while len(made) < len(wanted) and wanted[len(made)] <= frame.pts:
                    made.append(pixels)
            if len(made) == len(wanted):
                break
        if last is None:
            raise BadVideoError("damaged: no frame can be decoded")
        if len(made) == len(wanted) - 1:  # the last one may be hidden
            pixels = _upright(last)
            size = size if made else sampling.size(len(wanted), *pixels.shape[:2])
            made.append(_resized(pixels, size))
        if len(made) < len(wanted):
            after = float((last.pts - wanted[0]) * unit)
            raise BadVideoError(f"damaged: no frame can be decoded after {after:.1f} s")
    return [float((at - wanted[0]) * unit) for at in wanted], np.stack(made)


def _upright(frame: Any) -> NDArray[np.uint8]:
    """Return the pixels of a frame, rotated as the file says: counterclockwise."""
    import numpy as np

    _check_size(frame.width, frame.height)
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, round(frame.rotation / 90))


def _resized(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a frame of this height and width."""
    import numpy as np
    from PIL import Image

    height, width = size
    if pixels.shape[:2] == size:
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
