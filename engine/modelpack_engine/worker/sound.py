"""Decode a sound file to samples, within limits: the part that a worker process runs.

miniaudio (the extra `audio`) is a decoder in C. Files come from clients, and a small one may stand
for days of silence, so the samples are counted as they are decoded, whatever the header says.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: The longest sound, and the most samples of one channel: 30 minutes at 48 kHz.
MAX_SOUND_SECONDS = 1800
MAX_SAMPLES = MAX_SOUND_SECONDS * 48_000
MAX_CHANNELS = 8
#: Samples a second of a file.
MIN_RATE, MAX_RATE = 4_000, 192_000
#: The most samples a second that callers may ask for: all of a sound is one message.
MAX_WANTED_RATE = 32_000
#: The largest sample, where 1 is full scale: files in floating point may exceed it a little.
MAX_AMPLITUDE = 16.0
ACCEPTED = "expected WAV, FLAC, MP3 or Ogg Vorbis"
#: Sizes from which the header of a WAV says that the length was unknown when it was written.
_UNKNOWN_SIZE = 0x7FFF_0000
_BLOCK = 65_536  # samples of each channel that are decoded at a time
#: Zero crossings of the low-pass filter on each side, and the shape of its window (Kaiser's beta):
#: what would become noise is 80 dB lower.
_CROSSINGS, _BETA = 32, 8.0
_PASSED = 0.94  # the part of the lower rate's band that passes


class BadSoundError(Exception):
    """A file that is no sound within the limits; the text continues "the sound is"."""


def decode(data: bytes, rate: int, max_seconds: float = MAX_SOUND_SECONDS) -> NDArray[np.float32]:
    """Return the samples of a file, one channel of `rate` samples a second.

    Channels are averaged. Raises `BadSoundError`.
    """
    import numpy as np

    assert MIN_RATE <= rate <= MAX_WANTED_RATE
    kind = _kind(data)
    try:
        blocks = list(_blocks(data, kind, max_seconds))
    except (BadSoundError, MemoryError):
        raise
    except Exception as error:  # miniaudio raises many kinds for damaged files
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadSoundError(f"damaged: {why}") from error
    if len(blocks) < 2:
        raise BadSoundError("damaged: it has no samples")
    found: int = blocks.pop(0)
    return resampled(np.concatenate(blocks), found, rate)


def _kind(data: bytes) -> str:
    """Return the format of a file by its first bytes."""
    if data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE":
        size = int.from_bytes(data[4:8], "little")
        # Some programs count the 8 bytes of the header, too.
        if data[:4] == b"RIFF" and len(data) < size < _UNKNOWN_SIZE:
            raise BadSoundError(f"damaged: it ends after {len(data)} of {size + 8} bytes")
        return "WAV"
    if data.startswith(b"fLaC"):
        return "FLAC"
    if data.startswith(b"OggS"):
        if b"\x01vorbis" not in data[:512]:
            raise BadSoundError(f"refused: an Ogg file of another codec, {ACCEPTED}")
        return "VORBIS"
    if data.startswith(b"ID3") or starts_as_mp3(data):
        return "MP3"
    raise BadSoundError(f"refused: unknown format, {ACCEPTED}")


def starts_as_mp3(data: bytes) -> bool:
    """Return whether a file begins with the 11 bits that begin each frame of an MP3."""
    return data[:1] == b"\xff" and data[1:2] >= b"\xe0"


def _blocks(data: bytes, kind: str, max_seconds: float) -> Iterator[Any]:
    """Yield the samples a second of a file, then its samples by blocks, one channel."""
    import miniaudio
    import numpy as np

    if kind == "VORBIS":
        info = miniaudio.vorbis_get_info(data)
    else:
        info = getattr(miniaudio, f"{kind.lower()}_get_info")(data)
    rate, channels = int(info.sample_rate), int(info.nchannels)
    if not MIN_RATE <= rate <= MAX_RATE:
        raise BadSoundError(
            f"refused: it has {rate} samples a second, expected {MIN_RATE} to {MAX_RATE}"
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise BadSoundError(f"refused: it has {channels} channels, the limit is {MAX_CHANNELS}")
    yield rate
    most, count = min(int(max_seconds * rate), MAX_SAMPLES), 0
    how = miniaudio.SampleFormat.FLOAT32, channels, rate, _BLOCK
    if kind == "WAV":  # tried first; a source has no size, which headers of pipes leave out
        stream = miniaudio.stream_memory(data, *how)
    else:
        stream = miniaudio.stream_any(_source(data), miniaudio.FileFormat[kind], *how)
    for block in stream:
        samples = np.frombuffer(block, np.float32).reshape(-1, channels)
        count += len(samples)
        if count > most:
            raise BadSoundError(f"refused: it is longer than {most / rate:g} s")
        if not np.isfinite(samples).all():
            raise BadSoundError("refused: it has samples that are not finite numbers")
        if np.abs(samples).max(initial=0) > MAX_AMPLITUDE:
            raise BadSoundError(
                f"refused: it has samples beyond {MAX_AMPLITUDE:g}, full scale is 1"
            )
        yield samples.mean(1, dtype=np.float32)
    if count < int(info.num_frames):
        raise BadSoundError(f"damaged: it ends after {count} of {info.num_frames} samples")


def _source(data: bytes) -> Any:
    """Return a file as miniaudio reads it: only so can the format be chosen, not guessed."""
    import miniaudio

    whence = {miniaudio.SeekOrigin.START: io.SEEK_SET, miniaudio.SeekOrigin.CURRENT: io.SEEK_CUR}

    class Source(miniaudio.StreamableSource):  # type: ignore[misc]
        def __init__(self) -> None:
            self._file = io.BytesIO(data)

        def read(self, num_bytes: int) -> bytes:
            return self._file.read(num_bytes)

        def seek(self, offset: int, origin: miniaudio.SeekOrigin) -> bool:
            if self._file.seek(offset, whence.get(origin, io.SEEK_END)) > len(data):
                raise ValueError("beyond the end")  # False would count as success
            return True

    return Source()


def resampled(samples: NDArray[np.float32], found: int, rate: int) -> NDArray[np.float32]:
    """Return samples of the rate `found` at another one, by a windowed sinc for each phase."""
    import numpy as np

    if found == rate:
        return samples
    divisor = math.gcd(found, rate)
    phases, step = rate // divisor, found // divisor
    cutoff = _PASSED * min(1.0, rate / found)  # of the band of the file
    half = math.ceil(_CROSSINGS / cutoff)
    count = -(-len(samples) * phases // step)
    out = np.empty(count, np.float32)
    offsets = np.arange(-half + 1, half + 1)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(samples, half), 2 * half)
    for phase in range(min(phases, count)):
        first, part = divmod(phase * step, phases)
        distance = offsets - part / phases
        shape = np.i0(_BETA * np.sqrt(np.clip(1 - (distance / half) ** 2, 0, None)))
        taps = np.sinc(cutoff * distance) * shape
        rows = windows[first + 1 :: step][: len(out[phase::phases])]
        out[phase::phases] = rows @ (taps / taps.sum()).astype(np.float32)
    return out
