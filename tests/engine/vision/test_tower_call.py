"""Calls of a tower that are evaluated in slices, beside sequences that decode."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Parts
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from modelpack_engine.core.sequence import Sequence
from modelpack_engine.engine import Engine
from modelpack_engine.request import EngineRequest, Media, MediaSource, SamplingParams
from modelpack_engine.vision import encoder as encoder_module
from modelpack_engine.vision import tower_call
from modelpack_engine.vision.encoder import Vision, VisionEncoder
from modelpack_engine.vision.tower_call import BlockOutputs, TowerCall
from tests.engine.vision import hearing, tiny
from tests.engine.vision.test_media_batches import heard
from tests.engine.vision.tiny import KINDS, kinds, picture, request, run

ASK = "<image>What is it?"
ENGINES = kinds("gemma3", "idefics3", "llava", "pixtral", "qwen2_5_vl", "qwen3_vl", "mllama")


class Tower(nn.Module):  # type: ignore[misc]
    """Ten blocks, each of which has a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(10)]
        self.language_model = nn.Sequential(nn.Linear(8, 8))
        mx.eval(self.parameters())

    def embed(self, token_ids: mx.array, inputs: Mapping[str, mx.array]) -> mx.array:
        x = inputs["pixel_values"]
        for block in self.blocks:
            x = block(x)
        return x + 1


def media_of(number: int, start: int = 0) -> Media:
    pixels = np.full((3, 8), number, np.float32)
    return Media(start, (1, 2, 3), bytes([number]), {"pixel_values": pixels})


def num_left(call: TowerCall, path: Path) -> int:
    """Return how many of the blocks are not evaluated."""
    mx.export_to_dot(str(path), *call._parts)
    return path.read_text().count('"Tanh"')


@pytest.mark.parametrize("most", [1, 3, 10, 99])
def test_a_slice_has_so_many_blocks(most: int, tmp_path: Path) -> None:
    tower = Tower()
    outputs = BlockOutputs(tower)
    expected = TowerCall(tower, [media_of(1)]).finish()
    call = TowerCall(tower, [media_of(1)], outputs=outputs)
    assert call.advance(most) == 0  # copies the inputs
    assert not call._parts
    assert call.advance(most) == 0  # builds the graph
    left = num_left(call, tmp_path / "graph")
    assert left == 10
    while not call.is_evaluated:
        count = call.advance(most)
        before, left = left, num_left(call, tmp_path / "graph")
        assert count == before - left == min(most, before)
    assert left == 0
    assert mx.array_equal(call.finish()[0], expected[0])


def test_the_rest_is_evaluated_at_once(tmp_path: Path) -> None:
    tower = Tower()
    expected = TowerCall(tower, [media_of(1)]).finish()
    outputs = BlockOutputs(tower)
    for slices in range(6):
        call = TowerCall(tower, [media_of(1)], outputs=outputs)
        for _ in range(slices):
            call.advance(1)
        (found,) = call.finish()
        assert call.is_evaluated
        assert mx.array_equal(found, expected[0])


def test_blocks_outside_of_a_call_are_not_recorded() -> None:
    tower = Tower()
    outputs = BlockOutputs(tower)
    assert outputs.found
    tower.embed(mx.array([1]), {"pixel_values": mx.ones((3, 8))})
    with outputs.recorded() as recorded:
        tower.language_model(mx.ones((1, 8)))
        assert not recorded
    assert not BlockOutputs(tiny.tiny_loaded).found  # type: ignore[arg-type]


def test_evaluated_blocks_free_their_memory() -> None:
    """Each of ten blocks returns 4 MiB."""
    tower = Tower()
    outputs = BlockOutputs(tower)
    pixels = np.ones((1 << 17, 8), np.float32)
    media = Media(0, (1, 2, 3), b"large", {"pixel_values": pixels})
    call = TowerCall(tower, [media], outputs=outputs)
    call.advance(1)
    call.advance(1)
    gc.collect()
    before = mx.get_active_memory()
    while not call.is_evaluated:
        call.advance(1)
        assert mx.get_active_memory() - before <= 5 << 20


