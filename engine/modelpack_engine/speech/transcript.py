"""A request for a transcript, its result, and the formats of subtitles: SubRip and WebVTT."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from modelpack_engine.errors import RequestError

#: Samples a second of the sound that models read.
SAMPLE_RATE = 16_000
#: The shortest sound in seconds, as in OpenAI's API.
MIN_SECONDS = 0.1
#: `translate` writes English, whatever is spoken.
Task = Literal["transcribe", "translate"]


@dataclass(frozen=True, slots=True, eq=False)
class TranscriptionRequest:
    """Sound and how to write it down.

    `samples` is one channel at `SAMPLE_RATE`. `language` is an ISO 639-1 code; None: the model
    detects it. `prompt` is text that comes before. Temperature 0 lets the model raise it for a
    window whose text is improbable. `words` asks for the times of words.
    """

    samples: NDArray[np.float32]
    task: Task = "transcribe"
    language: str | None = None
    prompt: str = ""
    temperature: float = 0.0
    words: bool = False

    @property
    def seconds(self) -> float:
        """The duration of the sound."""
        return len(self.samples) / SAMPLE_RATE

    def check(self) -> None:
        """Raise `RequestError` for settings that no model can use; the samples are not read."""
        if not 0 <= self.temperature <= 1:  # false for NaN
            raise RequestError(
                f"temperature is {self.temperature:g}, expected 0 to 1", param="temperature"
            )

    def check_sound(self) -> None:
        """Raise `RequestError` for a sound that no model can use."""
        if self.seconds < MIN_SECONDS:
            raise RequestError(
                f"the sound has {self.seconds:.3f} s, expected {MIN_SECONDS} s or more",
                param="file",
            )


@dataclass(frozen=True, slots=True)
class Word:
    """A word, and when it is spoken, in seconds from the beginning."""

    text: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the text with its times in seconds.

    The other fields are those of OpenAI's API; models that do not compute them leave 0.
    """

    text: str
    start: float
    end: float
    seek: int = 0
    tokens: tuple[int, ...] = ()
    temperature: float = 0.0
    avg_logprob: float = 0.0
    compression_ratio: float = 0.0
    no_speech_prob: float = 0.0


@dataclass(frozen=True, slots=True)
class Transcript:
    """The text of a sound of `duration` seconds; `language` is "" if the model names none."""

    text: str
    duration: float
    language: str = ""
    segments: tuple[Segment, ...] = ()
    words: tuple[Word, ...] = ()


#: Called before each window of the sound; it raises to stop the work.
OnWindow = Callable[[], None]


def finite(value: float | None) -> float:
    """Return `value`, or 0 if it is missing or not a finite number, which JSON cannot hold."""
    return float(value) if value is not None and math.isfinite(value) else 0.0


def as_srt(segments: Iterable[Segment]) -> str:
    """Return segments as SubRip subtitles."""
    cues = _cues(segments, ",")
    return "".join(
        f"{number}\n{start} --> {end}\n{text}\n\n"
        for number, (start, end, text) in enumerate(cues, start=1)
    )


def as_vtt(segments: Iterable[Segment]) -> str:
    """Return segments as WebVTT subtitles (W3C, "WebVTT: The Web Video Text Tracks Format")."""
    cues = _cues(segments, ".")
    escaped = ((start, end, _escaped(text)) for start, end, text in cues)
    return "WEBVTT\n\n" + "".join(f"{start} --> {end}\n{text}\n\n" for start, end, text in escaped)


def _cues(segments: Iterable[Segment], point: str) -> Iterable[tuple[str, str, str]]:
    """Yield the times and the text of each segment that has text.

    An arrow in the text would be read as times, and an empty line as the end of a cue.
    """
    for segment in segments:
        text = re.sub(r"-+->", "->", re.sub(r"\s+", " ", segment.text).strip())
        if text:
            end = max(segment.start, segment.end)
            yield _time(segment.start, point), _time(end, point), text


def _time(seconds: float, point: str) -> str:
    """Return a time as hours, minutes, seconds and thousandths."""
    thousandths = round(max(0.0, seconds) * 1000)
    minutes, rest = divmod(thousandths, 60_000)
    whole, rest = divmod(rest, 1000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{whole:02d}{point}{rest:03d}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
