"""Sounds in an engine's prompts: the tokens are those of mlx-vlm's single-request path."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.errors import RequestError
from modelpack_engine.models import load
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.vision.sounds import Sound
from tests.engine.vision import hearing, tiny
from tests.engine.vision.hearing import KINDS, engine_of, request, sound
from tests.engine.vision.tiny import picture, run

pytestmark = pytest.mark.long

ONE, TWO, PICTURE = sound(1), sound(2), picture(1)
PROMPTS: dict[str, tuple[str, list[Any]]] = {
    "text only": ("hello there", []),
    "one sound": ("<audio>What is said?", [ONE]),
    "two sounds": ("this is <audio> and that is <audio>, hear?", [ONE, TWO]),
    "the same twice": ("<audio> or <audio>", [ONE, ONE]),
    "a sound and a picture": ("<audio> of <image>?", [ONE, PICTURE]),
    "a picture and a sound": ("<image> with <audio>?", [PICTURE, TWO]),
}


SLOW = {"gemma3n"}
PARAMETERS = [pytest.param(name, marks=[pytest.mark.long] * (name in SLOW)) for name in KINDS]


@pytest.fixture(scope="module", params=PARAMETERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", PROMPTS)
def test_tokens_are_those_of_mlx_vlm(kind: str, name: str) -> None:
    engine = engine_of(kind, max_num_batched_tokens=256)
    assert engine._runner.tier == "paged"
    assert run(engine, request(engine, *PROMPTS[name])) == [hearing.expected(kind, *PROMPTS[name])]


def test_changed_samples_change_the_answer(kind: str) -> None:
    """The control."""
    engine = engine_of(kind)
    text, _ = PROMPTS["one sound"]
    [first], [second] = (run(engine, request(engine, text, [sound(seed, 25.0)])) for seed in (1, 2))
    assert first != second
    assert engine.vision is not None
    assert engine.vision.encoder.misses == 2


@pytest.mark.parametrize("rows", [8, 17, 32])
def test_chunks_split_sounds(kind: str, rows: int) -> None:
    text, files = PROMPTS["two sounds"]
    engine = engine_of(kind, max_num_batched_tokens=rows)
    assert run(engine, request(engine, text, files)) == [hearing.expected(kind, text, files)]


def test_one_batch_with_other_requests(kind: str) -> None:
    engine = engine_of(kind, max_num_batched_tokens=24)
    names = ("text only", "one sound", "a sound and a picture")
    made = [request(engine, *PROMPTS[name]) for name in names]
    assert run(engine, *made) == [hearing.expected(kind, *PROMPTS[name]) for name in names]
    assert engine.stats().num_mixed_steps > 0


def test_the_prefix_cache_changes_nothing(kind: str) -> None:
    text, files = PROMPTS["two sounds"]
    expected = [hearing.expected(kind, text, files)]
    for cached in (True, False):
        engine = engine_of(kind, enable_prefix_caching=cached, block_size=8)
        made = request(engine, text, files)
        assert [run(engine, made) for _ in range(2)] == [expected, expected]
        assert (engine.stats().cached_tokens > 0) == cached


def test_a_second_question_reads_the_sound_once(kind: str) -> None:
    engine = engine_of(kind, block_size=8)
    run(engine, request(engine, "<audio>What is it?", [ONE]))
    assert engine.vision is not None
    assert engine.vision.encoder.misses == 1
    hits = engine.vision.encoder.hits
    run(engine, request(engine, "Who says <audio>?", [Sound(ONE.samples.copy())]))
    assert engine.vision.encoder.hits > hits
    assert engine.vision.encoder.misses == 1
    assert engine.stats().cached_tokens == 0
    run(engine, request(engine, "<audio>What else?", [ONE]))
    assert engine.stats().cached_tokens > 0
    assert engine.vision.encoder.misses == 1


def test_a_preempted_sound_is_computed_again() -> None:
    """Blocks for one request and a half: one of the two is preempted and computed again."""
    kind, count = "qwen3_omni_moe", 20
    prompts = [("<audio>What is said?", [ONE]), ("ab<audio>", [TWO])]
    engine = engine_of(kind, block_size=8, kv_cache_bytes=10 * 8 * 512)
    tokens = run(engine, *(request(engine, *prompt, count) for prompt in prompts))
    assert engine.stats().num_preemptions > 0
    assert tokens == [hearing.expected(kind, *prompt, count) for prompt in prompts]


def test_qwen3_omni_as_it_is_published(tmp_path: Path) -> None:
    """Each expert has tensors of its own."""
    files = copied(tmp_path, "qwen3_omni_moe")
    weights = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(weights, dict)
    split: dict[str, mx.array] = {}
    for name, value in weights.items():
        before, found, after = name.partition("switch_mlp.")
        split |= (
            {f"{before}experts.{index}.{after}": each for index, each in enumerate(value)}
            if found
            else {name: value}
        )
    assert len(split) > len(weights)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), split)
    engine = Engine(load(files, device="cpu"), EngineConfig(device="cpu"))
    prompt = PROMPTS["a sound and a picture"]
    found = run(engine, request(engine, *prompt))
    assert found == [hearing.expected("qwen3_omni_moe", *prompt)]


@pytest.mark.parametrize("count", [160, 1_279, 1_280, 16_000, 16_001, 99_999, 480_001])
def test_every_embedding_of_qwen3_omni_has_a_token(count: int) -> None:
    vision = hearing.loaded("qwen3_omni_moe").vision
    assert vision is not None
    assert vision.processor.sounds is not None
    samples = np.random.default_rng(count).normal(0, 0.1, count).astype(np.float32)
    media = vision.processor.sounds.media(Sound(samples))
    made = tiny.embeddings(vision.encoder, media)
    assert len(made) == len(media.token_ids)
    assert abs(len(media.token_ids) - count / 16_000 * 13) < 1.5


@pytest.mark.parametrize("count", [400, 640, 16_000, 16_001, 40_321, 99_999, 480_000])
def test_every_embedding_has_a_token(count: int) -> None:
    """A sound of any length: no row is of padding, and none is left out."""
    vision = hearing.loaded("gemma4").vision
    assert vision is not None
    assert vision.processor.sounds is not None
    samples = np.random.default_rng(count).normal(0, 0.1, count).astype(np.float32)
    media = vision.processor.sounds.media(Sound(samples))
    model: Any = vision.encoder._model
    features, mask = (mx.array(media.inputs[f"input_features{end}"]) for end in ("", "_mask"))
    rows, padding = model.audio_tower(features, ~mask)
    assert rows.shape[1] == padding.shape[1]
    assert len(media.token_ids) - 2 == int((~padding).sum())
    assert abs(len(media.token_ids) - 2 - count / 640) <= 1


def test_placeholders_of_another_kind(kind: str) -> None:
    engine = engine_of(kind)
    with pytest.raises(RequestError, match=r"the prompt has 2 placeholders .* and .* for 1 file"):
        request(engine, "<image><audio>", [ONE])
    with pytest.raises(RequestError, match="placeholder of another kind of file") as caught:
        request(engine, "<image>", [dataclasses.replace(ONE, param="there")])
    assert caught.value.param == "there"
    short = "here: the sound of 0 s cannot be processed: it is too short"
    with pytest.raises(RequestError, match=short) as caught:
        request(engine, "<audio>", [Sound(np.zeros(0, np.float32), "here")])
    assert caught.value.param == "here"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sampling_rate": 10**9}, "sampling_rate 1000000000 is not a number from 8000 to 32000"),
        ({"sampling_rate": "16000"}, "sampling_rate 16000 is not a number"),
        ({"feature_size": 10**9}, "feature_size 1000000000 is not from 1 to 1024"),
        ({"hop_length_ms": 0.0001}, "hop_length_ms 0.0001 is not from 5 to 1000"),
        ({"frame_length_ms": 1e9}, "frame_length_ms 1000000000.0 is not from 5 to 1000"),
        ({"dither": 0.1}, "dither adds noise to sounds"),
        ({"feature_size": 64}, "the model cannot encode this sound"),
        ({"mel_floor": "?"}, "the settings of the feature extractor are wrong"),
    ],
)
def test_models_with_wrong_settings_read_pictures(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    files = copied(tmp_path)
    document = json.loads((tmp_path / "processor_config.json").read_text())
    document["feature_extractor"] |= settings
    (tmp_path / "processor_config.json").write_text(json.dumps(document))
    check_no_sounds(files, reason)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"n_fft": 10**9}, "n_fft 1000000000 is not from 80 to 16000"),
        ({"hop_length": 1}, "hop_length 1 is not from 80 to 16000"),
        ({"feature_size": 32}, "the model cannot encode this sound"),
        ({"feature_extractor_type": "EncodecFeatureExtractor"}, "is not WhisperFeatureExtractor"),
    ],
)
def test_wrong_settings_of_qwen3_omni(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    files = copied(tmp_path, "qwen3_omni_moe")
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    check_no_sounds(files, reason)


def test_models_without_the_tower_read_pictures(kind: str, tmp_path: Path) -> None:
    files = copied(tmp_path, kind)
    weights = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(weights, dict)
    kept = {name: value for name, value in weights.items() if "audio" not in name}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), kept)
    check_no_sounds(files, "the files have no audio tower")


def copied(path: Path, kind: str = "gemma4") -> ModelFiles:
    """Return the files of a tiny model in another directory."""
    for file in hearing.directory(kind).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return ModelFiles.from_directory(path)


def check_no_sounds(files: ModelFiles, reason: str) -> None:
    found = load(files, device="cpu")
    assert found.vision is not None
    assert found.vision.processor.sounds is None
    assert reason in found.vision.processor.no_sounds
    assert found.notes == (f"sounds are not read: {found.vision.processor.no_sounds}",)
