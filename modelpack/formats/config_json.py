"""The `config.json` of a Hugging Face model: architecture, context size and MLX quantization.

`statistics` reads it for the config of a packaged model; `lint` and `deploy` read it for checks
and flags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeGuard, get_args

from modelpack.artifacts.config import MAX_CONTEXT_SIZE, ModelConfig
from modelpack.errors import ModelpackError, NotFoundError
from modelpack.formats.json_reader import reject_constant
from modelpack.formats.reader import WeightFile
from modelpack.formats.tensors import TensorInfo

#: The files that may have the settings of an image processor or a feature extractor.
PROCESSOR_CONFIGS: Final = ("preprocessor_config.json", "processor_config.json")
_WORD_BITS: Final = 32
_AFFINE: Final = "affine"
_BITS: Final = range(1, 17)
_BITS_KEY: Final = "quantization.bits"


@dataclass(frozen=True, slots=True)
class MLXQuantization:
    """The quantization that mlx-lm records in `config.json`: bits a weight and weights a group.

    `config.json` has `"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}`. Modules
    with other settings stand under their own names in the same object; `modules` maps them to
    their bits. A quantized `X.weight` packs its values into 32-bit words; `X.scales` and, for
    affine modes, `X.biases` are separate tensors. Source: mlx_lm.utils.quantize_model and
    mlx.nn.quantize; the models of mlx-community use this format.
    """

    bits: int
    group_size: int
    mode: str = _AFFINE
    modules: Mapping[str, int] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> MLXQuantization | None:
        """Return the quantization in a `config.json`, or None if mlx-lm did not quantize the model.

        Other tools write `quantization_config` with a `quant_method`: AWQ, GPTQ and the like.
        """
        value = config.get("quantization")
        if not isinstance(value, dict):
            return None
        bits, group_size = value.get("bits"), value.get("group_size")
        if not _is_bits(bits) or type(group_size) is not int or group_size < 1:
            return None
        mode = value.get("mode", _AFFINE)
        modules = {
            name: own["bits"]
            for name, own in value.items()
            if isinstance(own, dict) and _is_bits(own.get("bits"))
        }
        return cls(bits, group_size, mode if isinstance(mode, str) else _AFFINE, modules)

    @property
    def label(self) -> str:
        """The suffix that mlx-community gives to names of such models: `4bit`, `mxfp4`."""
        return f"{self.bits}bit" if self.mode == _AFFINE else self.mode

    def facts(self) -> dict[str, str]:
        """Return the entries for the `safetensors` map of a model's config."""
        return {
            _BITS_KEY: str(self.bits),
            "quantization.group_size": str(self.group_size),
            "quantization.mode": self.mode,
        }

    def parameters(self, tensors: Sequence[TensorInfo]) -> int:
        """Return the number of weights in `tensors`: unpacked, without scales and biases."""
        scales = (tensor.name for tensor in tensors if tensor.name.endswith(".scales"))
        packed = {name.removesuffix(".scales") for name in scales}
        return sum(self._count(tensor, packed) for tensor in tensors)

    def _count(self, tensor: TensorInfo, packed: set[str]) -> int:
        module, _, kind = tensor.name.rpartition(".")
        if module not in packed:
            return tensor.elements
        if kind in ("scales", "biases"):
            return 0
        if kind != "weight" or tensor.dtype != "U32":
            return tensor.elements
        return tensor.elements * _WORD_BITS // self.modules.get(module, self.bits)


def mlx_bits(config: ModelConfig) -> int | None:
    """Return the bits a weight of a packaged model that mlx-lm quantized, or None for others.

    Only MLX runs such models: vLLM and llama.cpp do not know their tensors.
    """
    text = (config.safetensors or {}).get(_BITS_KEY, "")
    return int(text) if text.isdecimal() and len(text) < 4 else None


def _is_bits(value: Any) -> TypeGuard[int]:
    return type(value) is int and value in _BITS


CONFIG_JSON = "config.json"
#: Configurations with the names of 20,000 classes are about 1 MB.
MAX_CONFIG_JSON_BYTES = 16 * 1024 * 1024

_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_ctx",
    "n_positions",
    "max_length",
    "max_sequence_length",
    "model_max_length",
)
#: Keys under which multimodal models keep the configuration of their language model.
_TEXT_KEYS = ("text_config", "llm_config", "language_config")

#: Parts of the config of a model that speaks: the model that writes text, and those of its voice.
_THINKER, _VOICE = "thinker_config", ("talker_config", "code2wav_config")

#: Model types, and architectures of GGUF, whose output is an embedding or a score.
ENCODERS: Final = frozenset({
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "jina-bert-v2",
    "jina-bert-v3", "modern-bert", "modernbert", "mpnet", "neo-bert", "nomic-bert",
    "nomic-bert-moe", "roberta", "t5encoder", "xlm-roberta",
})  # fmt: skip
_SCORE_HEADS: Final = ("ForSequenceClassification", "ForTokenClassification")


def is_processor_config(name: str, document: Mapping[str, Any]) -> bool:
    """Return whether one of `PROCESSOR_CONFIGS` has the settings of a processor.

    A processor_config.json may have none: it says how many tokens a picture has, for example.
    """
    if name == PROCESSOR_CONFIGS[0]:
        return bool(document)
    parts = ("image_processor", "feature_extractor")
    return any(isinstance(document.get(part), Mapping) for part in parts)


