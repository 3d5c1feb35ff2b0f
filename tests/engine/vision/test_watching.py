"""Videos in an engine's prompts: the tokens are those of mlx-vlm's single-request path."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpack_engine.core import batch
from modelpack_engine.core.batch import rope_positions
from modelpack_engine.errors import ContextLengthError, QueueFullError, RequestError
from modelpack_engine.models import load
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.request import Media
from modelpack_engine.vision.videos import VIDEO_CLASSES, Video, VideoProcessor
from modelpack_engine.worker.video import MAX_FRAMES, MAX_SAMPLED_PIXELS, Sampling, _resized
from tests.engine.vision import tiny, watching
from tests.engine.vision.tiny import picture, run, tiny_engine
from tests.engine.vision.watching import MIXED, STAMPED, expected, request, video

pytestmark = pytest.mark.long

ONE, TWO, ODD = video(1), video(2, 4, 16, 24), video(3, 5)
PROMPTS: dict[str, tuple[str, list[Any]]] = {
    "one video": ("<video>What happens?", [ONE]),
    "two videos": ("this is <video> and that is <video>, see?", [ONE, TWO]),
    "an odd number of frames": ("<video>?", [ODD]),
    "the same twice": ("<video> or <video>", [TWO, TWO]),
}
BOTH: dict[str, tuple[str, list[Any]]] = {
    "a picture and a video": ("<image> of <video>?", [picture(1), TWO]),
    "a video and a picture": ("<video> with <image>?", [ONE, picture(1)]),
}
#: Those that others stand for.
SLOW = (
    "qwen2_vl",
    "qwen3_vl_moe",
    "qwen3_omni_moe",
    *tiny.HYBRID,
    *watching.GEMMA,
    watching.LLAVA,
    "mage_vl",
)


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, marks=[pytest.mark.long] * (k in SLOW)) for k in watching.KINDS],
)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def check_tokens(kind: str, text: str, files: list[Any]) -> None:
    engine = tiny_engine(kind, max_num_batched_tokens=256)
    assert engine._runner.tier == "paged"
    made = request(engine, text, files)
    assert [*made.prompt_token_ids] == watching.inputs_of(kind, text, files)["input_ids"][
        0
    ].tolist()
    assert run(engine, made) == [expected(kind, text, files)]


@pytest.mark.parametrize("name", PROMPTS)
def test_tokens_are_those_of_mlx_vlm(kind: str, name: str) -> None:
    check_tokens(kind, *PROMPTS[name])


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("kind", MIXED)
def test_tokens_of_pictures_and_videos_are_those_of_mlx_vlm(kind: str, name: str) -> None:
    """Of the kinds whose mlx-vlm encodes both kinds of file of a prompt."""
    check_tokens(kind, *BOTH[name])


def test_another_order_of_frames_changes_the_answer(kind: str) -> None:
    """The control."""
    engine = tiny_engine(kind)
    backwards = dataclasses.replace(ONE, frames=ONE.frames[::-1].copy())
    text, _ = PROMPTS["one video"]
    [first], [second] = (run(engine, request(engine, text, [each])) for each in (ONE, backwards))
    assert first == expected(kind, text, [ONE])
    assert second == expected(kind, text, [backwards])
    assert first != second


def test_another_rate_changes_the_answer(kind: str) -> None:
    """Of models that see the time of frames: others count them."""
    engine = tiny_engine(kind)
    slowly = Video(ONE.frames, tuple(3 * time for time in ONE.times), 3 * ONE.seconds)
    text, _ = PROMPTS["one video"]
    [first], [second] = (run(engine, request(engine, text, [each])) for each in (ONE, slowly))
    assert (first == second) == (kind in watching.TIMELESS)


@pytest.mark.parametrize("kind", tiny.kinds(*watching.GEMMA))
def test_causal_frames_are_detected(kind: str) -> None:
    """The control: tokens of a frame that see no later ones, in layers with a window."""
    text, files = PROMPTS["two videos"]
    found = run(tiny_engine(kind), request(tiny_engine(kind), text, files, 16))
    assert found == [expected(kind, text, files, 16)]
    assert found != [expected(kind, text, files, 16, seen=False)]


@pytest.mark.parametrize("rows", [8, 17, 32])
def test_chunks_split_videos(kind: str, rows: int) -> None:
    text, files = PROMPTS["two videos"]
    engine = tiny_engine(kind, max_num_batched_tokens=rows)
    assert run(engine, request(engine, text, files)) == [expected(kind, text, files)]


def test_one_batch_with_other_requests(kind: str) -> None:
    engine = tiny_engine(kind, max_num_batched_tokens=24)
    asked: list[tuple[str, list[Any]]] = [
        ("hello there", []), PROMPTS["one video"], ("<image>What is it?", [picture(2)]),
        PROMPTS["two videos"],
    ]  # fmt: skip
    made = [request(engine, *each) for each in asked]
    assert run(engine, *made) == [expected(kind, *each) for each in asked]
    assert engine.stats().num_mixed_steps > 0


def test_the_prefix_cache_changes_nothing(kind: str) -> None:
    text, files = PROMPTS["two videos"]
    want = [expected(kind, text, files)]
    for cached in (True, False):
        engine = tiny_engine(kind, enable_prefix_caching=cached, block_size=8)
        made = request(engine, text, files)
        assert [run(engine, made) for _ in range(2)] == [want, want]
        assert (engine.stats().cached_tokens > 0) == cached


def test_a_second_question_encodes_no_frame_again() -> None:
    engine = tiny_engine("qwen2_5_vl", block_size=8)
    run(engine, request(engine, "<video>What is it?", [ONE]))
    assert engine.vision is not None
    assert engine.vision.encoder.misses == 3  # groups of two frames
    again = dataclasses.replace(ONE, frames=ONE.frames.copy())
    run(engine, request(engine, "Who is in <video>?", [again]))
    assert engine.vision.encoder.misses == 3
    assert engine.stats().cached_tokens == 0
    run(engine, request(engine, "<video>What else?", [ONE]))
    assert engine.stats().cached_tokens > 0


def test_prefixes_of_other_frames_are_not_shared() -> None:
    """Nor are those of the same frames at another time."""
    text, _ = PROMPTS["one video"]
    frames = ONE.frames.copy()
    frames[0, 0, 0] ^= 255
    slowly = Video(ONE.frames, ONE.times, 2 * ONE.seconds)
    for other, shared in ((Video(frames, ONE.times, ONE.seconds), 0), (slowly, 4)):
        engine = tiny_engine("qwen2_5_vl", block_size=4)
        run(engine, request(engine, f"abc{text}", [ONE]))
        run(engine, request(engine, f"abc{text}", [other]))
        # Three letters and the token that begins a video, and then its first group.
        assert engine.stats().cached_tokens == 4 + shared


def test_a_step_with_tokens_encodes_one_group_of_frames() -> None:
    engine = tiny_engine("qwen2_5_vl", max_num_batched_tokens=256)
    assert engine.vision is not None
    engine.add_request("text", request(engine, "hello", [], 16))
    engine.step()
    engine.step()
    engine.add_request("video", request(engine, *PROMPTS["one video"]))
    before = encoded = engine.vision.encoder.misses
    while engine.has_work:
        engine.step()
        assert engine.vision.encoder.misses <= encoded + 1
        encoded = engine.vision.encoder.misses
    assert encoded == before + 3


_QWEN_GROUP = f"<|vision_start|>{'<|video_pad|>' * 4}<|vision_end|>"
_GEMMA_FRAME = f"<|image>{'<|video|>' * 64}<image|>"


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        (STAMPED[0], [f"<{time} seconds>{_QWEN_GROUP}" for time in (0.2, 1.2, 34.6)]),
        (
            watching.GEMMA[1],
            [
                f"{' ' * (index > 0)}{time} {_GEMMA_FRAME}"
                for index, time in enumerate(["00:00", "00:00", "00:01", "00:01", "00:08", "01:01"])
            ],
        ),
    ],
)  # fmt: skip
def test_time_stamps(kind: str, shown: list[str]) -> None:
    """A group of frames has the mean of its times, with one digit, and its own placeholder.

    Gemma 4 has the minutes and seconds of each frame, as in mlx-vlm and transformers.
    """
    engine = tiny_engine(kind)
    made = request(engine, "a<video>b", [Video(ONE.frames, (0, 0.4, 1, 1.5, 8, 61.14), 64)])
    text = engine.tokenizer.decode(made.prompt_token_ids, skip_special_tokens=False)
    assert text == f"a{''.join(shown)}b"


@cache
def _videos() -> VideoProcessor:
    vision = tiny.tiny_loaded("qwen2_5_vl").vision
    assert vision is not None
    assert vision.processor.videos is not None
    return vision.processor.videos


@given(st.integers(0, 40), st.integers(0, 40), st.floats(0.2, 9))
@settings(max_examples=50)
def test_positions_of_chunks_are_those_of_the_prompt(a: int, b: int, seconds: float) -> None:
    placed, found = _videos().place(Video(ONE.frames, ONE.times, seconds))
    media = tuple(dataclasses.replace(each, start=each.start + 5) for each in found)
    whole = rope_positions(media, 0, len(placed) + 10)
    start, stop = sorted((a, b))
    if stop <= len(whole[0]):
        parts = rope_positions(media, start, stop)
        assert parts == [column[start:stop] for column in whole]
    interval = 4 * 2 * seconds / 6
    assert whole[0][5] == whole[0][8] == 5
    assert whole[0][9] == 5 + int(round(interval, 6))
    assert whole[0][13] == 5 + int(round(2 * interval, 5))
    after = 5 + max(int(round(2 * interval, 5)) + 1, 2)
    assert [column[len(placed) + 5] for column in whole] == [after] * 3


def test_wrong_positions_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: groups of frames that count from where each begins."""
    text, files = PROMPTS["two videos"]

    def wrong(media: tuple[Media, ...], start: int, stop: int) -> list[list[int]]:
        return rope_positions(tuple(dataclasses.replace(m, frame=None) for m in media), start, stop)

    monkeypatch.setattr(batch, "rope_positions", wrong)
    engine = tiny_engine("qwen2_5_vl")
    assert run(engine, request(engine, text, files)) != [expected("qwen2_5_vl", text, files)]


