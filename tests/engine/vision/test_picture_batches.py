"""Pictures that one call of the vision tower encodes together."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.core.sequence import Sequence
from modelpack_engine.engine import Engine
from modelpack_engine.request import Media, SamplingParams
from modelpack_engine.vision import encoder as encoder_module
from modelpack_engine.vision.encoder import VisionEncoder, open_vision
from modelpack_engine.vision.models import CLASSES, VisionModel
from modelpack_engine.vision.tower_call import TowerCall
from tests.engine.vision import tiny
from tests.engine.vision.tiny import KINDS, kinds, picture, request, run

BATCHED = [kind for kind in KINDS if CLASSES[tiny.config_of(kind)["model_type"]].batched]
ASK = "<image>What is it?"
PICTURES = frozenset({"pixel_values"})


@pytest.fixture(autouse=True)
def joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode pictures together as on a GPU."""
    monkeypatch.setattr(encoder_module, "joins", lambda: True)


class RecordingModel:
    """Records the number of pictures of each call, which have so many tokens each."""

    def __init__(self, model: VisionModel, tokens: int) -> None:
        self._model, self._tokens, self.calls = model, tokens, list[int]()

    def embed(self, token_ids: mx.array, inputs: Mapping[str, mx.array]) -> mx.array:
        if inputs:
            self.calls.append(token_ids.size // self._tokens)
        return self._model.embed(token_ids, inputs)


def recorded(engine: Engine, media: Media) -> RecordingModel:
    """Return the tower of an engine, whose calls are recorded from now on."""
    assert engine.vision is not None
    encoder: Any = engine.vision.encoder
    encoder._model = made = RecordingModel(encoder._model, len(media.token_ids))
    return made


def encoder_of(engine: Engine) -> VisionEncoder:
    assert engine.vision is not None
    return engine.vision.encoder


@pytest.mark.parametrize("kind", kinds(*BATCHED))
def test_embeddings_are_those_of_single_pictures(kind: str) -> None:
    """Those of other shapes with as many patches too. NaN of one does not reach another."""
    vision = tiny.tiny_loaded(kind).vision
    assert vision is not None
    assert "pixel_values" in vision.encoder._batched, "open_vision has tried it"
    model, token_id = vision.encoder._model, vision.processor.image_token_id
    for height, width in ((20, 30), (64, 64), (100, 48)):
        sizes = [(height, width), (width, height), *[(height, width)] * 3]
        pictures = [picture(seed, *size) for seed, size in enumerate(sizes, 1)]
        media = [vision.processor.place([token_id], [each])[1][0] for each in pictures]
        shapes = {name: array.shape for name, array in media[0].inputs.items()}
        batch = [each for each in media if {n: a.shape for n, a in each.inputs.items()} == shapes]
        assert len(batch) > 3
        alone = [TowerCall(model, [each]).finish()[0] for each in batch]
        together = TowerCall(model, batch).finish()
        assert len(together) == len(batch)
        largest = max(float(mx.abs(each).max()) for each in alone)
        for each, found in zip(alone, together, strict=True):
            assert each.shape == found.shape
            assert float(mx.abs(each - found).max()) <= 1e-5 * largest
        assert float(mx.abs(together[0] - together[-1]).max()) > 0.1 * largest
        pixels = np.full_like(batch[0].inputs["pixel_values"], np.nan)
        broken = dataclasses.replace(batch[0], inputs={**batch[0].inputs, "pixel_values": pixels})
        nan, *rest = TowerCall(model, [broken, *batch[1:]]).finish()
        assert mx.isnan(nan).any()
        for each, found in zip(alone[1:], rest, strict=True):
            assert float(mx.abs(each - found).max()) <= 1e-5 * largest


@pytest.mark.parametrize("kind", kinds("gemma3", "idefics3", "llava", "qwen2_5_vl", "qwen3_vl"))
def test_requests_that_arrive_at_once_take_fewer_calls(kind: str) -> None:
    """Of six requests, four may run: as many wait for the first call as could run next."""
    pictures = [picture(seed) for seed in range(6)]
    tokens = []
    for batched, calls in ((PICTURES, [5, 1]), (frozenset(), [1] * 6)):
        engine = tiny.tiny_engine(kind)
        made = [request(engine, ASK, [each]) for each in pictures]
        tower = recorded(engine, made[0].media[0])
        encoder_of(engine)._batched = batched
        tokens.append(run(engine, *made))
        assert tower.calls == calls
        assert encoder_of(engine).misses == 6
    assert tokens[0] == tokens[1] == [tiny.expected(kind, ASK, [each]) for each in pictures]


def test_pictures_of_other_shapes_have_calls_of_their_own() -> None:
    engine = tiny.tiny_engine("qwen2_vl")
    sizes = [(20, 30), (64, 64), (20, 30), (64, 64)]
    made = [request(engine, ASK, [picture(i, *size)]) for i, size in enumerate(sizes)]
    tower = recorded(engine, made[0].media[0])
    run(engine, *made)
    assert tower.calls == [2, 2]


def test_a_call_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures of one request are encoded together too."""
    pictures = [picture(seed) for seed in range(5)]
    text = "<image>" * 5
    for bound, calls in ((2.5, [2, 2, 1]), (0.5, [1] * 5)):
        engine = tiny.tiny_engine("llava", max_num_batched_tokens=256)
        made = request(engine, text, pictures)
        nbytes = made.media[0].inputs["pixel_values"].nbytes
        monkeypatch.setattr(encoder_module, "MAX_BATCH_BYTES", int(bound * nbytes))
        tower = recorded(engine, made.media[0])
        assert run(engine, made) == [tiny.expected("llava", text, pictures)]
        assert tower.calls == calls


def test_a_step_with_tokens_calls_the_tower_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another request gets a token between two calls, however many pictures the call encodes."""
    pictures = [picture(seed) for seed in range(8)]
    engine = tiny.tiny_engine("llava", max_num_batched_tokens=1024)
    made = request(engine, "<image>" * 8, pictures)
    nbytes = made.media[0].inputs["pixel_values"].nbytes
    monkeypatch.setattr(encoder_module, "MAX_BATCH_BYTES", 3 * nbytes)
    tower = recorded(engine, made.media[0])
    text = request(engine, "hello", [], count=60)
    tokens = tiny.run_beside_text(engine, made, text, tower.calls)
    assert tower.calls == [3, 3, 2]
    assert tokens == tiny.expected("llava", "<image>" * 8, pictures)


@pytest.mark.parametrize("rest", ["", " It is large, and there is text in it, but hard to read."])
def test_pictures_with_cached_blocks_are_not_encoded(rest: str) -> None:
    """Embeddings are dropped, not keys and values; the request is admitted first, or it waits."""
    engine = tiny.tiny_engine("llava", block_size=8)
    run(engine, request(engine, ASK, [picture(1)]))
    made = [request(engine, ASK, [picture(seed)]) for seed in (2, 3)]
    tower = recorded(engine, made[0].media[0])
    encoder_of(engine)._kept.clear()
    run(engine, *made, request(engine, ASK + rest, [picture(1)]))
    assert tower.calls == [2]


def test_owners_get_their_own_embeddings() -> None:
    """Two owners send the same picture, and one of them another one."""
    engine = tiny.tiny_engine("llava", enable_prefix_caching=False)
    sent = [(b"a", 1), (b"b", 1), (b"b", 2)]
    made = [request(engine, ASK, [picture(seed)], owner=owner) for owner, seed in sent]
    tower = recorded(engine, made[0].media[0])
    found = run(engine, *made)
    assert found == [tiny.expected("llava", ASK, [picture(seed)]) for _, seed in sent]
    assert tower.calls == [3]
    assert set(encoder_of(engine)._kept) == {(each.owner, each.media[0].digest) for each in made}
    run(engine, request(engine, ASK, [picture(2)], owner=b"a"))
    assert tower.calls == [3, 1], "the other owner's is not found"


class PickyModel:
    """Fails for pixels that are not numbers; records the number of pictures of each call."""

    def __init__(self, model: VisionModel) -> None:
        self._model, self.calls = model, list[int]()

    def embed(self, token_ids: mx.array, inputs: Mapping[str, mx.array]) -> mx.array:
        if inputs:
            pixels = inputs["pixel_values"]
            self.calls.append(len(pixels))
            if mx.isnan(pixels).any():
                raise RuntimeError("cannot encode")
        return self._model.embed(token_ids, inputs)


def test_a_bad_picture_fails_its_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    """After the call for all has failed, each of its pictures has one of its own."""
    engine = tiny.tiny_engine("llava")
    made = [request(engine, ASK, [picture(seed)]) for seed in range(4)]
    pixels = np.full_like(made[1].media[0].inputs["pixel_values"], np.nan)
    bad = dataclasses.replace(made[1].media[0], inputs={"pixel_values": pixels})
    made[1] = dataclasses.replace(made[1], media=(bad,))
    encoder: Any = encoder_of(engine)
    encoder._model = tower = PickyModel(encoder._model)
    for index, each in enumerate(made):
        engine.add_request(str(index), each)
    tokens: dict[str, list[int]] = {str(index): [] for index in range(4)}
    failed = []
    while engine.has_work:
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
            failed += [event.request_id] * bool(event.error)
    assert failed == ["1"]
    for index in (0, 2, 3):
        assert tokens[str(index)] == tiny.expected("llava", ASK, [picture(index)])
    assert tower.calls == [4, 1, 1, 1, 1]
    assert "4 pictures are encoded one by one: cannot encode" in caplog.text
    more = [request(engine, ASK, [picture(seed)]) for seed in (7, 8)]
    run(engine, *more)
    assert tower.calls[5:] == [2], "later pictures are encoded together again"


class SizedModel:
    """Embeds every token as its picture's first pixel."""

    def __init__(self) -> None:
        self.calls = 0

    def embed(self, token_ids: mx.array, inputs: Mapping[str, mx.array]) -> mx.array:
        self.calls += 1
        return mx.repeat(inputs["pixel_values"][:, :1], 3, axis=0) * mx.ones((1, 4))


def _numbered(number: int) -> Media:
    pixels = np.full((1, 8), number, np.float32)
    return Media(0, (1, 2, 3), bytes([number]), {"pixel_values": pixels})


def test_pictures_that_wait_take_about_half_of_the_cache() -> None:
    """Each has 48 bytes of embeddings; while three wait, no more are encoded ahead."""
    model = SizedModel()
    encoder = VisionEncoder(model, max_bytes=6 * 48, batched=PICTURES)
    media = [_numbered(number) for number in range(9)]
    user = Sequence("r", [1, 2, 3, 4], SamplingParams())

    def prepare(number: int, *waiting: int) -> None:
        encoder.begin_step()
        others = ((b"", media[each]) for each in waiting)
        assert encoder.prepare(user, media[number], alone=False, waiting=others)
        assert encoder._step[b"", media[number].digest].tolist() == [[number] * 4] * 3

    prepare(0, 0, 1, 2, 3)
    assert (model.calls, encoder.misses, encoder.nbytes) == (1, 4, 4 * 48)
    prepare(4, 5, 6)  # alone
    assert (model.calls, encoder.misses) == (2, 5)
    prepare(1)  # from the cache
    prepare(5, 5, 6, 7)
    assert (model.calls, encoder.misses, encoder.hits) == (3, 8, 1)
    assert encoder.nbytes == 6 * 48
    assert encoder._ahead == {(b"", media[each].digest) for each in (2, 3, 6, 7)}


def test_an_evicted_picture_frees_its_memory() -> None:
    """Each has 4 MiB of embeddings, of which none is a part of a larger array."""
    encoder = VisionEncoder(WideModel(), max_bytes=9 << 20, batched=PICTURES)
    before = mx.get_active_memory()
    waiting = [(b"", _numbered(number)) for number in range(1, 4)]
    tiny.embeddings(encoder, _numbered(0), waiting=waiting)
    mx.eval(*encoder._kept.values())
    assert len(encoder._kept) == 2
    assert mx.get_active_memory() - before < 10 << 20


class WideModel(SizedModel):
    """Embeds 3 tokens as 4 MiB."""

    def embed(self, token_ids: mx.array, inputs: Mapping[str, mx.array]) -> mx.array:
        return mx.repeat(super().embed(token_ids, inputs), (4 << 20) // 48, axis=-1)


class MixingModel:
    """Adds pictures to the next ones, as a tower that attends to all of a call's would.

    Those in the places before `first` are as alone.
    """

    def __init__(self, model: VisionModel, message: str, first: int) -> None:
        self._model, self._message, self._first = model, message, first

    def embed(self, token_ids: mx.array, inputs: Mapping[str, mx.array]) -> mx.array:
        made = self._model.embed(token_ids, inputs)
        if len(inputs["pixel_values"]) == 1:
            return made
        if self._message:
            raise ValueError(self._message)
        is_mixed = mx.arange(len(made))[:, None] >= 16 * self._first
        return made + mx.where(is_mixed, mx.roll(made, 16, 0), 0)


@pytest.mark.parametrize(
    ("message", "first", "logged"),
    [
        ("", 0, "together, they have other embeddings"),
        ("", 2, "together, they have other embeddings"),  # as mlx-vlm's GLM-4V
        ("one grid only", 0, "one grid only"),
    ],
)
def test_a_tower_that_mixes_pictures_encodes_them_one_by_one(
    message: str, first: int, logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = tiny.tiny_loaded("llava")
    assert loaded.vision is not None
    model = loaded.vision.encoder._model
    encode = lambda text: loaded.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    given = tiny.config_of("llava"), tiny.settings_of("llava"), encode
    with caplog.at_level(logging.WARNING):
        assert open_vision(model, *given).encoder._batched == PICTURES
        assert not caplog.records
        assert not open_vision(MixingModel(model, message, first), *given).encoder._batched
    assert f"pictures are encoded one by one: {logged}" in caplog.text


def test_the_types_in_the_document() -> None:
    """docs/pictures.md says of each type whether its pictures are encoded together."""
    path = Path(__file__).parents[3] / "docs/pictures.md"
    section = path.read_text().partition("\n### Pictures encoded together\n")[2]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    found = {kind: cells[1] for cells in rows for kind in re.findall(r"`([^`]+)`", cells[0])}
    seen = {kind: needs for kind, needs in CLASSES.items() if needs.pictures}
    batched = {kind: "yes" if needs.batched else "no" for kind, needs in seen.items()}
    assert found == batched
