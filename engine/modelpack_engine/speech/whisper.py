"""Whisper by mlx-audio: OpenAI's models and those in the format of transformers.

mlx-audio decodes the windows of 30 s; the tokenizer is ours, read from tokenizer.json. A model
whose vocabulary has languages transcribes, translates to English and detects the language.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from modelpack_engine.errors import EngineError, ModelLoadError, RequestError
from modelpack_engine.models import json_tokenizer
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_engine.patches.mlx_audio_imports import prepare
from modelpack_engine.speech.transcript import (
    OnWindow,
    Segment,
    Transcript,
    TranscriptionRequest,
    Word,
    finite,
)

#: The positions of the encoder: windows have 3000 frames, and it halves them.
_ENCODER_POSITIONS = 1500
#: The most positions of the decoder; the mask takes their square. OpenAI's models have 448.
_MOST_POSITIONS = 1024
# The most times that a window is decoded for each second of sound; six temperatures are tried.
_DECODINGS = 12
_TRANSFORMERS_NAMES = ("d_model", "encoder_layers")
_POSITIONS = ("max_source_positions", "n_audio_ctx"), ("max_target_positions", "n_text_ctx")
_END = "<|endoftext|>"
_SPECIAL = (
    _END, "<|startoftranscript|>", "<|transcribe|>", "<|translate|>", "<|startoflm|>",
    "<|startofprev|>", "<|notimestamps|>", "<|0.00|>", "<|30.00|>",
)  # fmt: skip
_NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")


class _Vocabulary:
    """Our tokenizer, as mlx-audio calls transformers' tokenizer of Whisper."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        end = tokenizer.token_id(_END)
        assert end is not None
        self.eos_token_id = self.unk_token_id = end

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of text; special tokens in it are ordinary text."""
        return self._tokenizer.encode(
            text, add_special_tokens=add_special_tokens, parse_special=False
        )

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def convert_tokens_to_ids(self, token: str) -> int:
        """Return the id of a token; as in transformers, that of the unknown token for others."""
        found = self._tokenizer.token_id(token)
        return self.unk_token_id if found is None else found

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of the no-speech tokens, the only ones that mlx-audio looks up."""
        found = {name: self._tokenizer.token_id(name) for name in _NO_SPEECH}
        return {name: at for name, at in found.items() if at is not None}


def build(config: Mapping[str, Any], dtype: mx.Dtype) -> Any:
    """Return mlx-audio's model without weights, which it casts to `dtype`.

    Raises `ModelLoadError` for sizes that no Whisper has.
    """
    prepare()
    from mlx_audio.stt.models.whisper.whisper import Model, ModelDimensions

    names = 0 if any(name in config for name in _TRANSFORMERS_NAMES) else 1
    encoder, decoder = (keys[names] for keys in _POSITIONS)
    if config.get(encoder, _ENCODER_POSITIONS) != _ENCODER_POSITIONS:
        raise ModelLoadError(
            f"config.json: {encoder} is {str(config[encoder])[:100]}, expected {_ENCODER_POSITIONS}"
        )
    positions = config.get(decoder)
    if type(positions) is not int or not 8 <= positions <= _MOST_POSITIONS:
        raise ModelLoadError(
            f"config.json: {decoder} is {str(positions)[:100]}, expected 8 to {_MOST_POSITIONS}"
        )
    return Model(ModelDimensions.from_dict(dict(config)), dtype)


