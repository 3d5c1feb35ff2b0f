"""Pictures in an engine's prompts: the tokens are those of mlx-vlm's single-request path."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.core import batch
from modelpack_engine.core.batch import rope_positions
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.errors import EngineError, QueueFullError, RequestError
from modelpack_engine.layers.cross_attention import Crossing
from modelpack_engine.patches.modules import ClassSwaps, add_to_layers
from modelpack_engine.request import EngineRequest, Media, SamplingParams
from modelpack_engine.vision import grids as layouts
from modelpack_engine.vision.encoder import HostCache, VisionEncoder, open_vision
from modelpack_engine.vision.models import VisionModel
from modelpack_engine.vision.processor import Picture
from modelpack_engine.vision.transfers import Transfers
from tests.engine.serving.tiny import tiny_engine as text_engine
from tests.engine.vision import tiny
from tests.engine.vision.tiny import (
    FALLBACK,
    KINDS,
    MROPE,
    PREFIX,
    kinds,
    picture,
    request,
    run,
)

ONE, TWO, WIDE = picture(1), picture(2, 31, 17), picture(3, 16, 64)
PROMPTS = {
    "text only": ("hello there", []),
    "one picture": ("<image>What is it?", [ONE]),
    "two pictures": ("<image><image>Which one?", [ONE, TWO]),
    "between texts": ("this is <image> and that is <image>, see?", [TWO, WIDE]),
    "the same twice": ("<image> or <image>", [ONE, ONE]),
}


@pytest.fixture(scope="module", params=kinds(*KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.sample(2)
def test_tokens_are_those_of_mlx_vlm(kind: str) -> None:
    """Those of the other prompts are below, in one batch; two prompts by turns."""
    text, pictures = PROMPTS[("between texts", "the same twice")[KINDS.index(kind) % 2]]
    engine = tiny.tiny_engine(kind, max_num_batched_tokens=256)
    made = request(engine, text, pictures)
    assert run(engine, made) == [tiny.expected(kind, text, pictures)]


def test_windows_that_fill_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-vlm then has empty windows, which GPUs cannot compute."""
    prompt = ("<image>What is it?", [picture(1, 32, 32)])
    engine = tiny.tiny_engine("qwen2_5_vl", max_num_batched_tokens=256)
    assert engine.vision is not None
    model: Any = engine.vision.encoder._model
    layout = layouts._layout(model.vision_tower, ((1, 8, 8),), mx.float32)
    assert layout.windows is not None
    assert layout.windows.places.tolist() == np.arange(64).reshape(4, 16).tolist()
    found = run(engine, request(engine, *prompt))
    tower = tiny.arguments_of("qwen2_5_vl")[0].VisionModel
    of_peer = tower.get_window_index

    def windows(self: Any, grid: mx.array) -> tuple[mx.array, mx.array]:
        index, edges = of_peer(self, grid)
        assert len(np.unique(edges)) < len(edges)
        return index, mx.array(np.unique(edges))

    monkeypatch.setattr(tower, "get_window_index", windows)
    assert found == [tiny.expected("qwen2_5_vl", *prompt)]


def test_rows_are_added_after_each_layer() -> None:
    """DeepStack may name any number of layers."""
    model: Any = nn.Module()
    model.args = SimpleNamespace(model_type="qwen3_vl")
    model.layers = [nn.Identity() for _ in range(12)]
    step, swaps = StepInputs(16, exact=True), ClassSwaps()
    add_to_layers(model, step, swaps)
    step.additions = tuple(mx.full((2, 3), float(1 << layer)) for layer in range(10))
    x = mx.zeros((2, 1, 3))
    for layer in model.layers:
        x = layer(x)
    assert x.tolist() == [[[1023.0] * 3]] * 2
    step.end()
    assert model.layers[0](x).tolist() == x.tolist()


@pytest.mark.sample(5)
def test_it_runs_in_the_paged_tier(kind: str) -> None:
    engine = tiny.tiny_engine(kind)
    assert engine._runner.tier == ("fallback" if kind in FALLBACK else "paged")
    # These tokenizers lack the tokens of sounds.
    others = ("recurrent", "sounds are not read", "attends in chunks")
    assert [note for note in engine.notes if not any(text in note for text in others)] == []


