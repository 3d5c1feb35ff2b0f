"""Tiny random models with a vision tower, as directories, and mlx-vlm's own answers."""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.models import LoadedModel, load
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.patches.mlx_vlm_imports import prepare
from modelpack_engine.request import EngineRequest, Media, SamplingParams
from modelpack_engine.vision.encoder import VisionEncoder
from modelpack_engine.vision.models import Encode
from modelpack_engine.vision.processor import Picture, PictureProcessor
from modelpack_engine.vision.tower_corrections import correct
from tests.engine.vision import specimens
from tests.engine.vision.specimens import SPECIMENS

DEEP = ("qwen3_vl", "qwen3_vl_moe")
#: With recurrent layers, and a part of each head rotated.
HYBRID = ("qwen3_5", "qwen3_5_moe")
QWEN = ("qwen2_5_vl", "qwen2_vl", *DEEP, *HYBRID)
MISTRAL = ("mistral3", "pixtral")
#: Tokens of a picture attend to each other in both directions.
WHOLE = ("gemma3", "gemma4", "gemma4_unified")
#: All tokens of a prompt do so: none is split.
PREFIX = ("paligemma",)
#: The rows that steps need beside those of tests, as pictures are large and never split.
ROWS = {"gemma4": 72, "gemma4_unified": 72, "paligemma": 56}
#: Without prefixes that are shared: each request has a cache of its own.
FALLBACK = ("llama4",)
#: What layers that attend to pictures get in mlx-vlm's model: states, and masks.
CROSS = ("cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask")
MROPE = (*QWEN, "glm4v", "glm4v_moe", "glm_ocr", "paddleocr_vl", "qwen3_omni_moe")
KINDS = (*WHOLE[:2], "idefics3", "llava", *MISTRAL, "smolvlm", *QWEN, *SPECIMENS)
#: Those that take long, or that others stand for.
SLOW = ("gemma4", *HYBRID, *({*SPECIMENS} - {"glm4v", "internvl_chat"}))


def kinds(*names: str) -> list[Any]:
    """Return parameters of tests; those of slow kinds are long."""
    return [pytest.param(name, marks=[pytest.mark.long] * (name in SLOW)) for name in names]


EOS = 256
SPECIAL = [
    "<eos>", "<image>", "<fake_token_around_image>", "<global-img>",
    *(f"<row_{y}_col_{x}>" for y in range(1, 5) for x in range(1, 5)),
    "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>",
    "[IMG]", "[IMG_BREAK]", "[IMG_END]",
    "<start_of_image>", "<image_soft_token>", "<end_of_image>",
    "<|image>", "<|image|>", "<image|>", *specimens.SPECIAL, *specimens.LATER,
]  # fmt: skip
IMAGE = EOS + 1
PAD, START, END, VIDEO, IMG = (EOS + index for index in range(20, 25))
BOI, SOFT = EOS + 27, EOS + 28
SOFT4 = EOS + 31
VOCABULARY = 320
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}"
    "{% endif %}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}assistant:"
)

_TEXT = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "vocab_size": VOCABULARY, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "num_attention_heads": 2, "patch_size": 4, "num_hidden_layers": 2,
    "intermediate_size": 48, "num_channels": 3,
}  # fmt: skip
_TILED: dict[str, Any] = {
    "do_convert_rgb": True, "do_image_splitting": True, "do_normalize": True, "do_pad": True,
    "do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5], "max_image_size": {"longest_edge": 16}, "resample": 1,
    "size": {"longest_edge": 32},
}  # fmt: skip
_NAMED = {
    "gemma3": {
        "boi_token": "<start_of_image>", "image_token": "<image_soft_token>",
        "eoi_token": "<end_of_image>",
    },
    "gemma3n": {
        "boi_token": "<start_of_image>", "image_token": "<image_soft_token>",
        "eoi_token": "<end_of_image>", "audio_token": "<|video|>", "boa_token": "<img>",
        "eoa_token": "</img>",
    },
    "gemma4": {
        "boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>",
    },
    "gemma4_unified": {
        "boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>",
    },
}  # fmt: skip

#: The tokens that mlx-vlm's processor of Qwen3-Omni looks for.
OMNI = {
    "image_token": "<|image_pad|>", "audio_token": "<|audio_pad|>", "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>",
}  # fmt: skip


