"""A tiny random Phi-4 Multimodal, as its files are published, and mlx-vlm's own answers."""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer

from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.models import LoadedModel, load
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.patches.mlx_vlm_imports import prepare
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.vision.sounds import Sound
from tests.engine.vision import tiny

PLACEHOLDER = "<|endoftext11|>"
AUDIO = 344
RANK, ALPHA = 8, 24
CONFIG: dict[str, Any] = {
    "model_type": "phi4mm", "architectures": ["Phi4MMForCausalLM"], "hidden_size": 64,
    "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 352, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75, "max_position_embeddings": 1024,
    "original_max_position_embeddings": 256, "sliding_window": 262144, "attention_bias": False,
    "rope_scaling": {
        "type": "longrope", "short_factor": [1.0, 1.0, 1.1, 1.2, 1.4, 2.0],
        "long_factor": [1.0, 1.0, 1.1, 1.2, 1.4, 2.0],
    },
    "tie_word_embeddings": True, "hidden_act": "silu", "lm_head_bias": False,
    "img_processor": None, "full_attn_mod": 1, "interpolate_factor": 1,
    "audio_token_index": AUDIO,
    "speech_lora": {"r": RANK, "lora_alpha": ALPHA, "dp": 0.01, "layer": "layers.*"},
    "vision_lora": {"r": RANK, "lora_alpha": ALPHA, "dp": 0.0, "layer": "layers.*"},
    "embd_layer": {
        "audio_embd_layer": {"compression_rate": 8, "enable_gradient_checkpointing": True},
        "embedding_cls": "image_audio",
    },
    "audio_processor": {
        "name": "cascades",
        "config": {
            "attention_dim": 32, "attention_heads": 2, "num_blocks": 2, "linear_units": 48,
            "input_size": 80, "time_reduction": 8, "kernel_size": 3, "conv_channels": 16,
            "ext_pw_out_channel": 32, "depthwise_seperable_out_channel": 32, "chunk_size": -1,
            "left_chunk": 18, "causal": True, "cnn_layer_norm": True, "batch_norm": False,
        },
    },
}  # fmt: skip
#: Sizes of mlx-vlm's vision tower, which published files do not name.
_SMALL: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
        "num_hidden_layers": 1, "patch_size": 4, "image_size": 16,
    },
    "mm_hidden_size": 16,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "feature_extractor_type": "Phi4MMAudioFeatureExtractor", "audio_compression_rate": 8,
    "audio_downsample_rate": 1, "audio_feat_stride": 1, "dynamic_hd": 36,
    "image_processor_type": "Phi4MMImageProcessor", "processor_class": "Phi4MMProcessor",
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<eos>' }}{% endfor %}"
    "{{ '<|assistant|>' }}"
)
#: Convolutions of published files, by their places in the modules of mlx-vlm.
_CONVOLUTIONS = {
    "conv_0": 0, "dw_pw_layers.0.dw": 2, "dw_pw_layers.0.pw": 3, "dw_pw_layers.1.dw": 5,
    "dw_pw_layers.1.pw": 6,
}  # fmt: skip


def _package() -> Any:
    prepare()
    return importlib.import_module("mlx_vlm.models.phi4mm")


def _published(name: str, value: mx.array) -> tuple[str, mx.array]:
    """Return the name and layout of a tensor in published files."""
    before = "model.embed_tokens_extend."
    if name.startswith("vision_tower.vision_tower."):
        rest = name.removeprefix("vision_tower.vision_tower.")
        return f"{before}image_embed.img_processor.{rest}", value
    if name.startswith("mm_projector."):
        return f"{before}image_embed.img_projection.{name.partition('.')[2]}", value
    if name.startswith("audio_projection."):
        rest = name.replace("proj_0", "0").replace("proj_2", "2")
        return f"{before}audio_embed.{rest}", value
    if name.startswith("audio_encoder."):
        rest = name.removeprefix("audio_encoder.")
        for ours, place in _CONVOLUTIONS.items():
            rest = rest.replace(f"embed.{ours}.", f"embed.conv.{place}.")
        rest = rest.replace(".net_0.", ".net.0.").replace(".net_2.", ".net.2.")
        if value.ndim == 4:
            value = value.transpose(0, 3, 1, 2)
        elif value.ndim == 3:
            value = value.transpose(0, 2, 1)
        elif rest.endswith("ext_pw_conv_1d.weight"):
            value = value[:, :, None]
        elif rest.endswith((".b1", ".b2")):
            value = value[None, :, None]
        return f"{before}audio_embed.encoder.{rest}", value
    name = name.removeprefix("language_model.")
    if value.ndim == 2 and "layers." in name:
        name = name.replace(".weight", ".base_layer.weight")
    return name, value


