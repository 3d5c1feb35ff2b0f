"""Sounds, and frames of videos, that one call of their tower encodes together."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.engine import Engine
from modelpack_engine.models import LoadedModel
from modelpack_engine.request import EngineRequest, Media
from modelpack_engine.vision import encoder as encoder_module
from modelpack_engine.vision.encoder import Vision, VisionEncoder
from modelpack_engine.vision.models import CLASSES, VisionModel
from modelpack_engine.vision.sounds import SOUND_CLASSES, Sound
from modelpack_engine.vision.tower_call import TowerCall
from modelpack_engine.vision.videos import VIDEO_CLASSES, Video
from tests.engine.vision import hearing, tiny, watching
from tests.engine.vision.hearing import sound
from tests.engine.vision.tiny import kinds, picture, run
from tests.engine.vision.watching import video

WATCHING = [kind for kind in watching.KINDS if CLASSES[kind].batched]
CONTENTS = {"sound": "input_features", "video": "pixel_values_videos"}
HEAR, WATCH = "<audio>What is said?", "<video>What happens?"


@pytest.fixture(autouse=True)
def joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode files together as on a GPU."""
    monkeypatch.setattr(encoder_module, "joins", lambda: True)


def vision_of(loaded: LoadedModel | Engine) -> Vision:
    assert loaded.vision is not None
    return loaded.vision


def heard(vision: Vision, *counts: int) -> list[Media]:
    """Return sounds of so many samples, which differ."""
    assert vision.processor.sounds is not None
    random = np.random.default_rng(0)
    samples = [random.normal(0, 0.1, count).astype(np.float32) for count in counts]
    return [vision.processor.sounds.media(Sound(each)) for each in samples]


def watched(vision: Vision, kind: str, *files: Video) -> list[Media]:
    """Return the groups of frames of videos."""
    assert vision.processor.videos is not None
    videos: Any = watching.fitted(kind, [*files])
    return [each for shown in videos for each in vision.processor.videos.place(shown)[1]]


def joined(media: list[Media]) -> Iterator[list[Media]]:
    """Yield those of the same shapes."""
    shapes = lambda each: sorted(encoder_module._shapes(each).items())  # noqa: E731
    for _, batch in groupby(sorted(media, key=shapes), shapes):
        yield [*batch]


def check_batch(model: VisionModel, batch: list[Media], content: str) -> None:
    """Embeddings are those of single calls, and NaN of one file does not reach another."""
    alone = [TowerCall(model, [each]).finish()[0] for each in batch]
    together = TowerCall(model, batch).finish()
    assert len(together) == len(batch) > 1
    largest = max(float(mx.abs(each).max()) for each in alone)
    for each, found in zip(alone, together, strict=True):
        assert each.shape == found.shape
        assert float(mx.abs(each - found).max()) <= 1e-5 * largest
    least = min(each.shape[-2] for each in together)
    first, last = (together[index][..., :least, :] for index in (0, -1))
    assert float(mx.abs(first - last).max()) > 0.05 * largest
    nan = np.full_like(batch[0].inputs[content], np.nan)
    broken = dataclasses.replace(batch[0], inputs={**batch[0].inputs, content: nan})
    first, *rest = TowerCall(model, [broken, *batch[1:]]).finish()
    assert mx.isnan(first).any()
    for each, found in zip(alone[1:], rest, strict=True):
        assert float(mx.abs(each - found).max()) <= 1e-5 * largest


@pytest.mark.parametrize("kind", kinds(*hearing.KINDS))
def test_embeddings_are_those_of_single_sounds(kind: str) -> None:
    """Those with rows of padding too, of which sounds of the same shapes have other numbers."""
    vision = vision_of(hearing.loaded(kind))
    assert "input_features" in vision.encoder._batched, "open_vision has tried it"
    counts = (8000, 8001, 16_129, 16_129, 16_250, 40_400, 40_321, 40_321)
    batches = [batch for batch in joined(heard(vision, *counts)) if len(batch) > 1]
    assert len(batches) >= 2
    for batch in batches:
        check_batch(vision.encoder._model, batch, "input_features")
    if kind == "gemma4":
        masks = [[each.inputs["input_features_mask"] for each in batch] for batch in batches]
        assert any(not mask.all() for of_batch in masks for mask in of_batch)
        assert any(len({int(mask.sum()) for mask in of_batch}) > 1 for of_batch in masks)