def config_of(kind: str) -> dict[str, Any]:
    """Return config.json of a tiny model."""
    if kind in SPECIMENS:
        return copy.deepcopy(SPECIMENS[kind].config)
    if kind in HYBRID:
        text = {
            **_TEXT, "model_type": f"{kind}_text", "head_dim": 16, "attention_bias": False,
            "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
            "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "num_hidden_layers": 4,
            "full_attention_interval": 2,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
                "mrope_interleaved": True, "mrope_section": [2, 2, 2],
            },
        }  # fmt: skip
        if kind == "qwen3_5_moe":
            text |= {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 32,
                "norm_topk_prob": True,
            }
        return {
            "model_type": kind, "text_config": text, "image_token_id": PAD,
            "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
            "tie_word_embeddings": False, "vocab_size": VOCABULARY,
            "vision_config": {
                "model_type": kind, "depth": 2, "hidden_size": 32, "intermediate_size": 48,
                "out_hidden_size": 64, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
                "temporal_patch_size": 2, "num_position_embeddings": 16, "in_channels": 3,
                "deepstack_visual_indexes": [],
            },
        }  # fmt: skip
    if kind in DEEP:
        text = {
            **_TEXT, "model_type": f"{kind}_text", "head_dim": 16, "attention_bias": False,
            "rope_scaling": {
                "rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 3, 3],
            },
        }  # fmt: skip
        if kind == "qwen3_vl_moe":
            text |= {
                "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
            }  # fmt: skip
        return {
            "model_type": kind, "text_config": text, "image_token_id": PAD,
            "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
            "tie_word_embeddings": False, "vocab_size": VOCABULARY,
            "vision_config": {
                "model_type": kind, "depth": 3, "hidden_size": 32, "intermediate_size": 48,
                "out_hidden_size": 64, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
                "temporal_patch_size": 2, "num_position_embeddings": 16, "in_channels": 3,
                "deepstack_visual_indexes": [0, 1],
            },
        }  # fmt: skip
    if kind in QWEN:
        sizes: dict[str, Any] = {"num_heads": 2, "patch_size": 4, "depth": 2, "in_channels": 3}
        if kind == "qwen2_5_vl":
            sizes |= {
                "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
                "window_size": 16, "fullatt_block_indexes": [1],
            }  # fmt: skip
        else:
            sizes |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        return {
            **_TEXT, "model_type": kind, "image_token_id": PAD, "video_token_id": VIDEO,
            "vision_start_token_id": START, "vision_end_token_id": END,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "vision_config": {"model_type": kind, "spatial_merge_size": 2, **sizes},
        }  # fmt: skip
    if kind in MISTRAL:
        vision = {
            **_VISION, "model_type": "pixtral", "image_size": 32, "head_dim": 16,
            "rope_theta": 10000.0,
        }  # fmt: skip
        text = {**_TEXT, "model_type": "mistral", "head_dim": 16}
        if kind == "mistral3":  # with the layers of Ministral 3
            text |= {"model_type": "ministral3", "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0,
                "original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.1,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "type": "yarn",
            }}  # fmt: skip
        return {
            "model_type": kind, "text_config": text, "vision_config": vision,
            "image_token_index": IMG, "vision_feature_layer": -1, "vocab_size": VOCABULARY,
            **({"spatial_merge_size": 2} if kind == "mistral3" else {}),
        }  # fmt: skip
    if kind == "gemma3":
        return {
            "model_type": kind, "vocab_size": VOCABULARY, "mm_tokens_per_image": 16,
            "image_token_index": SOFT, "boi_token_index": BOI, "hidden_size": 64,
            "text_config": {
                "model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                "num_hidden_layers": 4, "sliding_window": 20, "sliding_window_pattern": 2,
                "vocab_size": VOCABULARY, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
                "query_pre_attn_scalar": 16, "mm_tokens_per_image": 16,
            },
            "vision_config": {
                **_VISION, "model_type": "siglip_vision_model", "image_size": 32,
                "vision_use_head": False,
            },
        }  # fmt: skip
    if kind == "gemma4":
        return {
            "model_type": kind, "vocab_size": VOCABULARY, "image_token_id": SOFT4,
            "video_token_id": specimens.GLM_VIDEO, "tie_word_embeddings": True,
            "text_config": {
                "model_type": "gemma4_text", "hidden_size": 64, "intermediate_size": 96,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                "global_head_dim": 32, "num_hidden_layers": 4, "sliding_window": 20,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
                "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY,
                "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
                "final_logit_softcapping": 30.0, "use_bidirectional_attention": "vision",
                "rope_parameters": {
                    "full_attention": {
                        "partial_rotary_factor": 0.25, "rope_theta": 1000000.0,
                        "rope_type": "proportional",
                    },
                    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
                },
            },
            "vision_config": {
                "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
                "head_dim": 16, "global_head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2,
                "position_embedding_size": 64, "default_output_length": 70,
            },
        }  # fmt: skip
    if kind == "llava":
        vision = {**_VISION, "model_type": "clip_vision_model", "image_size": 16}
        return {
            "model_type": kind, "text_config": {**_TEXT}, "vision_config": vision,
            "image_token_index": IMAGE, "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default", "vocab_size": VOCABULARY,
        }  # fmt: skip
    return {
        "model_type": kind, "text_config": {**_TEXT}, "image_token_id": IMAGE, "scale_factor": 2,
        "vision_config": {**_VISION, "model_type": f"{kind}_vision", "image_size": 16},
        "vocab_size": VOCABULARY,
    }  # fmt: skip