def test_embeddings_are_those_of_the_whole_video() -> None:
    """A group of frames attends to no other: the tower returns the same rows for all at once."""
    for kind in ("qwen2_vl", "qwen2_5_vl"):
        vision = tiny.tiny_loaded(kind).vision
        assert vision is not None
        assert vision.processor.videos is not None
        _, media = vision.processor.videos.place(ONE)
        parts = mx.concatenate([tiny.embeddings(vision.encoder, each) for each in media])
        model: Any = vision.encoder._model
        patches = mx.array(np.concatenate([each.inputs["pixel_values_videos"] for each in media]))
        whole = model.vision_tower(patches, mx.array([[3, 4, 4]]))
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-4)


@given(
    st.integers(1, 768), st.integers(1, 4000), st.integers(1, 4000),
    st.sampled_from([(28, 100352, 602112), (32, 4096, 25165824), (8, 1024, 2048)]),
)  # fmt: skip
@settings(max_examples=100)
def test_sizes(count: int, height: int, width: int, limits: tuple[int, int, int]) -> None:
    """Sides are multiples of the patches of a token, and pixels within the limits, as mlx-vlm's.

    mlx-vlm's exceed the limit where a side of less than a patch was raised to one.
    """
    from modelpack_engine.patches.mlx_vlm_imports import prepare

    prepare()
    from mlx_vlm.models.qwen3_vl.processing_qwen3_vl import _smart_resize_video

    factor, least, most = limits
    rows, columns = Sampling(2.0, 4, 768, least, most, factor).size(count, height, width)
    assert rows % factor == columns % factor == 0 < rows * columns
    if min(height, width) >= factor and max(height, width) <= 200 * min(height, width):
        theirs = _smart_resize_video(count, height, width, 2, factor, least, most)
        if (rows, columns) != theirs:
            assert min(theirs) == factor
            assert math.ceil(count / 2) * 2 * math.prod(theirs) > most
            assert (rows, columns) == (factor, factor) or count * rows * columns <= most


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([(48, 70), (8, 70), (48, 1120)]))
@settings(max_examples=100)
def test_sizes_of_frames_that_are_pictures(
    height: int, width: int, limits: tuple[int, int]
) -> None:
    """They are those of mlx-vlm's Gemma 4: as large as so many tokens allow."""
    from modelpack_engine.patches.mlx_vlm_imports import prepare

    prepare()
    from mlx_vlm.models.gemma4.processing_gemma4 import get_aspect_ratio_preserving_size

    factor, tokens = limits
    most = tokens * factor**2
    sampling = Sampling(2.0, 32, 32, 1, MAX_SAMPLED_PIXELS, factor, group=1, frame_pixels=most)
    theirs = get_aspect_ratio_preserving_size(height, width, factor // 2, 4 * tokens, 2)
    assert sampling.size(9, height, width) == theirs
    assert sampling.count(10**6, 10.0) == min(32, MAX_SAMPLED_PIXELS // most)
    assert sampling.count(5, 10.0) == 5


@pytest.mark.parametrize(("height", "width"), [(1080, 1920), (640, 480), (100, 3000), (37, 41)])
@pytest.mark.parametrize("kind", [*watching.GEMMA, watching.LLAVA])
def test_inputs_of_published_sizes(kind: str, height: int, width: int) -> None:
    """Frames that the worker resized become the arrays of mlx-vlm's processor, bit for bit."""
    from modelpack_engine.patches.mlx_vlm_imports import prepare

    prepare()
    from mlx_vlm.models.gemma4.processing_gemma4 import Gemma4VideoProcessor
    from mlx_vlm.models.gemma4_unified.processing_gemma4_unified import Gemma4UnifiedVideoProcessor
    from mlx_vlm.models.llava_onevision.processing_llava_onevision import (
        LlavaOnevisionVideoProcessor,
    )

    vision = {"patch_size": 14 if kind == watching.LLAVA else 16, "image_size": 384}
    layout = VIDEO_CLASSES[kind].layout({"model_type": kind, "vision_config": vision}, {})
    frames = np.random.default_rng(3).integers(0, 256, (2, height, width, 3), np.uint8)
    size = layout.sampling.size(2, height, width)
    made = [[*layout.inputs(_resized(frame, size)[None]).values()] for frame in frames]
    ours = [np.concatenate(arrays) for arrays in zip(*made, strict=True)]
    if kind == watching.LLAVA:
        (theirs,) = LlavaOnevisionVideoProcessor()([list(frames)])
        np.testing.assert_array_equal(ours[0], theirs)
        return
    processors: dict[str, Any] = {
        "gemma4": Gemma4VideoProcessor, "gemma4_unified": Gemma4UnifiedVideoProcessor
    }  # fmt: skip
    given = processors[kind]()([frames.transpose(0, 3, 1, 2)])
    assert [math.prod(layout.grid(*size))] == given["num_soft_tokens_per_frame"]
    for own, name in zip(ours, ("pixel_values_videos", "video_position_ids"), strict=True):
        theirs = given[name].reshape(2, -1, own.shape[-1])  # with padding
        np.testing.assert_array_equal(own, theirs[:, : own.shape[1]])


def test_inputs_count_towards_the_limit() -> None:
    engine = tiny_engine("qwen2_5_vl")
    assert engine.vision is not None
    memory = engine.vision.processor.memory
    made = request(engine, *PROMPTS["one video"])
    held = memory.nbytes
    assert held == sum(media.nbytes for media in made.media) > 0
    memory.max_bytes = held
    with pytest.raises(QueueFullError):
        request(engine, *PROMPTS["one video"])
    del made
    assert memory.nbytes == 0
    memory.max_bytes = held - 1
    with pytest.raises(RequestError, match="here: the files of the request take more than"):
        request(engine, "<video>", [dataclasses.replace(ONE, param="here")])
    assert memory.nbytes == 0


def test_room_is_checked_before_frames_are_processed() -> None:
    processor = tiny.tiny_loaded("qwen2_5_vl").vision
    assert processor is not None
    seen = []

    def check(count: int) -> None:
        seen.append(count)
        if count > 12:
            raise ContextLengthError("too long")

    ids = [1, 2, tiny.START, tiny.VIDEO, tiny.END, 3]
    with pytest.raises(ContextLengthError):
        processor.processor.place(ids, [ONE], check)
    assert seen == [6, 17]
    assert processor.processor.memory.nbytes == 0


def _changed(path: Path, kind: str = "qwen3_vl", **documents: Any) -> Any:
    for file in tiny.directory(kind).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    for name, document in documents.items():
        (path / f"{name}.json").write_text(json.dumps(document))
    return load(ModelFiles.from_directory(path), device="cpu")


def test_settings_for_videos(tmp_path: Path) -> None:
    """They come from video_preprocessor_config.json if the model has it, within our limits."""
    own = {
        "fps": 1, "min_frames": 2, "max_frames": 10_000, "patch_size": 4,
        "size": {"shortest_edge": 64, "longest_edge": 10**9},
    }  # fmt: skip
    vision = tiny.tiny_loaded("qwen3_vl").vision
    assert vision is not None
    assert vision.processor.videos is not None
    assert vision.processor.videos.sampling == Sampling(2.0, 4, 768, 1024, 2048, 8)
    vision = _changed(tmp_path, video_preprocessor_config=own).vision
    assert vision.processor.videos.sampling == Sampling(
        1.0, 2, MAX_FRAMES, 64, MAX_SAMPLED_PIXELS, 8
    )


def test_settings_for_videos_of_gemma_4(tmp_path: Path) -> None:
    """Not those for pictures; with `num_frames`, or a rate that it limits."""

    def sampling(**processor: Any) -> Sampling:
        document = {"image_processor": tiny.settings_of("gemma4"), **processor}
        vision = _changed(tmp_path, "gemma4", processor_config=document).vision
        found: Sampling = vision.processor.videos.sampling
        return found

    usual = Sampling(2.0, 32, 32, 1, MAX_SAMPLED_PIXELS, 8, group=1, frame_pixels=70 * 64)
    assert sampling() == usual
    assert sampling(video_processor={"num_frames": 8, "max_soft_tokens": 140}) == (
        dataclasses.replace(usual, min_frames=8, max_frames=8, frame_pixels=140 * 64)
    )
    assert sampling(video_processor={"fps": 1, "num_frames": 10**6}) == (
        dataclasses.replace(usual, fps=1.0, min_frames=1, max_frames=MAX_FRAMES)
    )


@pytest.mark.parametrize("kind", [*watching.GEMMA, watching.LLAVA, "mage_vl", "qwen2_5_vl"])
def test_null_is_a_missing_setting(kind: str) -> None:
    """transformers writes fields that have no value as null."""
    names = (
        "fps", "num_frames", "min_frames", "max_frames", "size", "min_pixels", "max_pixels",
        "max_soft_tokens", "patch_size", "temporal_patch_size", "pooling_kernel_size",
        "image_mean", "image_std", "rescale_factor", "do_rescale", "do_normalize",
    )  # fmt: skip
    config, layout = tiny.config_of(kind), VIDEO_CLASSES[kind].layout
    made, usual = layout(config, dict.fromkeys(names)), layout(config, {})
    assert made.sampling == usual.sampling
    assert made.digest == usual.digest


def test_another_number_of_frames_in_the_file_changes_the_answer() -> None:
    """Of Mage-VL, whose tower rotates by the numbers of frames: by 5 each, not by 1."""
    engine, (text, _) = tiny_engine("mage_vl"), PROMPTS["one video"]
    others = dataclasses.replace(ONE, seconds=2.6)
    assert ONE.numbers == [0, 1, 2, 3, 4, 5]
    assert others.numbers == [0, 5, 10, 15, 20, 25]
    [first], [second] = (run(engine, request(engine, text, [each])) for each in (ONE, others))
    assert second == expected("mage_vl", text, [others])
    assert first != second


def test_settings_for_videos_of_mage_vl() -> None:
    """They are those of pictures; each frame has the limits of those."""
    usual = Sampling(2.0, 1, 32, 1024, 2048, 8, group=1, each=True)
    assert watching.sampling_of("mage_vl") == usual
    assert usual.size(9, 20, 30) == Sampling(2.0, 1, 1, 1024, 2048, 8, group=1).size(1, 20, 30)
    settings = {"max_pixels": 1003520, "max_frames": 500}
    config = {"model_type": "mage_vl", "vision_config": {"patch_size": 16}}
    large = VIDEO_CLASSES["mage_vl"].layout(config, settings).sampling
    assert large.max_frames == 21
    assert dataclasses.replace(large, max_frames=99).count(10**6, 10**6) == 33


def test_settings_for_videos_of_llava_onevision(tmp_path: Path) -> None:
    """Frames are squares of the tower's size, and as many as have 21,400 tokens at most."""
    usual = Sampling(2.0, 32, 32, 1, MAX_SAMPLED_PIXELS, 16, group=1, frame_pixels=256)
    for own, most in (({}, 32), ({"num_frames": 8}, 8), ({"num_frames": 10**6}, MAX_FRAMES)):
        loaded = _changed(tmp_path, watching.LLAVA, video_preprocessor_config=own)
        assert loaded.vision.processor.videos.sampling == (
            dataclasses.replace(usual, min_frames=most, max_frames=most)
        )
    published = {"vision_config": {"image_size": 384, "patch_size": 14}}
    layout = VIDEO_CLASSES[watching.LLAVA].layout(published, {"num_frames": 1000})
    assert layout.grid(384, 384) == (14, 14)
    assert layout.sampling.max_frames == 109
    for height, width in ((48, 64), (64, 64), (1000, 10)):
        assert usual.size(8, height, width) == (16, 16)
    size = {"height": 24, "width": 24}
    loaded = _changed(tmp_path, watching.LLAVA, video_preprocessor_config={"size": size})
    assert "is not that of config.json, 16" in loaded.vision.processor.why_no_videos


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("max_soft_tokens", 0, "max_soft_tokens 0 is not a number"),
        ("max_soft_tokens", 10**6, "max_soft_tokens 1000000 is not a number up to 524288"),
        ("num_frames", "8", "num_frames 8 is not a number"),
        ("pooling_kernel_size", 3, "pooling_kernel_size is not that of config.json"),
        ("image_std", [0, 0, 0], "image_std [0, 0, 0] is not three numbers"),
    ],
)
def test_gemma_4_with_wrong_settings_for_videos(
    tmp_path: Path, field: str, value: object, reason: str
) -> None:
    document = {"image_processor": tiny.settings_of("gemma4"), "video_processor": {field: value}}
    loaded = _changed(tmp_path, "gemma4", processor_config=document)
    assert reason in loaded.vision.processor.why_no_videos


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("fps", 0, "fps 0 is not a number up to 60"),
        ("fps", "2", "fps 2 is not a number"),
        ("fps", float("nan"), "fps nan is not a number"),
        ("max_frames", -1, "max_frames -1 is not a number"),
        ("patch_size", 5, "patch_size 5 is not that of config.json"),
        ("temporal_patch_size", 3, "temporal_patch_size 3 is not that of config.json"),
        ("image_mean", [0.5], "image_mean [0.5] is not three numbers"),
        ("size", {"longest_edge": 0.0}, "max_pixels 0.0 is not a number"),
    ],
)
def test_models_with_wrong_settings_read_pictures(
    tmp_path: Path, field: str, value: object, reason: str
) -> None:
    loaded = _changed(tmp_path, video_preprocessor_config={"patch_size": 4, field: value})
    assert loaded.vision.processor.videos is None
    assert reason in loaded.vision.processor.why_no_videos
    assert any("videos are not read" in note and reason in note for note in loaded.notes)
