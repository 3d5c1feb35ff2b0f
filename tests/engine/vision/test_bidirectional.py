"""Pictures whose tokens attend to each other in both directions: a step computes each of them."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.batch import Chunk, StepBatch
from modelpack_engine.core.buckets import EXACT, Buckets
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.engine import Engine
from modelpack_engine.errors import RequestError
from modelpack_engine.models import load
from modelpack_engine.request import Media
from modelpack_engine.runner.kv_cache_size import choose_sizes
from modelpack_engine.vision.encoder import VisionEncoder
from tests.engine.scheduling import steps
from tests.engine.scheduling.driving import ODD_BUCKETS, SMALL_BUCKETS
from tests.engine.scheduling.simulation import MODES, Simulation, sequence
from tests.engine.vision import tiny
from tests.engine.vision.test_extra import copied
from tests.engine.vision.tiny import PREFIX, WHOLE, kinds, picture, request, run

pytestmark = pytest.mark.long

ONE, TWO = picture(1), picture(2, 31, 17)
TEXT = "this is <image> and that is <image>, see?"


def with_spans(made: Sequence, *spans: tuple[int, int]) -> Sequence:
    """Return a sequence with pictures of bidirectional tokens at these positions."""
    made.media = tuple(
        Media(
            first, tuple(made.prompt_token_ids[first:stop]), b"%d" % first, {},
            bidirectional=((0, stop - first),),
        )
        for first, stop in spans
    )  # fmt: skip
    return made


@pytest.mark.parametrize("kind", kinds(*WHOLE, *PREFIX))
def test_causal_pictures_are_detected(kind: str) -> None:
    """The control: mlx-vlm's Gemma 3 lets tokens of a picture see no later ones."""
    engine = tiny.tiny_engine(kind)
    found = run(engine, request(engine, TEXT, [ONE, TWO], 24))
    assert found == [tiny.expected(kind, TEXT, [ONE, TWO], 24)]
    assert found != [tiny.expected(kind, TEXT, [ONE, TWO], 24, seen=False)]


