"""VideoProcessor: from the sampled frames of videos to their tokens, and encoder inputs.

The worker process samples and resizes frames, as `VideoProcessor.sampling` says. A video becomes
one `Media` for each group of frames that the tower joins (two): towers of Qwen-VL attend within a
group only, so a step encodes as few of them as it has time for. `VIDEO_CLASSES` says what each
type of model needs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.request import Media
from modelpack_engine.vision.models import CLASSES, Encode
from modelpack_engine.worker.video import MAX_FRAMES, MAX_SAMPLED_PIXELS, Sampling

#: The most frames a second that a video_preprocessor_config.json may ask for.
_MAX_FPS = 60


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """Sampled frames of a decoded video: RGB, uint8 [frames, height, width, 3].

    `times` are their seconds from the first one, `seconds` is the length of the whole video.
    `param` names it in errors.
    """

    frames: NDArray[np.uint8]
    times: tuple[float, ...]
    seconds: float
    param: str = "messages"


@dataclass(frozen=True, slots=True)
class VideoClass:
    """What the videos of a type of model need.

    With `stamps`, the text before each group of frames says its time, and each is placed as a
    picture is. Otherwise temporal positions count groups, or with `rate`, seconds times this field
    of the config, or of its `vision_config`: its name, and its value if it is missing.
    """

    stamps: bool = False
    rate: tuple[str, float] | None = None


PLACEHOLDER, _BEGINS, _ENDS = "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
#: The classes by the model type of config.json.
VIDEO_CLASSES: Mapping[str, VideoClass] = {
    "qwen2_vl": VideoClass(),
    "qwen2_5_vl": VideoClass(rate=("tokens_per_second", 4)),
    "qwen3_omni_moe": VideoClass(rate=("position_id_per_seconds", 25)),
    **dict.fromkeys(
        ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), VideoClass(stamps=True)
    ),
}


def video_settings(
    preprocessor: Mapping[str, Any],
    processor: Mapping[str, Any] | None,
    video: Mapping[str, Any] | None,
) -> Mapping[str, Any]:
    """Return the settings for videos, from the files that may have them.

    They are video_preprocessor_config.json (`video`), a part of processor_config.json, and
    preprocessor_config.json.
    """
    inner = (processor or {}).get("video_processor", preprocessor.get("image_processor"))
    return video or (inner if isinstance(inner, Mapping) else preprocessor)


class VideoProcessor:
    """Makes the tokens and the encoder's inputs of videos for one model. Any thread may use it."""

    def __init__(
        self, config: Mapping[str, Any], settings: Mapping[str, Any], encode: Encode
    ) -> None:
        """Read config.json and the settings for videos.

        Raises `ModelLoadError` if the tokenizer has no placeholder, or the settings are wrong.
        """
        kind = str(config["model_type"])
        self._needs, self._encode = VIDEO_CLASSES[kind], encode
        ids = [encode(text) for text in (PLACEHOLDER, _BEGINS, _ENDS)]
        stated = config.get("video_token_id", ids[0][0] if ids[0] else None)
        if any(len(each) != 1 for each in ids) or ids[0] != [stated]:
            raise ModelLoadError(f"{PLACEHOLDER!r} is not the token {stated} of config.json")
        #: The ids of the placeholder, and of the tokens around it in chat templates.
        self.token_id, self.begin_id, self.end_id = (each[0] for each in ids)
        #: The text for a video in a template that shows none.
        self.text = f"{_BEGINS}{PLACEHOLDER}{_ENDS}"
        vision = config["vision_config"]
        self._patch, self._merge = int(vision["patch_size"]), CLASSES[kind].merged(config)
        self._group = int(vision.get("temporal_patch_size", 2))
        for name, value in (("patch_size", self._patch), ("temporal_patch_size", self._group)):
            if settings.get(name, value) != value:
                raise ModelLoadError(
                    f"{name} {str(settings[name])[:50]} is not that of config.json"
                )
        self._rate: float | None = None
        if self._needs.rate is not None:
            self._rate = _number({**config, **vision}, *self._needs.rate, 1000)
        self.sampling = _sampling(settings, self._patch * self._merge, self._group)
        self._scale = _number(settings, "rescale_factor", 1 / 255, 1)
        self._mean, self._std = (_colours(settings, name) for name in ("image_mean", "image_std"))
        self._normalizes = settings.get("do_normalize", True) is not False
        self._rescales = settings.get("do_rescale", True) is not False

    def num_tokens(self, video: Video) -> int:
        """Return the number of tokens of a video, without those of its time stamps."""
        groups, height, width = self._grid(video)
        return groups * height * width

    def unwrapped(self, placed: list[int], after: Sequence[int]) -> int:
        """Take the tokens around a placeholder out of the prompt; return how many come after it.

        Each group of frames with a time stamp has its own.
        """
        if not self._needs.stamps or placed[-1:] != [self.begin_id] or after[:1] != [self.end_id]:
            return 0
        placed.pop()
        return 1

    def place(self, video: Video, start: int) -> tuple[list[int], list[Media]]:
        """Return the tokens of a video from position `start` on, and its groups of frames."""
        groups, height, width = self._grid(video)
        frames = video.frames
        missing = -len(frames) % self._group
        times = [*video.times, *video.times[-1:] * missing]
        if missing:
            frames = np.concatenate([frames, frames[-1:].repeat(missing, axis=0)])
        soft = (self.token_id,) * (height * width)
        grid = np.array([[1, height * self._merge, width * self._merge]], np.int64)
        interval = 1.0
        if self._rate is not None:  # rounded: a hair less than a whole number loses a position
            interval = round(self._rate * video.seconds / len(video.frames) * self._group, 6)
        placed: list[int] = []
        media: list[Media] = []
        for group in range(groups):
            first = group * self._group
            shown = frames[first : first + self._group]
            frame = None if self._needs.stamps or not group else int(group * interval)
            if self._needs.stamps:
                seconds = (times[first] + times[first + self._group - 1]) / 2
                placed += [*self._encode(f"<{seconds:.1f} seconds>"), self.begin_id]
            known = json.dumps([list(shown.shape), frame]).encode()
            digest = hashlib.sha256(self._settings_digest + known)
            digest.update(np.ascontiguousarray(shown).data)
            inputs: dict[str, NDArray[Any]] = {
                "pixel_values_videos": self._patches(shown),
                "video_grid_thw": grid,
            }
            media.append(
                Media(
                    start + len(placed),
                    soft,
                    digest.digest(),
                    inputs,
                    video.param,
                    (1, height, width),
                    frame=frame,
                )
            )
            placed += soft
            if self._needs.stamps:
                placed.append(self.end_id)
        return placed, media

    def _grid(self, video: Video) -> tuple[int, int, int]:
        """Return the groups of frames, and the rows and columns of tokens of each."""
        count, height, width, _ = video.frames.shape
        side = self._patch * self._merge
        (rows, above), (columns, beside) = divmod(height, side), divmod(width, side)
        assert above == beside == 0, "the worker resizes frames"
        return -(-count // self._group), rows, columns

    def _patches(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the patches [patches, values] of a group, those of a token after each other."""
        pixels = frames.transpose(0, 3, 1, 2).astype(np.float32)
        if self._rescales:
            pixels = pixels * np.float32(self._scale)
        if self._normalizes:
            pixels = (pixels - self._mean) / self._std
        side, merge = self._patch, self._merge
        count, colours, height, width = pixels.shape
        pixels = pixels.reshape(
            count, colours,
            height // side // merge, merge, side,
            width // side // merge, merge, side,
        )  # fmt: skip
        return pixels.transpose(2, 5, 3, 6, 1, 0, 4, 7).reshape(
            height // side * (width // side), colours * count * side * side
        )

    @cached_property
    def _settings_digest(self) -> bytes:
        """The SHA-256 of everything but the frames on which the encoder's inputs depend."""
        own = (
            "video", self._patch, self._merge, self._group, self._scale, self._rescales,
            self._normalizes, self._mean.tolist(), self._std.tolist(),
        )  # fmt: skip
        return hashlib.sha256(json.dumps(own).encode()).digest()


def _sampling(settings: Mapping[str, Any], factor: int, group: int) -> Sampling:
    """Return how videos are sampled: as the settings say, within the limits of this server."""
    size = settings.get("size")
    size = size if isinstance(size, Mapping) else {}
    given = {
        "min_pixels": settings.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": settings.get("max_pixels") or size.get("longest_edge"),
    }
    given = {name: value for name, value in given.items() if value is not None}
    most = int(_number(given, "max_pixels", 32 * 32 * 768, 2**40))
    least = int(_number(given, "min_pixels", 128 * 32 * 32, 2**40))
    frames = int(_number(settings, "max_frames", MAX_FRAMES, 2**20))
    return Sampling(
        fps=_number(settings, "fps", 2.0, _MAX_FPS),
        min_frames=min(int(_number(settings, "min_frames", 4, 2**20)), frames, MAX_FRAMES),
        max_frames=min(frames, MAX_FRAMES),
        min_pixels=min(least, most, MAX_SAMPLED_PIXELS),
        max_pixels=min(most, MAX_SAMPLED_PIXELS),
        factor=factor,
        group=group,
    )


def _number(settings: Mapping[str, Any], name: str, default: float, limit: float) -> float:
    value = settings.get(name, default)
    if type(value) not in (int, float) or not 0 < value <= limit:
        raise ModelLoadError(f"{name} {str(value)[:50]} is not a number up to {limit:g}")
    return float(value)


def _colours(settings: Mapping[str, Any], name: str) -> NDArray[np.float32]:
    value = settings.get(name, [0.5, 0.5, 0.5])
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(type(each) in (int, float) and 0 < each <= 1 for each in value)
    ):
        raise ModelLoadError(f"{name} {str(value)[:50]} is not three numbers up to 1")
    return np.array(value, np.float32)[:, None, None]