def check_slices(vision: Vision, media: Parts[Media]) -> None:
    """The bits are those of an evaluation at once; the tower has blocks."""
    model, outputs = vision.encoder._model, vision.encoder._outputs
    expected = TowerCall(model, media).finish()
    call = TowerCall(model, media, outputs=outputs)
    steps = 0
    while not call.is_evaluated:
        call.advance(1)
        steps += 1
    assert steps >= 3, "there is one block, at least"
    for each, found in zip(expected, call.finish(), strict=True):
        assert each.dtype == found.dtype
        assert np.array(each).tobytes() == np.array(found).tobytes()


@pytest.mark.parametrize("kind", kinds(*(kind for kind in KINDS if kind != "gemma4_unified")))
def test_embeddings_are_those_of_one_evaluation(kind: str) -> None:
    vision = tiny.tiny_loaded(kind).vision
    assert vision is not None
    token_id = vision.processor.image_token_id
    for each in (picture(1), picture(2, 64, 64)):
        check_slices(vision, vision.processor.place([token_id], [each])[1][:1])


@pytest.mark.parametrize("kind", kinds(*sorted({*hearing.KINDS} - {"gemma4_unified"})))
def test_embeddings_of_sounds_are_those_of_one_evaluation(kind: str) -> None:
    vision = hearing.loaded(kind).vision
    assert vision is not None
    check_slices(vision, heard(vision, 16_129)[:1])


class Slices:
    """Runs steps of an engine beside a text, one block a slice; counts the slices of each step."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, texts: int = 1) -> None:
        assert engine.vision is not None
        self.engine, self.encoder = engine, engine.vision.encoder
        self.count, self.tokens, self.errors = 0, dict[str, list[int]](), dict[str, str]()
        advance = TowerCall.advance

        def counted(call: TowerCall, num_blocks: int) -> int:
            self.count += 1
            assert num_blocks == 1
            return advance(call, num_blocks)

        monkeypatch.setattr(TowerCall, "advance", counted)
        monkeypatch.setattr(VisionEncoder, "_num_blocks", lambda *_: 1)
        for index in range(texts):
            self.add(f"text-{index}", request(engine, "hello", [], 200))
        while len(self.tokens) < texts:
            self.step()

    def add(self, name: str, made: EngineRequest) -> None:
        self.engine.add_request(name, made)

    def step(self) -> int:
        """Return the number of slices of a step."""
        before = self.count
        for event in self.engine.step():
            if event.error is not None:
                self.errors[event.request_id] = event.error
            self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
        return self.count - before

    def until(self, reached: Callable[[], object], *, preempts: bool = False) -> None:
        """Run steps, each of one slice at most, in which the text gets a token.

        Before a sequence is preempted, a step only collects the tokens of the one before.
        """
        while not reached():
            texts = len(self.tokens["text-0"])
            assert self.step() <= 1
            assert preempts or len(self.tokens["text-0"]) > texts

    def has(self, *names: str) -> bool:
        return all(len(self.tokens.get(name, "")) == 8 for name in names)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_step_beside_a_text_evaluates_one_slice(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny.tiny_engine(kind, max_num_batched_tokens=256)
    beside = Slices(engine, monkeypatch, texts=2)
    beside.add("one", request(beside.engine, ASK, [picture(1)]))
    beside.add("two", request(beside.engine, f"look: {ASK}", [picture(2, 31, 17)]))
    beside.until(lambda: beside.has("one", "two"))
    assert beside.count >= 6
    assert beside.tokens["one"] == tiny.expected(kind, ASK, [picture(1)])
    assert beside.tokens["two"] == tiny.expected(kind, f"look: {ASK}", [picture(2, 31, 17)])
    assert (beside.encoder.misses, len(beside.encoder._calls)) == (2, 0)


def test_pictures_without_a_text_are_evaluated_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Slices(tiny.tiny_engine("llava"), monkeypatch, texts=0)
    assert run(beside.engine, request(beside.engine, ASK, [picture(1)]))
    assert beside.count == 0


def test_more_prompts_than_texts_are_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts beside one text; the last one is then beside both others."""
    beside = Slices(tiny.tiny_engine("llava", max_num_batched_tokens=256), monkeypatch)
    for seed in (1, 2):
        beside.add(str(seed), request(beside.engine, ASK, [picture(seed)]))
    beside.step()
    assert (beside.count, beside.encoder.misses) == (0, 1)
    beside.until(lambda: beside.encoder.misses == 2)
    assert beside.count > 0


