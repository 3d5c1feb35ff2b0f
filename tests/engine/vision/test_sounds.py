"""Decoding sounds: good files of every kind, resampling, and bad files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import pytest

from modelpack_engine.errors import RequestError
from modelpack_engine.worker.sound import resampled
from modelpack_server.conversation import sounds
from modelpack_server.conversation.sounds import decode_sound
from tests.engine.vision.sound_files import BAD_FILES, fixture, flac_of_silence, tone, wav


def decoded(data: bytes, rate: int = 16_000) -> np.ndarray:
    return decode_sound(data, "here", rate)


def difference(found: np.ndarray, rate: int, edge: float = 0.1) -> float:
    """Return the largest difference from the tones, without the edges of the sound."""
    within = slice(int(edge * rate), int((1 - edge) * rate))
    return float(np.abs(found[within] - tone(rate)[within]).max())


@pytest.mark.parametrize(("name", "make", "message"), BAD_FILES, ids=[b[0] for b in BAD_FILES])
def test_bad_files(name: str, make: Callable[[], bytes], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        decoded(make())
    assert message in str(caught.value)
    assert str(caught.value).startswith("here: the sound is ")
    assert caught.value.param == "here"


@pytest.mark.parametrize(
    ("name", "most"), [("tone.flac", 1e-4), ("tone.ogg", 0.05), ("tone.mp3", 0.02)]
)
@pytest.mark.parametrize("rate", [22_050, 16_000])
def test_files_of_other_encoders(name: str, most: float, rate: int) -> None:
    found = decoded(fixture(name), rate)
    assert found.dtype == np.float32
    assert found.shape == (rate,)
    assert difference(found, rate) < most


@pytest.mark.parametrize(
    ("samples", "most"),
    [
        ((tone(16_000) * 32767).astype(np.int16), 1e-4),
        ((tone(16_000) * 127 + 128).astype(np.uint8), 0.02),
        ((tone(16_000) * (2**31 - 256)).astype(np.int32), 1e-6),
        (tone(16_000), 0),
        (tone(16_000).astype(np.float64), 0),
    ],
    ids=["16 bits", "8 bits", "32 bits", "float", "double"],
)
def test_kinds_of_wav(samples: np.ndarray, most: float) -> None:
    found = decoded(wav(samples))
    assert len(found) == 16_000
    assert np.abs(found - tone(16_000)).max() <= most


def test_channels_are_averaged() -> None:
    left, right = tone(16_000), np.linspace(-1, 1, 16_000, dtype=np.float32)
    found = decoded(wav(np.stack([left, right], 1)))
    assert np.allclose(found, (left + right) / 2, atol=1e-7)


def test_headers_of_programs_that_write_to_a_pipe() -> None:
    """They do not know the length yet."""
    samples = (tone(16_000) * 32767).astype(np.int16)
    data = wav(samples, size=2**32 - 1)
    at = data.find(b"data") + 4
    assert len(decoded(data[:at] + b"\xff" * 4 + data[at + 4 :])) == 16_000


def test_sizes_that_count_the_header() -> None:
    samples = (tone(16_000) * 32767).astype(np.int16)
    assert len(decoded(wav(samples, size=len(wav(samples))))) == 16_000


@pytest.mark.sample(1)
@pytest.mark.parametrize("found", [4_000, 8_000, 11_025, 22_050, 44_100, 44_099, 48_000, 192_000])
@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_resampling_keeps_tones(found: int, rate: int) -> None:
    made = resampled(tone(found), found, rate)
    assert made.dtype == np.float32
    assert len(made) == rate
    assert difference(made, rate) < 1e-4


def test_resampling_drops_tones_that_the_rate_cannot_have() -> None:
    time = np.arange(44_100) / 44_100
    made = resampled(np.sin(2 * np.pi * 9_000 * time).astype(np.float32), 44_100, 16_000)
    assert np.abs(made[1000:-1000]).max() < 1e-4


@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_short_sounds(count: int) -> None:
    assert len(decoded(wav(np.full(count, 99, np.int16), 48_000))) == -(-count // 3)


@pytest.mark.parametrize(
    ("start", "is_sound"),
    [
        (b"\xff\xfb\x90", True), (b"\xff\xfa\x90", True), (b"\xff\xf2\x40", True),
        (b"\xff\xe3\x18", True), (b"ID3\x04", True), (b"fLaC", True), (b"OggS", True),
        (b"RIFF\0\0\0\0WAVE", True), (b"RIFF\0\0\0\0WEBP", False),
        (b"\xff\xd8\xff\xe0", False), (b"\x89PNG", False), (b"\xff", False), (b"", False),
    ],
)  # fmt: skip
def test_what_begins_as_a_sound(start: bytes, is_sound: bool) -> None:
    assert sounds.is_sound(start) == is_sound


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"here: the sound is refused: it is longer than 0.5 s"):
        decode_sound(wav(tone(16_000)), "here", 16_000, max_sound_seconds=0.5)
    monkeypatch.setattr(sounds, "MAX_SOUND_BYTES", 100)
    with pytest.raises(RequestError, match="here: the sound has more than 100 bytes"):
        decoded(wav(tone(16_000)))


@pytest.mark.long
def test_slow_files_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sounds.SoundFile.decode, "__defaults__", (0.02,))
    with pytest.raises(RequestError, match=r"here: the sound is refused: .* longer than 0.02 s"):
        decoded(flac_of_silence(430))
    monkeypatch.undo()
    assert len(decoded(flac_of_silence(1))) == 65_535


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "miniaudio" else find(name)
    )
    with pytest.raises(RequestError, match=r"here: sounds need the extra 'audio', .*'modelpack\["):
        decoded(wav(tone(16_000)))