def settings_of(kind: str) -> dict[str, Any]:
    """Return preprocessor_config.json of a tiny model."""
    if kind in SPECIMENS:
        return copy.deepcopy(SPECIMENS[kind].settings)
    if kind in QWEN:
        return {
            "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2,
            "temporal_patch_size": 2, "min_pixels": 1024, "max_pixels": 2048,
            "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
        }  # fmt: skip
    if kind in MISTRAL:
        return {
            "image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 32},
            "patch_size": {"height": 4, "width": 4}, "do_convert_rgb": True, "do_normalize": True,
            "do_rescale": True, "do_resize": True, "image_mean": [0.48, 0.46, 0.41],
            "image_std": [0.27, 0.26, 0.28], "resample": 3, "rescale_factor": 1 / 255,
        }  # fmt: skip
    if kind == "gemma3":
        return {
            "image_processor_type": "Gemma3ImageProcessor", "size": {"height": 32, "width": 32},
            "do_pan_and_scan": None, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
            "resample": 2, "image_seq_length": 16,
        }  # fmt: skip
    if kind == "gemma4":
        return {
            "image_processor_type": "Gemma4ImageProcessor", "patch_size": 4,
            "pooling_kernel_size": 2, "max_soft_tokens": 70,
        }  # fmt: skip
    if kind == "llava":
        return {
            "image_processor_type": "CLIPImageProcessor", "do_center_crop": True,
            "do_normalize": True, "do_resize": True, "do_rescale": True, "do_convert_rgb": True,
            "crop_size": {"height": 16, "width": 16}, "size": {"shortest_edge": 16},
            "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3,
        }  # fmt: skip
    name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
    return {**copy.deepcopy(_TILED), "image_processor_type": f"{name}ImageProcessor"}


def placeholder(kind: str) -> str:
    """Return the token of pictures in a kind's chat template."""
    if kind in SPECIMENS:
        return SPECIMENS[kind].prompt
    if kind in WHOLE:
        return {"gemma3": "<start_of_image>", "gemma4": "<|image|>"}[kind]
    if kind in MISTRAL:
        return "[IMG]"
    return "<|image_pad|>" if kind in QWEN else "<image>"


def prompt_of(token: str, text: str) -> str:
    """Return a text with a model's placeholder for each <image>, as its chat template has it."""
    if token == "<|image_pad|>":
        token = f"<|vision_start|>{token}<|vision_end|>"
    return text.replace("<image>", token)


def arguments_of(kind: str) -> tuple[Any, Any]:
    """Return mlx-vlm's package of a kind, and the config of a tiny model."""
    prepare()
    config = config_of(kind)
    package: Any = importlib.import_module(f"mlx_vlm.models.{config['model_type']}")
    for part in ("language_config", "llm_config"):
        if part in config:
            config["text_config"] = config.pop(part)
    specimens.shrink(package)
    arguments = package.ModelConfig.from_dict(copy.deepcopy(config))
    if "thinker_config" in config:
        return package, arguments
    text = config.get("text_config") or {k: v for k, v in config.items() if k != "vision_config"}
    arguments.text_config = package.TextConfig.from_dict(text)
    arguments.vision_config = package.VisionConfig.from_dict(config.get("vision_config", {}))
    for part in ("audio", "perceiver"):
        if isinstance(given := getattr(arguments, f"{part}_config", None), dict):
            made = getattr(package, f"{part.title()}Config").from_dict(given)
            setattr(arguments, f"{part}_config", made)
    return package, arguments


