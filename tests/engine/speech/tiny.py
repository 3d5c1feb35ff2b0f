"""Tiny random speech-to-text models, and sounds for them.

The words of their vocabularies are `w256`, `w257` and so on. Logits are large, so that a model is
sure of its words and Whisper does not decode a window again at a higher temperature.
"""

from __future__ import annotations

import functools
import io
import json
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from safetensors.numpy import save_file

from modelpack_engine.patches.mlx_audio_imports import prepare
from modelpack_engine.speech.transcript import SAMPLE_RATE

prepare()

Samples = NDArray[np.float32]


def tone(seconds: float, hertz: float = 440.0) -> Samples:
    """Return a tone that grows louder."""
    at = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.5 * np.sin(2 * np.pi * hertz * at) * np.minimum(1, 0.1 + at / 10)).astype(np.float32)


def noise(seconds: float, seed: int = 0) -> Samples:
    """Return white noise whose loudness changes each half second."""
    random = np.random.default_rng(seed)
    count = int(seconds * SAMPLE_RATE)
    loudness = np.repeat(random.uniform(0, 0.5, count // 8000 + 1), 8000)[:count]
    return (random.uniform(-1, 1, count) * loudness).astype(np.float32)


def wav(samples: Samples, rate: int = SAMPLE_RATE) -> bytes:
    """Return samples as a WAV of 16 bits."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


WHISPER: Mapping[str, Any] = {
    "model_type": "whisper",
    "architectures": ["WhisperForConditionalGeneration"],
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "vocab_size": 51865,
    "max_target_positions": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "num_hidden_layers": 1,
    "eos_token_id": 50257,
    "decoder_start_token_id": 50258,
}
_TEXT_TOKENS = 50257
_LANGUAGES = 99


@functools.cache
def whisper_tokenizer(multilingual: bool = True, count: int = _TEXT_TOKENS) -> str:
    """Return the tokenizer.json with the ids of Whisper's vocabularies."""
    from mlx_audio.stt.models.whisper.tokenizer import LANGUAGES

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: at for at, letter in enumerate(letters)}
    vocab |= {f"Ġw{at}": at for at in range(len(letters), count)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    names = list(LANGUAGES)[:_LANGUAGES] if multilingual else ["en"]
    special = ["endoftext", "startoftranscript", *names, "translate", "transcribe", "startoflm",
               "startofprev", "nospeech", "notimestamps"]  # fmt: skip
    made.add_special_tokens([f"<|{name}|>" for name in special])
    times = [f"<|{at / 50:.2f}|>" for at in range(1501)]
    made.add_tokens([tokenizers.AddedToken(time, normalized=False) for time in times])
    text: str = made.to_str()
    return text


def write_whisper(
    directory: Path,
    *,
    config: Mapping[str, Any] | None = None,
    multilingual: bool = True,
    openai_names: bool = False,
    seed: int = 0,
    sure: float = 40.0,
) -> Path:
    """Write a Whisper in the format of transformers, or with the names of OpenAI's sizes."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**WHISPER, **(config or {})}
    text = whisper_tokenizer() if multilingual else whisper_tokenizer(False, 1000)
    if not multilingual:
        config["vocab_size"] = tokenizers.Tokenizer.from_str(text).get_vocab_size()
    weights = _whisper_weights(config, seed, sure)
    if openai_names:
        weights = _as_openai(weights)
        config = {
            "n_mels": config["num_mel_bins"],
            "n_audio_ctx": config["max_source_positions"],
            "n_audio_state": config["d_model"],
            "n_audio_head": config["encoder_attention_heads"],
            "n_audio_layer": config["encoder_layers"],
            "n_vocab": config["vocab_size"],
            "n_text_ctx": config["max_target_positions"],
            "n_text_state": config["d_model"],
            "n_text_head": config["decoder_attention_heads"],
            "n_text_layer": config["decoder_layers"],
        }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(text)
    settings = {"tokenizer_class": "WhisperTokenizer", "eos_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    extractor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": config.get("num_mel_bins", 80),
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(extractor))
    heads = {"alignment_heads": [[1, 0], [1, 1]], "eos_token_id": 50257}
    (directory / "generation_config.json").write_text(json.dumps(heads))
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def _whisper_weights(config: Mapping[str, Any], seed: int, sure: float) -> dict[str, Samples]:
    random = np.random.default_rng(seed)
    size, found = config["d_model"], {}

    def add(name: str, *shape: int, scale: float = 1.0, mean: float = 0.0) -> None:
        spread = scale / np.sqrt(np.prod(shape[1:]) or 1)
        found[f"model.{name}"] = (mean + random.normal(0, spread, shape)).astype(np.float32)

    def norm(name: str) -> None:
        add(f"{name}.weight", size, scale=0.1, mean=1.0)
        add(f"{name}.bias", size, scale=0.1)

    def linear(name: str, out: int, into: int, *, bias: bool = True) -> None:
        add(f"{name}.weight", out, into)
        if bias:
            add(f"{name}.bias", out, scale=0.1)

    def attention(name: str, strength: float = 1.0) -> None:
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{name}.{part}", size, size, bias=part != "k_proj")
        found[f"model.{name}.out_proj.weight"] *= strength

    add("encoder.conv1.weight", size, config["num_mel_bins"], 3)
    add("encoder.conv1.bias", size, scale=0.1)
    add("encoder.conv2.weight", size, size, 3)
    add("encoder.conv2.bias", size, scale=0.1)
    found["model.encoder.embed_positions.weight"] = np.zeros((1500, size), np.float32)
    add("decoder.embed_tokens.weight", config["vocab_size"], size, scale=sure / np.sqrt(size))
    add("decoder.embed_positions.weight", config["max_target_positions"], size, scale=60)
    for part in ("encoder", "decoder"):
        for layer in range(config[f"{part}_layers"]):
            name = f"{part}.layers.{layer}"
            attention(f"{name}.self_attn", 20 if part == "decoder" else 1)
            norm(f"{name}.self_attn_layer_norm")
            if part == "decoder":
                attention(f"{name}.encoder_attn", 30)
                norm(f"{name}.encoder_attn_layer_norm")
            linear(f"{name}.fc1", 4 * size, size)
            linear(f"{name}.fc2", size, 4 * size)
            norm(f"{name}.final_layer_norm")
        norm(f"{part}.layer_norm")
    return found


def _as_openai(weights: Mapping[str, Samples]) -> dict[str, Samples]:
    """Return weights with the names and shapes that mlx-audio saves."""
    import mlx.core as mx
    from mlx_audio.stt.models.whisper.whisper import Model, ModelDimensions

    dims = ModelDimensions.from_dict(dict(WHISPER))
    arrays = {name: mx.array(value) for name, value in weights.items()}
    made = Model(dims, mx.float32).sanitize(arrays)
    return {name: np.ascontiguousarray(value) for name, value in made.items()}


MOONSHINE: Mapping[str, Any] = {
    "model_type": "moonshine",
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 64,
    "encoder_num_hidden_layers": 1,
    "decoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4,
    "max_position_embeddings": 512,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


def write_moonshine(directory: Path, *, seed: int = 0) -> Path:
    """Write a Moonshine in the format of transformers."""
    from mlx.utils import tree_flatten
    from mlx_audio.stt.models.moonshine.moonshine import Model, ModelConfig

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(MOONSHINE))
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"▁w{at}": at for at in range(3, 500)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    parts = tokenizers.decoders
    made.decoder = parts.Sequence(
        [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    )
    made.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    random = np.random.default_rng(seed)
    weights = {}
    for name, value in tree_flatten(Model(ModelConfig.from_dict(dict(MOONSHINE))).parameters()):
        scale = 3 / np.sqrt(max(1, np.prod(value.shape[1:])))
        array = random.normal(1 if "norm" in name and "weight" in name else 0, scale, value.shape)
        if name.startswith("encoder.conv") and array.ndim == 3:  # as in PyTorch
            array = array.transpose(0, 2, 1)
        weights[f"model.{name}"] = np.ascontiguousarray(array, np.float32)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


_VOCABULARY = [
    "<unk>",
    *(f"▁w{at}" for at in range(1, 60)),
    *"abcdefghijklmnopqrstuvwxyz",
    ".",
    "?",
]
_PREPROCESSOR = {
    "sample_rate": 16000, "normalize": "per_feature", "window_size": 0.025,
    "window_stride": 0.01, "window": "hann", "features": 16, "n_fft": 512, "dither": 1e-5,
    "pad_to": 0,
}  # fmt: skip
_ENCODER = {
    "feat_in": 16, "n_layers": 1, "d_model": 16, "n_heads": 2, "ff_expansion_factor": 2,
    "subsampling_factor": 8, "self_attention_model": "rel_pos", "subsampling": "dw_striding",
    "conv_kernel_size": 9, "subsampling_conv_channels": 8, "pos_emb_max_len": 2000,
}  # fmt: skip
_PREDICTION = {
    "blank_as_pad": True, "vocab_size": len(_VOCABULARY),
    "prednet": {"pred_hidden": 12, "pred_rnn_layers": 1},
}  # fmt: skip
_JOINT = {
    "num_classes": len(_VOCABULARY), "vocabulary": _VOCABULARY,
    "jointnet": {"joint_hidden": 12, "activation": "relu", "encoder_hidden": 16, "pred_hidden": 12},
}  # fmt: skip
_NEMO = "nemo.collections.asr.models"
#: NeMo's configurations of each kind of Parakeet.
PARAKEETS: Mapping[str, Mapping[str, Any]] = {
    "ctc": {
        "target": f"{_NEMO}.ctc_bpe_models.EncDecCTCModelBPE",
        "preprocessor": _PREPROCESSOR,
        "encoder": _ENCODER,
        "decoder": {
            "feat_in": 16, "num_classes": len(_VOCABULARY), "vocabulary": _VOCABULARY,
        },
        "decoding": {"greedy": {"max_symbols": 10}},
    },
    "rnnt": {
        "target": f"{_NEMO}.rnnt_bpe_models.EncDecRNNTBPEModel",
        "preprocessor": _PREPROCESSOR,
        "encoder": _ENCODER,
        "decoder": _PREDICTION,
        "joint": _JOINT,
        "decoding": {"greedy": {"max_symbols": 10}},
    },
    "tdt": {
        "target": f"{_NEMO}.rnnt_bpe_models.EncDecRNNTBPEModel",
        "model_defaults": {"tdt_durations": [0, 1, 2, 3, 4]},
        "preprocessor": _PREPROCESSOR,
        "encoder": _ENCODER,
        "decoder": _PREDICTION,
        "joint": {**_JOINT, "num_extra_outputs": 5},
        "decoding": {
            "model_type": "tdt", "durations": [0, 1, 2, 3, 4], "greedy": {"max_symbols": 10},
        },
        "optim": {"sched": {"max_steps": 10_000_000}},  # of the training, and no size
    },
}  # fmt: skip
PARAKEETS = PARAKEETS | {
    "tdt_ctc": {
        **PARAKEETS["tdt"],
        "target": f"{_NEMO}.hybrid_rnnt_ctc_bpe_models.EncDecHybridRNNTCTCBPEModel",
        "aux_ctc": {"decoder": PARAKEETS["ctc"]["decoder"]},
    }
}


def write_parakeet(directory: Path, kind: str = "tdt", *, seed: int = 0) -> Path:
    """Write a Parakeet in the format of NeMo's conversions for MLX."""
    from mlx.utils import tree_flatten
    from mlx_audio.stt.models.parakeet.parakeet import Model

    directory.mkdir(parents=True, exist_ok=True)
    config = PARAKEETS[kind]
    (directory / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(seed)
    weights = {}
    for name, value in tree_flatten(Model.from_config(dict(config)).parameters()):
        made: Any = random.normal(0, 1 / np.sqrt(max(1, np.prod(value.shape[1:]))), value.shape)
        if name.endswith("running_var"):
            made = np.abs(made) + 1
        weights[name] = made.astype(np.float32)
    save_file(weights, directory / "model.safetensors", {"format": "mlx"})
    return directory