@pytest.mark.parametrize("kind", kinds(*WATCHING))
def test_embeddings_are_those_of_single_groups_of_frames(kind: str) -> None:
    vision = vision_of(tiny.tiny_loaded(kind))
    assert "pixel_values_videos" in vision.encoder._batched, "open_vision has tried it"
    media = watched(
        vision, kind, video(1, 4), video(2, 4), video(3, 4, 16, 24), video(4, 4, 16, 24)
    )
    batches = [*joined(media)]
    assert len(batches) == 2
    for batch in batches:
        check_batch(vision.encoder._model, batch, "pixel_values_videos")


def test_classes() -> None:
    """All that hear or watch are tested above.

    But Phi-4 Multimodal has tests of its own, and frames of Mage-VL are pictures.
    """
    assert {*hearing.KINDS, "phi4mm"} == set(SOUND_CLASSES)
    assert {*WATCHING, "mage_vl"} == set(VIDEO_CLASSES)


class RecordingModel:
    """Records the content of each call, and the number of its files.

    It fails for content that is not a number.
    """

    def __init__(self, model: VisionModel) -> None:
        self._model, self.calls = model, list[tuple[str, int]]()

    def embed(self, token_ids: mx.array, inputs: Mapping[str, mx.array]) -> mx.array:
        if inputs:
            (content,) = encoder_module._KINDS.keys() & inputs.keys()
            # Of Qwen's patches, the grid has a row for each file.
            self.calls.append((content, min(map(len, inputs.values()))))
            if mx.isnan(inputs[content]).any():
                raise RuntimeError("cannot encode")
        return self._model.embed(token_ids, inputs)


def recorded(engine: Engine) -> RecordingModel:
    """Return the towers of an engine, whose calls are recorded from now on."""
    encoder: Any = vision_of(engine).encoder
    encoder._model = made = RecordingModel(encoder._model)
    return made


@pytest.mark.parametrize("kind", kinds(*hearing.KINDS))
def test_sounds_that_arrive_at_once_take_fewer_calls(kind: str) -> None:
    """Of six requests, four may run: as many wait for the first call as could run next."""
    sounds = [sound(seed) for seed in range(6)]
    expected = [hearing.expected(kind, HEAR, [each]) for each in sounds]
    for batched, calls in (("input_features", [5, 1]), ("pixel_values", [1] * 6)):
        engine = hearing.engine_of(kind)
        vision_of(engine).encoder._batched = frozenset({batched})
        made = [hearing.request(engine, HEAR, [each]) for each in sounds]
        towers = recorded(engine)
        assert run(engine, *made) == expected
        assert towers.calls == [("input_features", count) for count in calls]


@pytest.mark.parametrize("kind", kinds(*WATCHING))
def test_videos_that_arrive_at_once_take_fewer_calls(kind: str) -> None:
    videos = [video(seed, 4) for seed in (1, 2, 3)]
    engine = tiny.tiny_engine(kind, max_num_batched_tokens=256)
    made = [watching.request(engine, WATCH, [each]) for each in videos]
    towers = recorded(engine)
    assert run(engine, *made) == [watching.expected(kind, WATCH, [each]) for each in videos]
    groups = sum(len(each.media) for each in made)
    # The last frame of LLaVA-OneVision's has one token more than others.
    calls = [9, 3] if kind == watching.LLAVA else [groups]
    assert towers.calls == [("pixel_values_videos", count) for count in calls]


@pytest.mark.parametrize("kind", kinds("qwen3_omni_moe"))
def test_kinds_are_not_encoded_together(kind: str) -> None:
    """Two of each wait, in turns."""
    engine = tiny.tiny_engine(kind, max_num_seqs=8, max_num_batched_tokens=512)
    image = "<image>What is it?"
    files = [(sound(seed), picture(seed), video(seed, 4)) for seed in (1, 2)]
    made, expected = [], []
    for hear, see, watch in files:
        made += [
            hearing.request(engine, HEAR, [hear]),
            hearing.request(engine, image, [see]),
            watching.request(engine, WATCH, [watch]),
        ]
        expected += [
            hearing.expected(kind, HEAR, [hear]),
            hearing.expected(kind, image, [see]),
            watching.expected(kind, WATCH, [watch]),
        ]
    towers = recorded(engine)
    assert run(engine, *made) == expected
    counts = {"input_features": 2, "pixel_values": 2, "pixel_values_videos": 4}
    assert sorted(towers.calls) == [*counts.items()]
    assert vision_of(engine).encoder._batched == counts.keys()


