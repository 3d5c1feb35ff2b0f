"""Phi-4 Multimodal: its own adapter changes all layers of prompts with sounds, and of no others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from modelpack.formats.adapter import Adapter, read_adapter_files
from modelpack_engine.errors import RequestError
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.vision.processor import Picture
from modelpack_engine.vision.sounds import Sound
from modelpack_engine.vision.tower_call import TowerCall
from tests.engine.vision import phi4, tiny
from tests.engine.vision.hearing import sound
from tests.engine.vision.phi4 import engine_of, expected, request
from tests.engine.vision.tiny import run

pytestmark = pytest.mark.long

ONE, TWO = sound(1), sound(2)
PROMPTS: dict[str, tuple[str, list[Sound]]] = {
    "text only": ("hello there", []),
    "one sound": ("<audio>What is said?", [ONE]),
    "two sounds": ("this is <audio> and that is <audio>, hear?", [ONE, TWO]),
    "the same twice": ("<audio> or <audio>", [ONE, ONE]),
}


def _adapter(path: Path) -> Adapter:
    """Return an adapter of requests in PEFT's format, for one layer."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 64, "target_modules": ["o_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    layer = "base_model.model.model.layers.1.self_attn.o_proj"
    mx.random.seed(3)
    arrays = {
        f"{layer}.lora_A.weight": mx.random.normal((2, 64)),
        f"{layer}.lora_B.weight": mx.random.normal((64, 2)),
    }
    mx.save_safetensors(str(path / "adapter_model.safetensors"), arrays)
    return read_adapter_files(path / "adapter_config.json", path / "adapter_model.safetensors")


@pytest.mark.parametrize("name", PROMPTS)
def test_tokens_are_those_of_mlx_vlm(name: str) -> None:
    engine = engine_of(max_num_batched_tokens=256)
    assert engine._runner.tier == "paged"
    assert run(engine, request(engine, *PROMPTS[name])) == [expected(*PROMPTS[name])]


def test_changed_samples_change_the_answer() -> None:
    """The control."""
    engine = engine_of(max_num_batched_tokens=256)
    text, _ = PROMPTS["one sound"]
    [first], [second] = (run(engine, request(engine, text, [sound(seed)])) for seed in (1, 2))
    assert first != second


def test_without_its_adapter_the_answer_is_another_one() -> None:
    """The control: of a prompt with a sound, and text has none of it."""
    engine = engine_of(max_num_batched_tokens=256)
    made = request(engine, *PROMPTS["one sound"])
    assert engine._adapters is not None
    own, engine._adapters.for_files = engine._adapters.for_files, None
    without = run(engine, made)
    engine._adapters.for_files = own
    assert run(engine, made) == [expected(*PROMPTS["one sound"])] != without


@pytest.mark.parametrize("rows", [8, 17, 32])
def test_one_batch_with_text_in_chunks(rows: int) -> None:
    engine = engine_of(max_num_batched_tokens=rows)
    made = [request(engine, *prompt) for prompt in PROMPTS.values()]
    assert run(engine, *made) == [expected(*prompt) for prompt in PROMPTS.values()]
    assert engine.stats().num_mixed_steps > 0


def test_prompts_share_no_prefix_with_text() -> None:
    """The keys and values before a sound are those of its adapter."""
    text = "a long beginning of a prompt, and then"
    spoken = f"{text} <audio>?", [ONE]
    for cached in (True, False):
        engine = engine_of(enable_prefix_caching=cached, block_size=8)
        for prompt in ((text, []), spoken, spoken, (f"{text}!", [])):
            assert run(engine, request(engine, *prompt)) == [expected(*prompt)]
        assert (engine.stats().cached_tokens > 0) == cached
        assert engine.vision is not None
        assert engine.vision.encoder.misses == 1


def test_sounds_of_one_length_are_encoded_together() -> None:
    vision = phi4.loaded().vision
    assert vision is not None
    media = [vision.processor.place([phi4.AUDIO], [each])[1][0] for each in (ONE, TWO)]
    alone = [TowerCall(vision.encoder._model, [each]).finish()[0] for each in media]
    together = TowerCall(vision.encoder._model, media).finish()
    for one, other in zip(alone, together, strict=True):
        assert np.allclose(np.array(one), np.array(other), atol=1e-5)


@pytest.mark.parametrize("count", [400, 559, 560, 1_679, 1_680, 16_000, 99_999, 640_000])
def test_every_embedding_has_a_token(count: int) -> None:
    vision = phi4.loaded().vision
    assert vision is not None
    assert vision.processor.sounds is not None
    samples = np.random.default_rng(count).normal(0, 0.1, count).astype(np.float32)
    media = vision.processor.sounds.media(Sound(samples))
    assert len(tiny.embeddings(vision.encoder, media)) == len(media.token_ids)
    assert len(media.token_ids) <= 500, "more are encoded in parts of 500"


