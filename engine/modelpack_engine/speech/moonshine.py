"""Moonshine by mlx-audio: Useful Sensors' small English models, in the format of transformers.

The models read utterances, not hours of sound, so long sound is cut where it is quiet.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.errors import ModelLoadError, RequestError
from modelpack_engine.models import json_tokenizer
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.patches.mlx_audio_imports import prepare
from modelpack_engine.speech.transcript import (
    MIN_SECONDS,
    SAMPLE_RATE,
    OnWindow,
    Segment,
    Transcript,
    TranscriptionRequest,
)

#: The longest window in seconds, and its last part in which it may be cut.
WINDOW, SEARCHED = 30.0, 5.0
_QUIET = SAMPLE_RATE // 50  # samples of which the loudness is compared


def build(config: Mapping[str, Any]) -> Any:
    """Return mlx-audio's model without weights; raise `ModelLoadError` for invalid settings."""
    prepare()
    from mlx_audio.stt.models.moonshine.moonshine import Model, ModelConfig

    settings = ModelConfig.from_dict(dict(config))
    start = settings.decoder_start_token_id
    if type(start) is not int or not 0 <= start < settings.vocab_size:
        raise ModelLoadError(
            f"config.json: decoder_start_token_id is {str(start)[:100]}, the vocabulary has"
            f" {settings.vocab_size} tokens"
        )
    return Model(settings)


class Moonshine:
    """A loaded Moonshine; only the thread that loaded it may call `transcribe`."""

    kind = "moonshine"

    def __init__(self, model: Any, files: ModelFiles, config: Mapping[str, Any]) -> None:
        """Raises `ModelLoadError` for a missing or an invalid tokenizer."""
        self._model = model
        # As mlx-audio's own hook sets it, which reads a directory.
        model._tokenizer = json_tokenizer.tokenizer_of(files, config)

    def check(self, request: TranscriptionRequest) -> None:
        """Raise `RequestError` for a request that this model cannot fulfil."""
        if request.task == "translate":
            raise RequestError("Moonshine models do not translate", param="model")
        if request.prompt.strip():
            raise RequestError("Moonshine models take no prompt", param="prompt")
        if request.words:
            raise RequestError(
                "Moonshine models have no word timestamps", param="timestamp_granularities"
            )
        if request.language not in (None, "en"):
            raise RequestError(
                f"this model does not know the language {request.language[:50]!r}",
                param="language",
                hint="send en, or none",
            )

    def transcribe(self, request: TranscriptionRequest, on_window: OnWindow) -> Transcript:
        """Return the transcript; `on_window` is called before each window is decoded."""
        segments = []
        for start, end in itertools.pairwise(cuts(request.samples)):
            on_window()
            made = self._model.generate(
                mx.array(request.samples[start:end]), temperature=request.temperature
            )
            segments.append(Segment(made.text, start / SAMPLE_RATE, end / SAMPLE_RATE))
        spoken = tuple(one for one in segments if one.text)
        text = " ".join(one.text for one in spoken)
        return Transcript(text, request.seconds, "english", spoken)


def cuts(samples: NDArray[np.float32]) -> list[int]:
    """Return where windows begin and the last one ends: the quietest places, 30 s apart at most."""
    found, longest = [0], int(WINDOW * SAMPLE_RATE)
    while len(samples) - found[-1] > longest:
        first = found[-1] + longest - int(SEARCHED * SAMPLE_RATE)
        # What follows the last cut is no shorter than the shortest sound.
        end = min(found[-1] + longest, len(samples) - int(MIN_SECONDS * SAMPLE_RATE))
        part = samples[first:end].astype(np.float64)
        blocks = part[: len(part) // _QUIET * _QUIET].reshape(-1, _QUIET)
        quietest = int(np.argmin((blocks**2).sum(1)))
        found.append(first + quietest * _QUIET + _QUIET // 2)
    return [*found, len(samples)]