def read_config_json(path: Path, *, strict: bool) -> Mapping[str, Any]:
    """Return the JSON object in the file `path`.

    Raises `ValueError` with the reason if the file does not hold a JSON object, and
    `NotFoundError` if it does not exist. Python's `json` writes `Infinity` into some models'
    files, which is not JSON; `strict` rejects it.
    """
    try:
        with WeightFile.open(path) as file:
            if file.size > MAX_CONFIG_JSON_BYTES:
                raise ValueError(f"more than {MAX_CONFIG_JSON_BYTES} bytes")
            raw = file.read(0, file.size)
    except NotFoundError:
        raise
    except ModelpackError as error:
        raise ValueError(error.message) from None
    return parse_config_json(raw, strict=strict)


def parse_config_json(raw: bytes, *, strict: bool) -> Mapping[str, Any]:
    """Return the JSON object `raw`; raise `ValueError` as `read_config_json` does."""
    constants = reject_constant if strict else None
    try:
        value = json.loads(raw.decode("utf-8", "replace"), parse_constant=constants)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def without_speech(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration of the model that writes text, for one that speaks (Qwen3-Omni)."""
    thinker = config.get(_THINKER)
    if not isinstance(thinker, Mapping):
        return config
    return {**thinker, **{key: v for key, v in config.items() if key not in (_THINKER, *_VOICE)}}


def context_size(config: Mapping[str, Any], *, nested: bool) -> int | None:
    """Return the context size in tokens, or None if `config` has none.

    With `nested`, search the configuration of a multimodal model's language model, too.
    """
    places = [config, *_text_configs(config)] if nested else [config]
    for key in _CONTEXT_KEYS:
        for place in places:
            value = place.get(key)
            if type(value) is int and 1 <= value <= MAX_CONTEXT_SIZE:
                return value
    return None


def architecture_name(config: Mapping[str, Any]) -> str:
    """Return the model's architecture, or an empty string.

    GGUF files use the names of `model_type` ("llama", "qwen2"), so it comes first; `architectures`
    names a Python class.
    """
    for place in (config, *_text_configs(config)):
        kind = place.get("model_type")
        if isinstance(kind, str) and kind.strip():
            return kind.strip()
    if (family := speech_family(config)) is not None:
        return family
    classes = config.get("architectures")
    if isinstance(classes, list) and classes and isinstance(classes[0], str):
        return classes[0].strip()
    return ""


def output_of(config: Mapping[str, Any]) -> str:
    """Return what a model of this configuration computes: `text`, `embedding`, or `other`."""
    classes = config.get("architectures")
    names = [str(name) for name in classes] if isinstance(classes, list) else []
    if any(name.endswith(_SCORE_HEADS) for name in names):
        return "other"
    kind = str(config.get("model_type", "")).lower().replace("_", "-")
    encodes = kind in ENCODERS or any(name.endswith("ForMaskedLM") for name in names)
    return "embedding" if encodes else "text"


SpeechFamily = Literal["whisper", "moonshine", "parakeet"]
#: The families of speech-to-text models, which are their architectures too.
SPEECH_FAMILIES: Final[tuple[SpeechFamily, ...]] = get_args(SpeechFamily)
# The Python class that a NeMo configuration names, for each Parakeet of mlx-audio.
_NEMO_SPEECH: Final = re.compile(
    r"nemo\.collections\.asr\.models\."
    r"(rnnt_bpe_models\.EncDecRNNTBPEModel|ctc_bpe_models\.EncDecCTCModelBPE"
    r"|hybrid_rnnt_ctc_bpe_models\.EncDecHybridRNNTCTCBPEModel)"
)


def speech_family(config: Mapping[str, Any]) -> SpeechFamily | None:
    """Return the family of a speech-to-text model by its configuration; None for other models.

    mlx-audio's own Whisper has OpenAI's names of sizes, and not always a `model_type`; NeMo's
    configurations have none.
    """
    kind = config.get("model_type")
    if kind == "whisper" or (kind is None and {"n_mels", "n_audio_ctx"} <= config.keys()):
        return "whisper"
    if kind == "moonshine":
        return "moonshine"
    target = config.get("target")
    if kind in (None, "parakeet") and isinstance(target, str) and _NEMO_SPEECH.fullmatch(target):
        return "parakeet"
    return None


def stated_template(tokenizer_config: Mapping[str, Any]) -> str:
    """Return the default chat template in a `tokenizer_config.json`, or an empty string."""
    stated = tokenizer_config.get("chat_template")
    if isinstance(stated, list):
        named = [one for one in stated if isinstance(one, dict) and one.get("name") == "default"]
        stated = named[0].get("template") if named else None
    return stated if isinstance(stated, str) else ""


def first_config_json(directories: Iterable[Path]) -> Path | None:
    """Return the first `config.json` that exists in `directories`."""
    paths = (directory / CONFIG_JSON for directory in dict.fromkeys(directories))
    return next((path for path in paths if path.exists()), None)


def _text_configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    config = without_speech(config)
    return (value for value in map(config.get, _TEXT_KEYS) if isinstance(value, dict))
