"""Load a speech-to-text model from the files of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from modelpack.errors import ModelpackError
from modelpack.formats.config_json import SpeechFamily, speech_family
from modelpack.formats.safetensors import read_safetensors_header
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import load_progress
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.models.loader import Device
from modelpack_engine.models.precision import (
    array_shapes,
    check_parameters,
    evaluate,
    shapes_of,
)
from modelpack_engine.models.safetensors import read_headers
from modelpack_engine.patches import mlx_audio_imports
from modelpack_engine.speech import moonshine, parakeet, whisper
from modelpack_engine.speech.transcript import OnWindow, Transcript, TranscriptionRequest

#: Parts of NeMo's configurations that have sizes of the model; the others are of its training.
_NEMO_PARTS = ("encoder", "decoder", "joint")
#: The head of transformers' Whisper, which is the table of embeddings again.
_TIED = "proj_out.weight"
_FLOATS = ("F32", "F16", "BF16")


class SpeechModel(Protocol):
    """A loaded model of one family."""

    @property
    def kind(self) -> str: ...

    def check(self, request: TranscriptionRequest) -> None:
        """Raise `RequestError` for a request that the model cannot fulfil; for any thread."""

    def transcribe(self, request: TranscriptionRequest, on_window: OnWindow) -> Transcript:
        """Return the transcript, calling `on_window` before each window of the sound."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Transcriber:
    """A speech-to-text model; only the thread that loaded it may call `transcribe`."""

    model: SpeechModel
    device: Device
    weight_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """The family of the model."""
        return self.model.kind

    def check(self, request: TranscriptionRequest) -> None:
        """Raise `RequestError` for settings that the model cannot use; for any thread."""
        request.check()
        self.model.check(request)

    def transcribe(
        self, request: TranscriptionRequest, on_window: OnWindow = lambda: None
    ) -> Transcript:
        """Return the transcript of a request; `on_window` may raise to stop the work.

        Raises `RequestError` for a request that the model cannot fulfil.
        """
        self.check(request)
        request.check_sound()
        with mx.stream(mx.cpu if self.device == "cpu" else mx.gpu):
            return self.model.transcribe(request, on_window)


def load_transcriber(
    files: ModelFiles, *, device: Device, dtype: mx.Dtype | None = None
) -> Transcriber:
    """Load a speech-to-text model.

    The default `dtype` is float32 on a CPU, and that of mlx-audio on a GPU. Raises
    `ModelLoadError`, naming the cause, for invalid or unsupported files.
    """
    config = files.json("config.json") or {}
    family = speech_family(config)
    if family is None or files.format != "safetensors":
        raise ModelLoadError("the model is not a speech-to-text model in safetensors")
    if not mlx_audio_imports.is_installed():
        raise ModelLoadError(
            "speech-to-text models need mlx-audio", hint="run pip install 'modelpack[audio]'"
        )
    dtype = dtype or _usual_dtype(family, device)
    with mx.stream(mx.cpu if device == "cpu" else mx.gpu):
        model = _built(files, config, family, dtype)
        load_progress.begin(files.weights)
        weight_bytes = evaluate(model)
    loaded: SpeechModel
    if family == "whisper":
        loaded = whisper.Whisper(model, files, config)
    elif family == "moonshine":
        loaded = moonshine.Moonshine(model, files, config)
    else:
        loaded = parakeet.Parakeet(model, dtype)
    return Transcriber(loaded, device, weight_bytes, files.notes)


def loaded_bytes(files: ModelFiles, device: Device) -> int:
    """Return the bytes of the model's weights as `load_transcriber` loads them."""
    family = speech_family(files.json("config.json") or {})
    assert family is not None
    size = _usual_dtype(family, device).size
    tensors = [tensor for path in files.weights for tensor in read_safetensors_header(path).tensors]
    return sum(tensor.elements * (size if tensor.dtype in _FLOATS else 4) for tensor in tensors)


def _usual_dtype(family: SpeechFamily, device: Device) -> mx.Dtype:
    if device == "cpu" or family == "moonshine":
        return mx.float32
    return mx.float16 if family == "whisper" else mx.bfloat16


def _built(
    files: ModelFiles, config: Mapping[str, Any], family: SpeechFamily, dtype: mx.Dtype
) -> Any:
    """Return mlx-audio's model with its weights, not evaluated."""
    bounds, _ = read_headers(files)
    if family != "parakeet":
        bounds.check(config)
    for part in _NEMO_PARTS if family == "parakeet" else ():
        if isinstance(config.get(part), dict):
            bounds.check(config[part], f"config.json: {part}")
    try:
        with bounds.building("config.json"):
            if family == "whisper":
                model = whisper.build(config, dtype)
            else:
                model = {"moonshine": moonshine, "parakeet": parakeet}[family].build(config)
        weights: dict[str, mx.array] = {}
        for path in files.weights:
            found = mx.load(str(path), format="safetensors")
            assert isinstance(found, dict)
            weights |= found
        if family == "whisper":
            weights.pop(_TIED, None)
        if hasattr(model, "sanitize"):
            weights = model.sanitize(weights)
        from mlx_audio.utils import apply_quantization

        apply_quantization(model, dict(config), weights)
    except ModelpackError:
        raise
    except Exception as error:  # mlx-audio raises what Python does for an invalid config
        text = " ".join(str(error).split())[:600]
        raise ModelLoadError(
            f"cannot build mlx-audio's {family} from these files: {type(error).__name__}: {text}"
        ) from error
    check_parameters(family, shapes_of(model), array_shapes(weights))
    model.load_weights(list(weights.items()))
    model.set_dtype(dtype)
    model.eval()
    return model