@pytest.mark.parametrize("kind", kinds("gemma4", "qwen3_omni_moe"))
def test_sounds_of_other_shapes_have_calls_of_their_own(kind: str) -> None:
    engine = hearing.engine_of(kind)
    sounds = [sound(seed, seconds) for seed, seconds in enumerate((1.0, 1.5, 1.0, 1.5))]
    made = [hearing.request(engine, HEAR, [each]) for each in sounds]
    towers = recorded(engine)
    assert run(engine, *made) == [hearing.expected(kind, HEAR, [each]) for each in sounds]
    assert towers.calls == [("input_features", 2)] * 2


def test_frames_of_other_shapes_have_calls_of_their_own() -> None:
    engine = tiny.tiny_engine("qwen2_5_vl", max_num_batched_tokens=256)
    videos = [video(1, 4), video(2, 4, 16, 24), video(3, 4)]
    made = [watching.request(engine, WATCH, [each]) for each in videos]
    towers = recorded(engine)
    expected = [watching.expected("qwen2_5_vl", WATCH, [each]) for each in videos]
    assert run(engine, *made) == expected
    assert [count for _, count in towers.calls] == [4, 2]


def test_a_call_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bytes of the inputs, and of files that are looked at."""
    kind, shown = "qwen2_5_vl", video(1, 8)
    for bound, candidates, calls in ((2.5, 100, [2, 2]), (0.5, 100, [1] * 4), (9, 3, [3, 1])):
        engine = tiny.tiny_engine(kind, max_num_batched_tokens=256)
        made = watching.request(engine, WATCH, [shown])
        nbytes = made.media[0].inputs["pixel_values_videos"].nbytes
        monkeypatch.setattr(encoder_module, "MAX_BATCH_BYTES", int(bound * nbytes))
        monkeypatch.setattr(encoder_module, "_MAX_CANDIDATES", candidates)
        towers = recorded(engine)
        assert run(engine, made) == [watching.expected(kind, WATCH, [shown])]
        assert [count for _, count in towers.calls] == calls


def test_a_step_with_tokens_calls_the_tower_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another request gets a token between two calls, each of which encodes three groups."""
    kind = "qwen2_5_vl"
    engine = tiny.tiny_engine(kind, max_num_batched_tokens=256)
    videos: list[Any] = [video(1, 8), video(2, 8)]
    text = "<video> or <video>?"
    made = watching.request(engine, text, videos)
    nbytes = made.media[0].inputs["pixel_values_videos"].nbytes
    monkeypatch.setattr(encoder_module, "MAX_BATCH_BYTES", 3 * nbytes)
    towers = recorded(engine)
    beside = watching.request(engine, "hello", [], count=60)
    tokens = tiny.run_beside_text(engine, made, beside, towers.calls)
    assert tokens == watching.expected(kind, text, videos)
    assert [count for _, count in towers.calls] == [3, 3, 2]