@pytest.mark.sample(2)
def test_chunks_split_pictures(kind: str) -> None:
    """A chunk boundary within a picture changes nothing; those of some kinds are never split."""
    rows = (8, 17)[KINDS.index(kind) % 2]
    if kind == "gemma3":
        rows += 11  # 16 for a picture, and 3 for sequences that decode
    if kind in PREFIX:
        rows += 24  # for all of the prompt
    text, pictures = PROMPTS["between texts"]
    engine = tiny.tiny_engine(kind, max_num_batched_tokens=rows)
    made = request(engine, text, pictures)
    most = max(len(media.token_ids) for media in made.media)
    assert most > rows or rows > 8 or kind == "mllama"  # whose chunks end between pictures
    assert run(engine, made) == [tiny.expected(kind, text, pictures)]


@pytest.mark.sample(1)
def test_one_batch_with_text_only_requests(kind: str) -> None:
    engine = tiny.tiny_engine(kind, max_num_batched_tokens=24)
    made = [
        request(engine, *PROMPTS[name]) for name in ("text only", "one picture", "two pictures")
    ]
    names = ("text only", "one picture", "two pictures")
    assert run(engine, *made) == [tiny.expected(kind, *PROMPTS[name]) for name in names]
    assert engine.stats().num_mixed_steps > 0


@pytest.mark.sample(1)
def test_the_prefix_cache_changes_nothing(kind: str) -> None:
    text, pictures = PROMPTS["between texts"]
    expected = [tiny.expected(kind, text, pictures)]
    for cached in (True, False):
        engine = tiny.tiny_engine(kind, enable_prefix_caching=cached, block_size=8)
        made = request(engine, text, pictures)
        assert [run(engine, made) for _ in range(2)] == [expected, expected]
        assert (engine.stats().cached_tokens > 0) == (cached and kind not in FALLBACK)


def test_a_second_question_reads_the_picture_once() -> None:
    engine = tiny.tiny_engine("idefics3", block_size=8)
    first = request(engine, "<image>What is it?", [ONE])
    second = request(engine, "<image>How many?", [ONE])
    run(engine, first)
    assert engine.vision is not None
    encoder = engine.vision.encoder
    assert encoder.misses == 1
    [tokens] = run(engine, second)
    assert encoder.misses == 1
    assert encoder.hits > 0
    shared = len(first.media[0].token_ids) // 8 * 8
    assert engine.stats().cached_tokens == shared
    assert tokens == tiny.expected("idefics3", "<image>How many?", [ONE])


