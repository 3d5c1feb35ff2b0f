"""Tiny random models that read sounds, as directories, and mlx-vlm's own answers."""

from __future__ import annotations

import importlib
import json
import warnings
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
from modelpack_engine.vision.processor import Picture
from modelpack_engine.vision.sounds import Sound
from tests.engine.vision import specimens, tiny
from tests.engine.vision.specimens import SPECIMENS, shrink

SPECIAL = [
    "<|audio>", "<|audio|>", "<audio|>", "<start_of_audio>", "<end_of_audio>", "<audio_soft_token>",
]  # fmt: skip
RATE = 16_000
VOCABULARY = 352
_FIRST = 340  # the tokens of `tiny` are fewer
#: The token of sounds, by kind.
AUDIO = {
    "gemma4": _FIRST + 1, "gemma4_unified": _FIRST + 1, "gemma3n": _FIRST + 5,
    "qwen3_omni_moe": specimens.AUDIO,
}  # fmt: skip
PLACEHOLDERS = {
    "gemma4": "<|audio|>", "gemma4_unified": "<|audio|>", "gemma3n": "<audio_soft_token>",
    "qwen3_omni_moe": "<|audio_pad|>",
}  # fmt: skip
KINDS = ("gemma4", "gemma4_unified", "gemma3n", "qwen3_omni_moe")
SEEDS = {"gemma4": 11, "gemma4_unified": 11, "gemma3n": 7}  # of which sounds change the answers
_PROCESSORS = {
    "gemma4": "Gemma4Processor", "gemma4_unified": "Gemma4UnifiedProcessor",
    "gemma3n": "Gemma3nProcessor", "qwen3_omni_moe": "Qwen3OmniMoeProcessor",
}  # fmt: skip
#: What mlx-vlm's `prepare_omni_inputs` calls the processor with, and the mask that counts features.
_CALLED = {"qwen3_omni_moe": {"padding": True, "return_attention_mask": True}}


def sound(seed: int, seconds: float = 1.0) -> Sound:
    """Return a sound of random tones, a new one each tenth of a second."""
    random = np.random.default_rng(seed)
    time = np.arange(int(RATE * seconds)) / RATE
    pitch = random.uniform(100, 4000, 1 + int(seconds * 10)).repeat(RATE // 10)[: len(time)]
    return Sound((0.5 * np.sin(2 * np.pi * pitch * time)).astype(np.float32))


def config_of(kind: str) -> dict[str, Any]:
    """Return config.json of a tiny model."""
    config = tiny.config_of(kind)
    if kind == "qwen3_omni_moe":
        return config
    config["text_config"]["vocab_size"] = VOCABULARY
    config |= {"vocab_size": VOCABULARY, "audio_token_id": AUDIO[kind]}
    if kind == "gemma3n":
        config["audio_config"] |= {"vocab_offset": _FIRST + 4, "input_feat_size": 128}
        return config
    config["text_config"] |= {
        "vocab_size_per_layer_input": VOCABULARY,
        # mlx-vlm does not do it without a patch, which `tiny` has.
        "use_bidirectional_attention": None,
    }
    if kind == "gemma4_unified":
        sizes = {"audio_samples_per_token": 640, "audio_embed_dim": 640, "output_proj_dims": 640}
        return config | {"audio_config": {"model_type": "gemma4_unified_audio", **sizes}}
    return config | {
        "audio_config": {
            "model_type": "gemma4_audio", "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "subsampling_conv_channels": [8, 4], "output_proj_dims": 48,
            "use_clipped_linears": True,
        },
    }  # fmt: skip


def arguments_of(kind: str) -> tuple[Any, Any]:
    """Return mlx-vlm's package of a kind, and the config of a tiny model."""
    prepare()
    package: Any = importlib.import_module(f"mlx_vlm.models.{kind}")
    shrink(package)
    config = config_of(kind)
    made = package.ModelConfig.from_dict(dict(config))
    if kind == "qwen3_omni_moe":
        return package, made
    for part in ("text", "vision", "audio"):
        own = getattr(package, f"{part.title()}Config").from_dict(config[f"{part}_config"])
        setattr(made, f"{part}_config", own)
    return package, made


def _tokenizer(path: Path) -> None:
    backend = Tokenizer.from_file(str(tiny.directory("gemma4") / "tokenizer.json"))
    filling = [f"<unused{index}>" for index in range(backend.get_vocab_size(), _FIRST)]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in filling + SPECIAL])
    for kind, text in PLACEHOLDERS.items():
        assert backend.token_to_id(text) == AUDIO[kind]
    backend.save(str(path))


