"""Tiny models of `tiny` as a GGUF file and its projector, by gguf-py's writer and map of names.

The conversion follows llama.cpp's (conversion/*.py), and uses no code of the loader.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from fixtures.pictures import model as trained
from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.models.files import ModelFiles
from tests.engine.loaders.vocabularies import finish
from tests.engine.vision import tiny

Weights = dict[str, np.ndarray]
#: The kinds of `tiny` that llama.cpp converts, with the architecture and the type of the projector.
KINDS: Mapping[str, tuple[str, str]] = {
    "gemma3": ("gemma3", "gemma3"),
    "idefics3": ("llama", "idefics3"),
    "internvl_chat": ("qwen2", "internvl"),
    "llava": ("llama", "mlp"),
    "mistral3": ("llama", "pixtral"),  # not the rotation of tiny's Ministral
    "pixtral": ("llama", "pixtral"),
    "qwen2_vl": ("qwen2vl", "qwen2vl_merger"),
    "qwen2_5_vl": ("qwen2vl", "qwen2.5vl_merger"),
    "qwen3_vl": ("qwen3vl", "qwen3vl_merger"),
    "qwen3_vl_moe": ("qwen3vlmoe", "qwen3vl_merger"),
}
_ACTIVATIONS = {
    "gemma3": "gelu", "idefics3": "gelu", "internvl": "gelu", "pixtral": "silu",
    "qwen2.5vl_merger": "silu", "qwen3vl_merger": "gelu",
}  # fmt: skip
_LEGACY_MERGER = {"mlp.0": "mm.0", "mlp.2": "mm.2", "linear_fc1": "mm.0", "linear_fc2": "mm.2"}
_TEXT_PREFIX = re.compile(r"language_model\.(model\.)?(?!lm_head)|language_model\.")

#: Writes an array with a type of its own.
Add = Callable[[gguf.GGUFWriter, str, np.ndarray], None]


def weights_of(path: Path) -> Weights:
    """Return the weights of safetensors that mlx-vlm saved, with convolutions as PyTorch's."""
    found = mx.load(str(path))
    assert isinstance(found, dict)
    return {
        name: np.moveaxis(np.array(value), -1, 1) if value.ndim > 3 else np.array(value)
        for name, value in ((name, value.astype(mx.float32)) for name, value in found.items())
    }


def is_text(name: str) -> bool:
    return name.startswith("language_model.")


def add_array(writer: gguf.GGUFWriter, name: str, value: np.ndarray) -> None:
    writer.add_tensor(name, np.ascontiguousarray(value, np.float32))


def write_projector(
    path: Path,
    kind: str,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    weights: Weights,
    add: Add = add_array,
    matrices: Weights | None = None,
    **fields: Any,
) -> None:
    """Write the projector of a model; `fields` replace metadata, and None leaves one out.

    `matrices` replace what is behind the tower.
    """
    writer = gguf.GGUFWriter(path, "clip")
    _write_metadata(writer, kind, config, settings, weights)
    data = writer.kv_data[0]
    for key, value in fields.items():
        name = key.replace("__", ".")
        data.pop(name, None)
        if value is not None:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    tensors = projector_tensors(kind, config, weights)
    if matrices is not None:
        tensors = {name: each for name, each in tensors.items() if not name.startswith("mm.")}
    for name, value in (tensors | (matrices or {})).items():
        add(writer, name, value)
    finish(writer)