@pytest.mark.sample(1)
@pytest.mark.parametrize("cached", [False, True])
def test_a_picture_is_encoded_once(kind: str, cached: bool) -> None:
    """Without the prefix cache, the second prompt reads the whole picture from the encoder's.

    The text of PaliGemma's prompts is a part of the picture, so the second prompt is the first one.
    """
    engine = tiny.tiny_engine(kind, block_size=8, enable_prefix_caching=cached)
    assert engine.vision is not None
    encoder = engine.vision.encoder
    first, second = "<image>What is it?", "<image>How many?"
    for text in (first, first if kind in PREFIX else second):
        before = encoder.hits
        assert run(engine, request(engine, text, [ONE])) == [tiny.expected(kind, text, [ONE])]
        assert encoder.misses == 1
    assert cached or encoder.hits > before


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", kinds(*(kind for kind in KINDS if kind not in FALLBACK)))
def test_a_preempted_picture_is_computed_again(kind: str) -> None:
    """Blocks for one request and a half: one of the two is preempted and computed again.

    Requests of the fallback have caches of their own, which never lack blocks.
    """
    count, prompts = 20, [PROMPTS["one picture"], ("ab<image>", [TWO])]
    engine = tiny.tiny_engine(kind, block_size=8)
    lengths = [len(request(engine, *prompt).prompt_token_ids) for prompt in prompts]
    blocks = sum(-(-(length + count) // 8) for length in lengths) - 3
    bytes_per_block = engine.kv_cache_bytes // (engine.stats().blocks_total + 1)
    longest = max(lengths) + count
    limits = {"max_model_len": longest, "kv_cache_bytes": (blocks + 1) * bytes_per_block}
    if engine._sizes.groups:  # with chunks as long as this, no layer has blocks of its own
        limits["max_num_batched_tokens"] = 2 * longest
    engine = tiny.tiny_engine(kind, block_size=8, **limits)
    assert engine.stats().blocks_total == blocks
    tokens = run(engine, *(request(engine, *prompt, count) for prompt in prompts))
    assert engine.stats().num_preemptions > 0
    assert tokens == [tiny.expected(kind, *prompt, count) for prompt in prompts]


@pytest.mark.parametrize("kind", kinds("llava", "lfm2_vl", *FALLBACK))
def test_a_picture_in_the_background_gives_its_place_to_another(kind: str) -> None:
    engine = tiny.tiny_engine(kind, max_num_seqs=1)
    prompts = {"background": PROMPTS["one picture"], "chat": ("ab<image>", [TWO])}
    tokens: dict[str, list[int]] = {name: [] for name in prompts}

    def step() -> None:
        for event in engine.step():
            tokens[event.request_id] += event.token_ids

    engine.add_request("background", request(engine, *prompts["background"], 20, background=True))
    while len(tokens["background"]) < 3:
        step()
    engine.add_request("chat", request(engine, *prompts["chat"], 20))
    while len(tokens["chat"]) < 20:
        step()
    assert len(tokens["background"]) < 20
    while engine.has_work:
        step()
    assert engine.stats().num_preemptions == 1
    assert tokens == {name: tiny.expected(kind, *prompt, 20) for name, prompt in prompts.items()}


def test_choices_share_a_picture() -> None:
    engine = tiny.tiny_engine("llava", block_size=8)
    made = request(engine, "<image>What is it?", [ONE], n=2)
    engine.add_request("both", made)
    tokens: dict[int, list[int]] = {0: [], 1: []}
    while engine.has_work:
        for event in engine.step():
            tokens[event.index] += event.token_ids
    assert tokens[0] == tokens[1] == tiny.expected("llava", "<image>What is it?", [ONE])


@pytest.mark.sample(1)
def test_changed_pixels_change_the_answer(kind: str) -> None:
    """The control: one block of pixels decides the tokens, and never meets the other's cache."""
    pixels = ONE.pixels.copy()
    pixels[:10, :10] = 255 - pixels[:10, :10]
    changed, text = Picture(pixels), "<image>What is it?"
    engine = tiny.tiny_engine(kind, block_size=8)
    [[first], [second]] = [run(engine, request(engine, text, [p])) for p in (ONE, changed)]
    assert first == tiny.expected(kind, text, [ONE])
    assert second == tiny.expected(kind, text, [changed])
    assert first != second
    assert engine.stats().cached_tokens == 0


@pytest.mark.sample(2)
def test_zeroed_embeddings_are_detected(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the comparison itself: without the picture's embeddings, tokens differ."""
    text, pictures = PROMPTS["one picture"]
    engine = tiny.tiny_engine(kind)
    made = request(engine, text, pictures)
    monkeypatch.setattr(VisionEncoder, "input_embeddings", lambda *_: None)
    assert run(engine, made) != [tiny.expected(kind, text, pictures)]


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", kinds(*MROPE))
def test_plain_positions_are_detected(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with one position a token, in the prompt or after it, tokens differ."""
    text, pictures = PROMPTS["between texts"]
    expected = [tiny.expected(kind, text, pictures, 24)]

    def found() -> list[list[int]]:
        engine = tiny.tiny_engine(kind)
        return run(engine, request(engine, text, pictures, 24))

    def plain(media: tuple[Media, ...], start: int, stop: int) -> list[list[int]]:
        return [list(range(start, stop))] * 3

    def transposed(media: tuple[Media, ...], start: int, stop: int) -> list[list[int]]:
        frames, height, width = rope_positions(media, start, stop)
        return [frames, width, height]

    def without_shift(media: tuple[Media, ...], start: int, stop: int) -> list[list[int]]:
        if stop - start > 1:
            return rope_positions(media, start, stop)
        return [[start], [start], [start]]  # of a decode row

    assert found() == expected
    for wrong in (plain, transposed, without_shift):
        monkeypatch.setattr(batch, "rope_positions", wrong)
        assert found() != expected


@pytest.mark.parametrize("kind", kinds(*MROPE))
def test_positions_are_those_of_mlx_vlm(kind: str) -> None:
    """All chunks of prompts with pictures of these sizes in tokens, between these texts."""
    package, arguments = tiny.arguments_of(kind)
    arguments = getattr(arguments, "thinker_config", arguments)
    peer = package.LanguageModel(arguments.text_config, arguments)
    for grids in ([(3, 4)], [(1, 5), (6, 2)], [(2, 2), (1, 1), (4, 7)]):
        ids, media = [1, 2], []
        for height, width in grids:
            named = "image" if kind == "glm_ocr" else "vision"
            ids += [getattr(arguments, f"{named}_start_token_id")]
            tokens = (arguments.image_token_id,) * (height * width)
            media.append(Media(len(ids), tokens, b"", {}, grid=(1, height, width)))
            ids += [*tokens, 4, 3]
        sizes = mx.array([(1, 2 * height, 2 * width) for height, width in grids])
        expected, shift = peer.get_rope_index(mx.array([ids]), sizes)
        rows = [[*row, len(ids) + shift.item()] for row in expected[:, 0].tolist()]
        for start in range(len(ids) + 1):
            for stop in range(start + 1, len(ids) + 2):
                found = rope_positions(tuple(media), start, stop)
                assert found == [row[start:stop] for row in rows], (grids, start, stop)


def test_text_before_two_pictures_is_shared() -> None:
    """Only blocks with a picture, and those after, have hashes of their own."""
    engine = tiny.tiny_engine("llava", block_size=8)
    text = "a system prompt of 24 ch<image>What is it?"
    run(engine, request(engine, text, [ONE]))
    run(engine, request(engine, text, [TWO]))
    assert engine.stats().cached_tokens == 24


def test_settings_of_the_processor_are_part_of_the_digest() -> None:
    settings = tiny.settings_of("llava")
    loaded = tiny.tiny_loaded("llava")
    digests = set()
    for mean in ([0.5, 0.5, 0.5], [0.4, 0.5, 0.5]):
        encode = lambda text: loaded.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        found = tiny.processor({**settings, "image_mean": mean}, encode)
        _, (media,) = found.place([tiny.IMAGE], [ONE])
        digests.add(media.digest)
    assert len(digests) == 2


def test_pictures_of_other_shapes_have_other_digests() -> None:
    flat = np.zeros((4, 6, 3), np.uint8)
    assert Picture(flat).digest() != Picture(flat.reshape(6, 4, 3)).digest()


class CountingModel:
    """Embeds every token as one number, and counts the calls."""

    def __init__(self) -> None:
        self.config, self.calls = None, 0

    def embed(self, token_ids: mx.array, inputs: object) -> mx.array:
        self.calls += 1
        return mx.ones((token_ids.size, 4))


def test_whether_rows_need_only_embeddings_from_the_cache() -> None:
    """Graphs are for such steps only."""
    media = Media(0, (1, 2, 3), b"one", {})
    user = Sequence("r", [1, 2, 3, 4], SamplingParams())
    encoder = VisionEncoder(CountingModel())
    for is_ready in (False, True):  # encoded in the first step
        encoder.begin_step()
        assert encoder.is_ready, "no picture yet"
        assert encoder.prepare(user, media, alone=True)
        assert encoder.is_ready == is_ready
    encoder._step[b"", b"two"] = mx.ones((3, 3, 4))  # with DeepStack
    assert not encoder.is_ready
    for options in ({"hidden": ((7,), 0)}, {"crossing": Crossing()}):
        assert not VisionEncoder(CountingModel(), **options).is_ready  # type: ignore[arg-type]


def test_the_cache_of_embeddings_is_bounded() -> None:
    model = CountingModel()
    encoder = VisionEncoder(model, max_bytes=2 * 3 * 4 * 4)
    media = [Media(0, (1, 2, 3), bytes([i]), {}) for i in range(3)]
    for each in (0, 1, 0, 2, 0, 1):  # 2 drops 1, the least recently used
        tiny.embeddings(encoder, media[each])
    assert (model.calls, encoder.hits, encoder.misses) == (4, 2, 4)
    assert encoder.nbytes == 2 * 3 * 4 * 4
    tiny.embeddings(encoder, Media(0, tuple(range(99)), b"large", {}))
    assert encoder.nbytes == 2 * 3 * 4 * 4


class NumberingModel(CountingModel):
    """Embeds every token as the number of the call."""

    def embed(self, token_ids: mx.array, inputs: object) -> mx.array:
        return super().embed(token_ids, inputs) * self.calls


def test_evicted_embeddings_return_from_the_host() -> None:
    """The device has room for one of four pictures, the host for two."""
    model = NumberingModel()
    encoder = VisionEncoder(model, max_bytes=48, host_bytes=2 * 48)
    media = [Media(0, (1, 2, 3), bytes([i]), {}) for i in range(4)]
    steps = [
        # the pictures of a step, their numbers, and how many the host keeps when it begins
        ([0, 1, 0], [1, 2, 1], 0),  # evicted and used again in one step
        ([2], [3], 1),  # the last one is still arriving
        ([3], [4], 2),
        ([1], [2], 2),
        ([0], [5], 2),  # the host has dropped the least recently used
        ([3], [4], 2),
    ]
    for pictures, numbers, num_kept in steps:
        encoder.begin_step()
        assert encoder._host.nbytes == num_kept * 48
        found = [tiny.embeddings(encoder, media[each]) for each in pictures]
        assert [each.tolist() for each in found] == [[[n] * 4] * 3 for n in numbers]
        assert encoder.nbytes == 48
    assert (model.calls, encoder.hits, encoder.misses) == (5, 3, 5)


@pytest.mark.parametrize("kind", kinds("llava", "qwen3_vl", "mllama"))
def test_an_evicted_picture_is_not_encoded_again(kind: str) -> None:
    """Those of DeepStack and of cross-attention have more dimensions."""
    engine = tiny.tiny_engine(kind, enable_prefix_caching=False)
    assert engine.vision is not None
    encoder, text, other = engine.vision.encoder, "<image>What is it?", picture(4)
    encoder._host = HostCache(1 << 24, encoder._transfers)
    for each, misses in ((ONE, 1), (other, 2), (ONE, 2), (other, 2)):
        expected = tiny.expected(kind, text, [each])
        assert run(engine, request(engine, text, [each])) == [expected]
        run(engine, request(engine, "hello", []))  # the engine holds its last step
        assert encoder.misses == misses
        if misses == 1:
            encoder._max_bytes = encoder.nbytes
        assert len(encoder._kept) == 1


#: The shapes of embeddings, of those with DeepStack, and of keys and values of layers.
@pytest.mark.parametrize("shape", [(3, 8), (4, 3, 8), (2, 2, 4, 3, 8)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_the_host_keeps_every_bit(dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    """Bits of NaNs too, and those of an array that is not contiguous."""
    size = (2 * int(np.prod(shape)) * dtype.size,)
    bits = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    made = mx.array(bits).view(dtype).reshape(*shape[:-1], -1)[..., ::2]
    host, key = HostCache(made.nbytes, Transfers()), (b"", b"one")
    host.save(key, made)
    host.collect()
    assert (host.nbytes, key in host) == (0, True), "the device may be copying it"
    host.collect()
    assert host.nbytes == made.nbytes
    found = host.load(key)
    assert found is not None
    assert (found.dtype, found.shape) == (dtype, shape)
    number = {2: mx.uint16, 4: mx.uint32}[dtype.size]
    assert found.view(number).tolist() == made.view(number).tolist()
    host.save(key, made)
    host.collect()
    host.save((b"", b"two"), made)
    host.save((b"", b"two"), made)
    host.collect()
    host.save((b"", b"two"), made)
    host.collect()
    assert (host.nbytes, len(host._kept)) == (made.nbytes, 1), "the second drops the first"
    host.save(key, made)
    host.collect()
    host.collect()
    host.save((b"", b"large"), mx.concatenate([made, made]))
    assert (b"", b"large") not in host
    assert host.load(key) is not None, "what exceeds the limit drops nothing"


@pytest.mark.parametrize(
    ("backend", "available", "limit"),
    [
        ("none", 1 << 40, 0),
        ("metal", 1 << 40, 0),
        ("cuda", 1 << 40, 1 << 30),
        ("cuda", 1 << 30, 1 << 27),
    ],
)
def test_the_host_keeps_embeddings_only_for_devices_with_their_own_memory(
    backend: str, available: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny.tiny_loaded("llava")
    assert loaded.vision is not None
    encode = lambda text: loaded.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    launch = SimpleNamespace(backend=lambda: backend)
    monkeypatch.setattr("modelpack_engine.vision.encoder.launch", launch)
    monkeypatch.setattr("modelpack_engine.vision.encoder.available_memory", lambda: available)
    settings = tiny.config_of("llava"), tiny.settings_of("llava")
    vision = open_vision(loaded.vision.encoder._model, *settings, encode)
    assert vision.encoder._host._max_bytes == limit


def test_owners_share_no_embeddings() -> None:
    """Otherwise the time of a reply would tell which pictures another owner has sent."""
    engine = tiny.tiny_engine("llava")
    assert engine.vision is not None
    for owner, misses in ((b"a", 1), (b"b", 2), (b"a", 2)):
        run(engine, request(engine, "<image>What is it?", [ONE], owner=owner, cache_salt=owner))
        assert engine.vision.encoder.misses == misses


def test_the_inputs_of_unfinished_requests_are_bounded() -> None:
    engine = tiny.tiny_engine("llava")
    assert engine.vision is not None
    first = request(engine, "<image>What is it?", [ONE])
    memory = engine.vision.processor.memory
    assert memory.nbytes == first.media[0].nbytes
    memory.max_bytes = memory.nbytes
    with pytest.raises(QueueFullError, match="the files of all requests have more than"):
        request(engine, "<image>What is it?", [TWO])  # however far the first one is
    engine.add_request("first", first)
    del first
    while engine.has_work:
        engine.step()
    run(engine, request(engine, "hello", []))  # the engine holds its last step
    assert memory.nbytes == 0
    request(engine, "<image>What is it?", [TWO])
    with pytest.raises(RequestError, match="the files of the request take more than"):
        request(engine, "<image><image>", [ONE, TWO])
    assert memory.nbytes == 0


@pytest.mark.parametrize(
    ("text", "count"), [("no place", 1), ("<image><image>", 1), ("<image>", 2)]
)
def test_placeholders_that_are_not_the_pictures(text: str, count: int) -> None:
    engine = tiny.tiny_engine("llava")
    with pytest.raises(RequestError, match=r"placeholders <image> for \d pictures?"):
        request(engine, text, [ONE] * count)


def test_a_model_of_text_refuses_pictures() -> None:
    engine = text_engine()
    media = Media(0, (1, 2), b"digest", {})
    with pytest.raises(RequestError, match="reads no pictures"):
        engine.add_request("r", EngineRequest([1, 2, 3], SamplingParams(), media=(media,)))
    assert not engine.has_work


def test_media_must_match_the_prompt() -> None:
    engine = tiny.tiny_engine("llava")
    made = request(engine, "ab<image>", [ONE])
    moved = dataclasses.replace(made.media[0], start=1)
    with pytest.raises(RequestError, match="does not match the prompt"):
        engine.add_request("r", dataclasses.replace(made, media=(moved,)))
    assert not engine.has_work


@pytest.mark.parametrize("before", ["", "What is it? "])
def test_a_picture_that_cannot_be_encoded_fails_its_request_alone(before: str) -> None:
    """The step that would encode it computes the text before it."""
    engine = tiny.tiny_engine("llava")
    engine.add_request("good", request(engine, "<image>What is it?", [ONE]))
    made = request(engine, f"{before}<image>", [TWO])
    broken = dataclasses.replace(
        made.media[0], digest=b"other", inputs={"pixel_values": np.zeros((1, 3, 7), np.float32)},
        param="messages[3].content[1]",
    )  # fmt: skip
    engine.add_request("bad", dataclasses.replace(made, media=(broken,), n=2))
    tokens: list[int] = []
    failures = []
    while engine.has_work:
        for event in engine.step():
            tokens += event.token_ids
            failures += [(event.request_id, event.error, event.error_param)] * bool(event.error)
    assert tokens == tiny.expected("llava", "<image>What is it?", [ONE])
    part = "messages[3].content[1]"
    assert failures == [("bad", f"{part}: the model cannot encode this picture", part)] * 2
    assert engine.stats().blocks_used == 0


def test_a_tower_that_ignores_pixels_is_detected() -> None:
    loaded = tiny.tiny_loaded("llava")
    encode = lambda text: loaded.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    with pytest.raises(EngineError, match="same or infinite"):
        open_vision(CountingModel(), tiny.config_of("llava"), tiny.settings_of("llava"), encode)


def test_a_picture_that_fails_once_its_embeddings_are_dropped_fails_its_request_alone() -> None:
    """They are dropped between two chunks of the picture, and then the model cannot encode it."""
    engine = tiny.tiny_engine("idefics3", max_num_batched_tokens=24, block_size=8)
    assert engine.vision is not None
    encoder = engine.vision.encoder
    encoder._max_bytes = 0
    engine.add_request("bad", request(engine, "<image>What is it?", [WIDE]))
    engine.step()
    model = encoder._model
    encoder._model = BrokenModel(model)
    errors = [event.error for event in engine.step()]
    assert errors == ["messages: the model cannot encode this picture"]
    encoder._model = model
    expected = tiny.expected("idefics3", "<image>What is it?", [WIDE])
    assert run(engine, request(engine, "<image>What is it?", [WIDE])) == [expected]


class BrokenModel:
    """Cannot encode pictures, as when memory is short."""

    def __init__(self, model: VisionModel) -> None:
        self._model = model

    def embed(self, token_ids: mx.array, inputs: Mapping[str, mx.array]) -> mx.array:
        if inputs:
            raise RuntimeError("[metal::malloc] out of memory")
        return self._model.embed(token_ids, inputs)


def test_pictures_are_encoded_in_the_steps_that_need_them() -> None:
    engine = tiny.tiny_engine("llava", max_num_batched_tokens=256, max_num_seqs=1)
    assert engine.vision is not None
    engine.add_request("one", request(engine, "hello", []))
    engine.add_request("two", request(engine, "<image>What is it?", [ONE]))
    assert engine.vision.encoder.misses == 0
    engine.step()  # the second one waits for the place of the first
    assert engine.vision.encoder.misses == 0
    engine.abort("two")
    while engine.has_work:
        engine.step()
    assert engine.vision.encoder.misses == 0
    expected = tiny.expected("llava", "<image>What is it?", [ONE])
    assert run(engine, request(engine, "<image>What is it?", [ONE])) == [expected]


def test_a_step_with_tokens_encodes_one_picture() -> None:
    """20 pictures of a request let another one's tokens through after each; alone, they do not."""
    pictures = [picture(seed) for seed in range(10, 30)]
    text = "<image>" * 20 + "Which one?"
    engine = tiny.tiny_engine("llava", max_num_batched_tokens=1024)
    assert engine.vision is not None
    encoder = engine.vision.encoder
    encoder._batched = frozenset()
    engine.add_request("text", request(engine, "hello", [], count=200))
    while not any(event.token_ids for event in engine.step()):
        pass
    engine.add_request("pictures", request(engine, text, pictures))
    tokens: dict[str, list[int]] = {"text": [], "pictures": []}
    while engine.has_work:
        before = encoder.misses
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
        assert encoder.misses <= before + 1
    assert encoder.misses == 20
    assert tokens["pictures"] == tiny.expected("llava", text, pictures)
    engine = tiny.tiny_engine("llava", max_num_batched_tokens=1024)
    assert run(engine, request(engine, text, pictures)) == [tokens["pictures"]]
    assert engine.stats().num_steps < 20
