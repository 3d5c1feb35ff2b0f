"""Decoding videos: formats, sampled frames and their sizes, and bad files."""

from __future__ import annotations

import importlib.util
import io
import struct
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from modelpack_engine.errors import RequestError
from modelpack_engine.vision.videos import Video
from modelpack_engine.worker import threads
from modelpack_engine.worker.video import (
    MAX_FRAMES,
    MAX_SAMPLED_PIXELS,
    BadVideoError,
    Sampling,
    decode,
)
from modelpack_engine.worker.workers import Workers, shared_workers
from modelpack_server.api.media_urls import MediaUrls
from modelpack_server.conversation import pictures, videos
from modelpack_server.conversation.pictures import PictureFiles
from modelpack_server.conversation.videos import VideoFile
from tests.engine.vision.video_files import (
    BAD_FILES,
    TINY,
    frames,
    growing,
    plain,
    rotated,
    trimmed,
    written,
)

LARGE = Sampling(2.0, 4, 768, 1024, 10**6, 8)


def decoded(data: bytes, sampling: Sampling = TINY) -> Any:
    """Decode in a worker process, as for a request."""
    processor: Any = SimpleNamespace(sampling=sampling)
    with PictureFiles([VideoFile(data, "here")], videos=processor) as files:
        (found,) = (file.decode() for file in files)
        return found


@pytest.mark.parametrize(("name", "make", "message"), BAD_FILES, ids=[b[0] for b in BAD_FILES])
def test_bad_files(name: str, make: Callable[[], bytes], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        decoded(make())
    assert message in str(caught.value)
    assert str(caught.value).startswith("here: the video is ")
    assert caught.value.param == "here"


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "libx264"), ("mp4", "mpeg4"), ("mov", "mjpeg"), ("webm", "libvpx"),
        ("webm", "libvpx-vp9"), ("matroska", "libx264"),
    ],
)  # fmt: skip
def test_formats(container: str, codec: str) -> None:
    """Three seconds at 2 a second are 6 frames, the first and the last of the file among them."""
    seconds, times, found = decode(written(frames(30), container=container, codec=codec), LARGE)
    assert seconds == pytest.approx(3.0)
    assert times == pytest.approx([0.0, 0.6, 1.2, 1.7, 2.3, 2.9])
    assert found.shape == (6, 48, 64, 3)
    assert Video(found, tuple(times), seconds).numbers == [0, 6, 12, 17, 23, 29]
    of_frames = [255 * round(10 * time) / 29 for time in times]
    assert np.abs(found[:, 24, 32, 0] - np.array(of_frames)).max() < 20
    assert found[0, 4, 32, 1] < 60 < 180 < found[0, 44, 32, 1]  # lighter further down


def test_frames_are_those_that_are_decoded() -> None:
    """The pixels are those of PyAV, resized by Pillow."""
    data = written(frames(30), codec="libx264")
    with av.open(io.BytesIO(data)) as container:
        all_of_them = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    _, times, found = decode(data, TINY)
    assert found.shape == (6, 16, 16, 3)
    for time, pixels in zip(times, found, strict=True):
        image = Image.fromarray(all_of_them[round(time * 10)])
        assert (np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)) == pixels).all()


@pytest.mark.parametrize(
    ("count", "rate", "taken"),
    [(1, 10, 1), (2, 10, 2), (3, 10, 2), (5, 10, 4), (12, 10, 4), (35, 10, 6), (40, 10, 8)],
)
def test_the_number_of_frames(count: int, rate: int, taken: int) -> None:
    """At least four, if there are as many, and a multiple of two."""
    _, times, found = decode(written(frames(count), rate), TINY)
    assert len(times) == len(found) == taken


def test_limits_on_frames() -> None:
    _, times, _ = decode(written(frames(60), 2), Sampling(2.0, 4, 16, 64, 10**6, 8))
    assert len(times) == 16
    assert times[-1] == 29.5


@pytest.mark.parametrize("factor", [28, 32])
@pytest.mark.parametrize(
    ("height", "width"), [(32, 3200), (3200, 32), (60, 6000), (28, 28), (112, 11200), (1, 100)]
)
def test_narrow_frames_have_no_more_pixels(factor: int, height: int, width: int) -> None:
    """A side has one patch at least, which the other side makes up for."""
    for most in (MAX_SAMPLED_PIXELS, 2**22, 100 * factor**2, 2 * factor**2):
        sampling = Sampling(2.0, 4, MAX_FRAMES, 1, most, factor)
        count = sampling.count(10_000, 5000.0)
        rows, columns = sampling.size(count, height, width)
        assert rows % factor == columns % factor == count % 2 == 0
        assert 0 < count * rows * columns <= most