def broken(request: EngineRequest) -> EngineRequest:
    """Return a request whose first file has content that is not a number."""
    first, *rest = request.media
    content = encoder_module._content(first)
    inputs = {**first.inputs, content: np.full_like(first.inputs[content], np.nan)}
    return dataclasses.replace(request, media=(dataclasses.replace(first, inputs=inputs), *rest))


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        pytest.param("sound", "gemma4", marks=pytest.mark.long),
        pytest.param("sound", "qwen3_omni_moe", marks=pytest.mark.long),
        ("video", "qwen2_5_vl"),
    ],
)
def test_a_bad_file_fails_its_request_alone(
    what: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After the call for all has failed, each of its files has one of its own."""
    content = CONTENTS[what]
    if what == "sound":
        engine = hearing.engine_of(kind)
        files: list[Any] = [sound(seed) for seed in range(6)]
        made = [hearing.request(engine, HEAR, [each]) for each in files]
        expected = [hearing.expected(kind, HEAR, [each]) for each in files]
    else:
        engine = tiny.tiny_engine(kind)
        files = [video(seed, 4) for seed in range(6)]
        made = [watching.request(engine, WATCH, [each]) for each in files]
        expected = [watching.expected(kind, WATCH, [each]) for each in files]
    towers = recorded(engine)
    for index, each in enumerate([made[0], broken(made[1]), made[2], made[3]]):
        engine.add_request(str(index), each)
    tokens: dict[str, list[int]] = {str(index): [] for index in range(4)}
    failed = []
    while engine.has_work:
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
            if event.error:
                failed.append((event.request_id, str(event.error)))
    assert failed == [("1", f"messages: the model cannot encode this {what}")]
    assert [tokens[str(index)] for index in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]
    # The other groups of a bad video are not encoded.
    groups = len(made[0].media)
    calls = [(content, 4 * groups), *[(content, 1)] * (3 * groups + 1)]
    assert towers.calls == calls
    assert f"{4 * groups} {what}s are encoded one by one: cannot encode" in caplog.text
    assert run(engine, *made[4:]) == expected[4:]
    calls.append((content, 2 * groups))
    assert towers.calls == calls, "later files are encoded together again"


class MixingModel:
    """Adds a call's embeddings of one kind to each other, as a tower that mixes files would."""

    def __init__(self, model: VisionModel, content: str) -> None:
        self._model, self._content, self._rows = model, content, 0

    def embed(self, token_ids: mx.array, inputs: Mapping[str, mx.array]) -> mx.array:
        made = self._model.embed(token_ids, inputs)
        if self._content not in inputs:
            return made
        rows = len(inputs[self._content])
        self._rows = self._rows or rows
        return made + mx.roll(made, made.shape[-2] // 2, -2) if rows > self._rows else made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def opened(kind: str, monkeypatch: pytest.MonkeyPatch, mixed: str) -> Vision:
    """Return the vision of a model whose tower mixes files of a kind; load tests it."""
    embed = encoder_module._test
    monkeypatch.setattr(
        encoder_module,
        "_test",
        lambda tower, model, *given: embed(tower, MixingModel(model, mixed), *given),
    )
    return vision_of(loaded(kind))


def loaded(kind: str) -> LoadedModel:
    return (tiny.tiny_loaded if kind in tiny.QWEN else hearing.loaded)(kind)


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        *(pytest.param("sound", k, marks=pytest.mark.long) for k in hearing.KINDS),
        ("video", "qwen2_5_vl"),
        pytest.param("video", "qwen3_omni_moe", marks=pytest.mark.long),
    ],
)
def test_a_tower_that_mixes_files_encodes_them_one_by_one(
    what: str, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Others are still encoded together."""
    with caplog.at_level(logging.WARNING):
        vision = opened(kind, monkeypatch, CONTENTS[what])
    logged = f"{what}s are encoded one by one: together, they have other embeddings"
    assert [record.getMessage() for record in caplog.records] == [logged]
    monkeypatch.undo()
    monkeypatch.setattr(encoder_module, "joins", lambda: True)
    whole = vision_of(loaded(kind)).encoder._batched
    assert CONTENTS[what] in whole
    assert vision.encoder._batched == whole - {CONTENTS[what]}


@pytest.mark.long
def test_rows_of_padding_are_found(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The control: mlx-vlm's Gemma 4 takes the rows after a sound for those of the next one."""
    vision = vision_of(hearing.loaded("gemma4"))
    model: Any = vision.encoder._model
    kind = type(model.audio_tower)
    monkeypatch.setattr(kind, "__call__", kind.__mro__[1].__call__)
    first, second = heard(vision, 16_129, 16_129)
    made = {each: tiny.embeddings(VisionEncoder(model), each) for each in (first, second)}
    assert not encoder_module._is_batched(model, made)
    assert "sounds are encoded one by one: together, they have other embeddings" in caplog.text
    with pytest.raises(AssertionError):
        check_batch(model, [first, second], "input_features")
