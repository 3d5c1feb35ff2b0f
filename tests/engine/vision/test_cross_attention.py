"""Llama 3.2 Vision: layers that attend to pictures, whose keys and values requests keep."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from modelpack.formats.adapter import AdapterError, read_adapter
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.batch import MediaRows
from modelpack_engine.engine import Engine
from modelpack_engine.errors import ModelLoadError, RequestError
from modelpack_engine.layers.cross_attention import Crossing
from modelpack_engine.models import load
from modelpack_engine.vision.processor import _end
from tests.adapters import write_peft
from tests.engine.adapters.test_zoo import linears
from tests.engine.vision import tiny
from tests.engine.vision.test_types import copied
from tests.engine.vision.tiny import expected, picture, request, run

KIND = "mllama"
ONE, TWO, WIDE = picture(1), picture(2, 31, 17), picture(3, 16, 64)
TEXT = "<image>What is it?"


def encoder_of(engine: Engine) -> Any:
    assert engine.vision is not None
    return engine.vision.encoder


@pytest.mark.parametrize(
    ("prompt", "ends"),
    [
        ("i", [None]),
        ("ai", [None]),
        ("iab", [None]),
        ("iaib", [2, None]),
        ("iiab", [None, None]),
        ("aiiaib", [4, 4, None]),
        ("iiiaii", [4, 4, 4, None, None]),
    ],
)
def test_tokens_see_the_pictures_before_them(prompt: str, ends: list[int | None]) -> None:
    """Those of mlx-vlm, whose last row decides for all later tokens."""
    from mlx_vlm.models.mllama.processing_mllama import get_cross_attention_token_mask

    ids = list(prompt.encode())
    image = ord("i")
    places = [at for at, token in enumerate(ids) if token == image]
    found = [_end(ids, at) for at in places]
    assert [end if end <= len(ids) else None for end in found] == ends
    peer: Any = get_cross_attention_token_mask
    masks = [[at, len(ids) if end in (-1, len(ids)) else end] for at, end in peer(ids, image)]
    assert [[at, min(end, len(ids))] for at, end in zip(places, found, strict=True)] == masks


def test_text_before_a_picture_is_shared() -> None:
    """It sees no picture: its blocks are those of a text without any."""
    engine = tiny.tiny_engine(KIND, block_size=8)
    text = "a system prompt of 24 ch"
    run(engine, request(engine, f"{text} and more", []))
    for each in (ONE, TWO):
        before = engine.stats().cached_tokens
        assert run(engine, request(engine, f"{text}{TEXT}", [each])) == [
            expected(KIND, f"{text}{TEXT}", [each])
        ]
        assert engine.stats().cached_tokens == before + 24


def test_a_second_question_reads_the_picture_once() -> None:
    engine = tiny.tiny_engine(KIND, block_size=8)
    run(engine, request(engine, TEXT, [ONE]))
    [tokens] = run(engine, request(engine, "<image>How many?", [ONE]))
    assert encoder_of(engine).misses == 1
    assert tokens == expected(KIND, "<image>How many?", [ONE])


def test_a_request_waits_for_room_for_its_picture() -> None:
    """While others decode, pictures of running requests take no more than they may."""
    engine = tiny.tiny_engine(KIND, max_num_batched_tokens=256)
    encoder = encoder_of(engine)
    encoder._max_bytes = encoder._picture_bytes + 1
    prompts = [(TEXT, [ONE]), ("<image>How many?", [TWO]), ("<image><image>Which?", [WIDE, ONE])]
    made = [request(engine, *prompt) for prompt in prompts]
    for index, each in enumerate(made):
        engine.add_request(str(index), each)
    tokens: dict[str, list[int]] = {}
    most = 0
    del made, each
    while engine.has_work:
        for event in engine.step():
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
        most = max(most, encoder.nbytes)
    assert [tokens[str(index)] for index in range(3)] == [
        expected(KIND, *prompt) for prompt in prompts
    ]
    # The last request alone has two, and the step before it may hold another one's.
    assert most <= 3 * encoder._picture_bytes


def test_pictures_of_running_requests_stay() -> None:
    """The cache drops those of ended requests only."""
    engine = tiny.tiny_engine(KIND)
    encoder = encoder_of(engine)
    run(engine, request(engine, TEXT, [ONE], 2))
    encoder._max_bytes = 2 * encoder.nbytes
    engine.add_request("long", request(engine, "<image>How many?", [TWO], 12))
    while encoder.misses < 2:
        engine.step()
    engine.add_request("other", request(engine, "<image>Which?", [WIDE], 4))
    tokens: dict[str, list[int]] = {"long": [], "other": []}
    while engine.has_work:
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
    assert tokens["long"] == expected(KIND, "<image>How many?", [TWO], 12)
    assert tokens["other"] == expected(KIND, "<image>Which?", [WIDE], 4)
    for each, misses in ((TWO, 3), (WIDE, 3), (ONE, 4)):
        run(engine, request(engine, TEXT, [each], 2))
        assert encoder.misses == misses


def test_an_idle_engine_holds_no_arrays_of_its_last_step() -> None:
    """Once the cache drops a picture, its memory is free."""
    engine = tiny.tiny_engine(KIND)
    encoder = encoder_of(engine)
    run(engine, request(engine, TEXT, [ONE]))
    kept = [weakref.ref(each) for each in encoder._kept.values()]
    encoder._kept.clear()
    assert [each() is None for each in kept] == [True]


def test_more_pictures_than_memory_is_planned_for() -> None:
    engine = tiny.tiny_engine(KIND)
    assert engine.vision is not None
    encoder, processor = engine.vision.encoder, engine.vision.processor
    assert processor.max_pictures == encoder._max_bytes // encoder._picture_bytes
    processor.max_pictures = 2
    with pytest.raises(RequestError, match="the prompt has 3 pictures, the limit is 2"):
        request(engine, "<image>" * 3, [ONE] * 3)


def test_no_picture_is_larger_than_planned() -> None:
    engine = tiny.tiny_engine(KIND)
    encoder = encoder_of(engine)
    for height, width in ((16, 16), (16, 64), (64, 16), (32, 32), (200, 200)):
        made = request(engine, "<image>", [picture(1, height, width)])
        assert tiny.embeddings(encoder, made.media[0]).nbytes <= encoder._picture_bytes


def test_rows_with_the_same_pictures_share_their_keys_and_values() -> None:
    """64 rows that see two pictures take no more for them than one layer of these."""
    engine = tiny.tiny_engine(KIND)
    encoder = encoder_of(engine)
    media = request(engine, "<image><image>", [ONE, TWO]).media
    kept = sum(tiny.embeddings(encoder, each).nbytes for each in media)
    rows = [MediaRows(row, 1, each, 0, b"") for row in range(64) for each in media]
    batch: Any = SimpleNamespace(media_rows=rows)
    assert encoder.input_embeddings(batch, mx.zeros((64,), mx.int32)) is None
    for index, layer in enumerate(encoder._crossing.layers):
        spans = encoder._crossing.spans_of(index)
        assert [(start, stop) for start, stop, _ in spans] == [(row, row + 1) for row in range(64)]
        joined = {id(seen): seen.nbytes for _, _, seen in spans}
        assert layer.index == index
        assert sum(joined.values()) * len(encoder._crossing.layers) == kept
    assert encoder.reserved_bytes >= encoder._max_bytes + sum(joined.values())


def test_unseen_pictures_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: tokens differ if decoded ones, or those of another request, see no picture."""
    engine = tiny.tiny_engine(KIND)
    right = [expected(KIND, TEXT, [ONE])]
    assert run(engine, request(engine, TEXT, [ONE])) == right

    def cut(self: Any, spans: Any) -> None:
        self.__dict__["spans"] = tuple(each for each in spans if each[1] - each[0] > 1)

    monkeypatch.setattr(
        Crossing, "spans", property(lambda self: self.__dict__["spans"], cut), raising=False
    )
    encoder_of(engine)._crossing.spans = ()
    assert run(engine, request(engine, TEXT, [ONE])) != right


