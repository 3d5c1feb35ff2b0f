"""Videos for tiny models of `tiny`, and mlx-vlm's own answers about them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from modelpack_engine.engine import Engine
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.vision.processor import Picture
from modelpack_engine.vision.videos import Video
from modelpack_engine.worker.video import Sampling, _resized
from tests.engine.vision import tiny

#: Those whose frames are pictures, with a time stamp before each.
GEMMA = ("gemma4", "gemma4_unified")
LLAVA = "llava_onevision"
KINDS = (*tiny.QWEN, "qwen3_omni_moe", *GEMMA, LLAVA, "mage_vl")
#: Those that do not see the time of frames.
TIMELESS = ("qwen2_vl", LLAVA)
#: Positions a second of those that see the time of frames.
RATES = {"qwen2_5_vl": 4, "qwen3_omni_moe": 25}
#: Those whose videos mlx-vlm, or the function below, puts beside pictures.
MIXED = tuple(kind for kind in KINDS if kind != "qwen3_vl_moe")
#: Those whose classes in mlx-vlm encode pictures and videos of one prompt.
WHOLE = ("qwen3_vl", "qwen3_omni_moe", *GEMMA, LLAVA, "mage_vl")
#: Those that write the time of frames into the prompt.
STAMPED = (*tiny.DEEP, *tiny.HYBRID, "mage_vl")
FPS = 2.0


@cache
def sampling_of(kind: str) -> Sampling:
    """Return how a tiny model samples videos."""
    vision = tiny.tiny_loaded(kind).vision
    assert vision is not None
    assert vision.processor.videos is not None, vision.processor.no_videos
    return vision.processor.videos.sampling


def fitted(kind: str, files: list[Picture | Video]) -> list[Picture | Video]:
    """Return files whose videos have the size that the worker process gives them.

    mlx-vlm's LLaVA-OneVision reads several videos of a prompt if they have as many frames.
    """
    found: list[Picture | Video] = []
    least = min((len(file.frames) for file in files if isinstance(file, Video)), default=0)
    for file in files:
        if isinstance(file, Video):
            if kind == LLAVA:
                file = replace(file, frames=file.frames[:least], times=file.times[:least])
            count, height, width, _ = file.frames.shape
            size = sampling_of(kind).size(count, height, width)
            assert sampling_of(kind).size(count, *size) == size, "mlx-vlm would resize them again"
            file = replace(file, frames=np.stack([_resized(each, size) for each in file.frames]))
        found.append(file)
    return found


def video(seed: int, count: int = 6, height: int = 16, width: int = 16) -> Video:
    """Return frames of random blocks, two a second: of a size that Qwen does not change."""
    frames = [tiny.picture(seed * 100 + index, height, width).pixels for index in range(count)]
    times = tuple(index / FPS for index in range(count))
    return Video(np.stack(frames), times, count / FPS)


def placeholder(kind: str) -> str:
    """Return what stands for a video in a kind's chat template."""
    if kind == LLAVA:
        return "<video>"
    return "<|video|>" if kind in GEMMA else "<|vision_start|><|video_pad|><|vision_end|>"


def prompt_of(kind: str, text: str) -> str:
    """Return a text with the placeholders of a model for <image> and <video>."""
    image = tiny.placeholder(kind)
    image = "<|image_pad|>" if "<|image_pad|>" in image else image
    return tiny.prompt_of(image, text).replace("<video>", placeholder(kind))


def request(
    engine: Engine, text: str, files: list[Picture | Video], count: int = 8, **fields: Any
) -> EngineRequest:
    """Return a greedy request of a text with <image> and <video> in the places of the files."""
    assert engine.vision is not None
    kind = engine.vision.processor._kind
    ids = engine.tokenizer.encode(prompt_of(kind, text), add_special_tokens=False)
    ids, media = engine.vision.processor.place(ids, fitted(kind, files))
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    return EngineRequest(ids, params, media=media, **fields)