def test_a_split_picture_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: where chunks end within pictures, tokens differ."""
    engine = tiny.tiny_engine("gemma3", max_num_batched_tokens=30)
    monkeypatch.setattr(
        "modelpack_engine.core.scheduler._outside_spans", lambda _seq, _start, stop, _most: stop
    )
    found = run(engine, request(engine, TEXT, [ONE, TWO], 24))
    assert found != [tiny.expected("gemma3", TEXT, [ONE, TWO], 24)]


@pytest.mark.parametrize("rows", [19, 23, 30])
def test_any_chunks_and_blocks(rows: int) -> None:
    """Prefixes from the cache end within pictures, too: the rest is computed at once."""
    expected = [tiny.expected("gemma3", TEXT, [ONE, TWO])]
    for block_size in (4, 8):
        engine = tiny.tiny_engine("gemma3", max_num_batched_tokens=rows, block_size=block_size)
        made = request(engine, TEXT, [ONE, TWO])
        assert [run(engine, made) for _ in range(2)] == [expected] * 2
        # A prompt that ends within a block of the second picture.
        short = request(engine, TEXT.removesuffix(", see?"), [ONE, TWO])
        assert run(engine, short) == [
            tiny.expected("gemma3", TEXT.removesuffix(", see?"), [ONE, TWO])
        ]


def test_a_prompt_whose_tokens_all_see_each_other() -> None:
    """PaliGemma: other text after the same picture changes all keys, so that none are shared."""
    engine = tiny.tiny_engine("paligemma", block_size=8)
    made = [request(engine, f"<image>{text}", [ONE]) for text in ("What is it?", "What is that?")]
    first, second = made
    assert first.media[0].spans == [(0, len(first.prompt_token_ids))]
    assert first.prompt_token_ids[-1] == ord("\n") + 188  # the byte's token
    run(engine, first)
    assert engine.stats().cached_tokens == 0
    assert run(engine, second) == [tiny.expected("paligemma", "<image>What is that?", [ONE])]
    assert engine.stats().cached_tokens == 0
    long = request(engine, "<image>" + "a" * 100, [ONE])
    with pytest.raises(RequestError, match=r"tokens .* computes at most") as caught:
        engine.add_request("r", long)
    assert caught.value.hint == "raise max_num_batched_tokens and max_prefill_chunk"


@pytest.mark.parametrize("missing", [4, 7])
def test_a_prefix_that_ends_within_a_picture(missing: int) -> None:
    """The last blocks of a request are evicted first; 19 blocks hold the prompt and the reply."""
    engine = tiny.tiny_engine("gemma3", max_num_batched_tokens=40, block_size=4)
    made = request(engine, TEXT, [ONE, TWO])
    run(engine, made)
    pools = (engine._blocks.pool, *engine._blocks.window_pools)
    for pool in pools:
        free = pool.num_available - pool.num_cached
        pool.release_all([pool.allocate() for _ in range(free + missing)])
    before = engine.stats().cached_tokens
    assert run(engine, made) == [tiny.expected("gemma3", TEXT, [ONE, TWO])]
    cached = engine.stats().cached_tokens - before
    assert cached == 4 * (19 - missing)
    assert made.media[1].spans[0][0] < cached < made.media[1].spans[0][1]


def test_a_picture_larger_than_a_step() -> None:
    engine = tiny.tiny_engine("gemma3", max_num_batched_tokens=18)
    with pytest.raises(RequestError, match=r"16 tokens .* computes at most 15") as caught:
        engine.add_request("r", request(engine, TEXT, [ONE, TWO]))
    assert caught.value.hint == "raise max_num_batched_tokens and max_prefill_chunk"
    assert not engine.has_work
    assert run(engine, request(engine, "hello", [])) == [tiny.expected("gemma3", "hello", [])]


def test_a_step_has_room_for_a_picture_by_default() -> None:
    layout: Any = SimpleNamespace(bytes_per_token=64, snapshot_bytes=0, bytes_per_sequence=0)
    config = dataclasses.replace(tiny.tiny_engine("gemma3").config, max_num_batched_tokens=None)
    for span in (0, 16, 256, 1120):
        sizes = choose_sizes(layout, 4096, config, span=span)
        limits = sizes.scheduler_config(config)
        assert limits.chunk_rows >= span
        assert limits.max_num_batched_tokens - limits.max_num_seqs >= span
        assert limits.max_num_batched_tokens == max(256, span and span + limits.max_num_seqs)


@pytest.mark.parametrize("seed", range(60))
def test_chunks_end_outside_pictures(seed: int) -> None:
    """Random pictures, limits, buckets and preemptions: all prompts end, none is split."""
    rng = random.Random(seed)
    sim = Simulation(
        num_blocks=rng.choice([10, 12, 30]),
        max_num_batched_tokens=rng.choice([12, 16, 24]),
        buckets=rng.choice([EXACT, SMALL_BUCKETS, ODD_BUCKETS]),
        **rng.choice([{}, {"window": 6}, {"window_pools": ((6, rng.choice([8, 12])),)}]),
        overtaking=rng.choice([0, 3]),
        mode=rng.choice(MODES),
    )
    sim.scheduler._pictures = SimpleNamespace(
        prepare=lambda *_, alone, **__: alone or rng.random() < 0.9
    )
    texts = []
    for salt in (b"a", b"b"):
        text = [rng.randrange(6) for _ in range(24)]
        first, spans = 0, list[tuple[int, int]]()
        while (first := first + rng.randrange(1, 9)) < 20:
            spans.append((first, stop := first + rng.randrange(1, 5)))
            first = stop
        texts.append((salt, text, spans))
    of: dict[str, list[tuple[int, int]]] = {}
    for number in range(10):
        salt, text, spans = rng.choice(texts)
        length = rng.randrange(8, 24)
        length = next((stop for first, stop in spans if first < length < stop), length)
        of[str(number)] = spans = [span for span in spans if span[1] <= length]
        prompt = text[:length] + [6 + rng.randrange(2)] * rng.randrange(1, 4)
        made = sequence(prompt, rng.randrange(1, 8), request_id=str(number), salt=salt)
        sim.add(with_spans(made, *spans))
        for _ in range(rng.randrange(3)):
            sim.step()
    sim.drain()
    ends = [
        (chunk.sequence.request_id, chunk.start + chunk.length)
        for output in sim.outputs
        for chunk in output.prefill
    ]
    assert ends
    assert not [end for end in ends if any(first < end[1] < last for first, last in of[end[0]])]


def test_a_chunk_ends_before_a_picture_or_takes_it_whole() -> None:
    sched = steps.scheduler(max_num_batched_tokens=64, max_prefill_chunk=10, max_num_seqs=1)
    sched._pictures = SimpleNamespace(prepare=lambda *_, **__: True)  # type: ignore[assignment]
    sched.add(with_spans(sequence(steps.prompt(40)), (6, 15), (15, 18), (30, 40)))
    found = []
    while sched.has_work:
        found += [(start, length) for _, start, length in steps.chunks(steps.run(sched))]
    assert found == [(0, 6), (6, 9), (15, 9), (24, 6), (30, 10)]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("in_windows", [True, False])
@pytest.mark.parametrize("window", [None, 5, 12])
@pytest.mark.parametrize(
    ("start", "length", "spans"),
    [
        (0, 12, ((3, 9),)), (0, 30, ((3, 9), (9, 14), (20, 30))), (10, 14, ((12, 20),)),
        (13, 7, ((9, 20),)), (9, 3, ()), (17, 1, ((16, 18),)),
    ],
)  # fmt: skip
def test_masks(
    exact: bool,
    in_windows: bool,
    window: int | None,
    start: int,
    length: int,
    spans: tuple[tuple[int, int], ...],
) -> None:
    """A query sees all keys up to itself and those of its picture, within the window."""
    stop, size = start + length, 4
    buckets = EXACT if exact else Buckets(rows=(1,), chunk=(8, 16, 32), table_width=(4, 16))
    padded = buckets.pad_chunk(length)
    width = buckets.pad_table_width(-(-(stop + padded - length) // size))
    table = tuple(index + 1 if index * size < stop else 0 for index in range(width))
    chunk = Chunk(0, length, padded, stop, table, 1, spans=spans, in_windows=in_windows)
    step = StepInputs(size, exact=exact)
    batch = StepBatch(
        token_ids=[0] * padded, positions=[0] * padded, slots=[0] * padded, from_previous=(),
        num_decode=0, decode_tables=[], decode_lengths=[], decode_seq_ids=(), chunks=(chunk,),
        sample_rows=(), sample_seqs=(),
    )  # fmt: skip
    step.begin(batch, [])
    made = step.chunk_keys(0, window)
    if in_windows and window is None:
        spans = ()
    assert made.is_causal == (not spans)
    first_block = next(i for i in range(width) if table[i] == made.keys.tables[0][0])
    keys = np.arange(made.keys.start, made.keys.stop) + first_block * size
    queries = np.arange(start, stop)[:, None]
    seen = keys <= queries
    for first, end in spans:
        seen |= (queries >= first) & (queries < end) & (keys >= first) & (keys < end)
    if window is not None:
        seen &= keys > queries - window
    if isinstance(made.mask, mx.array):
        assert np.array_equal(np.array(made.mask)[:length], seen)
    else:
        assert not spans
        aligned = keys <= keys[-1] - padded + 1 + np.arange(length)[:, None]
        assert np.array_equal(aligned if made.mask else np.ones_like(seen), seen)


def test_the_scale_of_embeddings_is_that_of_the_language_model(tmp_path: Path) -> None:
    """Published configs have no hidden_size of their own, and mlx-vlm would take 2048."""
    config = {n: v for n, v in tiny.config_of("gemma3").items() if n != "hidden_size"}
    files = copied("gemma3", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = []
    for loaded in (tiny.tiny_loaded("gemma3"), load(files, device="cpu")):
        assert loaded.vision is not None
        _, [media] = loaded.vision.processor.place([tiny.BOI], [ONE])
        found.append(np.array(tiny.embeddings(loaded.vision.encoder, media)))
    assert np.array_equal(*found)


@pytest.mark.parametrize("tokens", [0, 15, 25, 10**9, "16", None])
def test_tokens_that_do_not_divide_the_patches(tokens: object, tmp_path: Path) -> None:
    loaded = load(copied("gemma3", tmp_path, mm_tokens_per_image=tokens), device="cpu")
    assert loaded.vision is None
    assert "mm_tokens_per_image" in loaded.no_vision


def test_pan_and_scan_is_refused(tmp_path: Path) -> None:
    files = copied("gemma3", tmp_path)
    settings = tiny.settings_of("gemma3") | {"do_pan_and_scan": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    loaded = load(files, device="cpu")
    assert loaded.no_vision == "preprocessor_config.json: do_pan_and_scan is not supported"


@pytest.mark.parametrize("name", ["patch_size", "pooling_kernel_size"])
def test_settings_that_are_not_those_of_the_tower(name: str, tmp_path: Path) -> None:
    files = copied("gemma4", tmp_path)
    settings = tiny.settings_of("gemma4") | {name: 10**6}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    loaded = load(files, device="cpu")
    assert loaded.no_vision == (
        f"preprocessor_config.json: {name} 1000000 is not that of config.json"
    )


def test_settings_for_pictures_that_are_too_large(tmp_path: Path) -> None:
    vision = tiny.config_of("gemma4")["vision_config"] | {"pooling_kernel_size": 1000}
    files = copied("gemma4", tmp_path, vision_config=vision)
    settings = tiny.settings_of("gemma4") | {"pooling_kernel_size": 1000}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    loaded = load(files, device="cpu")
    assert loaded.no_vision == "preprocessor_config.json: pictures have more than 67108864 pixels"


def test_small_models_of_gemma_4_are_causal(tmp_path: Path) -> None:
    """Only where config.json says so do pictures attend in both directions: chunks split others."""
    text = tiny.config_of("gemma4")["text_config"] | {"use_bidirectional_attention": None}
    loaded = load(copied("gemma4", tmp_path, text_config=text), device="cpu")
    config = EngineConfig(device="cpu", max_num_batched_tokens=32, max_num_seqs=4)
    engine = Engine(loaded, config)
    made = request(engine, TEXT, [ONE, TWO], 24)
    assert all(not media.bidirectional for media in made.media)
    assert run(engine, made) == [tiny.expected("gemma4", TEXT, [ONE, TWO], 24, seen=False)]


def test_layers_without_embeddings_of_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: where Gemma 4's layers look up tokens of pictures, tokens differ."""
    engine = tiny.tiny_engine("gemma4")
    monkeypatch.setattr(VisionEncoder, "shown_ids", lambda _, token_ids: token_ids)
    found = run(engine, request(engine, TEXT, [ONE, TWO], 24))
    assert found != [tiny.expected("gemma4", TEXT, [ONE, TWO], 24)]


def test_the_text_around_a_picture_is_tokenised_with_it() -> None:
    """The newlines join those of the prompt, as in the processors of mlx-vlm and transformers."""
    loaded = tiny.tiny_loaded("gemma3")
    assert loaded.vision is not None
    processor = loaded.vision.processor
    text = processor.with_spaces("user\n<start_of_image>a<start_of_image>")
    assert text == "user\n\n\n<start_of_image>\n\na\n\n<start_of_image>\n\n"
    llava = tiny.tiny_loaded("llava").vision
    assert llava is not None
    assert llava.processor.with_spaces("user\n<image>") == "user\n<image>"


def test_the_paged_tier_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_METAL_USE_PAGED_ATTENTION", "0")
    engine = tiny.tiny_engine("gemma3")
    assert (engine._runner.tier, engine.vision) == ("fallback", None)
    assert engine.notes == (
        "pictures are not read: pictures that attend in both directions need the paged tier",
    )
