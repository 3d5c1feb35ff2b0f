"""Sound files for tests, good and bad."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parents[3] / "fixtures" / "sounds"


def tone(rate: int, seconds: float = 1.0) -> np.ndarray:
    """Return the samples of the tones of fixtures/sounds."""
    time = np.arange(int(rate * seconds)) / rate
    both = 0.4 * np.sin(2 * np.pi * 440 * time) + 0.2 * np.sin(2 * np.pi * 1250 * time)
    return both.astype(np.float32)


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return a chunk of a WAV."""
    return kind + struct.pack("<I", len(body)) + body


def wav(
    samples: np.ndarray,
    rate: int = 16_000,
    *,
    tag: int | None = None,
    extra: bytes = b"",
    size: int | None = None,
) -> bytes:
    """Return a WAV of samples [time] or [time, channels] of their own type.

    `tag`, `size` and `extra` are what the header says instead, and chunks before the data.
    """
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    width = samples.itemsize
    tag = tag if tag is not None else 3 if samples.dtype.kind == "f" else 1
    form = struct.pack(
        "<HHIIHH", tag, channels, rate, rate * channels * width % 2**32, channels * width, 8 * width
    )
    body = b"WAVE" + chunk(b"fmt ", form) + extra + chunk(b"data", samples.tobytes())
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def flac_of_silence(blocks: int, rate: int = 16_000) -> bytes:
    """Return a FLAC of blocks of 65,535 samples of silence, 14 bytes each, without its length."""
    info = struct.pack(">HH", 16, 65_535) + bytes(6)
    info += ((rate << 44) | (15 << 36)).to_bytes(8, "big") + bytes(16)
    out = [b"fLaC\x80\0\0\x22", info]
    for number in range(blocks):
        header = b"\xff\xf8\x70\x08" + _utf8(number) + b"\xff\xfe"
        frame = header + bytes([_crc(header, 8, 0x07)]) + b"\0\0\0"
        out.append(frame + _crc(frame, 16, 0x8005).to_bytes(2, "big"))
    return b"".join(out)


def _utf8(number: int) -> bytes:
    return chr(number).encode()


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    value = 0
    for byte in data:
        value ^= byte << (bits - 8)
        for _ in range(8):
            value <<= 1
            if value >> bits:
                value ^= polynomial | 1 << bits
    return value


def fixture(name: str) -> bytes:
    """Return a file of fixtures/sounds."""
    return (FIXTURES / name).read_bytes()


_TONE = tone(16_000)
_PCM = (_TONE * 32767).astype(np.int16)
_WAV = wav(_PCM)


def _with(value: float) -> bytes:
    samples = _TONE.copy()
    samples[9_000] = value
    return wav(samples)


def _header(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def _half(name: str) -> bytes:
    data = fixture(name)
    return data[: len(data) // 2]


#: Files that are refused: a name, the file, and a part of the message.
BAD_FILES: list[tuple[str, Callable[[], bytes], str]] = [
    ("empty", lambda: b"", "the sound is empty"),
    ("text", lambda: b"hello, this is no sound", "refused: unknown format, expected WAV"),
    ("html", lambda: b"<html><audio src=x></html>", "unknown format"),
    ("zeros", lambda: bytes(1000), "unknown format"),
    ("png", lambda: b"\x89PNG\r\n\x1a\n" + bytes(99), "unknown format"),
    ("webp", lambda: b"RIFF\x24\0\0\0WEBPVP8 " + bytes(99), "unknown format"),
    ("m4a", lambda: b"\0\0\0\x18ftypM4A " + bytes(99), "unknown format"),
    ("webm", lambda: b"\x1aE\xdf\xa3" + bytes(99), "unknown format"),
    ("aiff", lambda: b"FORM\0\0\0\x24AIFF" + bytes(99), "unknown format"),
    ("midi", lambda: b"MThd\0\0\0\6" + bytes(99), "unknown format"),
    ("opus", lambda: fixture("opus.ogg"), "an Ogg file of another codec, expected WAV"),
    ("only riff", lambda: _WAV[:12], "ends after 12 of 32044 bytes"),
    ("half a wav", lambda: _WAV[:9000], "damaged: it ends after 9000 of 32044 bytes"),
    ("half a flac", lambda: _half("tone.flac"), "damaged: it ends after"),
    ("half an mp3", lambda: _half("tone.mp3"), "damaged: it ends after"),
    ("half an ogg", lambda: _half("tone.ogg"), "is damaged"),
    ("an ogg without its headers", lambda: fixture("tone.ogg")[:80], "is damaged"),
    ("a flac of no frames", lambda: fixture("tone.flac")[:86], "is damaged"),
    ("a flac with a wrong block", lambda: fixture("tone.flac")[:6000] + bytes(99), "is damaged"),
    ("an mp3 of no frames", lambda: b"ID3\4\0\0\0\0\0\0" + bytes(999), "is damaged"),
    ("the start of an mp3", lambda: b"\xff\xfb\x90\x64", "is damaged"),
    ("noise after an mp3's sign", lambda: b"\xff\xff" + b"\x7a" * 5000, "is damaged"),
    ("a wav without a format", lambda: b"RIFF\x0c\0\0\0WAVEdata\0\0\0\0", "is damaged"),
    ("a wav without data", lambda: wav(np.zeros(0, np.int16)), "it has no samples"),
    ("a rate of 0", lambda: wav(_PCM, 0), "the sound is"),
    ("a rate of 1", lambda: wav(_PCM, 1), "has 1 samples a second, expected 4000 to 192000"),
    ("a rate of 4 GHz", lambda: wav(_PCM, 2**32 - 1), "the sound is"),
    ("no channels", lambda: _header(_WAV, 22, b"\0\0"), "is damaged"),
    ("nine channels", lambda: wav(np.zeros((9, 9), np.int16)), "has 9 channels, the limit is 8"),
    ("65535 channels", lambda: _header(_WAV, 22, b"\xff\xff"), "the sound is"),
    ("a codec of 65535", lambda: wav(_PCM, tag=0xFFFF), "the sound is"),
    ("no bits", lambda: _header(_WAV, 34, b"\0\0"), "the sound is"),
    ("nan", lambda: _with(float("nan")), "samples that are not finite numbers"),
    ("inf", lambda: _with(float("inf")), "samples that are not finite numbers"),
    ("far too loud", lambda: _with(1e30), "samples beyond 16, full scale is 1"),
    ("31 minutes", lambda: wav(np.zeros(4000 * 1860, np.uint8), 4000), "longer than 1800 s"),
    ("a bomb", lambda: flac_of_silence(2000), "longer than 1800 s"),
    ("a bomb of high rate", lambda: flac_of_silence(1400, 96_000), "longer than 900 s"),
    ("a claim of 2 GB", lambda: _WAV[:40] + b"\xff\xff\xff\x7e" + _WAV[44:48], "it ends after 48"),
]