def inputs_of(kind: str, text: str, files: list[Picture | Video]) -> dict[str, Any]:
    """Return what mlx-vlm's processor makes of a prompt."""
    from PIL import Image

    _, processor = tiny._peer(kind)
    files = fitted(kind, files)
    images = [Image.fromarray(each.pixels) for each in files if isinstance(each, Picture)]
    videos = [each for each in files if isinstance(each, Video)]
    given: dict[str, Any] = {}
    if videos and kind in GEMMA:
        given["videos"] = [each.frames.transpose(0, 3, 1, 2) for each in videos]
        # Its stamps count from this rate; ours, as transformers', are the times of the frames.
        given["fps"] = [(len(each.times) - 1) / each.times[-1] for each in videos]
    elif videos:
        given["videos"] = [list(each.frames) for each in videos]
        if kind == "mage_vl":
            given["video_metadata"] = [
                {"frames_indices": each.numbers, "fps": 1 / (each.seconds - each.times[-1])}
                for each in videos
            ]
        elif kind in STAMPED:
            given["video_metadata"] = [
                {"frames_indices": [round(100 * t) for t in each.times], "fps": 100}
                for each in videos
            ]
    return dict(processor(images=images or None, text=[prompt_of(kind, text)], **given))


def _by_time(kind: str, ids: list[int], files: list[Picture | Video]) -> dict[str, mx.array]:
    """Return the positions of Qwen2.5-VL: groups of frames count by their time.

    mlx-vlm's count groups, whatever their time is. It is section 2.1.2 of its report, with the four
    tokens a second of the tiny model, and one token for 8 x 8 pixels.
    """
    rows: list[tuple[int, int, int]] = []
    left, at = list(files), 0
    while at < len(ids):
        first = 1 + max(map(max, rows), default=-1)
        if ids[at] not in (tiny.PAD, tiny.VIDEO):
            rows.append((first, first, first))
            at += 1
            continue
        shown = left.pop(0)
        pixels = shown.frames if isinstance(shown, Video) else shown.pixels[None]
        count = -(-len(pixels) // 2)
        is_video = isinstance(shown, Video)
        height, width = pixels.shape[1] // 8, pixels.shape[2] // 8
        if not is_video:  # which is resized
            end = next(place for place in range(at, len(ids)) if ids[place] != tiny.PAD)
            height, width = _SIZES[end - at]
        step = int(RATES[kind] * 2 / FPS) if is_video else 1
        rows += [
            (first + t * step, first + y, first + x)
            for t in range(count)
            for y in range(height)
            for x in range(width)
        ]
        at += count * height * width
    positions = mx.array(np.array(rows).T[:, None], mx.int32)
    return {"position_ids": positions, "rope_deltas": positions.max() + 1 - len(ids)}


#: Rows and columns of the tokens of a picture of 20 x 30 pixels.
_SIZES = {24: (4, 6), 20: (4, 5)}


def _features(model: Any, kind: str, ids: mx.array, inputs: dict[str, Any]) -> Any:
    """Return mlx-vlm's embeddings and positions of a prompt.

    Of a prompt with pictures and videos, most of its classes encode the pictures alone: then those
    of the videos are computed by themselves, and put in their places.
    """
    pixels = inputs.get("pixel_values")
    of_videos = {name: inputs[name] for name in inputs if "video" in name}
    if kind in WHOLE or pixels is None or not of_videos:
        inputs.pop("pixel_values", None)
        return model.get_input_embeddings(ids, pixels, **inputs)
    grid = inputs["image_grid_thw"]
    without = [mx.where(ids == token, 0, ids) for token in (tiny.VIDEO, tiny.PAD)]
    made = model.get_input_embeddings(without[0], pixels, image_grid_thw=grid)
    shown = model.get_input_embeddings(without[1], None, **of_videos)
    rows = mx.where((ids == tiny.VIDEO)[..., None], shown.inputs_embeds, made.inputs_embeds)
    positions, deltas = model.language_model.get_rope_index(ids, grid, inputs["video_grid_thw"])
    return SimpleNamespace(inputs_embeds=rows, position_ids=positions, rope_deltas=deltas)


def expected(
    kind: str, text: str, files: list[Picture | Video], count: int = 8, *, seen: bool = True
) -> list[int]:
    """Return the greedy tokens of mlx-vlm's own processor, model and cache, for one request.

    Without `seen`, tokens of a frame see no later ones where they should.
    """
    model, _ = tiny._peer(kind)
    inputs = inputs_of(kind, text, files)
    ids = mx.array(inputs.pop("input_ids"))
    inputs.pop("attention_mask", None)
    features = _features(model, kind, ids, inputs)
    tokens: list[int] = ids[0].tolist()
    if kind in RATES:
        features = SimpleNamespace(**{**vars(features), **_by_time(kind, tokens, files)})
    return tiny.generated(model, ids, features, count, tiny._pictures_seen(kind, tokens, seen))