@pytest.mark.parametrize("loras", [1, 3])
def test_beside_adapters_of_requests(loras: int, tmp_path: Path) -> None:
    """Text has the adapters of its requests, prompts with sounds the model's own."""
    engine = engine_of(max_loras=loras, max_num_batched_tokens=256)
    assert engine.runs_adapters
    base = run(engine, request(engine, *PROMPTS["text only"]))
    engine.add_adapter("own", _adapter(tmp_path), "one")
    named = request(engine, *PROMPTS["text only"], adapter="own")
    alone = run(engine, named)
    assert alone != base
    others = [request(engine, *PROMPTS[name]) for name in ("one sound", "text only")]
    assert run(engine, others[0], named, others[1]) == [
        expected(*PROMPTS["one sound"]), *alone, *base
    ]  # fmt: skip
    with pytest.raises(RequestError, match="an adapter of the model's own, and no other"):
        engine.add_request("both", request(engine, *PROMPTS["one sound"], adapter="own"))
    engine.remove_adapter("own")
    assert run(engine, others[0]) == [expected(*PROMPTS["one sound"])]


def test_requests_name_no_adapters_unless_they_may() -> None:
    engine = engine_of()
    assert not engine.runs_adapters
    with pytest.raises(RequestError, match="the model is loaded without LoRA adapters"):
        engine.add_request("text", request(engine, *PROMPTS["text only"], adapter="own"))


def test_files_of_mlx_vlm_have_the_adapters_in_their_weights(tmp_path: Path) -> None:
    """It merges both before it quantises; the names are those of its modules."""
    phi4.write(tmp_path)
    peer = phi4.peer()
    assert peer.quant_predicate is not None  # it merges them
    merged = dict(tree_flatten(peer.parameters()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), merged, metadata={"format": "mlx"})
    engine = engine_of(tmp_path, max_num_batched_tokens=256)
    assert engine._adapters is None
    prompt = PROMPTS["one sound"]
    found = run(engine, request(engine, *prompt))
    assert found == [expected(*prompt, model=peer)] != [expected(*prompt)]


def test_pictures_are_refused() -> None:
    engine = engine_of()
    assert engine.vision is not None
    processor = engine.vision.processor
    with pytest.raises(RequestError, match=r"the prompt has 1 placeholders .* for 0 sounds"):
        processor.place([phi4.AUDIO], [])
    shown = Picture(np.zeros((8, 8, 3), np.uint8), "there")
    with pytest.raises(RequestError, match="the placeholder of another kind of file") as caught:
        processor.place([phi4.AUDIO], [shown])
    assert caught.value.param == "there"
    with pytest.raises(RequestError, match="it is too short"):
        processor.place([phi4.AUDIO], [Sound(np.zeros(399, np.float32))])


def _without(tensors: dict[str, mx.array], part: str) -> dict[str, mx.array]:
    return {name: value for name, value in tensors.items() if part not in name}


QKV = "model.layers.0.self_attn.qkv_proj"


@pytest.mark.parametrize(
    ("config", "settings", "change", "reason"),
    [
        ({"audio_processor": None}, {}, None, "config.json has no audio tower"),
        ({}, {"audio_compression_rate": 4}, None, "audio_compression_rate 4 is not 8"),
        ({"audio_token_index": 7}, {}, None, "'<|endoftext11|>' is not the token 7"),
        ({"speech_lora": None}, {}, None, "speech_lora has no r and lora_alpha"),
        ({"speech_lora": {"r": 4, "lora_alpha": 8}}, {}, None, "A is [8, 64] and B [128, 8], exp"),
        ({"speech_lora": {"r": 0, "lora_alpha": 8}}, {}, None, "has no r and lora_alpha"),
        ({}, {}, ("chunk_size", 18), "time_reduction is not 8, or chunk_size is not -1"),
        ({}, {}, ("time_reduction", 4), "time_reduction is not 8, or chunk_size is not -1"),
        ({}, {}, ("num_blocks", 3), "Missing"),
        ({}, {}, ("num_blocks", 10**9), "num_blocks"),
        ({}, {}, "embed_tokens_extend.audio_embed", "the files have no audio tower"),
        ({}, {}, f"{QKV}.lora_B.speech", "the model has no such layer, or no B for this A"),
        ({}, {}, float("nan"), "A or B has values that are not finite"),
    ],
)  # fmt: skip
def test_broken_models_read_text(
    config: dict[str, Any], settings: dict[str, Any], change: Any, reason: str, tmp_path: Path
) -> None:
    if isinstance(change, tuple):
        audio = phi4.CONFIG["audio_processor"]
        name, value = change
        config = {"audio_processor": audio | {"config": audio["config"] | {name: value}}}
    phi4.write(tmp_path, **config)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(phi4.SETTINGS | settings))
    if isinstance(change, str | float):
        tensors = dict(phi4.weights())
        if isinstance(change, str):
            tensors = _without(tensors, change)
        else:
            tensors[f"{QKV}.lora_A.speech.weight"] = mx.full((phi4.RANK, 64), change)
        mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    loaded = phi4.loaded(tmp_path)
    assert loaded.vision is None
    assert reason in loaded.no_vision
    assert loaded.notes[-1] == f"sounds are not read: {loaded.no_vision}"
    engine = engine_of(tmp_path)
    assert engine._adapters is None
    prompt = [1, 2, 3]
    engine.add_request("text", EngineRequest(prompt, SamplingParams(max_tokens=2)))
    while engine.has_work:
        engine.step()


def test_the_adapter_counts_in_memory() -> None:
    loaded = phi4.loaded()
    own = sum(each.nbytes for each in loaded.adapter_for_files.values())
    stored = phi4.weights().items()
    layers = [value for name, value in stored if re.search(r"lora_[AB]\.speech", name)]
    assert own == sum(value.nbytes for value in layers) > 0
    assert loaded.weight_bytes > 2 * own