@cache
def directory(kind: str) -> Path:
    """Return the directory of a tiny model with reproducible random weights."""
    if kind == "qwen3_omni_moe":
        return tiny.directory(kind)
    package, arguments = arguments_of(kind)
    mx.random.seed(SEEDS[kind])
    weights = {}
    for name, value in tree_flatten(package.Model(arguments).parameters()):
        if not value.ndim:  # the range of a linear
            weights[name] = mx.array(-3.0 if name.endswith("min") else 3.0)
            continue
        scale = 0.2 if value.ndim == 1 else 1.6 / value.shape[-1] ** 0.5
        noise = mx.random.normal(value.shape) * scale
        name = SPECIMENS[kind].stored(name) if kind in SPECIMENS else name
        weights[name] = noise + 1 if value.ndim == 1 and name.endswith("weight") else noise
    path = tiny.new_directory(f"hearing-{kind}")
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    names = json.loads((tiny.directory(kind) / "tokenizer_config.json").read_text())
    template = tiny.TEMPLATE.replace(
        "{% else %}{{ p.text }}",
        f"{{% elif p.type == 'audio' %}}{PLACEHOLDERS[kind]}{{% else %}}{{{{ p.text }}}}",
    )
    named = _PROCESSORS[kind].removesuffix("Processor")
    extractor = {"feature_extractor_type": f"{named}AudioFeatureExtractor"}
    in_one = extractor if kind == "gemma3n" else {}
    named = {"audio_token": PLACEHOLDERS[kind], "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    if kind == "gemma3n":
        named |= {
            "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>",
            "boi_token": "<start_of_image>", "image_token": "<image_soft_token>",
            "eoi_token": "<end_of_image>",
        }  # fmt: skip
    documents = {
        "config.json": config_of(kind),
        "preprocessor_config.json": tiny.settings_of(kind) | in_one,
        "processor_config.json": {
            "image_processor": tiny.settings_of(kind),
            **({} if in_one else {"feature_extractor": extractor}),
        },
        "tokenizer_config.json": names | named | {
            "chat_template": tiny.prompt_of(tiny.placeholder(kind), template),
        },
    }  # fmt: skip
    for name, document in documents.items():
        (path / name).write_text(json.dumps(document))
    _tokenizer(path / "tokenizer.json")
    return path


def loaded(kind: str) -> LoadedModel:
    """Return a tiny model as the loaders return it."""
    return load(ModelFiles.from_directory(directory(kind)), device="cpu")


def engine_of(kind: str, **settings: Any) -> Engine:
    """Return an engine with a tiny model; `settings` are fields of EngineConfig."""
    given = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "device": "cpu"} | settings
    return Engine(loaded(kind), EngineConfig(**given))


def request(
    engine: Engine, text: str, files: list[Picture | Sound], count: int = 8, **fields: Any
) -> EngineRequest:
    """Return a greedy request of a text with <image> and <audio> in the places of the files."""
    assert engine.vision is not None
    processor = engine.vision.processor
    assert processor.sounds is not None
    text = tiny.prompt_of(processor.image_token, text)
    text = text.replace("<audio>", processor.sounds.token)
    text = processor.with_spaces(text) if files else text
    ids, media = processor.place(engine.tokenizer.encode(text, add_special_tokens=False), files)
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    return EngineRequest(ids, params, media=media, **fields)


@cache
def _peer(kind: str) -> tuple[Any, Any]:
    path = directory(kind)
    package, arguments = arguments_of(kind)
    model = package.Model(arguments)
    stored: Any = mx.load(str(path / "model.safetensors"))
    names = [name for name, _ in tree_flatten(model.parameters())]
    of = SPECIMENS[kind].stored if kind in SPECIMENS else str
    model.load_weights([(name, stored[of(name)]) for name in names])
    model.eval()
    module: Any = importlib.import_module(f"mlx_vlm.models.{kind}.processing_{kind}")
    with warnings.catch_warnings():  # of filters that are empty
        warnings.simplefilter("ignore", UserWarning)
        return model, getattr(module, _PROCESSORS[kind]).from_pretrained(path)


def expected(kind: str, text: str, files: list[Picture | Sound], count: int = 8) -> list[int]:
    """Return the greedy tokens of mlx-vlm's own processor, model and cache, for one request."""
    from PIL import Image

    model, processor = _peer(kind)
    text = tiny.prompt_of(tiny.placeholder(kind), text).replace("<audio>", PLACEHOLDERS[kind])
    images = [Image.fromarray(each.pixels) for each in files if isinstance(each, Picture)]
    sounds = [each.samples for each in files if isinstance(each, Sound)]
    called = _CALLED.get(kind, {})
    inputs = processor(images=images or None, audio=sounds or None, text=[text], **called)
    ids = mx.array(inputs.pop("input_ids"))
    pixels = inputs.pop("pixel_values", None)
    given = {
        name: mx.array(np.asarray(inputs[name]))
        for name in (
            "input_features",
            "input_features_mask",
            "image_position_ids",
            "image_grid_thw",
            "feature_attention_mask",
        )
        if name in inputs
    }
    features = model.get_input_embeddings(ids, pixels, **given)
    if kind == "gemma3n":
        features.inputs_embeds = _corrected(model, ids, features.inputs_embeds)
    return tiny.generated(model, ids, features, count)


def _corrected(model: Any, ids: mx.array, rows: mx.array) -> mx.array:
    """Return embeddings as transformers has them: text is scaled, pictures have their rows first.

    mlx-vlm's Gemma 3n does neither (`specimens`).
    """
    made, of_text = np.array(rows[0]), np.array(ids[0]) < _FIRST + 4
    of_text &= (np.array(ids[0]) < 284) | (np.array(ids[0]) >= 292)
    made[of_text] = np.array(model.language_model.model.embed_tokens(ids)[0])[of_text] * 8.0
    shown = np.array(ids[0]) == 284
    pictures = made[shown].reshape(-1, 16, 16, made.shape[-1])
    made[shown] = pictures.swapaxes(1, 2).reshape(-1, made.shape[-1])
    return mx.array(made[None])