class Whisper:
    """A loaded Whisper; only the thread that loaded it may call `transcribe`."""

    kind = "whisper"

    def __init__(self, model: Any, files: ModelFiles, config: Mapping[str, Any]) -> None:
        """Raises `ModelLoadError` for a tokenizer that is not Whisper's."""
        from mlx_audio.stt.models.whisper.tokenizer import LANGUAGES
        from mlx_audio.stt.models.whisper.whisper import HFTokenizerWrapper

        tokenizer = json_tokenizer.tokenizer_of(files, config)
        missing = [token for token in _SPECIAL if tokenizer.token_id(token) is None]
        if missing:
            raise ModelLoadError(f"tokenizer.json: has no token {', '.join(missing)}")
        if tokenizer.num_ids > model.dims.n_vocab:
            raise ModelLoadError(
                f"tokenizer.json: has {tokenizer.num_ids} tokens, the model has"
                f" {model.dims.n_vocab}",
                hint="package the tokenizer of the same model",
            )
        self._model = model
        self._decode = model.decode
        vocabulary = _Vocabulary(tokenizer)

        def get_tokenizer(language: str | None = None, task: str = "transcribe") -> Any:
            return HFTokenizerWrapper(
                vocabulary,
                multilingual=model.is_multilingual,
                num_languages=model.num_languages,
                language=language,
                task=task,
            )

        model.get_tokenizer = get_tokenizer
        heads = (files.json("generation_config.json") or {}).get("alignment_heads")
        if heads is not None:
            self._set_alignment(heads)
        codes = list(LANGUAGES)[: model.num_languages] if model.is_multilingual else ["en"]
        known = {code: tokenizer.token_id(f"<|{code}|>") for code in codes}
        #: The codes of the languages that requests may name, with their English names.
        self.languages = {
            code: name
            for code, name in LANGUAGES.items()
            if code in known and (known[code] is not None or not model.is_multilingual)
        }

    def _set_alignment(self, heads: Any) -> None:
        """Set the heads of the decoder that follow the sound, for the times of words."""
        dims = self._model.dims
        known = {
            (layer, head) for layer in range(dims.n_text_layer) for head in range(dims.n_text_head)
        }
        pairs = heads if isinstance(heads, list) else []
        valid = bool(pairs) and all(
            isinstance(pair, list) and len(pair) == 2 and tuple(pair) in known for pair in pairs
        )
        if not valid:
            raise ModelLoadError(
                "generation_config.json: alignment_heads is not a list of [layer, head] of the"
                " model"
            )
        self._model.set_alignment_heads(heads)

    def check(self, request: TranscriptionRequest) -> None:
        """Raise `RequestError` for a request that this model cannot fulfil."""
        if request.task == "translate" and not self._model.is_multilingual:
            raise RequestError(
                "this model knows English only; it does not translate", param="model"
            )
        if request.task == "translate" and request.words:
            raise RequestError(
                "Whisper has no word timestamps for translations",
                param="timestamp_granularities",
                hint="ask for the times of segments",
            )
        if request.language is not None and request.language not in self.languages:
            raise RequestError(
                f"this model does not know the language {request.language[:50]!r}",
                param="language",
                hint="send an ISO 639-1 code such as en, or none",
            )

    def transcribe(self, request: TranscriptionRequest, on_window: OnWindow) -> Transcript:
        """Return the transcript; `on_window` is called before each window is decoded."""

        left = _DECODINGS * (10 + int(request.seconds))

        def decode(*args: Any, **options: Any) -> Any:
            nonlocal left
            on_window()
            left -= 1
            if left < 0:  # mlx-audio goes on from the last time that the model wrote
                raise EngineError("transcription stopped: timestamps do not advance")
            return self._decode(*args, **options)

        model = self._model
        model.decode = decode
        options: dict[str, Any] = {"fp16": model.dtype == mx.float16}
        if request.temperature > 0:
            options["temperature"] = request.temperature
        if request.prompt.strip():
            options["initial_prompt"] = request.prompt
        try:
            made = model.generate(
                mx.array(request.samples),
                language=request.language,
                task=request.task,
                word_timestamps=request.words,
                **options,
            )
        finally:
            model.decode = self._decode  # `decode` holds the request
        segments = [part for part in made.segments if part["text"].strip()]
        return Transcript(
            made.text.strip(),
            request.seconds,
            self.languages.get(made.language, str(made.language or "")),
            tuple(map(_segment, segments)),
            tuple(_word(word) for part in segments for word in part.get("words", ())),
        )


def _segment(part: Mapping[str, Any]) -> Segment:
    found = SimpleNamespace(**part)
    return Segment(
        found.text,
        finite(found.start),
        finite(found.end),
        int(found.seek),
        tuple(found.tokens),
        finite(found.temperature),
        finite(found.avg_logprob),
        finite(found.compression_ratio),
        finite(found.no_speech_prob),
    )


def _word(word: Mapping[str, Any]) -> Word:
    return Word(word["word"].strip(), finite(word["start"]), finite(word["end"]))
