"""Tiny random models that read sounds, as directories, and mlx-vlm's own answers."""

from __future__ import annotations

import importlib
import json
import warnings
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
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
from tests.engine.vision import tiny

SPECIAL = ["<|audio>", "<|audio|>", "<audio|>"]
RATE = 16_000
VOCABULARY = 352
_FIRST = 340  # the tokens of `tiny` are fewer
AUDIO = _FIRST + 1

KINDS = ("gemma4",)


def sound(seed: int, seconds: float = 1.0) -> Sound:
    """Return a sound of random tones, a new one each tenth of a second."""
    random = np.random.default_rng(seed)
    time = np.arange(int(RATE * seconds)) / RATE
    pitch = random.uniform(100, 4000, 1 + int(seconds * 10)).repeat(RATE // 10)[: len(time)]
    return Sound((0.5 * np.sin(2 * np.pi * pitch * time)).astype(np.float32))


def config_of(kind: str) -> dict[str, Any]:
    """Return config.json of a tiny model."""
    config = tiny.config_of(kind)
    config["text_config"] |= {
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY,
        # mlx-vlm does not do it without a patch, which `tiny` has.
        "use_bidirectional_attention": None,
    }
    return config | {
        "vocab_size": VOCABULARY, "audio_token_id": AUDIO,
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
    config = config_of(kind)
    made = package.ModelConfig.from_dict(dict(config))
    for part in ("text", "vision", "audio"):
        own = getattr(package, f"{part.title()}Config").from_dict(config[f"{part}_config"])
        setattr(made, f"{part}_config", own)
    return package, made


def _tokenizer(path: Path) -> None:
    backend = Tokenizer.from_file(str(tiny.directory("gemma4") / "tokenizer.json"))
    filling = [f"<unused{index}>" for index in range(backend.get_vocab_size(), _FIRST)]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in filling + SPECIAL])
    assert backend.token_to_id("<|audio|>") == AUDIO
    backend.save(str(path))


@cache
def directory(kind: str) -> Path:
    """Return the directory of a tiny model with reproducible random weights."""
    package, arguments = arguments_of(kind)
    mx.random.seed(11)
    weights = {}
    for name, value in tree_flatten(package.Model(arguments).parameters()):
        if not value.ndim:  # the range of a linear
            weights[name] = mx.array(-3.0 if name.endswith("min") else 3.0)
            continue
        scale = 0.2 if value.ndim == 1 else 1.6 / value.shape[-1] ** 0.5
        noise = mx.random.normal(value.shape) * scale
        weights[name] = noise + 1 if value.ndim == 1 and name.endswith("weight") else noise
    path = Path(mkdtemp(prefix=f"modelpack-hearing-{kind}-"))
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    names = json.loads((tiny.directory(kind) / "tokenizer_config.json").read_text())
    template = tiny.TEMPLATE.replace(
        "{% else %}{{ p.text }}",
        "{% elif p.type == 'audio' %}<|audio|>{% else %}{{ p.text }}",
    )
    documents = {
        "config.json": config_of(kind),
        "preprocessor_config.json": tiny.settings_of(kind),
        "processor_config.json": {
            "image_processor": tiny.settings_of(kind),
            "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
        },
        "tokenizer_config.json": names | {
            "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
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
    text = text.replace("<image>", processor.image_token).replace("<audio>", processor.sounds.token)
    text = processor.with_spaces(text) if files else text
    ids, media = processor.place(engine.tokenizer.encode(text, add_special_tokens=False), files)
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    return EngineRequest(ids, params, media=media, **fields)


@cache
def _peer(kind: str) -> tuple[Any, Any]:
    path = directory(kind)
    package, arguments = arguments_of(kind)
    model = package.Model(arguments)
    model.load_weights(str(path / "model.safetensors"))
    model.eval()
    module: Any = importlib.import_module(f"mlx_vlm.models.{kind}.processing_{kind}")
    with warnings.catch_warnings():  # of filters that are empty
        warnings.simplefilter("ignore", UserWarning)
        return model, module.Gemma4Processor.from_pretrained(path)


def expected(kind: str, text: str, files: list[Picture | Sound], count: int = 8) -> list[int]:
    """Return the greedy tokens of mlx-vlm's own processor, model and cache, for one request."""
    from mlx_vlm.models.cache import make_prompt_cache
    from PIL import Image

    model, processor = _peer(kind)
    text = text.replace("<image>", tiny.placeholder(kind)).replace("<audio>", "<|audio|>")
    images = [Image.fromarray(each.pixels) for each in files if isinstance(each, Picture)]
    sounds = [each.samples for each in files if isinstance(each, Sound)]
    inputs = processor(images=images or None, audio=sounds or None, text=[text])
    ids = mx.array(inputs.pop("input_ids"))
    pixels = inputs.pop("pixel_values", None)
    given = {
        name: mx.array(np.asarray(inputs[name]))
        for name in ("input_features", "input_features_mask", "image_position_ids")
        if name in inputs
    }
    features = model.get_input_embeddings(ids, pixels, **given)
    cache_ = make_prompt_cache(model.language_model)
    found: list[int] = []
    logits = model.language_model(
        ids, inputs_embeds=features.inputs_embeds, cache=cache_,
        per_layer_inputs=features.per_layer_inputs,
    ).logits  # fmt: skip
    for _ in range(count):
        found.append(int(mx.argmax(logits[0, -1])))
        logits = model.language_model(mx.array([[found[-1]]]), cache=cache_).logits
    return found
