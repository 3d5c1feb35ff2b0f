"""SoundProcessor: from decoded sounds to the tokens that stand for them, and encoder inputs.

Feature extractors are those of transformers, by the model's processor_config.json or
preprocessor_config.json; Phi-4 Multimodal's is mlx-vlm's, as that of transformers needs PyTorch.
`SOUND_CLASSES` says what each type of model needs.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelpack.formats.config_json import without_speech
from modelpack_engine.errors import ModelLoadError, RequestError
from modelpack_engine.request import Media, MediaSource
from modelpack_engine.vision.models import (
    GEMMA3N_AUDIO,
    GEMMA4_AUDIO,
    PHI4_AUDIO,
    QWEN3_OMNI_AUDIO,
    Encode,
)

#: The largest width of features, and of the windows that they are made of, in milliseconds.
_MAX_FEATURES, _MAX_WINDOW = 1024, 1000
#: The fewest samples of a window.
_LEAST_WINDOW = 80


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """A decoded sound: float32 [samples] at the model's rate. `param` names it in errors."""

    samples: NDArray[np.float32]
    param: str = "messages"

    def digest(self) -> bytes:
        """Return the SHA-256 of the samples."""
        return hashlib.sha256(b"sound" + np.ascontiguousarray(self.samples).data).digest()


@dataclass(frozen=True, slots=True)
class SoundClass:
    """What the sounds of a type of model need.

    `placeholder` stands for a sound in chat templates. Its tokens are `begins`, tokens `soft`, and
    `ends`, with the text `around` before and after them. `extractor` is the class of transformers,
    `options` are those of its call, and it names the mask of the features `mask`. `count` returns
    the number of tokens `soft` for a mask. A sound has `seconds` at most.
    """

    placeholder: str
    soft: str
    extractor: str
    count: Callable[[NDArray[np.bool_]], int]
    token_id: int
    begins: str = ""
    ends: str = ""
    around: str = ""
    seconds: float = 30.0
    options: Mapping[str, Any] = field(default_factory=dict)
    mask: str = "input_features_mask"


def _halved_twice(mask: NDArray[np.bool_]) -> int:
    """Gemma 4: a token for each fourth frame, by two convolutions."""
    return int(mask[::2][::2].sum())


def _always_188(mask: NDArray[np.bool_]) -> int:
    """Gemma 3n: those of 30 s, whatever the length is."""
    return 188 if mask.any() else 0


def _each(mask: NDArray[np.bool_]) -> int:
    """Gemma 4 without encoders: a token for each row of samples."""
    return int(mask.sum())