def _write_metadata(
    writer: gguf.GGUFWriter,
    kind: str,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    weights: Weights,
) -> None:
    vision = config["vision_config"]
    text = config.get("text_config") or config.get("llm_config") or config
    projector = KINDS.get(kind, ("", kind))[1]
    patch = vision["patch_size"]
    side = vision.get("image_size")
    if side is None:
        side = int(vision.get("num_position_embeddings", 1) ** 0.5) * patch
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(projector)
    writer.add_vision_projection_dim(text["hidden_size"])
    writer.add_vision_image_size(side)
    writer.add_vision_patch_size(patch)
    writer.add_vision_embedding_length(vision.get("embed_dim", vision["hidden_size"]))
    # Of Qwen2-VL the converter writes the width of the language model here.
    feed_forward = vision.get("intermediate_size", vision["hidden_size"])
    writer.add_vision_feed_forward_length(feed_forward)
    writer.add_vision_block_count(vision.get("num_hidden_layers", vision.get("depth", 0)))
    writer.add_vision_head_count(vision.get("num_attention_heads", vision.get("num_heads", 0)))
    writer.add_vision_attention_layernorm_eps(
        vision.get("layer_norm_eps", {"mlp": 1e-5, "pixtral": 1e-5}.get(projector, 1e-6))
    )
    writer.add_vision_image_mean(settings.get("image_mean", [0.485, 0.456, 0.406]))
    writer.add_vision_image_std(settings.get("image_std", [0.229, 0.224, 0.225]))
    if activation := _ACTIVATIONS.get(projector):
        writer.add_bool(f"clip.use_{activation}", True)
    if projector == "idefics3":
        writer.add_vision_projector_scale_factor(config["scale_factor"])
        writer.add_vision_preproc_image_size(settings["size"]["longest_edge"])
    elif projector == "mlp":
        writer.add_array("clip.vision.feature_layer", [vision["num_hidden_layers"] - 1])
    elif projector == "pixtral" and "spatial_merge_size" in config:
        writer.add_vision_spatial_merge_size(config["spatial_merge_size"])
    elif projector.startswith("qwen"):
        writer.add_vision_spatial_merge_size(vision["spatial_merge_size"])
        writer.add_vision_min_pixels(settings["min_pixels"])
        writer.add_vision_max_pixels(settings["max_pixels"])
    if projector == "qwen2.5vl_merger":
        writer.add_vision_n_wa_pattern(vision["fullatt_block_indexes"][0] + 1)
        writer.add_vision_window_size(vision["window_size"])
    if "deepstack_visual_indexes" in vision:
        deep = vision["deepstack_visual_indexes"]
        writer.add_vision_is_deepstack_layers([at in deep for at in range(vision["depth"])])
    if projector == "gemma3":
        tokens = text["mm_tokens_per_image"] ** 0.5
        writer.add_vision_projector_scale_factor(int(side / patch / tokens))
    if projector == "internvl":
        writer.add_vision_projector_scale_factor(int(1 / config["downsample_ratio"]))
        if "max_dynamic_patch" in config:
            writer.add_vision_preproc_min_tiles(config["min_dynamic_patch"])
            writer.add_vision_preproc_max_tiles(config["max_dynamic_patch"])