def test_many_prompts_are_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of them beside six texts; slices begin when four are left."""
    engine = tiny.tiny_engine("llava", max_num_batched_tokens=64, max_num_seqs=12)
    beside = Slices(engine, monkeypatch, texts=6)
    for seed in range(5):
        beside.add(str(seed), request(engine, ASK, [picture(seed)]))
    beside.until(lambda: beside.encoder.misses == 1)
    assert beside.count == 0
    beside.until(lambda: beside.encoder.misses == 2)
    assert beside.count >= 3


def test_background_prompts_may_wait_for_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny.tiny_engine("llava", max_num_batched_tokens=256, max_num_seqs=3)
    beside = Slices(engine, monkeypatch, texts=2)
    for number in range(4):
        made = request(engine, f"later {number}", [], background=True)
        beside.add(f"later-{number}", made)
    beside.add("one", request(engine, ASK, [picture(1)]))
    beside.until(lambda: beside.encoder.misses == 1)
    assert beside.count >= 3


def test_inputs_of_the_next_picture_are_made_during_slices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TowerCall, "advance", lambda *_: 0)
    encoder = VisionEncoder(Tower(), inputs=lambda media: media_of(2).inputs)
    user, pixels = Sequence("r", [1, 2, 3, 4], SamplingParams()), np.zeros((2, 2, 3), np.uint8)
    source = MediaSource("picture", pixels, (0, 1))
    second, third = (
        dataclasses.replace(media_of(number), inputs={}, source=source) for number in (2, 3)
    )
    for media in (media_of(1), second, third):
        assert not encoder.prepare(user, media, alone=False, in_slices=True)
    assert [*encoder._processing] == [second]
    assert encoder._processing[second].result(60)


def test_a_step_computes_the_text_before_a_picture_or_a_slice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beside = Slices(tiny.tiny_engine("llava", max_num_batched_tokens=256), monkeypatch)
    made = request(beside.engine, f"Look at this: {ASK}", [picture(1)])
    beside.add("one", made)
    assert beside.step() == 0
    (sequence,) = (each for each in beside.engine._scheduler._running if each.media)
    assert sequence.num_computed_tokens == made.media[0].start
    assert beside.step() == 1


@pytest.mark.parametrize("slices", range(1, 5))
def test_an_aborted_request_ends_its_call(slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Slices(tiny.tiny_engine("llava"), monkeypatch)
    beside.add("gone", request(beside.engine, ASK, [picture(1)]))
    beside.until(lambda: beside.count == slices)
    (call,) = {*map(weakref.ref, beside.encoder._calls.values())}
    beside.engine.abort("gone")
    assert call() is None
    assert (beside.encoder.nbytes, beside.encoder._users) == (0, {})
    beside.add("one", request(beside.engine, ASK, [picture(1)]))
    beside.until(lambda: beside.has("one"))
    assert beside.tokens["one"] == tiny.expected("llava", ASK, [picture(1)])


@pytest.mark.parametrize("kind", kinds("llava", "mllama"))
def test_requests_with_the_same_picture_share_its_call(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one ends when half of the call is evaluated."""
    beside = Slices(tiny.tiny_engine(kind), monkeypatch, texts=2)
    for name in ("gone", "one"):
        beside.add(name, request(beside.engine, ASK, [picture(1)]))
    beside.until(lambda: beside.count == 3)
    (call,) = {*beside.encoder._calls.values()}
    beside.engine.abort("gone")
    beside.until(lambda: beside.has("one"))
    assert call.is_evaluated
    assert beside.encoder.misses == 1
    assert beside.tokens["one"] == tiny.expected(kind, ASK, [picture(1)])