def test_variable_rates() -> None:
    """Frames are taken at equal distances in time, not in number: half are in the first second."""
    data = written(frames(40), 20, times=lambda index: index if index < 20 else 4 * index - 60)
    _, times, _ = decode(data, TINY)
    assert len(times) == 8
    assert np.abs(np.diff(times) - 96 / 20 / 7).max() < 0.2


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [((1, 0, 0, 1), 0), ((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],
)
def test_frames_are_upright(matrix: tuple[int, int, int, int], turns: int) -> None:
    """The matrix in the header says how: cameras rotate nothing."""
    _, _, plainly = decode(plain(), LARGE)
    _, _, found = decode(rotated(plain(), matrix), LARGE)
    assert np.array_equal(found, np.rot90(plainly, turns, axes=(1, 2)))


@pytest.mark.parametrize(("start", "seconds"), [(0, 3), (2, 4), (2, 2)])
def test_a_video_that_was_trimmed_shows_what_its_edit_list_has(start: int, seconds: int) -> None:
    """Phones trim videos without encoding them again: the packets stay in the file."""
    data = written(frames(60), codec="libx264", flags="faststart")
    (unit,) = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)
    cut = trimmed(data, start * unit, seconds * 1000)
    length, times, found = decode(cut, LARGE)
    assert length == pytest.approx(seconds)
    assert len(times) == 2 * seconds
    _, _, whole = decode(data, Sampling(10.0, 4, 768, 1024, 10**6, 8))
    for time, pixels in zip(times, found, strict=True):
        assert np.array_equal(pixels, whole[round(10 * (start + time))])
    with pytest.raises(BadVideoError, match="damaged"):
        decode(cut[: len(cut) // 2], LARGE)


def test_a_webm_that_ends_early_shows_what_it_has() -> None:
    """It has no number of frames."""
    data = written(frames(30), container="webm", codec="libvpx")
    seconds, _, _ = decode(data[: len(data) // 2], TINY)
    assert 0 < seconds < 3


def test_a_larger_frame_is_resized() -> None:
    """Only one that is larger than the limit is refused."""
    limit = decode.__globals__["MAX_FRAME_PIXELS"]
    assert limit < 4096 * 2400
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(decode.__globals__, "MAX_FRAME_PIXELS", 4096 * 2400)
        _, _, found = decode(growing(), TINY)
    assert found.shape == (4, 16, 24, 3)


def test_limits_on_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "MAX_VIDEO_BYTES", 1000)
    with pytest.raises(RequestError, match="here: the video has more than 1000 bytes"):
        VideoFile(plain(), "here")
    with pytest.raises(RequestError, match="here: the video is empty"):
        VideoFile(b"", "here")


def test_slow_files_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_DECODE_SECONDS", -0.5)  # no time, with the grace
    large = written([np.zeros((2304, 4096, 3), np.uint8)] * 4, codec="mjpeg", container="mov")
    with pytest.raises(
        RequestError, match=r"here: the video is refused: it took longer than -0\.5"
    ):
        decoded(large, Sampling(2.0, 4, 768, 1024, 10**9, 8))


def test_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose frames take too much fails, and the next one has a new worker."""
    small = Workers(memory=400 * 1024 * 1024, purpose="video")
    monkeypatch.setattr(pictures, "shared_workers", lambda _: small)
    try:
        large = written([np.zeros((2304, 4096, 3), np.uint8)] * 4, codec="mjpeg", container="mov")
        with pytest.raises(RequestError, match="memory"):
            decoded(large, Sampling(2.0, 4, 768, 1024, 10**9, 8))
        assert len(decoded(plain()).frames) == 6
    finally:
        small.close()


def test_pictures_do_not_wait_for_videos() -> None:
    assert shared_workers("video") is not shared_workers("media")


def test_no_more_requests_wait_for_files_than_there_are_threads() -> None:
    """A request that waits takes a thread, of which all are for workers and URLs."""
    workers = [shared_workers(purpose) for purpose in ("render", "media", "video")]
    slots = MediaUrls([])._slots.values()
    waiting = sum(each._waiting + each._count for each in workers)
    waiting += sum(each._most_waiting + each._most for each in slots)
    assert waiting <= threads._threads._max_workers


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "av" else find(name)
    )
    with pytest.raises(RequestError) as caught:
        VideoFile(plain(), "here")
    assert "here: videos need the extra 'video'" in str(caught.value)
    assert "pip install 'modelpack[video]'" in str(caught.value)


def test_nothing_is_opened_but_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats that name other files are not read, and FFmpeg gets no way to open one."""
    given: dict[str, Any] = {}
    opened = av.open

    def watched(*args: Any, **options: Any) -> Any:
        given.update(options)
        return opened(*args, **options)

    monkeypatch.setattr(sys.modules["av"], "open", watched)
    decode(plain(), TINY)
    assert given["format"] == "mp4"
    with pytest.raises(Exception, match="it refers to another file"):
        given["io_open"]("file:///etc/passwd", 1, {})


def test_no_other_decoder_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg decodes frames of a file when it opens this, to learn of their pixels."""
    made: list[Any] = []
    opened, data = av.open, written(frames(4), container="mov", codec="prores_ks")
    with opened(io.BytesIO(data)) as control:
        assert control.streams.video[0].codec_context.pix_fmt == "yuv422p10le"

    def watched(*args: Any, **options: Any) -> Any:
        container = opened(*args, **options)
        made.append(container.streams.video[0].codec_context.pix_fmt)
        return container

    monkeypatch.setattr(sys.modules["av"], "open", watched)
    with pytest.raises(BadVideoError, match="its codec is prores"):
        decode(data, TINY)
    assert made == [None]
