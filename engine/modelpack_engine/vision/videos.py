"""VideoProcessor: from the sampled frames of videos to their tokens, and encoder inputs.

The worker process samples and resizes frames, as `VideoProcessor.sampling` says. A video becomes
one `Media` for each group of frames that the tower joins (two in Qwen-VL, one in others): towers
attend within a group only, so a step encodes as few of them as it has time for. `VIDEO_CLASSES`
says what each type of model needs, and `FrameLayout` how its frames are sized and laid out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.request import Media, MediaSource
from modelpack_engine.vision.models import CLASSES, Encode, sees_ahead_in_windows
from modelpack_engine.worker.video import MAX_FRAMES, MAX_SAMPLED_PIXELS, Sampling

#: The most frames a second that a video_preprocessor_config.json may ask for.
_MAX_FPS = 60
#: The most tokens of a video where a token is fewer pixels than in Qwen-VL.
_MAX_TOKENS = 21_400


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """Sampled frames of a decoded video: RGB, uint8 [frames, height, width, 3].

    `times` are their seconds from the first one, `seconds` is the length of the whole video, with
    the time for which its last frame is shown. `param` names it in errors.
    """

    frames: NDArray[np.uint8]
    times: tuple[float, ...]
    seconds: float
    param: str = "messages"

    @property
    def numbers(self) -> list[int]:
        """The numbers of the frames in a file whose frames are shown equally long."""
        shown = self.seconds - self.times[-1]
        return [round(time / shown) if shown > 0 else 0 for time in self.times]


class FrameLayout:
    """How frames are sized, and laid out for the tower: Qwen-VL's, as patches of joined frames.

    `group` is the number of frames that the tower joins. Subclasses are those of other types.
    """

    #: The mean and the deviation of colours for files that have none.
    colours = (0.5, 0.5)
    #: The tokens after those of the last group.
    last = 0
    #: Whether inputs depend on the number of a frame in the file.
    numbered = False

    def __init__(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Read config.json and the settings for videos; raise `ModelLoadError` for wrong ones."""
        settings = {name: value for name, value in settings.items() if value is not None}
        self._scale = _number(settings, "rescale_factor", 1 / 255, 1)
        names = ("image_mean", "image_std")
        self._mean, self._std = (
            _colours(settings, name, default, least)
            for name, default, least in zip(names, self.colours, (0.0, 1e-6), strict=True)
        )
        self._normalizes = settings.get("do_normalize", True) is not False
        self._rescales = settings.get("do_rescale", True) is not False
        vision = config["vision_config"]
        self.patch = int(vision.get("patch_size", 16))
        self.merge, self.group = self._joined(config)
        for name, value in (("patch_size", self.patch), ("temporal_patch_size", self.group)):
            if settings.get(name, value) != value:
                raise ModelLoadError(
                    f"{name} {str(settings[name])[:50]} is not that of config.json"
                )
        self.sampling = self._sampling(config, settings)

    def _joined(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return the rows and columns of patches that become one token, and the frames."""
        merge = CLASSES[str(config["model_type"])].merged(config)
        return merge, int(config["vision_config"].get("temporal_patch_size", 2))

    def _sampling(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Sampling:
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
            factor=self.patch * self.merge,
            group=self.group,
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of tokens of a group of frames."""
        side = self.patch * self.merge
        (rows, above), (columns, beside) = divmod(height, side), divmod(width, side)
        assert above == beside == 0, "the worker resizes frames"
        return rows, columns

    def inputs(self, frames: NDArray[np.uint8], number: int = 0) -> dict[str, NDArray[Any]]:
        """Return the encoder's inputs for a group: its patches, those of a token in a row."""
        pixels = self.pixels(frames)
        side, merge = self.patch, self.merge
        count, colours, height, width = pixels.shape
        rows, columns = height // side, width // side
        pixels = pixels.reshape(
            count, colours, rows // merge, merge, side, columns // merge, merge, side
        )
        patches = pixels.transpose(2, 5, 3, 6, 1, 0, 4, 7)
        return {
            "pixel_values_videos": patches.reshape(rows * columns, colours * count * side * side),
            "video_grid_thw": np.array([[1, rows, columns]], np.int64),
        }

    def pixels(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return normalised colours [frames, 3, height, width]."""
        pixels = frames.transpose(0, 3, 1, 2).astype(np.float32)
        if self._rescales:
            pixels = pixels * np.float32(self._scale)
        if self._normalizes:
            pixels = (pixels - self._mean) / self._std
        return pixels

    @cached_property
    def digest(self) -> bytes:
        """The SHA-256 of everything but the frames on which the encoder's inputs depend."""
        own = (
            "video", self.patch, self.merge, self.group, self._scale, self._rescales,
            self._normalizes, self._mean.tolist(), self._std.tolist(),
        )  # fmt: skip
        return hashlib.sha256(json.dumps(own).encode()).digest()


class _MageLayout(FrameLayout):
    """Mage-VL: frames are pictures, with the settings of those, and their numbers in the file."""

    numbered = True

    def _joined(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return super()._joined(config)[0], 1

    def _sampling(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Sampling:
        found = super()._sampling(config, {"min_frames": 1, "max_frames": 32, **settings})
        most = max(1, _MAX_TOKENS * found.factor**2 // found.max_pixels)
        return replace(found, max_frames=min(found.max_frames, most), each=True)

    def inputs(self, frames: NDArray[np.uint8], number: int = 0) -> dict[str, NDArray[Any]]:
        """Return the patches of a frame, as those of a picture."""
        pixels, grid = super().inputs(frames).values()
        return {
            "pixel_values": pixels, "image_grid_thw": grid, "frame_number": np.array(number)
        }  # fmt: skip


class _Gemma4Layout(FrameLayout):
    """Gemma 4: frames are pictures of fewer tokens. `unified` has patches as large as tokens."""

    colours = (0.0, 1.0)
    unified = False

    def _joined(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return int(config["vision_config"].get("pooling_kernel_size", 3)), 1

    def _sampling(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Sampling:
        if settings.get("pooling_kernel_size", self.merge) != self.merge:
            raise ModelLoadError("pooling_kernel_size is not that of config.json")
        factor = self.patch * self.merge
        tokens = int(_number(settings, "max_soft_tokens", 70, MAX_SAMPLED_PIXELS / factor**2))
        return _counted(settings, 32, factor=factor, frame_pixels=tokens * factor**2)

    def inputs(self, frames: NDArray[np.uint8], number: int = 0) -> dict[str, NDArray[Any]]:
        """Return the patches of a frame, values of a pixel in a row, and their places."""
        side = self.patch * self.merge if self.unified else self.patch
        pixels = self.pixels(frames)
        count, colours, height, width = pixels.shape
        rows, columns = height // side, width // side
        patches = pixels.reshape(count, colours, rows, side, columns, side)
        patches = patches.transpose(0, 2, 4, 3, 5, 1)
        places = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1)
        return {
            "pixel_values_videos": patches.reshape(count, rows * columns, side * side * colours),
            "video_position_ids": places.reshape(1, -1, 2).astype(np.int64),
        }


class _Gemma4UnifiedLayout(_Gemma4Layout):
    unified = True


class _LlavaLayout(FrameLayout):
    """LLaVA-OneVision: squares of one size, pooled to a quarter of their patches.

    A token for a new line ends the last one, as its row in a picture.
    """

    def _joined(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return 1, 1

    def _sampling(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Sampling:
        side = int(_number(config["vision_config"], "image_size", 384, MAX_SAMPLED_PIXELS**0.5))
        size = settings.get("size")
        if size is not None and size != {"height": side, "width": side}:
            raise ModelLoadError(f"size {str(size)[:50]} is not that of config.json, {side}")
        self._pooled = -(-(side // self.patch) // 2)
        self.last = int(config.get("use_image_newline_parameter", True) is not False)
        most = _MAX_TOKENS // self._pooled**2
        return _counted(settings, 32, most, factor=side, frame_pixels=side**2)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of tokens of a frame."""
        return self._pooled, self._pooled

    def inputs(self, frames: NDArray[np.uint8], number: int = 0) -> dict[str, NDArray[Any]]:
        """Return the colours of a frame."""
        return {"pixel_values_videos": self.pixels(frames)}


def _counted(
    settings: Mapping[str, Any], default: int, most: int = MAX_FRAMES, **sizes: Any
) -> Sampling:
    """Return how videos are sampled by `num_frames`, whatever their length, or by `fps`."""
    most = min(int(_number(settings, "num_frames", default, 2**20)), most, MAX_FRAMES)
    has_rate = "fps" in settings
    return Sampling(
        fps=_number(settings, "fps", 2.0, _MAX_FPS) if has_rate else 2.0,
        min_frames=1 if has_rate else most,
        max_frames=most,
        min_pixels=1,
        max_pixels=MAX_SAMPLED_PIXELS,
        group=1,
        **sizes,
    )


def _in_seconds(seconds: float, index: int) -> str:
    return f"<{seconds:.1f} seconds>"


def _in_minutes(seconds: float, index: int) -> str:
    return f"{' ' if index else ''}{int(seconds // 60):02d}:{int(seconds % 60):02d} "


@dataclass(frozen=True, slots=True)
class VideoClass:
    """What the videos of a type of model need.

    `placeholder` stands for a video in chat templates, between `begins` and `ends` if these are
    `wrapped` around it there. In a prompt, tokens `soft` stand for it, if not the placeholder.

    With `stamp`, a text says the time of each group of frames, from its seconds and its index, and
    each has its own `begins` and `ends`. Otherwise temporal positions count groups, or with `rate`,
    seconds times this field of the config, or of its `vision_config`: its name, and its value if it
    is missing.

    Without `shared`, the settings for pictures are none for videos.
    """

    layout: type[FrameLayout] = FrameLayout
    placeholder: str = "<|video_pad|>"
    begins: str = "<|vision_start|>"
    ends: str = "<|vision_end|>"
    wrapped: bool = True
    stamp: Callable[[float, int], str] | None = None
    rate: tuple[str, float] | None = None
    shared: bool = True
    soft: str = ""


def _gemma4(layout: type[FrameLayout]) -> VideoClass:
    return VideoClass(
        layout, "<|video|>", "<|image>", "<image|>", wrapped=False, stamp=_in_minutes, shared=False
    )


#: The classes by the model type of config.json.
VIDEO_CLASSES: Mapping[str, VideoClass] = {
    "gemma4": _gemma4(_Gemma4Layout),
    "gemma4_unified": _gemma4(_Gemma4UnifiedLayout),
    "llava_onevision": VideoClass(
        _LlavaLayout, "<video>", begins="", ends="", wrapped=False, shared=False
    ),
    "mage_vl": VideoClass(_MageLayout, stamp=_in_seconds, soft="<|image_pad|>"),
    "qwen2_vl": VideoClass(),
    "qwen2_5_vl": VideoClass(rate=("tokens_per_second", 4)),
    "qwen3_omni_moe": VideoClass(rate=("position_id_per_seconds", 25)),
    **dict.fromkeys(
        ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), VideoClass(stamp=_in_seconds)
    ),
}


def video_settings(
    kind: str,
    preprocessor: Mapping[str, Any],
    processor: Mapping[str, Any] | None,
    video: Mapping[str, Any] | None,
) -> Mapping[str, Any]:
    """Return the settings for videos of a model type, from the files that may have them.

    They are video_preprocessor_config.json (`video`), a part of processor_config.json, and
    preprocessor_config.json, if its settings are for videos, too.
    """
    inner = (processor or {}).get("video_processor")
    if inner is None and not VIDEO_CLASSES[kind].shared:
        return video or {}
    inner = preprocessor.get("image_processor") if inner is None else inner
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
        needs = self._needs
        #: What stands for a video in chat templates.
        self.placeholder = needs.placeholder
        ids = [encode(text) for text in (needs.placeholder, needs.begins, needs.ends) if text]
        named = config.get("video_token_index", ids[0][0] if ids[0] else None)
        stated = config.get("video_token_id", named)
        if any(len(each) != 1 for each in ids) or ids[0] != [stated]:
            raise ModelLoadError(f"{needs.placeholder!r} is not the token {stated} of config.json")
        #: The ids of the placeholder, and of tokens around it or around each group of frames.
        self.token_id, *around = (each[0] for each in ids)
        self._begin_id, self._end_id = around or (-1, -1)
        (self._soft_id,) = encode(needs.soft) if needs.soft else (self.token_id,)
        #: The text for a video in a template that shows none.
        self.text = needs.placeholder
        if needs.wrapped:
            self.text = f"{needs.begins}{needs.placeholder}{needs.ends}"
        self._layout = needs.layout(config, settings)
        self.sampling = self._layout.sampling
        self._rate: float | None = None
        if needs.rate is not None:
            self._rate = _number({**config, **config["vision_config"]}, *needs.rate, 1000)
        #: Whether the tokens of a group attend to each other in both directions.
        self.bidirectional = sees_ahead_in_windows(config)
        self._mrope = CLASSES[kind].mrope
        self._counts = self._mrope and needs.stamp is None

    @property
    def largest_group(self) -> int:
        """The most tokens of a group of frames, in a type whose frames have a size of their own."""
        sampling = self.sampling
        return sampling.frame_pixels // sampling.factor**2

    def num_tokens(self, video: Video) -> int:
        """Return the number of tokens of a video, without those of its time stamps."""
        groups, height, width = self._grid(video)
        return groups * height * width + self._layout.last

    def unwrapped(self, placed: list[int], after: Sequence[int]) -> int:
        """Take the tokens around a placeholder out of the prompt; return how many come after it.

        Each group of frames with a time stamp has its own.
        """
        if self._needs.stamp is None or not self._needs.wrapped:
            return 0
        if placed[-1:] != [self._begin_id] or after[:1] != [self._end_id]:
            return 0
        placed.pop()
        return 1

    def place(self, video: Video) -> tuple[list[int], list[Media]]:
        """Return the tokens of a video from position 0 on, and its groups of frames."""
        groups, height, width = self._grid(video)
        frames, size, stamp = video.frames, self._layout.group, self._needs.stamp
        missing = -len(frames) % size
        times = [*video.times, *video.times[-1:] * missing]
        if missing:
            frames = np.concatenate([frames, frames[-1:].repeat(missing, axis=0)])
        interval = 1.0
        if self._rate is not None:  # rounded: a hair less than a whole number loses a position
            interval = round(self._rate * video.seconds / len(video.frames) * size, 6)
        placed: list[int] = []
        media: list[Media] = []
        for group in range(groups):
            first = group * size
            shown = frames[first : first + size]
            frame = int(group * interval) if self._counts and group else None
            if stamp is not None:
                seconds = (times[first] + times[first + size - 1]) / 2
                placed += [*self._encode(stamp(seconds, group)), self._begin_id]
            count = height * width + (self._layout.last if group == groups - 1 else 0)
            soft = (self._soft_id,) * count
            number = video.numbers[first] if self._layout.numbered else 0
            known = json.dumps([list(shown.shape), frame, count, number]).encode()
            digest = hashlib.sha256(self._layout.digest + known)
            digest.update(np.ascontiguousarray(shown).data)
            source = MediaSource("video", shown, (number,))
            media.append(
                Media(
                    len(placed),
                    soft,
                    digest.digest(),
                    self.inputs(source),
                    video.param,
                    (1, height, width) if self._mrope else None,
                    ((0, len(soft)),) if self.bidirectional else (),
                    in_windows=self.bidirectional,
                    frame=frame,
                    source=source,
                )
            )
            placed += soft
            if stamp is not None:
                placed.append(self._end_id)
        return placed, media

    def inputs(self, group: MediaSource) -> dict[str, NDArray[Any]]:
        """Return the encoder's inputs of a group of frames."""
        return self._layout.inputs(group.content, *group.numbers)

    def _grid(self, video: Video) -> tuple[int, int, int]:
        """Return the groups of frames, and the rows and columns of tokens of each."""
        count, height, width, _ = video.frames.shape
        return -(-count // self._layout.group), *self._layout.grid(height, width)


def _number(settings: Mapping[str, Any], name: str, default: float, limit: float) -> float:
    value = settings.get(name, default)
    if type(value) not in (int, float) or not 0 < value <= limit:
        raise ModelLoadError(f"{name} {str(value)[:50]} is not a number up to {limit:g}")
    return float(value)


def _colours(
    settings: Mapping[str, Any], name: str, default: float, least: float
) -> NDArray[np.float32]:
    value = settings.get(name, [default] * 3)
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(type(each) in (int, float) and least <= each <= 1 for each in value)
    ):
        raise ModelLoadError(f"{name} {str(value)[:50]} is not three numbers up to 1")
    return np.array(value, np.float32)[:, None, None]