def test_a_preempted_request_goes_on_with_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture in the background gives its place to a text, beside another one."""
    engine = tiny.tiny_engine("llava", max_num_seqs=2)
    beside = Slices(engine, monkeypatch)
    beside.add("one", request(engine, ASK, [picture(1)], background=True))
    beside.until(lambda: beside.count == 3)
    beside.add("two", request(engine, "hello", []))
    beside.until(lambda: beside.has("two"), preempts=True)
    assert engine.stats().num_preemptions == 1
    beside.until(lambda: beside.has("one"))
    assert beside.encoder.misses == 1
    assert beside.tokens["one"] == tiny.expected("llava", ASK, [picture(1)])


def test_another_request_finishes_the_call_of_a_preempted_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = tiny.tiny_engine("llava", max_num_seqs=3)
    beside = Slices(engine, monkeypatch, texts=2)
    beside.add("one", request(engine, ASK, [picture(1)], background=True))
    beside.until(lambda: beside.count == 3)
    beside.add("two", request(engine, ASK, [picture(2)]))
    beside.until(lambda: beside.has("two"), preempts=True)
    assert beside.encoder.misses == 2
    beside.until(lambda: beside.has("one"))
    assert beside.encoder.misses == 2
    for name, seed in (("one", 1), ("two", 2)):
        assert beside.tokens[name] == tiny.expected("llava", ASK, [picture(seed)])


def test_a_bad_picture_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Slices(tiny.tiny_engine("llava"), monkeypatch, texts=2)
    made = request(beside.engine, ASK, [picture(1)])
    pixels = np.zeros((1, 3, 7), np.float32)
    bad = dataclasses.replace(made.media[0], digest=b"bad", inputs={"pixel_values": pixels})
    beside.add("bad", dataclasses.replace(made, media=(bad,)))
    beside.add("one", made)
    beside.until(lambda: beside.has("one"))
    assert beside.errors == {"bad": "messages: the model cannot encode this picture"}
    assert beside.tokens["one"] == tiny.expected("llava", ASK, [picture(1)])
    assert not beside.encoder._calls


@pytest.mark.parametrize("slices", [3, 4])
def test_memory_that_runs_out_in_a_slice(slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures in one call: after its failure, each has one of its own."""
    monkeypatch.setattr(encoder_module, "joins", lambda: True)
    beside = Slices(tiny.tiny_engine("llava"), monkeypatch, texts=2)
    for seed in (1, 2):
        beside.add(str(seed), request(beside.engine, ASK, [picture(seed)]))
    beside.until(lambda: beside.count == slices - 1)
    (call,) = {*beside.encoder._calls.values()}
    assert len(call.keys) == 2

    def fail(_: object) -> None:
        raise RuntimeError("[malloc] out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(tower_call, "mx", SimpleNamespace(**vars(mx) | {"eval": fail}))
        beside.until(lambda: beside.count == slices)
    assert not beside.encoder._calls
    beside.until(lambda: beside.has("1", "2"))
    assert beside.encoder.misses == 2
    assert not beside.errors
    for seed in (1, 2):
        assert beside.tokens[str(seed)] == tiny.expected("llava", ASK, [picture(seed)])


def test_pictures_that_wait_are_encoded_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both get the parts of a call whose slices are those of one picture."""
    monkeypatch.setattr(encoder_module, "joins", lambda: True)
    engine = tiny.tiny_engine("llava", max_num_batched_tokens=256)
    beside = Slices(engine, monkeypatch, texts=2)
    for seed in (1, 2):
        beside.add(str(seed), request(beside.engine, ASK, [picture(seed)]))
    beside.until(lambda: beside.has("1", "2"))
    assert (beside.encoder.misses, beside.encoder.hits) == (2, 1)
    for seed in (1, 2):
        assert beside.tokens[str(seed)] == tiny.expected("llava", ASK, [picture(seed)])


def test_embeddings_without_room_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk of the picture takes a call of its own."""
    beside = Slices(tiny.tiny_engine("idefics3", max_num_batched_tokens=24), monkeypatch)
    beside.encoder._max_bytes = 0
    beside.add("one", request(beside.engine, ASK, [picture(3, 16, 64)]))
    beside.until(lambda: beside.has("one"))
    assert beside.encoder.misses > 1
    assert beside.tokens["one"] == tiny.expected("idefics3", ASK, [picture(3, 16, 64)])


class Timed:
    """Steps of an encoder, each of which takes as long as is added to `now`."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, advance: Callable[[TowerCall, int], int]
    ) -> None:
        monkeypatch.setattr(TowerCall, "advance", advance)
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(encoder_module, "time", clock)
        self.now, self.encoder = 100.0, VisionEncoder(Tower())
        self._user, self._media = Sequence("r", [1, 2, 3, 4], SamplingParams()), media_of(1)

    def text(self, seconds: float) -> None:
        self.encoder.begin_step()
        self.now += seconds

    def slice(self, *, after_prompts: bool = False) -> None:
        self.encoder.begin_step(after_prompts=after_prompts)
        assert not self.encoder.prepare(self._user, self._media, alone=False, in_slices=True)


def test_a_slice_takes_as_long_as_a_step_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of text takes 30 seconds, a block two, and a slice one more."""
    given, left = list[int](), [0, 0]
    evaluated = 0

    def advance(_: TowerCall, blocks: int) -> int:
        nonlocal evaluated
        given.append(blocks)
        evaluated = left.pop(0) if left else blocks
        return evaluated

    timed = Timed(monkeypatch, advance)

    def step(seconds: float | None = None, *, after_prompts: bool = False) -> None:
        timed.slice(after_prompts=after_prompts)
        timed.now += 30 + 1 + 2 * evaluated if seconds is None else seconds

    for seconds in (20, 500, 30, 20, 40):
        timed.text(seconds)
    for _ in range(5):
        step()
    assert given == [1, 1, 1, 10, 14], "copied, built, then so many blocks as take 30 seconds"
    del given[:]
    step(1000)
    step()
    step()
    step()
    assert given == [14, 1, 10, 14], "a step that took long makes one slice small"
    step(29)
    step(29)
    step()
    assert given[4:] == [14, 28, 57], "the device may have computed blocks beside the step before"
    step()
    del given[:]
    step(1000)
    step(1000, after_prompts=True)
    for _ in range(3):
        step()
    assert given == [14] * 5, "prompts in a step, or in the one before, do not count"


def test_slices_grow_while_they_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with a slice takes less time than one of text."""
    given = list[int]()
    timed = Timed(monkeypatch, lambda _, blocks: given.append(blocks) or blocks)
    for _ in range(2):
        timed.text(20)
    for _ in range(60):
        timed.slice()
        timed.now += 19
    assert given[:7] == [1, 2, 4, 8, 16, 32, 64]
    assert len(given) == 60
    assert given[-1] == given[-2] == int(20 / (3 * encoder_module._LEAST_BLOCK_TIME))


def test_slices_of_each_kind_have_their_own_time() -> None:
    """A larger call has smaller slices."""
    encoder, tower = VisionEncoder(Tower()), Tower()
    encoder._text_times.append(6.0)
    small = TowerCall(tower, [media_of(1)], kind="picture")
    assert encoder._num_blocks(small) == 1, "nothing is known yet"
    encoder._count_slice("picture", 3, 7.0)
    assert encoder._num_blocks(small) == 6
    several = TowerCall(tower, [media_of(1), media_of(2)], kind="picture")
    assert encoder._num_blocks(several) == 3
    assert encoder._num_blocks(TowerCall(tower, [media_of(1)], kind="sound")) == 1
    encoder._count_slice("picture", 3, 1000.0)
    assert encoder._num_blocks(small) == 1


def test_a_picture_of_a_call_is_not_encoded_with_others() -> None:
    """Another picture is encoded at once, and one that waits is part-way."""
    encoder = VisionEncoder(Tower(), batched=frozenset({"pixel_values"}))
    users = [Sequence(name, [1, 2, 3, 4], SamplingParams()) for name in ("one", "two")]
    media = [media_of(number) for number in range(3)]
    for _ in range(3):
        encoder.begin_step()
        assert not encoder.prepare(users[0], media[0], alone=False, in_slices=True)
    waiting = [(b"", each) for each in media]
    encoder.begin_step()
    assert encoder.prepare(users[1], media[1], alone=False, waiting=waiting)
    assert (encoder.misses, {*encoder._calls}) == (2, {media[0]})
    encoder.begin_step()
    assert encoder.prepare(users[0], media[0], alone=True)
    assert (encoder.misses, {*encoder._calls}) == (3, set())


@pytest.mark.sample(5)
@pytest.mark.parametrize("kind", kinds(*KINDS))
def test_attention_has_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of no rows ends the process on CUDA, as with mlx-vlm's GLM-4V for one picture."""
    sizes = list[int]()
    attend = mx.fast.scaled_dot_product_attention

    def watched(queries: mx.array, keys: mx.array, *args: object, **named: object) -> mx.array:
        sizes.extend((queries.size, keys.size))
        made: mx.array = attend(queries, keys, *args, **named)
        return made

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watched)
    vision = tiny.tiny_loaded(kind).vision
    assert vision is not None
    place, token_id = vision.processor.place, vision.processor.image_token_id
    try:
        mx.disable_compile()  # mlx-vlm's may be traced before
        for each in (picture(1), picture(1, 64, 96)):
            TowerCall(vision.encoder._model, place([token_id], [each])[1]).finish()
    finally:
        mx.enable_compile()
    assert all(sizes)
    assert sizes or kind in ("gemma4_unified", "kimi_k25")  # none, and by other functions