def test_adapters(tmp_path: Path) -> None:
    """Those of requests cannot change the keys and values of a picture, which others share."""
    loaded = tiny.tiny_loaded(KIND)
    engine = Engine(loaded, EngineConfig(device="cpu", max_num_seqs=4, max_loras=1, block_size=8))
    targets = linears(loaded.model)
    size: Any = {"rank": 2, "seed": 1, "size": 0.3}
    wrong = read_adapter(write_peft(tmp_path / "wrong", targets, **size))
    with pytest.raises(AdapterError, match=r"cross_attn\.._proj cannot have adapters of requests"):
        engine.add_adapter("wrong", wrong, "digest")
    shared = (".cross_attn.k_proj", ".cross_attn.v_proj")
    kept = {name: value for name, value in targets.items() if not name.endswith(shared)}
    engine.add_adapter("one", read_adapter(write_peft(tmp_path / "one", kept, **size)), "digest")
    plain, adapted = (request(engine, TEXT, [ONE], adapter=name) for name in (None, "one"))
    [alone] = run(engine, adapted)
    assert alone != expected(KIND, TEXT, [ONE])
    assert run(engine, plain, adapted) == [expected(KIND, TEXT, [ONE]), alone]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross_attention_layers": [1, 9]}, r"\[1, 9\] are not some of the 5 layers"),
        ({"cross_attention_layers": [1, 1]}, "not some of the 5 layers"),
        ({"cross_attention_layers": []}, "not some of the 5 layers"),
        ({"cross_attention_layers": [0, 1, 2, 3, 4]}, "not some of the 5 layers"),
        ({"cross_attention_layers": "all"}, "not some of the 5 layers"),
        ({"num_hidden_layers": None}, "cannot build"),
        ({"model_type": "qwen2"}, "is not supported for mllama"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load(copied(KIND, tmp_path, {"text_config": change}), device="cpu")


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_num_tiles": 2}, "cannot"),
        ({"attention_heads": 5}, "cannot"),
        ({"vision_output_dim": 64}, "cannot"),
        ({"image_size": 10**6}, "config.json|cannot"),
    ],
)
def test_towers_that_are_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """The model then reads text only."""
    loaded = load(copied(KIND, tmp_path, {"vision_config": change}), device="cpu")
    assert loaded.vision is None
    assert reason.split("|")[0] in loaded.no_vision or reason.split("|")[-1] in loaded.no_vision
    engine = Engine(loaded, EngineConfig(device="cpu"))
    ids = engine.tokenizer.encode("hello there", add_special_tokens=False)
    made = request(tiny.tiny_engine(KIND), "hello there", [])
    assert list(made.prompt_token_ids) == ids
    assert run(engine, made) == [expected(KIND, "hello there", [])]


def test_layers_without_pictures_are_skipped() -> None:
    """A text without pictures computes what a model without these layers does."""
    loaded: Any = tiny.tiny_loaded(KIND)
    ids = mx.array([[5, 6, 7]])
    logits = loaded.model(ids)
    inner = loaded.model.language_model.model
    inner.layers = [layer for layer in inner.layers if hasattr(layer, "self_attn")]
    assert len(inner.layers) == 3
    assert mx.array_equal(loaded.model(ids), logits)
    assert logits[..., -8:].tolist() == [[[-float("inf")] * 8] * 3]