def projector_tensors(kind: str, config: Mapping[str, Any], weights: Weights) -> Weights:
    """Return the tensors of a projector by their names in GGUF."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 64)
    deep = config["vision_config"].get("deepstack_visual_indexes", [])
    made: Weights = {}
    for name, value in weights.items():
        if is_text(name):
            continue
        stem, _, suffix = name.rpartition(".")
        if kind == "idefics3":
            name = f"model.{name}"
        elif kind == "llava":
            if ".post_layernorm" in name:  # nothing reads it
                continue
            for old, new in (("linear_1", "mm.0"), ("linear_2", "mm.2")):
                if old in name:
                    made[f"{new}.{suffix}"] = value
        elif kind in ("mistral3", "pixtral"):
            name = name.replace("vision_tower.vision_model.", "vision_tower.")
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                value = permuted(value, config["vision_config"]["num_attention_heads"])
        elif kind == "gemma3":
            name = name.replace("projection_weight", "projection.weight")
            value = value + 1 if "soft_emb_norm" in name else value
        elif kind in ("internvl", "internvl_chat"):
            value = value.squeeze()
            if name.startswith("vision_model"):
                name = f"vision_tower.{name}"
            if name.endswith((".ls1", ".ls2", "position_embedding")):
                name += ".weight"
            if ".qkv." in name:
                for part, third in zip("qkv", np.split(value, 3), strict=True):
                    new = name.replace("attn.qkv", f"self_attn.{part}_proj")
                    made[names.get_name(new, (".weight", ".bias")) or ""] = third
                continue
        else:
            name = name.replace("vision_tower.", "visual.")
            if merged := next((new for old, new in _LEGACY_MERGER.items()
                               if stem.endswith(f"tower.merger.{old}")), None):  # fmt: skip
                made[f"{merged}.{suffix}"] = value
                continue
            if "deepstack_merger_list" in name:
                part = name.split(".")[2:]
                new = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}[part[1]]
                made[f"v.deepstack.{deep[int(part[0])]}.{new}.{suffix}"] = value
                continue
            if name == "visual.merger.norm." + suffix:
                name = f"visual.merger.ln_q.{suffix}"
            if name == "visual.patch_embed.proj.weight":
                made["v.patch_embd.weight"], made["v.patch_embd.weight.1"] = (
                    value[:, :, 0],
                    value[:, :, 1],
                )
                continue
            if ".qkv." in name and kind in ("qwen2_vl", "qwen2_5_vl"):
                for part, third in zip("qkv", np.split(value, 3), strict=True):
                    new = names.get_name(name.replace("qkv", part), (".weight", ".bias"))
                    assert new is not None
                    made[new] = third
                continue
        if kind == "llava" and "linear_" in name:
            continue
        found = names.get_name(name, (".weight", ".bias"))
        assert found is not None, name
        made[found] = value
    if kind in ("mistral3", "pixtral"):  # llama.cpp's encoder ends rows; the engine's prompt does
        made["v.token_embd.img_break"] = np.zeros(8, np.float32)
    return made


def permuted(value: np.ndarray, heads: int) -> np.ndarray:
    """conversion/llama.py: LlamaModel.permute."""
    return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def write_text(path: Path, kind: str, config: Mapping[str, Any], weights: Weights) -> None:
    """Write the language model of a tiny model, with its tokenizer."""
    architecture = KINDS[kind][0]
    text = config.get("text_config") or config.get("llm_config") or config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(text.get("rope_theta", 1e6))
    if architecture == "gemma3":
        writer.add_sliding_window(text["sliding_window"])
        pattern = text["sliding_window_pattern"]
        writer.add_uint32("gemma3.attention.sliding_window_pattern", pattern)
    writer.add_vocab_size(text["vocab_size"])
    if "head_dim" in text:
        writer.add_key_length(text["head_dim"])
        writer.add_value_length(text["head_dim"])
    rope = text.get("rope_scaling") or {}
    if "mrope_section" in rope:
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    if "num_experts" in text:
        writer.add_expert_count(text["num_experts"])
        writer.add_expert_used_count(text["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(text["moe_intermediate_size"])
    write_tokenizer(writer, kind)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, text["num_hidden_layers"])
    for name, value in weights.items():
        if not is_text(name):
            continue
        name = _TEXT_PREFIX.sub(lambda m: "model." if not m[0].endswith("lm_head") else "", name)
        name = name.replace("model.lm_head", "lm_head").replace("switch_mlp", "experts")
        if architecture == "llama":
            for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
                if f".{part}_proj." in name:
                    value = permuted(value, text[heads])
        if architecture == "gemma3" and name.endswith("norm.weight"):
            value = value + 1
        found = names.get_name(name, (".weight", ".bias"))
        assert found is not None, name
        add_array(writer, found, value)
    finish(writer)


def write_tokenizer(writer: gguf.GGUFWriter, kind: str) -> None:
    tokens = sorted(tiny.pre_tokenizers.ByteLevel.alphabet()) + tiny.SPECIAL
    types = [gguf.TokenType.NORMAL] * tiny.EOS + [gguf.TokenType.CONTROL] * len(tiny.SPECIAL)
    padding = tiny.VOCABULARY - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + [f"[PAD{at}]" for at in range(padding)])
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * padding)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_eos_token_id(tiny.EOS)
    writer.add_chat_template(tiny.prompt_of(tiny.placeholder(kind), tiny.TEMPLATE))


@cache
def files(kind: str) -> ModelFiles:
    """Return the GGUF files of a tiny model, float32."""
    path = tiny.new_directory(f"gguf-{kind}")
    weights = weights_of(tiny.directory(kind) / "model.safetensors")
    config = tiny.config_of(kind)
    write_text(path / "model.gguf", kind, config, weights)
    write_projector(path / "eyes.gguf", kind, config, tiny.settings_of(kind), weights)
    return ModelFiles((path / "model.gguf",), "gguf", projector=path / "eyes.gguf")


def write_trained(directory: Path) -> tuple[Path, Path]:
    """Write the model of fixtures/pictures as llama.cpp's converter would; return both files.

    SmolLM2's file is copied, with the names of three tokens and the template changed. Matrices of
    the projector are float16.
    """
    text, eyes = directory / "text.gguf", directory / "eyes.gguf"
    reader = gguf.GGUFReader(smollm2_gguf())
    writer = gguf.GGUFWriter(text, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value: Any = field.contents()
        if field.name == "tokenizer.ggml.tokens":
            value = [trained.RENAMED.get(token, token) for token in value]
        elif field.name == "tokenizer.chat_template":
            value = trained.TEMPLATE
        part = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=part)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)

    def add(writer: gguf.GGUFWriter, name: str, value: np.ndarray) -> None:
        dtype = np.float16 if value.ndim > 1 and "embd" not in name else np.float32
        writer.add_tensor(name, np.ascontiguousarray(value, dtype))

    weights = weights_of(trained.TOWER)
    config, settings = trained.CONFIG, trained.PREPROCESSOR
    write_projector(eyes, "idefics3", config, settings, weights, add)
    return text, eyes