def _each_eighth(mask: NDArray[np.bool_]) -> int:
    """Phi-4 Multimodal: a token for each eighth frame, by three convolutions."""
    return -(-int(mask.sum()) // 8)


def _thirteen_a_second(mask: NDArray[np.bool_]) -> int:
    """Qwen3-Omni: 13 for each 100 frames, and for the rest what three convolutions leave of it."""
    hundreds, rest = divmod(int(mask.sum()), 100)
    return hundreds * 13 + -(-rest // 8)


#: By the model type of config.json.
SOUND_CLASSES: Mapping[str, SoundClass] = {
    "gemma3n": SoundClass(
        placeholder="<audio_soft_token>",
        soft="<audio_soft_token>",
        begins="<start_of_audio>",
        ends="<end_of_audio>",
        extractor="gemma3n.feature_extraction_gemma3n:Gemma3nAudioFeatureExtractor",
        count=_always_188,
        token_id=GEMMA3N_AUDIO,
        around="\n\n",
    ),
    "gemma4": SoundClass(
        placeholder="<|audio|>",
        soft="<|audio|>",
        begins="<|audio>",
        ends="<audio|>",
        extractor="gemma4.feature_extraction_gemma4:Gemma4AudioFeatureExtractor",
        count=_halved_twice,
        token_id=GEMMA4_AUDIO,
    ),
    "gemma4_unified": SoundClass(
        placeholder="<|audio|>",
        soft="<|audio|>",
        begins="<|audio>",
        ends="<audio|>",
        extractor="gemma4_unified.feature_extraction_gemma4_unified"
        ":Gemma4UnifiedAudioFeatureExtractor",
        count=_each,
        token_id=GEMMA4_AUDIO,
    ),
    "phi4mm": SoundClass(
        placeholder="<|endoftext11|>",
        soft="<|endoftext11|>",
        extractor="Phi4MMAudioFeatureExtractor",
        count=_each_eighth,
        token_id=PHI4_AUDIO,
        seconds=40.0,  # mlx-vlm's tower attends to the padding of longer ones
    ),
    "qwen3_omni_moe": SoundClass(
        placeholder="<|audio_pad|>",
        soft="<|audio_pad|>",
        extractor="whisper.feature_extraction_whisper:WhisperFeatureExtractor",
        count=_thirteen_a_second,
        token_id=QWEN3_OMNI_AUDIO,
        seconds=600.0,
        options={"padding": True, "truncation": False, "return_attention_mask": True},
        mask="attention_mask",
    ),
}


def has_sounds(config: Mapping[str, Any]) -> bool:
    """Return whether models of this config.json read sounds here, if their files are complete."""
    return config.get("model_type") in SOUND_CLASSES and bool(audio_config(config))


def audio_config(config: Mapping[str, Any]) -> Any:
    """Return the part of config.json about the audio tower, None if there is none."""
    config = without_speech(config)
    named = config.get("audio_processor")  # of Phi-4 Multimodal
    inner = named.get("config") if isinstance(named, Mapping) else None
    return config.get("audio_config") or inner


def sound_settings(
    preprocessor: Mapping[str, Any] | None, processor: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """Return the settings of a feature extractor, from the files that may have them."""
    inner = (processor or {}).get("feature_extractor")
    if isinstance(inner, Mapping):
        return inner
    found = preprocessor or {}
    return found if "feature_extractor_type" in found else {}


class SoundProcessor:
    """Makes the tokens and the encoder's inputs of sounds for one model. Any thread may use it."""

    def __init__(
        self, config: Mapping[str, Any], settings: Mapping[str, Any], encode: Encode
    ) -> None:
        """Read config.json and the settings of the feature extractor.

        Raises `ModelLoadError` if the tokenizer has no placeholder, or the settings are wrong.
        """
        self._kind = str(config["model_type"])
        self._needs = needs = SOUND_CLASSES[self._kind]
        self._encode = encode
        #: The text of the placeholder in chat templates.
        self.token = needs.placeholder
        soft_id: Any = config.get("audio_token_id", needs.token_id)
        ids = encode(needs.placeholder)
        if len(ids) != 1 or encode(needs.soft) != [soft_id]:
            raise ModelLoadError(f"{needs.soft!r} is not the token {soft_id} of config.json")
        #: The ids of the placeholder and of the token that stands for a part of a sound.
        self.token_id, self.soft_id = ids[0], int(soft_id)
        self._extractor = _extractor(needs, settings)
        #: Samples a second, and the longest sound in seconds.
        self.rate, self.seconds = int(self._extractor.sampling_rate), needs.seconds

    def with_spaces(self, text: str) -> str:
        """Return a prompt with sounds as it is tokenised: with what the model has around them."""
        around = self._needs.around
        return text.replace(self.token, f"{around}{self.token}{around}") if around else text

    def media(self, sound: Sound) -> Media:
        """Return the tokens and inputs of a sound at position 0; raises `RequestError`."""
        needs = self._needs
        try:
            if len(sound.samples) < getattr(self._extractor, "hop_length", 1):
                raise ValueError("it is too short")
            inputs = self.inputs(sound.samples)
            count = needs.count(inputs["input_features_mask"][0])
            if not count:
                raise ValueError("it is too short")
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise RequestError(
                f"{sound.param}: the sound of {len(sound.samples) / self.rate:g} s cannot be"
                f" processed: {error}",
                param=sound.param,
            ) from error
        tokens = self._encode(f"{needs.begins}{needs.soft * count}{needs.ends}")
        digest = hashlib.sha256(self._settings_digest + sound.digest()).digest()
        return Media(
            0,
            tuple(tokens),
            digest,
            inputs,
            sound.param,
            in_windows=self._kind.startswith("gemma4"),
            source=MediaSource("sound", sound.samples),
        )

    def inputs(self, samples: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Return the encoder's inputs of a sound: features [1, frames, width] and their mask."""
        needs = self._needs
        made = self._extractor([samples], sampling_rate=self.rate, **needs.options)
        return {
            "input_features": np.asarray(made["input_features"][0], np.float32)[None],
            "input_features_mask": np.asarray(made[needs.mask][0], np.bool_)[None],
        }

    @cached_property
    def _settings_digest(self) -> bytes:
        settings = json.dumps(self._extractor.to_dict(), sort_keys=True, default=str)
        return hashlib.sha256(settings.encode()).digest()


def with_sound_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with its audio tower and token of sounds under the usual names.

    Raises `ModelLoadError` if it has no audio tower.
    """
    if not has_sounds(config):
        raise ModelLoadError("config.json has no audio tower")
    needs = SOUND_CLASSES[config["model_type"]]
    token_id = config.get("audio_token_id", config.get("audio_token_index", needs.token_id))
    return {**config, "audio_config": audio_config(config), "audio_token_id": token_id}


class _SpeechFeatures:
    """Phi-4 Multimodal's feature extractor, with the interface of those of transformers."""

    sampling_rate = 16_000
    #: The samples of a window: a sound has one at least.
    hop_length = 400

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Raise `ModelLoadError` for settings that mlx-vlm's does not have."""
        for name, only in (
            ("audio_compression_rate", 8), ("audio_downsample_rate", 1), ("audio_feat_stride", 1),
        ):  # fmt: skip
            if settings.get(name, only) != only:
                raise ModelLoadError(f"{name} {str(settings[name])[:50]} is not {only}")
        module: Any = importlib.import_module("mlx_vlm.models.phi4mm.processing_phi4mm")
        self._extractor = module.Phi4MMAudioFeatureExtractor()

    def __call__(self, sounds: list[NDArray[np.float32]], **_: Any) -> dict[str, Any]:
        made = self._extractor([(samples, self.sampling_rate) for samples in sounds])
        features = np.array(made["input_audio_embeds"])
        return {
            "input_features": features,
            "input_features_mask": np.ones(features.shape[:2], np.bool_),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return what its features depend on."""
        return {"feature_extractor_type": type(self._extractor).__name__}


def _extractor(needs: SoundClass, settings: Mapping[str, Any]) -> Any:
    """Return the feature extractor for these settings."""
    if ":" not in needs.extractor:
        return _SpeechFeatures(settings)
    rate = settings.get("sampling_rate", 16_000)
    if type(rate) is not int or not 8_000 <= rate <= 32_000:
        raise ModelLoadError(f"sampling_rate {str(rate)[:50]} is not a number from 8000 to 32000")
    width = settings.get("feature_size", 128)
    if type(width) is not int or not 0 < width <= _MAX_FEATURES:
        raise ModelLoadError(f"feature_size {str(width)[:50]} is not from 1 to {_MAX_FEATURES}")
    for name in ("n_fft", "hop_length"):
        size = settings.get(name, _LEAST_WINDOW)
        if type(size) is not int or not _LEAST_WINDOW <= size <= rate:
            raise ModelLoadError(f"{name} {str(size)[:50]} is not from {_LEAST_WINDOW} to {rate}")
    for name in ("frame_length_ms", "hop_length_ms"):
        value = settings.get(name, 10.0)
        if type(value) not in (int, float) or not 5 <= value <= _MAX_WINDOW:
            raise ModelLoadError(f"{name} {str(value)[:50]} is not from 5 to {_MAX_WINDOW}")
    if settings.get("dither"):
        raise ModelLoadError("dither adds noise to sounds, which is not supported")
    module, _, name = needs.extractor.partition(":")
    kind = settings.get("feature_extractor_type", name)
    if kind != name:
        raise ModelLoadError(f"feature_extractor_type {str(kind)[:50]!r} is not {name}")
    kept = {key: value for key, value in settings.items() if key != "feature_extractor_type"}
    try:
        found: Any = importlib.import_module(f"transformers.models.{module}")
        return getattr(found, name)(**kept)
    except (ArithmeticError, AttributeError, ImportError, TypeError, ValueError) as error:
        raise ModelLoadError(f"the settings of the feature extractor are wrong: {error}") from error
