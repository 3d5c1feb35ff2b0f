"""Speech-to-text models: mlx-audio's own transcripts, long sound, and files that are refused."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from modelpack_engine.embedding import purpose_of
from modelpack_engine.errors import EngineError, ModelLoadError, RequestError
from modelpack_engine.models import ModelFiles
from modelpack_engine.patches import mlx_audio_imports
from modelpack_engine.speech.async_transcriber import AsyncTranscriber
from modelpack_engine.speech.loader import Transcriber, load_transcriber, loaded_bytes
from modelpack_engine.speech.moonshine import cuts
from modelpack_engine.speech.parakeet import Parakeet
from modelpack_engine.speech.transcript import (
    MIN_SECONDS,
    SAMPLE_RATE,
    TranscriptionRequest,
    finite,
)
from modelpack_engine.speech.whisper import Whisper
from tests.engine.speech.tiny import (
    PARAKEETS,
    noise,
    tone,
    write_moonshine,
    write_parakeet,
    write_whisper,
)

pytestmark = pytest.mark.long

LONG = noise(40)


def load(directory: Path) -> Transcriber:
    return load_transcriber(ModelFiles.from_directory(directory), device="cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def whisper(directory: Path) -> Transcriber:
    return load(directory)


@pytest.fixture(scope="module")
def parakeet(tmp_path_factory: pytest.TempPathFactory) -> Transcriber:
    return load(write_parakeet(tmp_path_factory.mktemp("parakeet")))


def peer_of_whisper(directory: Path) -> Any:
    """Return mlx-audio's Whisper in float32, with transformers' tokenizer."""
    from mlx_audio.stt.models.whisper.whisper import Model, ModelDimensions

    config = json.loads((directory / "config.json").read_text())
    model = Model(ModelDimensions.from_dict(config), mx.float32)
    arrays = mx.load(str(directory / "model.safetensors"))
    model.load_weights(list(model.sanitize(arrays).items()))
    model.eval()
    return Model.post_load_hook(model, directory)


@pytest.mark.parametrize(
    ("names", "options"),
    [
        ({}, {}),
        ({"openai_names": True}, {"language": "de"}),
        ({"multilingual": False}, {"words": True}),
        ({}, {"task": "translate", "language": "fr"}),
        ({"config": {"num_mel_bins": 128}}, {"prompt": "names and terms", "language": "en"}),
    ],
)
def test_whisper_writes_what_mlx_audio_does(
    tmp_path: Path, names: dict[str, Any], options: dict[str, Any]
) -> None:
    """40 s are two windows."""
    write_whisper(tmp_path, **names)
    mx.random.seed(0)  # a window whose text is improbable is decoded again, at random
    made = load(tmp_path).transcribe(TranscriptionRequest(LONG, **options))
    kwargs: dict[str, Any] = {
        "language": options.get("language"),
        "task": options.get("task", "transcribe"),
        "initial_prompt": options.get("prompt"),
        "word_timestamps": options.get("words", False),
    }
    mx.random.seed(0)
    peer = peer_of_whisper(tmp_path).generate(mx.array(LONG), fp16=False, **kwargs)
    assert made.text == peer.text.strip() != ""
    segments = [one for one in peer.segments if one["text"].strip()]
    assert len(segments) > 1
    for ours, theirs in zip(made.segments, segments, strict=True):
        assert (ours.text, ours.tokens) == (theirs["text"], tuple(theirs["tokens"]))
        assert (ours.start, ours.end, ours.seek) == (theirs["start"], theirs["end"], theirs["seek"])
        assert ours.avg_logprob == pytest.approx(finite(theirs["avg_logprob"]), abs=1e-6)
    words = [word for one in segments for word in one.get("words", ())]
    assert [(w.text, w.start, w.end) for w in made.words] == [
        (w["word"].strip(), w["start"], w["end"]) for w in words
    ]
    assert bool(words) == options.get("words", False)


@pytest.mark.parametrize("kind", PARAKEETS)
def test_parakeet_writes_what_mlx_audio_does(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_audio.stt.models.parakeet.parakeet import Model

    from modelpack_engine.speech import parakeet

    monkeypatch.setattr(parakeet, "WINDOW", 3.0)
    monkeypatch.setattr(parakeet, "OVERLAP", 1.0)
    write_parakeet(tmp_path, kind)
    sound = noise(6)
    windows: list[None] = []
    made = load(tmp_path).transcribe(
        TranscriptionRequest(sound, words=True), lambda: windows.append(None)
    )
    model = Model.from_config(json.loads((tmp_path / "config.json").read_text()))
    model.load_weights(str(tmp_path / "model.safetensors"))
    model.eval()
    peer = model.generate(
        mx.array(sound), dtype=mx.float32, chunk_duration=3.0, overlap_duration=1.0
    )
    ours = [token for one in made.segments for token in one.tokens]
    theirs = [token.id for one in peer.sentences for token in one.tokens]
    if kind == "ctc":  # mlx-audio drops a token that follows the same one after a blank
        alone = [[token for token, _ in itertools.groupby(one)] for one in (ours, theirs)]
        assert alone[0] == alone[1]
    else:
        assert ours == theirs
        assert made.text == peer.text != ""
        assert [one.text for one in made.segments] == [one.text for one in peer.sentences]
    # mlx-audio sorts tokens by time after it has joined the text.
    assert sorted(word.text for word in made.words) == sorted(made.text.split())
    for word in made.words:
        assert 0 <= word.start <= word.end
    assert len(windows) == 3


def test_moonshine_writes_what_mlx_audio_does(tmp_path: Path) -> None:
    from mlx_audio.stt.models.moonshine.moonshine import Model, ModelConfig

    write_moonshine(tmp_path)
    sound = np.concatenate([noise(27), np.zeros(8000, np.float32), noise(6, 1)])
    windows: list[None] = []
    made = load(tmp_path).transcribe(TranscriptionRequest(sound), lambda: windows.append(None))
    model = Model(ModelConfig.from_dict(json.loads((tmp_path / "config.json").read_text())))
    arrays = mx.load(str(tmp_path / "model.safetensors"))
    model.load_weights(list(model.sanitize(arrays).items()))
    model = Model.post_load_hook(model, tmp_path)
    [_, cut, end] = cuts(sound)
    assert 27 <= cut / SAMPLE_RATE <= 27.5
    peers = [model.generate(mx.array(part)).text for part in (sound[:cut], sound[cut:])]
    assert [one.text for one in made.segments] == peers
    assert made.text == " ".join(peers)
    assert all(peers)
    assert [(s.start, s.end) for s in made.segments] == [(0, cut / 16000), (cut / 16000, 33.5)]
    assert (len(windows), end, made.language) == (2, len(sound), "english")


@pytest.mark.parametrize("seconds", [30.0001, 30.001, 30.05, 30.2])
def test_moonshine_gets_no_window_that_is_too_short(tmp_path: Path, seconds: float) -> None:
    sound = noise(seconds)
    sound[int(29.97 * SAMPLE_RATE) :] = 0
    starts = cuts(sound)
    assert len(sound) - starts[-2] >= MIN_SECONDS * SAMPLE_RATE
    if seconds == 30.001:
        made = load(write_moonshine(tmp_path)).transcribe(TranscriptionRequest(sound))
        assert made.duration == len(sound) / SAMPLE_RATE


@given(st.floats(0.1, 120), st.integers(0, 9))
def test_cuts(seconds: float, seed: int) -> None:
    sound = noise(seconds, seed)
    found = cuts(sound)
    assert (found[0], found[-1]) == (0, len(sound))
    for start, end in itertools.pairwise(found):
        assert MIN_SECONDS * SAMPLE_RATE <= end - start <= 30 * SAMPLE_RATE
    for start, end in itertools.pairwise(found[:-1]):
        assert end - start >= 25 * SAMPLE_RATE


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"task": "translate"}, "model"),
        ({"prompt": "x"}, "prompt"),
        ({"words": True}, "timestamp_granularities"),
        ({"language": "de"}, "language"),
    ],
)
def test_what_moonshine_cannot_do(tmp_path: Path, fields: dict[str, Any], param: str) -> None:
    model = load(write_moonshine(tmp_path))
    with pytest.raises(RequestError) as refused:
        model.check(TranscriptionRequest(noise(1), **fields))
    assert refused.value.param == param
    model.check(TranscriptionRequest(noise(1), language="en"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"decoder_start_token_id": 500}, "decoder_start_token_id is 500"),
        ({"decoder_start_token_id": None}, "decoder_start_token_id is None"),
        ({"hidden_size": 64}, "has the shape"),
        ({"hidden_size": 0}, "cannot build mlx-audio's moonshine"),
        ({"decoder_num_hidden_layers": 900}, "decoder_num_hidden_layers is 900|modules"),
    ],
)
def test_damaged_moonshines(tmp_path: Path, fields: Mapping[str, Any], said: str) -> None:
    _config(**fields)(write_moonshine(tmp_path))
    with pytest.raises(ModelLoadError, match=said):
        load(tmp_path)


def test_the_sound_the_language_and_the_task_change_the_text(whisper: Transcriber) -> None:
    texts = {
        whisper.transcribe(TranscriptionRequest(sound, task, language)).text
        for sound in (noise(3), tone(3))
        for language in ("en", "ja")
        for task in ("transcribe", "translate")
    }
    assert len(texts) == 8


def test_the_language_is_detected_and_named(whisper: Transcriber) -> None:
    assert isinstance(whisper.model, Whisper)
    detected = whisper.transcribe(TranscriptionRequest(tone(3))).language
    assert detected in whisper.model.languages.values()
    assert whisper.transcribe(TranscriptionRequest(tone(3), language="yi")).language == "yiddish"


def test_quantised_weights(tmp_path: Path) -> None:
    plain = write_whisper(tmp_path / "plain", config={"d_model": 64})
    model = peer_of_whisper(plain)
    nn.quantize(model, group_size=32, bits=8)
    packed = tmp_path / "packed"
    write_whisper(packed, config={"d_model": 64})
    config = json.loads((packed / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 8}
    (packed / "config.json").write_text(json.dumps(config))
    parameters = tree_flatten(model.parameters())
    arrays = {name: np.ascontiguousarray(value) for name, value in parameters}
    save_file(arrays, packed / "model.safetensors", {"format": "mlx"})
    loaded = load(packed)
    files = ModelFiles.from_directory(packed)
    assert loaded.weight_bytes == loaded_bytes(files, "cpu") < load(plain).weight_bytes / 2
    mx.random.seed(0)
    text = loaded.transcribe(TranscriptionRequest(noise(1), language="en")).text
    mx.random.seed(0)
    peer = model.generate(mx.array(noise(1)), language="en", fp16=False)
    assert text == peer.text.strip() != ""


def test_half_precision_is_planned_as_it_is_loaded(directory: Path, tmp_path: Path) -> None:
    """On a CPU, models compute in float32."""
    write_whisper(tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    halves = {name: value.astype(np.float16) for name, value in arrays.items()}
    save_file(halves, tmp_path / "model.safetensors")
    half, full = (ModelFiles.from_directory(one) for one in (tmp_path, directory))
    assert loaded_bytes(half, "cpu") == loaded_bytes(full, "cpu")
    assert loaded_bytes(half, "gpu") * 2 == loaded_bytes(full, "cpu")
    positions = 1500 * 16 * 4  # of the encoder, which are computed
    assert load(tmp_path).weight_bytes == loaded_bytes(half, "cpu") - positions


def test_a_transcription_stops_between_windows(whisper: Transcriber) -> None:
    windows = 0

    def on_window() -> None:
        nonlocal windows
        windows += 1
        if windows == 3:
            raise KeyError("stop")

    with pytest.raises(KeyError):
        whisper.transcribe(TranscriptionRequest(noise(200)), on_window)
    assert windows == 3
    assert whisper.transcribe(TranscriptionRequest(tone(1))).text


def test_a_model_whose_times_stand_still(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelpack_engine.speech import whisper

    monkeypatch.setattr(whisper, "_DECODINGS", 0)
    with pytest.raises(EngineError, match="timestamps do not advance"):
        load(directory).transcribe(TranscriptionRequest(tone(1)))


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"samples": noise(0.05)}, "file", "the sound has 0.050 s, expected 0.1 s or more"),
        ({"samples": noise(0)}, "file", "the sound has 0.000 s"),
        ({"temperature": 1.5}, "temperature", "temperature is 1.5, expected 0 to 1"),
        ({"temperature": float("nan")}, "temperature", "temperature is nan"),
        ({"language": "tlh"}, "language", "does not know the language 'tlh'"),
        ({"task": "translate", "words": True}, "timestamp_granularities", "for translations"),
        ({"language": "english"}, "language", "does not know the language 'english'"),
    ],
)
def test_refused_requests(
    whisper: Transcriber, fields: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        whisper.transcribe(TranscriptionRequest(**{"samples": noise(1), **fields}))
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"task": "translate"}, "model"),
        ({"prompt": "x"}, "prompt"),
        ({"language": "e1"}, "language"),
    ],
)
def test_what_parakeet_cannot_do(parakeet: Transcriber, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        parakeet.check(TranscriptionRequest(noise(1), **fields))
    assert refused.value.param == param


def test_an_english_model_does_not_translate(tmp_path: Path) -> None:
    model = load(write_whisper(tmp_path, multilingual=False))
    with pytest.raises(RequestError, match="English only"):
        model.check(TranscriptionRequest(noise(1), "translate"))
    with pytest.raises(RequestError, match="language 'de'"):
        model.check(TranscriptionRequest(noise(1), language="de"))
    assert model.transcribe(TranscriptionRequest(noise(1), language="en")).language == "english"


def test_the_shortest_sound(whisper: Transcriber, parakeet: Transcriber) -> None:
    for model in (whisper, parakeet):
        made = model.transcribe(TranscriptionRequest(noise(0.1)))
        assert made.duration == 0.1


def test_silence(whisper: Transcriber, parakeet: Transcriber) -> None:
    for model in (whisper, parakeet):
        made = model.transcribe(TranscriptionRequest(np.zeros(32_000, np.float32), words=True))
        assert made.duration == 2


def test_their_purpose(directory: Path, tmp_path: Path) -> None:
    assert purpose_of(ModelFiles.from_directory(directory)) == "transcription"
    parakeet = write_parakeet(tmp_path, "ctc")
    assert purpose_of(ModelFiles.from_directory(parakeet)) == "transcription"


def _config(**fields: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **fields}))

    return change


def _tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        arrays = load_file(directory / "model.safetensors")
        change(arrays)
        save_file(arrays, directory / "model.safetensors")

    return rewrite


def _generation(heads: Any) -> Callable[[Path], None]:
    text = json.dumps({"alignment_heads": heads})
    return lambda directory: (directory / "generation_config.json").write_text(text) and None


_PROJECTION = "model.decoder.layers.0.fc1.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_config(max_source_positions=3000), "max_source_positions is 3000, expected 1500"),
        (
            _config(max_target_positions=2**31),
            "max_target_positions is 2147483648, but positions are",
        ),
        (_config(max_target_positions=10**6), "max_target_positions is 1000000, expected 8 to"),
        (_config(max_target_positions="448"), "max_target_positions is 448, expected 8 to"),
        (_config(max_target_positions=64), "decoder.positional_embedding has the shape"),
        (_config(d_model=32), "has the shape"),
        (_config(d_model=0), "cannot build mlx-audio's whisper"),
        (_config(decoder_layers=2000), "need more than 1616 modules"),
        (_config(decoder_layers=4), "missing decoder.blocks.2"),
        (_config(vocab_size=10**9), "vocab_size is 1000000000, but the largest dimension"),
        (_config(num_mel_bins=128), "encoder.conv1.weight has the shape"),
        (_tensors(lambda a: a.pop(_PROJECTION) is None), "missing decoder.blocks.0.mlp1.weight"),
        (
            _tensors(lambda a: a.update(other=np.zeros(3, np.float32))),
            "not known to the model: other",
        ),
        (_generation([[9, 0]]), "alignment_heads is not a list"),
        (_generation("all"), "alignment_heads is not a list"),
        (lambda d: (d / "tokenizer.json").unlink(), "the model has no tokenizer.json"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x08" + bytes(20)), "model.safetensors"),
    ],
)
def test_damaged_whispers(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(write_whisper(tmp_path))
    with pytest.raises(Exception, match=said) as refused:
        load(tmp_path)
    assert type(refused.value).__module__.startswith("modelpack")


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    large = write_whisper(tmp_path / "large")
    small = write_whisper(tmp_path / "small", multilingual=False)
    (small / "tokenizer.json").write_text((large / "tokenizer.json").read_text())
    with pytest.raises(ModelLoadError, match="has 51865 tokens, the model has"):
        load(small)
    text = (large / "tokenizer.json").read_text().replace("<|startofprev|>", "<|before|>")
    (large / "tokenizer.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"has no token <\|startofprev\|>"):
        load(large)


def _preprocessor(**fields: Any) -> Mapping[str, Any]:
    return {"preprocessor": {**PARAKEETS["tdt"]["preprocessor"], **fields}}


def _decoding(**fields: Any) -> Mapping[str, Any]:
    return {"decoding": {**PARAKEETS["tdt"]["decoding"], **fields}}


@pytest.mark.parametrize("kind", ["tdt", "rnnt"])
@pytest.mark.parametrize("greedy", [None, {}, {"max_symbols": None}])
def test_a_parakeet_without_a_limit_of_symbols_gets_one(
    tmp_path: Path, kind: str, greedy: Any
) -> None:
    decoding = {**PARAKEETS[kind]["decoding"], "greedy": greedy}
    _config(decoding=decoding)(write_parakeet(tmp_path, kind))
    model = load(tmp_path).model
    assert isinstance(model, Parakeet)
    assert model._model.max_symbols == 10


@pytest.mark.parametrize("kind", ["whisper", "parakeet"])
def test_a_stopped_model_frees_its_weights_and_sounds(
    directory: Path, tmp_path: Path, kind: str
) -> None:
    path = directory if kind == "whisper" else write_parakeet(tmp_path)
    engine = AsyncTranscriber(lambda: load(path))
    engine.wait_until_ready(60)
    model: Any = engine.model.model
    weights = weakref.ref(model._model)
    del model
    sound = noise(1)
    held = weakref.ref(sound)
    asyncio.run(engine.transcribe(TranscriptionRequest(sound)))
    del sound
    done = time.monotonic() + 5
    while held() is not None:  # the thread lets it go after it has answered
        assert time.monotonic() < done
    engine.close()
    assert weights() is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (_preprocessor(sample_rate=8000), "preprocessor.sample_rate is 8000, expected 16000"),
        (_preprocessor(n_fft=10**9), "preprocessor.n_fft is 1000000000, expected at most 4096"),
        (_preprocessor(features="x"), "preprocessor.features is x"),
        ({"preprocessor": None}, "preprocessor.sample_rate is None"),
        (_decoding(durations=[0] * 5, greedy={}), r"durations is \[0, 0, 0, 0, 0\], expected 5"),
        (_decoding(durations=[0, 1, 2, 3]), "durations is .*, expected 5 integers"),
        (_decoding(durations=[0, 1, 2, 3, -4]), "durations is"),
        (_decoding(durations=[0, 1, 2, 3, 0.5]), "durations is"),
        (_decoding(greedy={"max_symbols": 0}), "max_symbols is 0, expected 1 to 100"),
        (_decoding(greedy={"max_symbols": 10**9}), "max_symbols is 1000000000, expected 1 to"),
        (_decoding(greedy={"max_symbols": "x"}), "max_symbols is x"),
        ({"joint": {}}, "cannot build mlx-audio's parakeet"),
        ({"encoder": {**PARAKEETS["tdt"]["encoder"], "n_layers": 9000}}, "n_layers is 9000"),
        ({"encoder": {**PARAKEETS["tdt"]["encoder"], "d_model": 32}}, "has the shape"),
    ],
)
def test_damaged_parakeets(tmp_path: Path, fields: Mapping[str, Any], said: str) -> None:
    _config(**fields)(write_parakeet(tmp_path))
    with pytest.raises(ModelLoadError, match=said):
        load(tmp_path)


def test_without_mlx_audio(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_audio_imports, "is_installed", lambda: False)
    with pytest.raises(ModelLoadError, match="need mlx-audio") as refused:
        load(directory)
    assert refused.value.hint == "run pip install 'modelpack[audio]'"