def _tokenizer() -> Tokenizer:
    """A tokenizer of one token for each byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    return backend


_GEMMA4_PROCESSOR = {
    "image_processor": settings_of("gemma4"), "video_processor": specimens.GEMMA_FRAMES,
}  # fmt: skip
_MODELS = TemporaryDirectory(prefix="modelpack-tiny-")


def new_directory(kind: str) -> Path:
    """Make a directory that is removed when the process ends."""
    return Path(mkdtemp(prefix=f"{kind}-", dir=_MODELS.name))


@cache
def directory(kind: str) -> Path:
    """Return the directory of a tiny model with reproducible random weights."""
    config = config_of(kind)
    package, arguments = arguments_of(kind)
    model = package.Model(arguments)
    seed = SPECIMENS[kind].seed if kind in SPECIMENS else 5
    mx.random.seed(8 if kind in ("qwen3_5", "qwen3_vl_moe") else seed)  # answers depend on all
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        scale = 0.2 if value.ndim == 1 else 1.6 / value.shape[-1] ** 0.5
        noise = mx.random.normal(value.shape) * scale
        noise = noise + 1 if value.ndim == 1 and name.endswith(("weight", "_gate")) else noise
        weights[SPECIMENS[kind].stored(name) if kind in SPECIMENS else name] = noise
    if "thinker_config" in config:  # without a voice, it is left in the file
        weights["talker.model.norm.weight"] = mx.zeros(64)
    path = new_directory(kind)
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    documents = {
        "config.json": config,
        "preprocessor_config.json": settings_of(kind),
        "processor_config.json": {
            "image_seq_len": 4, "image_seq_length": 16, "patch_size": 4,
            "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",
            **(_GEMMA4_PROCESSOR if kind == "gemma4" else {}),
        },
        "tokenizer_config.json": {
            "eos_token": "<eos>", "chat_template": prompt_of(placeholder(kind), TEMPLATE),
            "tokenizer_class": "PreTrainedTokenizerFast", **_NAMED.get(kind, {}),
            **({"pad_token": "<eos>", "bos_token": "<bos>"} if kind in SPECIMENS else {}),
            **(OMNI if kind == "qwen3_omni_moe" else {}),
        },
    }  # fmt: skip
    if kind in SPECIMENS:
        documents |= SPECIMENS[kind].documents
    for name, document in documents.items():
        (path / name).write_text(json.dumps(document))
    _tokenizer().save(str(path / "tokenizer.json"))
    return path


def tiny_loaded(kind: str) -> LoadedModel:
    """Return a tiny model as the loaders return it."""
    return load(ModelFiles.from_directory(directory(kind)), device="cpu")


def tiny_engine(kind: str, **settings: object) -> Engine:
    """Return an engine with a tiny model; `settings` are fields of EngineConfig."""
    given: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "device": "cpu"}
    given |= settings
    given["max_num_batched_tokens"] += ROWS.get(kind, 0)
    return Engine(tiny_loaded(kind), EngineConfig(**given))  # type: ignore[arg-type]


def processor(settings: dict[str, Any], encode: Encode) -> PictureProcessor:
    """Return the processor of the tiny llava with other settings."""
    return PictureProcessor(config_of("llava"), settings, encode)


def picture(seed: int, height: int = 20, width: int = 30) -> Picture:
    """Return a picture of random blocks of 5 x 5 pixels."""
    blocks = np.random.default_rng(seed).integers(
        0, 256, (-(-height // 5), -(-width // 5), 3), np.uint8
    )
    return Picture(blocks.repeat(5, axis=0).repeat(5, axis=1)[:height, :width].copy())


def request(
    engine: Engine, text: str, pictures: list[Picture], count: int = 8, **fields: Any
) -> EngineRequest:
    """Return a greedy request of a text with <image> in the places of the pictures."""
    assert engine.vision is not None
    kind = engine.vision.processor._kind
    known = SPECIMENS[kind].prompt if kind in SPECIMENS else engine.vision.processor.image_token
    text = prompt_of(known, text)
    if pictures:
        text = engine.vision.processor.with_spaces(text)
    ids, media = engine.tokenizer.encode(text, add_special_tokens=False), ()
    if pictures:
        ids, media = engine.vision.processor.place(ids, pictures)
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    return EngineRequest(ids, params, media=media, **fields)


def embeddings(
    encoder: VisionEncoder, media: Media, waiting: Iterable[tuple[bytes, Media]] = ()
) -> mx.array:
    """Return the embeddings of a picture, encoded at once, maybe with others that wait."""
    found = encoder._encoded((b"", media.digest), media, waiting)
    assert found is not None
    return found


def run(engine: Engine, *requests: EngineRequest) -> list[list[int]]:
    """Run requests in one batch; return their tokens."""
    names = [f"r{index}" for index in range(len(requests))]
    tokens: dict[str, list[int]] = {name: [] for name in names}
    for name, each in zip(names, requests, strict=True):
        engine.add_request(name, each)
    while engine.has_work:
        for event in engine.step():
            assert event.error is None, event.error
            tokens[event.request_id] += event.token_ids
    return [tokens[name] for name in names]


def run_beside_text(
    engine: Engine, made: EngineRequest, text: EngineRequest, calls: Sequence[object]
) -> list[int]:
    """Run a request while `text` generates tokens; return its own tokens.

    A step adds at most one to `calls`, those of the tower.
    """
    engine.add_request("text", text)
    while not any(event.token_ids for event in engine.step()):
        pass
    engine.add_request("made", made)
    tokens: dict[str, list[int]] = {"text": [], "made": []}
    while engine.has_work:
        before = len(calls)
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
        assert len(calls) <= before + 1
    return tokens["made"]


@cache
def _peer(kind: str) -> tuple[Any, Any]:
    """Return mlx-vlm's model, its tower corrected as the engine's, and its processor.

    `test_oracle.py` compares what is corrected with transformers.
    """
    path = directory(kind)
    package, arguments = arguments_of(kind)
    model = package.Model(arguments)
    correct(model, config_of(kind))
    stored = SPECIMENS[kind].stored if kind in SPECIMENS else str
    weights: Any = mx.load(str(path / "model.safetensors"))
    model.load_weights([(n, weights[stored(n)]) for n, _ in tree_flatten(model.parameters())])
    model.eval()
    if kind in SPECIMENS:
        module, _, name = SPECIMENS[kind].processor.partition(":")
        found: Any = importlib.import_module(f"mlx_vlm.models.{module}")
        made = getattr(found, name).from_pretrained(path)
        if kind == "kimi_vl":  # mlx-vlm looks for it in a dict's attributes
            made.image_processor.patch_size = 4
        return model, made
    of = "qwen3_vl" if kind in HYBRID else kind.removesuffix("_moe")
    processor_module: Any = importlib.import_module(f"mlx_vlm.models.{of}.processing_{of}")
    names = {
        "gemma3": "Gemma3", "gemma4": "Gemma4", "idefics3": "Idefics3", "llava": "Llava",
        "mistral3": "Mistral3", "pixtral": "Pixtral", "qwen2_5_vl": "Qwen2_5_VL",
        "qwen2_vl": "Qwen2VL", "qwen3_vl": "Qwen3VL", "smolvlm": "SmolVLM",
    }  # fmt: skip
    with warnings.catch_warnings():  # of Gemma 4's filters for audio
        warnings.simplefilter("ignore", UserWarning)
        processor = getattr(processor_module, f"{names[of]}Processor").from_pretrained(path)
    return model, processor


def _picture_mask(kind: str, ids: list[int], window: int | None) -> mx.array:
    """Return transformers' mask [1, 1, rows, rows]: pictures in both directions.

    It is `create_masks_for_vision_model` of transformers 5.23: a layer with a window sees no
    further back in a picture either; those of Gemma 4 without one are causal.
    """
    places = np.arange(len(ids))
    is_soft = np.isin(ids, [SOFT, SOFT4, specimens.GLM_VIDEO])
    starts = is_soft & ~np.concatenate([[False], is_soft[:-1]])
    group = np.where(is_soft, np.cumsum(starts), 0)
    same = (group[:, None] == group) & is_soft
    mask = places <= places[:, None]
    if not kind.startswith("gemma4") or window is not None:
        mask |= same
    if window is not None:
        mask &= places > places[:, None] - window
    return mx.array(mask[None, None])


@contextmanager
def _pictures_seen(kind: str, ids: list[int], seen: bool) -> Iterator[None]:
    """Let tokens of a picture see each other in mlx-vlm's model.

    Its Gemma 3 drops its own mask, and its Gemma 4 would apply it in all layers.
    """
    if kind not in WHOLE or not seen:
        yield
        return
    named = kind.removesuffix("_unified")
    module: Any = importlib.import_module(f"mlx_vlm.models.{named}.language")
    native = module.create_attention_mask
    module.create_attention_mask = lambda h, cache, window_size=None, **_: _picture_mask(
        kind, ids, window_size
    )
    try:
        yield
    finally:
        module.create_attention_mask = native


def _inputs(kind: str, processor: Any, text: str, images: list[Any]) -> dict[str, Any]:
    """Return what mlx-vlm's processor makes of a prompt for a specimen."""
    specimen = SPECIMENS[kind]
    text = text if specimen.peer == "<image>" else prompt_of(specimen.prompt, text)
    if not images:
        return {"input_ids": mx.array(processor.tokenizer([text])["input_ids"])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Pillow's getdata
        if specimen.call is not None:
            made = specimen.call(processor, images, text)
        else:
            made = processor(images=images, text=[text])
    return {name: mx.array(np.array(v)) if _is_array(v) else v for name, v in made.items()}


def _is_array(value: object) -> bool:
    """Return whether a processor's output is an array for mlx-vlm, not a list of arrays."""
    return isinstance(value, np.ndarray) or (isinstance(value, list) and type(value[0]) is not list)


def expected(
    kind: str, text: str, pictures: list[Picture], count: int = 8, *, seen: bool = True
) -> list[int]:
    """Return the greedy tokens of mlx-vlm's own processor, model and cache, for one request.

    Without `seen`, tokens of a picture see no later ones where they should.
    """
    from PIL import Image

    model, processor = _peer(kind)
    images = [Image.fromarray(each.pixels) for each in pictures]
    if kind in SPECIMENS:
        inputs = _inputs(kind, processor, text, images)
    else:
        inputs = processor(images=images or None, text=[prompt_of(placeholder(kind), text)])
    ids = mx.array(inputs.pop("input_ids"))
    pixels = inputs.pop("pixel_values", None)
    mask = inputs.pop("attention_mask", None)
    inputs.pop("mm_token_type_ids", None)
    if kind == "gemma3":
        inputs["mask"] = mx.array(mask)
    if kind in PREFIX:  # transformers lets text without pictures be causal
        model.config.text_config.use_bidirectional_attention = seen and bool(pictures)
    specimen = SPECIMENS.get(kind)
    embed = specimen and (pixels is not None or specimen.embeds_text) and specimen.embed
    if embed:
        features = embed(model, ids, pixels, inputs)
        if isinstance(features, mx.array):
            features = SimpleNamespace(inputs_embeds=features)
    else:
        features = model.get_input_embeddings(ids, pixels, **inputs)
    seen_whole = _pictures_seen(kind, ids[0].tolist(), seen)
    return generated(model, ids, features, count, seen_whole)


def generated(
    model: Any,
    ids: mx.array,
    features: Any,
    count: int,
    for_prompt: AbstractContextManager[None] = nullcontext(),  # noqa: B008 - it has no state
) -> list[int]:
    """Return the greedy tokens of mlx-vlm's language model for the embeddings of a prompt.

    `for_prompt` is entered while it reads the prompt.
    """
    from mlx_vlm.models.cache import make_prompt_cache

    cache_ = make_prompt_cache(model.language_model)
    found: list[int] = []
    # As in mlx_vlm.generate: the positions of the prompt, and their distance to those after it.
    names = (
        "position_ids", "rope_deltas", "visual_pos_masks", "deepstack_visual_embeds",
        "per_layer_inputs", *CROSS,
    )  # fmt: skip
    given = {name: getattr(features, name, None) for name in names}
    extra = {name: value for name, value in given.items() if value is not None}
    with for_prompt:
        logits = model.language_model(
            ids, inputs_embeds=features.inputs_embeds, cache=cache_, **extra
        ).logits
    # As in transformers, tokens after the prompt see what its last one does.
    extra = {
        name: value[:, :, -1:] if name in CROSS[1:] else value
        for name, value in extra.items()
        if name in ("rope_deltas", *CROSS)
    }
    for _ in range(count):
        found.append(int(mx.argmax(logits[0, -1])))
        logits = model.language_model(mx.array([[found[-1]]]), cache=cache_, **extra).logits
    return found
