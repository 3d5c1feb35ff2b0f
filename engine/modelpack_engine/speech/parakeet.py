"""Parakeet by mlx-audio: NVIDIA's TDT, RNN-T and CTC models, in the format of NeMo.

The vocabulary is in config.json. Long sound is decoded in windows that overlap.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from modelpack_engine.errors import ModelLoadError, RequestError
from modelpack_engine.patches.mlx_audio_imports import prepare
from modelpack_engine.speech.transcript import (
    SAMPLE_RATE,
    OnWindow,
    Segment,
    Transcript,
    TranscriptionRequest,
    Word,
)

#: Seconds of a window, whose attention takes their square, and of the overlap of two windows.
WINDOW, OVERLAP = 120.0, 15.0
#: Limits of the settings of the spectrogram, which no tensor justifies.
_MOST = {"features": 512, "n_fft": 4096, "window_size": 0.25, "window_stride": 0.25, "pad_to": 4096}
#: The most tokens for one frame of the encoder, and how many there are if the file names none.
_MOST_SYMBOLS, _SYMBOLS = 100, 10
_LANGUAGE = re.compile(r"[a-z]{2,3}")


def build(config: Mapping[str, Any]) -> Any:
    """Return mlx-audio's model without weights; raise `ModelLoadError` for invalid settings."""
    prepare()
    from mlx_audio.stt.models.parakeet.parakeet import Model

    settings = config.get("preprocessor")
    settings = settings if isinstance(settings, dict) else {}
    if settings.get("sample_rate") != SAMPLE_RATE:
        raise ModelLoadError(
            f"config.json: preprocessor.sample_rate is {str(settings.get('sample_rate'))[:100]},"
            f" expected {SAMPLE_RATE}"
        )
    for name, most in _MOST.items():
        value = settings.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise ModelLoadError(
                f"config.json: preprocessor.{name} is {str(value)[:100]}, expected at most {most}"
            )
    model = Model.from_config(dict(config))
    if hasattr(model, "max_symbols"):
        _check_steps(model)
    return model


def _check_steps(model: Any) -> None:
    """Raise `ModelLoadError` for settings with which a TDT or an RNN-T model would not end.

    Such a model stays at a frame until it writes no token, or a duration other than 0.
    """
    model.max_symbols = most = _SYMBOLS if model.max_symbols is None else model.max_symbols
    if type(most) is not int or not 1 <= most <= _MOST_SYMBOLS:
        raise ModelLoadError(
            f"config.json: decoding.greedy.max_symbols is {str(most)[:100]},"
            f" expected 1 to {_MOST_SYMBOLS}"
        )
    if not hasattr(model, "durations"):
        return
    durations, count = model.durations, model.joint._num_classes - model.blank_id - 1
    if (
        not isinstance(durations, list)
        or any(type(one) is not int or one < 0 for one in durations)
        or not any(durations)
        or len(durations) != count
    ):
        raise ModelLoadError(
            f"config.json: decoding.durations is {str(durations)[:100]},"
            f" expected {max(0, count)} integers from 0, not all of them 0"
        )


class Parakeet:
    """A loaded Parakeet; only the thread that loaded it may call `transcribe`."""

    kind = "parakeet"

    def __init__(self, model: Any, dtype: mx.Dtype) -> None:
        self._model = model
        self._dtype = dtype
        from mlx_audio.stt.models.parakeet.parakeet import ParakeetCTC

        is_ctc = type(model) is ParakeetCTC
        self._decode = partial(_decoded_ctc, model) if is_ctc else model.decode

    def check(self, request: TranscriptionRequest) -> None:
        """Raise `RequestError` for a request that this model cannot fulfil."""
        if request.task == "translate":
            raise RequestError("Parakeet models do not translate", param="model")
        if request.prompt.strip():
            raise RequestError("Parakeet models take no prompt", param="prompt")
        # The model detects the language among those that it knows, which its files do not name.
        if request.language is not None and not _LANGUAGE.fullmatch(request.language):
            raise RequestError(
                f"no such language: {request.language[:50]!r}",
                param="language",
                hint="send an ISO 639-1 code such as en, or none",
            )

    def transcribe(self, request: TranscriptionRequest, on_window: OnWindow) -> Transcript:
        """Return the transcript; `on_window` is called before each window is decoded."""

        def decode(mel: mx.array) -> Any:
            on_window()
            return self._decode(mel)

        self._model.decode = decode
        try:
            made = self._model.generate(
                mx.array(request.samples),
                dtype=self._dtype,
                chunk_duration=WINDOW,
                overlap_duration=OVERLAP,
            )
        finally:
            self._model.decode = self._decode  # `decode` holds the request
        sentences = [one for one in made.sentences if one.text.strip()]
        return Transcript(
            made.text.strip(),
            request.seconds,
            request.language or "",
            tuple(
                Segment(
                    one.text,
                    float(one.start),
                    float(one.end),
                    tokens=tuple(int(token.id) for token in one.tokens),
                )
                for one in sentences
            ),
            tuple(_words(sentences)) if request.words else (),
        )


def _decoded_ctc(model: Any, mel: mx.array) -> list[Any]:
    """Return what `ParakeetCTC.decode` of mlx-audio should, which drops a token that follows the
    same one after a blank (0.6.2).

    A token lasts as long as its frames.
    """
    from mlx_audio.stt.models.nemo.alignment import (
        AlignedToken,
        sentences_to_result,
        tokens_to_sentences,
    )
    from mlx_audio.stt.models.parakeet import tokenizer

    features, lengths = model.encoder(mel)
    best = mx.argmax(model.decoder(features)[0], axis=-1)[: int(lengths[0])]
    settings, vocabulary = model.preprocessor_config, model.vocabulary
    frame = model.encoder_config.subsampling_factor * settings.hop_length / settings.sample_rate
    tokens, at = [], 0
    for token, run in itertools.groupby(int(one) for one in np.array(best)):
        count = len(list(run))
        if token < len(vocabulary) and not tokenizer.is_special_token(token, vocabulary):
            text = tokenizer.decode([token], vocabulary)
            tokens.append(AlignedToken(token, text, at * frame, count * frame))
        at += count
    return [sentences_to_result(tokens_to_sentences(tokens))]


def _words(sentences: list[Any]) -> Iterator[Word]:
    """Yield the words, each of one or several tokens: a word's first token begins with a space."""
    for sentence in sentences:
        text, start, end = "", 0.0, 0.0
        for token in sentence.tokens:
            if text.strip() and token.text.startswith(" "):
                yield Word(text.strip(), start, end)
                text = ""
            if not text.strip():
                start = float(token.start)
            text, end = text + token.text, float(token.end)
        if text.strip():
            yield Word(text.strip(), start, end)