@cache
def weights() -> dict[str, mx.array]:
    """Return reproducible random weights, by the names of published files."""
    package = _package()
    model = package.Model(package.ModelConfig.from_dict(CONFIG | _SMALL))
    mx.random.seed(5)
    found = {}
    for name, value in tree_flatten(model.parameters()):
        scale = 0.2 if value.ndim == 1 else 1.6 / value.shape[-1] ** 0.5
        noise = mx.random.normal(value.shape) * scale
        noise = noise + 1 if value.ndim == 1 and name.endswith("weight") else noise
        if "global_invstd" in name:
            noise = mx.abs(noise) + 0.1
        stored, noise = _published(name, noise)
        found[stored] = noise
        if ".base_layer." not in stored:
            continue
        outputs, inputs = noise.shape
        for kind in ("vision", "speech"):
            a, b = stored.replace("base_layer", f"lora_A.{kind}"), f"lora_B.{kind}"
            found[a] = mx.random.normal((RANK, inputs)) * 0.1
            found[stored.replace("base_layer", b)] = mx.random.normal((outputs, RANK)) * 0.1
    found["model.embed_tokens_extend.image_embed.glb_GN"] = mx.zeros((1, 1, 16))
    mx.eval(found)
    return found


def write(path: Path, **changed: Any) -> None:
    """Write a model to a directory, with other fields of config.json."""
    mx.save_safetensors(str(path / "model.safetensors"), weights())
    names = {"eos_token": "<eos>", "chat_template": TEMPLATE}
    documents = {
        "config.json": CONFIG | changed,
        "preprocessor_config.json": SETTINGS,
        "tokenizer_config.json": names | {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    for name, document in documents.items():
        (path / name).write_text(json.dumps(document))
    backend = Tokenizer.from_file(str(tiny.directory("gemma4") / "tokenizer.json"))
    filling = [f"<unused{index}>" for index in range(backend.get_vocab_size(), AUDIO)]
    texts = [*filling, PLACEHOLDER, "<|user|>", "<|assistant|>"]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in texts])
    assert backend.token_to_id(PLACEHOLDER) == AUDIO
    backend.save(str(path / "tokenizer.json"))


@cache
def directory() -> Path:
    """Return the directory of the model."""
    path = tiny.new_directory("phi4mm")
    write(path)
    return path


def loaded(path: Path | None = None) -> LoadedModel:
    """Return the model as the loaders return it."""
    return load(ModelFiles.from_directory(path or directory()), device="cpu")


def engine_of(path: Path | None = None, **settings: Any) -> Engine:
    """Return an engine with the model; `settings` are fields of EngineConfig."""
    given = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "device": "cpu"} | settings
    return Engine(loaded(path), EngineConfig(**given))


def request(
    engine: Engine, text: str, sounds: list[Sound], count: int = 8, **fields: Any
) -> EngineRequest:
    """Return a greedy request of a text with <audio> in the places of the sounds."""
    assert engine.vision is not None
    ids = engine.tokenizer.encode(text.replace("<audio>", PLACEHOLDER), add_special_tokens=False)
    ids, media = engine.vision.processor.place(ids, sounds)
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    return EngineRequest(ids, params, media=media, **fields)


def peer() -> Any:
    """Return a model of mlx-vlm."""
    package = _package()
    model = package.Model(package.ModelConfig.from_dict(CONFIG | _SMALL))
    model.load_weights([*model.sanitize(dict(weights())).items()])
    model.eval()
    return model


_peer = cache(peer)


def expected(text: str, sounds: list[Sound], count: int = 8, model: Any = None) -> list[int]:
    """Return the greedy tokens of mlx-vlm's features, model and cache, for one request.

    Its processor looks for the token of the published vocabulary, so it is not called. `model` is
    one of mlx-vlm whose adapters are in its weights.
    """
    if model is None:
        model = _peer()
        model.set_modality(has_audio=bool(sounds))
    module: Any = importlib.import_module("mlx_vlm.models.phi4mm.processing_phi4mm")
    backend = Tokenizer.from_file(str(directory() / "tokenizer.json"))
    given: dict[str, Any] = {}
    if sounds:
        pairs = [(each.samples, 16_000) for each in sounds]
        given = module.Phi4MMAudioFeatureExtractor()(pairs)
        given.pop("audio_attention_mask", None)
    sizes = iter(np.array(given.get("audio_embed_sizes", [])).tolist())
    ids: list[int] = []
    for token_id in backend.encode(text.replace("<audio>", PLACEHOLDER)).ids:
        ids += [token_id] * (int(next(sizes)) if token_id == AUDIO else 1)
    features = model.get_input_embeddings(mx.array([ids]), None, **given)
    return tiny.generated(model, mx.array([ids]), features, count)
