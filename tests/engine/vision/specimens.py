"""Tiny models of the types that `tiny` has no branch for: one `Specimen` each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, partialmethod
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from modelpack_engine.vision.layouts import PROCESSORS

EOS = 256
IMAGE = EOS + 1
#: Special tokens after those of `tiny`, which end at 288.
SPECIAL = [
    "<|begin_of_image|>", "<|end_of_image|>", "<|video|>", "<img>", "</img>",
    "<IMG_CONTEXT>", "<|media_pad|>", "<|media_start|>", "<|media_content|>", "<|media_end|>",
    "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>",
    "<|IMG_PATCH|>", "<image_id>", "</image_id>", "</image>", "<slice>", "</slice>", "<unk>",
    *(f"<|img_row_{y}_col_{x}|>" for y in range(1, 4) for x in range(1, 4)),
]  # fmt: skip
#: After all of those that models of 320 tokens have.
LATER = [
    "<bos>",
    "<|img|>",
    "<|endofimg|>",
    "<|imgpad|>",
    "<|IMAGE_START|>",
    "<|IMAGE_END|>",
    "<|IMAGE_PLACEHOLDER|>",
    "<|audio_start|>",
    "<|audio_pad|>",
    "<|audio_end|>",
    "<im_patch>",
    "<im_col>",
    "<im_start>",
    "<im_end>",
    "<|endoftext|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<video>",
]
VOCABULARY_LATER = 352
LATER_IDS = {text: 320 + index for index, text in enumerate(LATER)}
BOS = 320
AUDIO = 328
CLIP = LATER_IDS["<video>"]
SOFT4 = EOS + 31
GLM_IMAGE = 287
GLM_START, GLM_END, GLM_VIDEO, _, _, CONTEXT, MEDIA = range(289, 296)
PATCH = 304
PAD, START, END, VIDEO = (EOS + index for index in range(20, 24))
VOCABULARY = 320

TEXT: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "vocab_size": VOCABULARY, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 2, "patch_size": 4, "num_hidden_layers": 2,
    "intermediate_size": 48, "num_channels": 3, "image_size": 16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Specimen:
    """Configs of a tiny model, and the processor of mlx-vlm that prepares its prompts.

    `prompt` is what a chat template writes for a picture, `peer` the same for mlx-vlm's processor.
    `call` calls the processor, if it is not called as transformers' are. `embed` takes the place of
    mlx-vlm's `get_input_embeddings`: of a model, token ids, pixels and other inputs; with
    `embeds_text`, of prompts without pictures, too. `stored` is the name of a tensor in published
    files, for that of mlx-vlm's model.
    """

    config: dict[str, Any]
    settings: dict[str, Any]
    processor: str
    prompt: str
    peer: str = ""
    documents: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    call: Callable[[Any, list[Any], str], dict[str, Any]] | None = None
    embed: Callable[[Any, mx.array, mx.array, Mapping[str, Any]], Any] | None = None
    embeds_text: bool = False
    stored: Callable[[str], str] = str
    seed: int = 5


def _packed(model: Any, ids: mx.array, pixels: mx.array, inputs: Mapping[str, Any]) -> mx.array:
    """Return the embeddings of a prompt as LLaVA-NeXT's paper and transformers put tiles together.

    mlx-vlm puts each tile of the first picture in the place of one token.
    """
    config = model.config
    rows = np.array(model.language_model.model.embed_tokens(ids))
    side = config.vision_config.image_size // config.vision_config.patch_size
    found = []
    for picture, (height, width) in zip(pixels, inputs["image_sizes"].tolist(), strict=True):
        best = max(
            POINTS,
            key=lambda point: (
                min(
                    int(width * min(point[1] / width, point[0] / height))
                    * int(height * min(point[1] / width, point[0] / height)),
                    height * width,
                ),
                -point[0] * point[1],
            ),
        )
        down, across = best[0] // 16, best[1] // 16
        *_, states = model.vision_tower(
            picture[: 1 + down * across].transpose(0, 2, 3, 1), output_hidden_states=True
        )
        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        first = 1 if config.vision_feature_select_strategy == "default" else 0
        chosen = mx.concatenate([states[layer][:, first:] for layer in layers], axis=-1)
        features = np.array(model.multi_modal_projector(chosen))
        whole, tiles = features[0], features[1:]
        grid = tiles.reshape(down, across, side, side, -1).transpose(0, 2, 1, 3, 4)
        grid = grid.reshape(down * side, across * side, -1)
        if width / height > best[1] / best[0]:
            cut = (len(grid) - int(height * grid.shape[1] / width)) // 2
            grid = grid[cut : len(grid) - cut]
        else:
            cut = (grid.shape[1] - int(width * len(grid) / height)) // 2
            grid = grid[:, cut : grid.shape[1] - cut]
        ends = np.broadcast_to(np.array(model.image_newline), (len(grid), 1, grid.shape[-1]))
        grid = np.concatenate([grid, ends], axis=1)
        found.append(np.concatenate([whole, grid.reshape(-1, grid.shape[-1])]))
    rows[0, np.array(ids)[0] == config.image_token_index] = np.concatenate(found)
    return mx.array(rows)


POINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]


#: Settings for videos of the tiny LLaVA-OneVision.
_FRAMES = {
    "size": {"height": 16, "width": 16}, "num_frames": 8, "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}  # fmt: skip


def _any_res(kind: str, text: dict[str, Any], **vision: Any) -> Specimen:
    name = {
        "granite_vision": "GraniteVision", "llava_next": "LlavaNext",
        "llava_onevision": "LlavaOnevision",
    }[kind]  # fmt: skip
    is_clip = vision["model_type"].startswith("clip")
    own: dict[str, Any] = {}
    if kind == "llava_onevision":
        text, own = text | {"vocab_size": VOCABULARY_LATER}, {"video_token_index": CLIP}
    processor = "LlavaOnevision" if kind == "llava_onevision" else "LlavaNext"
    return Specimen(
        config={
            "model_type": kind, "text_config": TEXT | text, **own,
            "vocab_size": text.get("vocab_size", VOCABULARY),
            "vision_config": VISION | vision, "image_token_index": IMAGE,
            "image_grid_pinpoints": POINTS, "vision_aspect_ratio": "anyres_max_2",
            "vision_feature_layer": {"granite_vision": [-2, -1], "llava_next": -2}.get(kind, -1),
            "vision_feature_select_strategy": "default" if is_clip else "full",
        },
        settings={
            "image_processor_type": f"{processor}ImageProcessor", "do_convert_rgb": True,
            "size": {"shortest_edge": 16} if is_clip else {"height": 16, "width": 16},
            "crop_size": {"height": 16, "width": 16}, "image_grid_pinpoints": POINTS,
            "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
        },
        processor=f"{kind}.processing_{kind}:{name}Processor",
        prompt="<image>",
        documents={
            "processor_config.json": {
                "patch_size": 4, "num_image_tokens": 16,
                "vision_feature_select_strategy": "default" if is_clip else "full",
                "num_additional_image_tokens": int(is_clip),
            },
            **({"video_preprocessor_config.json": _FRAMES} if own else {}),
        },
        embed=None if kind == "llava_onevision" else _packed,
    )  # fmt: skip


def _glm(moe: bool) -> Specimen:
    kind = "glm4v_moe" if moe else "glm4v"
    text = {
        **TEXT, "model_type": f"{kind}_text", "attention_bias": True, "partial_rotary_factor": 0.5,
        "eos_token_id": [EOS],
        "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    if moe:
        text |= {
            "head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
            "moe_intermediate_size": 32, "n_shared_experts": 1, "routed_scaling_factor": 1.0,
            "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True,
            "use_qk_norm": False, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        }  # fmt: skip
    return Specimen(
        config={
            "model_type": kind, "text_config": text, "image_token_id": GLM_IMAGE,
            "video_token_id": GLM_VIDEO, "image_start_token_id": GLM_START,
            "vision_start_token_id": GLM_START, "vision_end_token_id": GLM_END,
            "vocab_size": VOCABULARY,
            "vision_config": {
                "model_type": f"{kind}_vision", "depth": 2, "hidden_size": 32,
                "intermediate_size": 48, "out_hidden_size": 64, "num_heads": 2, "patch_size": 4,
                "spatial_merge_size": 2, "temporal_patch_size": 2, "image_size": 16,
                "in_channels": 3, "rms_norm_eps": 1e-5,
            },
        },
        settings={
            "image_processor_type": "Glm4vImageProcessor", "patch_size": 4, "merge_size": 2,
            "temporal_patch_size": 2, "size": {"shortest_edge": 2048, "longest_edge": 4096},
            "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
        },
        processor=f"{kind}.processing:Glm46V{'MoE' if moe else ''}Processor",
        prompt="<|begin_of_image|><|image|><|end_of_image|>",
    )  # fmt: skip


def _internvl_hf() -> Specimen:
    return Specimen(
        config={
            "model_type": "internvl", "downsample_ratio": 0.5, "image_token_id": CONTEXT,
            "text_config": {**TEXT, "model_type": "qwen3", "head_dim": 16}, "image_seq_length": 4,
            "vision_config": {**VISION, "model_type": "internvl_vision", "patch_size": [4, 4],
                              "image_size": [16, 16]},
        },
        settings={
            "image_processor_type": "GotOcr2ImageProcessorFast", "crop_to_patches": False,
            "max_patches": 12, "min_patches": 1, "size": {"height": 16, "width": 16},
            "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
        },
        processor="internvl.processing_internvl:InternVLProcessor",
        prompt="<IMG_CONTEXT>",
        documents={"processor_config.json": {"image_seq_length": 4}},
    )  # fmt: skip


def _hybrid() -> dict[str, Any]:
    """Return the text_config of a small Qwen 3.5."""
    text = {
        **TEXT, "model_type": "qwen3_5_text", "num_hidden_layers": 4, "head_dim": 16,
        "full_attention_interval": 2, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": 16,
        "attention_bias": False,
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True,
            "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        },
    }  # fmt: skip
    del text["rope_theta"]
    return text


def _internvl() -> Specimen:
    return Specimen(
        config={
            "model_type": "internvl_chat", "max_dynamic_patch": 3, "min_dynamic_patch": 1,
            "llm_config": {**TEXT, "model_type": "qwen2", "rms_norm_eps": 1e-6},
            "vision_config": {
                **VISION, "model_type": "intern_vit_6b", "qkv_bias": True,
                "norm_type": "layer_norm", "qk_normalization": False,
            },
            "downsample_ratio": 0.5, "use_thumbnail": True, "force_image_size": 16,
        },
        settings={"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 16, "size": 16},
        processor="internvl_chat.processor:InternVLChatProcessor",
        prompt="<IMG_CONTEXT>",
        peer="<image>",
    )  # fmt: skip


def _aya() -> Specimen:
    return Specimen(
        config={
            "model_type": "aya_vision", "image_token_index": PATCH, "downsample_factor": 2,
            "alignment_intermediate_size": 48, "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "text_config": {
                **TEXT, "model_type": "cohere2", "head_dim": 16, "logit_scale": 0.5,
                "layer_norm_eps": 1e-5, "sliding_window": 24, "sliding_window_pattern": 2,
                "num_hidden_layers": 4, "tie_word_embeddings": True,
            },
            "vision_config": {**VISION, "model_type": SIGLIP},
        },
        settings={
            "image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": True,
            "max_patches": 3, "min_patches": 1, "size": {"height": 16, "width": 16},
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        },
        processor="aya_vision.processing_aya_vision:AyaVisionOutputProcessor",
        prompt="<image>",
        documents={
            "processor_config.json": {
                "patch_size": 4, "downsample_factor": 2, "img_size": 16,
                "processor_class": "AyaVisionProcessor",
            },
        },
    )  # fmt: skip


def _call_deepseek(processor: Any, images: list[Any], text: str) -> dict[str, Any]:
    processor.tokenizer.bos_token = "<eos>"
    made = processor.process_one(prompt=text, images=images)
    return {
        "input_ids": made.input_ids[None][:, 1:],  # it adds a token at the start
        "pixel_values": made.images[None],
        "images_spatial_crop": made.images_spatial_crop[None],
        "images_seq_mask": made.images_seq_mask[None][:, 1:],
    }


def _in_rows(model: Any, ids: mx.array, pixels: mx.array, inputs: Mapping[str, Any]) -> mx.array:
    """Return the embeddings of a prompt with DeepSeek-VL2's pictures.

    mlx-vlm's own function gives two different results for one picture, in turns.
    """
    rows, first, found = np.array(model.language_model.model.embed_tokens(ids)), 0, []
    end, separator = np.array(model.image_newline), np.array(model.view_separator)
    for across, down in np.array(inputs["images_spatial_crop"])[0].tolist():
        count = 1 + across * down
        views = pixels[0, first : first + count].transpose(0, 2, 3, 1)
        features = np.array(model.projector(model.vision(views)[0]))
        first += count
        side = int(features.shape[1] ** 0.5)
        for y in range(side):
            found += [*features[0, y * side : (y + 1) * side], end]
        found.append(separator)
        for y in range(down * side):
            for x in range(across * side):
                tile = 1 + y // side * across + x // side
                found.append(features[tile, y % side * side + x % side])
            found.append(end)
    rows[0, np.array(inputs["images_seq_mask"])[0]] = np.stack(found)
    return mx.array(rows)


def _deepseek(latent: bool) -> Specimen:
    text = {
        **TEXT, "model_type": "deepseek_v2", "num_key_value_heads": 4, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
        "kv_lora_rank": None, "q_lora_rank": None, "qk_rope_head_dim": 0, "qk_nope_head_dim": 0,
        "v_head_dim": 0, "use_mla": False,
    }  # fmt: skip
    if latent:  # only with `rope_traditional`, mlx-vlm rotates pairs, as DeepSeek and mlx-lm do
        text |= {
            "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
            "use_mla": True, "rope_traditional": True,
        }  # fmt: skip
    resolutions = [[16, 16], [16, 32], [32, 16], [32, 32], [16, 48], [48, 16]]
    return Specimen(
        config={
            "model_type": "deepseek_vl_v2", "language_config": text,
            "candidate_resolutions": resolutions, "tile_tag": "2D", "global_view_pos": "head",
            "image_token_index": IMAGE,
            "vision_config": {
                "model_type": "vision", "layers": 2, "width": 32, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 4, "mlp_ratio": 1.5, "intermediate_size": 48,
            },
            "projector_config": {
                "model_type": "mlp_projector", "projector_type": "downsample_mlp_gelu",
                "input_dim": 32, "n_embed": 64, "depth": 2, "mlp_ratio": 1, "downsample_ratio": 2,
            },
        },
        settings={"candidate_resolutions": resolutions, "image_mean": [0.5] * 3},
        processor="deepseek_vl_v2.processing_deepsek_vl_v2:DeepseekVLV2Processor",
        prompt="<image>",
        documents={
            "processor_config.json": {
                "candidate_resolutions": resolutions, "patch_size": 4, "downsample_ratio": 2,
                "pad_token": "<eos>",
            },
        },
        call=_call_deepseek,
        embed=_in_rows,
        seed=2 if latent else 5,
    )  # fmt: skip


def _call_minicpm(processor: Any, images: list[Any], text: str) -> dict[str, Any]:
    made = processor(text=[text], images=images)
    return {name: made[name] for name in ("input_ids", "pixel_values", "tgt_sizes", "image_bound")}


def _minicpm() -> Specimen:
    return Specimen(
        config={
            "model_type": "minicpmv4_6", "text_config": _hybrid(), "image_token_id": PAD,
            "insert_layer_id": 0, "patch_size": 4, "image_size": 64, "downsample_mode": "16x",
            "vision_config": {
                **VISION, "model_type": "siglip", "image_size": 64, "num_hidden_layers": 2,
            },
        },
        settings={
            "image_processor_type": "MiniCPMVImageProcessor", "max_slice_nums": 4, "patch_size": 4,
            "scale_resolution": 32,
        },
        processor="minicpmv4_6.processing_minicpmv4_6:MiniCPMVProcessor",
        prompt="<|image_pad|>",
        call=_call_minicpm, seed=1,
    )  # fmt: skip


def _kimi() -> Specimen:
    return Specimen(
        config={
            "model_type": "kimi_vl", "media_placeholder_token_id": MEDIA,
            "text_config": {
                **TEXT, "model_type": "deepseek_v3", "num_key_value_heads": 4,
                "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                "n_shared_experts": 1,
                "kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16,
                "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
                "first_k_dense_replace": 1, "rope_scaling": None,
            },
            "vision_config": {
                "model_type": "moonvit", "depth": 2, "embed_dim": 32, "hidden_size": 32,
                "num_heads": 2, "patch_size": 4, "num_channels": 3, "intermediate_size": 48,
                "init_pos_emb_height": 8, "init_pos_emb_width": 8, "merge_kernel_size": [2, 2],
            },
        },
        settings={
            "image_processor_type": "KimiVLImageProcessor", "in_token_limit": 4096,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
        processor="kimi_vl.processing_kimi_vl:KimiVLProcessor",
        prompt="<|media_start|>image<|media_content|><|media_pad|><|media_end|>",
    )  # fmt: skip


def _lfm2() -> Specimen:
    return Specimen(
        config={
            "model_type": "lfm2_vl", "image_token_id": IMAGE, "downsample_factor": 2,
            "projector_hidden_size": 48, "tie_word_embeddings": True,
            "text_config": {
                **TEXT, "model_type": "lfm2", "norm_eps": 1e-5, "conv_bias": False,
                "conv_L_cache": 3, "num_hidden_layers": 4, "block_dim": 64, "block_ff_dim": 96,
                "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0,
                "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True, "num_heads": 4,
                "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            },
            "vision_config": {
                **VISION, "model_type": "siglip2_vision_model", "num_patches": 16,
                "vision_use_head": False,
            },
        },
        settings={
            "image_processor_type": "Lfm2VlImageProcessorFast", "encoder_patch_size": 4,
            "downsample_factor": 2, "min_image_tokens": 4, "max_image_tokens": 8, "tile_size": 16,
            "max_pixels_tolerance": 1.5, "resample": 2, "do_resize": False,
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        },
        processor="lfm2_vl.processing_lfm2_vl:Lfm2VlProcessor",
        prompt="<image>",
        documents={"processor_config.json": {"use_image_special_tokens": True}},
    )  # fmt: skip


def _placed(model: Any, ids: mx.array, found: list[mx.array], scale: float = 1.0) -> mx.array:
    """Return the embeddings of a prompt, with `found` in the places of the pictures' tokens."""
    rows = np.array(model.language_model.model.embed_tokens(ids)) * scale
    if found:
        rows[0, np.array(ids)[0] == model.config.image_token_index] = np.concatenate(found)
    return mx.array(rows)


def _gemma3n_rows(
    model: Any, ids: mx.array, pixels: mx.array | None, inputs: Mapping[str, Any]
) -> mx.array:
    """Multiply embeddings of text by the root of the width, as transformers does."""
    model.config.image_token_index = SOFT
    found = []
    if pixels is not None:
        made = model.get_image_features(
            pixels, model.vision_tower, model.config, model.embed_vision
        )
        for each in made:  # mlx-vlm has the columns of the picture first, transformers the rows
            found.append(np.array(each).reshape(16, 16, 64).swapaxes(0, 1).reshape(256, 64))
    rows = _placed(model, ids, found, 8.0)
    end = SOFT + 1  # of a picture, which is in the table of the vision tower
    own = model.embed_vision(input_ids=mx.array([[end]]))
    return mx.where((ids == end)[..., None], own, rows)


def _gemma3n_stored(name: str) -> str:
    return "model." + name.replace("language_model.model.", "language_model.")


SOFT = 284


def _gemma3n() -> Specimen:
    """Without shared layers: mlx-vlm rotates their queries by the length of the chunk, too."""
    return Specimen(
        config={
            "model_type": "gemma3n", "image_token_id": SOFT, "audio_token_id": 299,
            "vocab_size": VOCABULARY, "tie_word_embeddings": True,
            "text_config": {
                **TEXT, "model_type": "gemma3n_text", "head_dim": 16,
                "intermediate_size": [96] * 4, "num_hidden_layers": 4,
                "num_kv_shared_layers": 0, "vocab_size_per_layer_input": SOFT,
                "sliding_window": 24, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0,
                "final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "altup_num_inputs": 2,
                "altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_active_idx": 0,
                "laurel_rank": 8,
            },
            "vision_config": {
                "model_type": "gemma3n_vision", "hidden_size": 2048, "vocab_size": 8,
                "vocab_offset": SOFT,
            },
            "audio_config": {
                "hidden_size": 32, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1,
                "vocab_size": 8, "vocab_offset": 292,
            },
        },
        settings={
            "image_processor_type": "SiglipImageProcessor", "size": {"height": 512, "width": 512},
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "do_normalize": False,
        },
        processor="gemma3n.processing_gemma3n:Gemma3nProcessor",
        prompt="<image_soft_token>",
        documents={"processor_config.json": {"image_seq_length": 256}},
        embed=_gemma3n_rows,
        embeds_text=True,
        stored=_gemma3n_stored,
        seed=6,
    )  # fmt: skip


def _paligemma_rows(
    model: Any, ids: mx.array, pixels: mx.array, inputs: Mapping[str, Any]
) -> mx.array:
    """Place several pictures, anywhere; mlx-vlm places one at the start."""
    found = []
    for picture in pixels:
        states = model.vision_tower(picture[None].transpose(0, 2, 3, 1))[0]
        found.append(np.array(model.multi_modal_projector(states)).reshape(-1, 64) / 8.0)
    return _placed(model, ids, found)


def _paligemma() -> Specimen:
    return Specimen(
        config={
            "model_type": "paligemma", "image_token_index": IMAGE, "hidden_size": 2048,
            "projection_dim": 64, "vocab_size": VOCABULARY_LATER, "bos_token_id": BOS,
            "text_config": {
                **TEXT, "model_type": "gemma", "head_dim": 16, "num_image_tokens": 16,
                "vocab_size": VOCABULARY_LATER, "hidden_activation": "gelu_pytorch_tanh",
                "tie_word_embeddings": True,
            },
            "vision_config": {**VISION, "model_type": SIGLIP, "projection_dim": 64},
        },
        settings={
            "image_processor_type": "SiglipImageProcessor", "size": {"height": 16, "width": 16},
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "image_seq_length": 16,
        },
        processor="paligemma.processing_paligemma:PaliGemmaProcessor",
        prompt="<image>",
        documents={"processor_config.json": {"image_seq_length": 16}},
        embed=_paligemma_rows,
    )  # fmt: skip


def _idefics2_rows(
    model: Any, ids: mx.array, pixels: mx.array, inputs: Mapping[str, Any]
) -> mx.array:
    """Encode each view by itself: mlx-vlm's tower attends to padding, transformers' does not."""
    found = []
    for mask, view in zip(np.array(inputs["pixel_attention_mask"])[0], pixels[0], strict=True):
        rows, columns = (int(mask.sum(axis).max()) // 4 * 4 for axis in (0, 1))
        seen = view[:, :rows, :columns].transpose(1, 2, 0)[None]
        found.append(np.array(model.connector(model.vision_model(seen)[0])[0]))
    table = model.language_model.embed_tokens
    rows = np.array(table(ids))
    rows[0, np.array(ids)[0] == IMAGE] = np.concatenate(found)
    return mx.array(rows)


def _idefics2() -> Specimen:
    return Specimen(
        config={
            "model_type": "idefics2", "image_token_id": IMAGE, "vocab_size": VOCABULARY_LATER,
            "text_config": {**TEXT, "model_type": "mistral", "vocab_size": VOCABULARY_LATER},
            "vision_config": {**VISION, "model_type": "idefics2", "image_size": 32},
            "perceiver_config": {
                "model_type": "idefics2_perceiver", "resampler_depth": 1, "resampler_head_dim": 16,
                "resampler_n_heads": 4, "num_key_value_heads": 2, "resampler_n_latents": 4,
            },
        },
        settings={
            "image_processor_type": "Idefics2ImageProcessor", "do_image_splitting": True,
            "size": {"shortest_edge": 12, "longest_edge": 32}, "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3, "do_pad": True,
        },
        processor="idefics2.processing_idefics2:Idefics2Processor",
        prompt="<image>",
        documents={"processor_config.json": {"image_seq_len": 4}},
        embed=_idefics2_rows,
    )  # fmt: skip


def _call_phi3(processor: Any, images: list[Any], text: str) -> dict[str, Any]:
    """Return a prompt with all of its text: mlx-vlm drops a token after each picture."""
    made = processor.image_processor(images)
    ids: list[int] = []
    for index, part in enumerate(text.split("<|image|>")):
        if index:
            size = images[index - 1]
            ids += [IMAGE_OF_PHI] * processor.image_processor.calc_num_image_tokens(size)
        ids += processor.tokenizer.encode(part, add_special_tokens=False)
    return {"input_ids": np.array([ids]), **made}


def _phi3_rows(model: Any, ids: mx.array, pixels: mx.array, inputs: Mapping[str, Any]) -> mx.array:
    places = np.argwhere(np.array(ids) == IMAGE_OF_PHI).tolist()
    rows = model.model.embed_tokens(ids)
    made: mx.array = model.model.vision_embed_tokens(pixels, rows, inputs["image_sizes"], places)
    return made


IMAGE_OF_PHI = GLM_IMAGE


def _phi3() -> Specimen:
    return Specimen(
        config={
            **TEXT, "model_type": "phi3_v", "original_max_position_embeddings": 1024,
            "img_processor": {"image_dim_out": 1024, "num_img_tokens": 144},
            "max_position_embeddings": 4096,
        },
        settings={
            "image_processor_type": "Phi3VImageProcessor", "num_crops": 1,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
        processor="phi3_v.processing_phi3_v:Phi3VProcessor",
        prompt="<|image|>",
        call=_call_phi3,
        embed=_phi3_rows,
    )  # fmt: skip


def _dots_stored(name: str) -> str:
    return name.replace("language_model.model.lm_head", "lm_head").removeprefix("language_model.")


def _call_dots(processor: Any, images: list[Any], text: str) -> dict[str, Any]:
    """Return a prompt with the model's tokens: mlx-vlm's processor looks for its own ids."""
    made = processor.image_processor(images, return_tensors="np")
    parts = text.split("<|imgpad|>")
    counts = np.prod(made["image_grid_thw"], axis=1) // 4
    whole = parts[0]
    for count, part in zip(counts.tolist(), parts[1:], strict=True):
        whole += "<|imgpad|>" * count + part
    ids = processor.tokenizer.encode(whole, add_special_tokens=False)
    return {"input_ids": np.array([ids]), **made}


def _dots() -> Specimen:
    return Specimen(
        config={
            **TEXT, "model_type": "dots_ocr", "vocab_size": VOCABULARY_LATER,
            "attention_bias": True, "image_token_id": IMGPAD, "video_token_id": VIDEO,
            "vision_config": {
                "model_type": "dots_vit", "embed_dim": 32, "hidden_size": 64, "patch_size": 4,
                "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                "spatial_merge_size": 2, "temporal_patch_size": 1,
            },
        },
        settings={
            "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2,
            "temporal_patch_size": 1, "min_pixels": 1024, "max_pixels": 2048,
            "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
        },
        processor="dots_ocr.processing_dots_ocr:DotsVLProcessor",
        prompt="<|img|><|imgpad|><|endofimg|>",
        call=_call_dots,
        stored=_dots_stored,
    )  # fmt: skip


IMGPAD = VOCABULARY_LATER - 29


def _kimi_k25() -> Specimen:
    old = _kimi()
    vision = {**old.config["vision_config"], "spatial_merge_size": 2}
    return replace(
        old,
        config={**old.config, "model_type": "kimi_k25", "vision_config": vision},
        settings={
            "media_proc_cfg": {
                "patch_size": 4, "in_patch_limit": 256, "patch_limit_on_one_side": 64,
                "merge_kernel_size": 2, "image_mean": [0.5, 0.4, 0.5], "image_std": [0.5] * 3,
            },
        },
        processor="kimi_k25.processing_kimi_k25:KimiK25Processor",
    )  # fmt: skip


def _glm_ocr() -> Specimen:
    old = _glm(moe=False)
    text = {
        name: value for name, value in old.config["text_config"].items() if name != "rope_theta"
    }
    for name in ("rope_scaling", "partial_rotary_factor"):
        del text[name]
    text |= {
        "model_type": "glm_ocr_text", "head_dim": 16, "attention_bias": False,
        "num_nextn_predict_layers": 1,
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0,
            "rope_theta": 10000.0,
        },
    }  # fmt: skip
    vision = {**old.config["vision_config"], "model_type": "glm_ocr_vision"}
    return replace(
        old,
        config={
            **old.config, "model_type": "glm_ocr", "text_config": text, "vision_config": vision,
            "image_end_token_id": GLM_END,
        },
        settings={**old.settings, "image_processor_type": "Glm46VImageProcessor"},
        processor="glm_ocr.processing:GlmOcrProcessor",
    )  # fmt: skip


def _granite4_features(
    model: Any, ids: mx.array, pixels: mx.array, inputs: Mapping[str, Any]
) -> Any:
    """Encode one picture at a time: mlx-vlm's model takes one."""
    from transformers.image_processing_utils import select_best_resolution

    places = np.array(ids)[0] == IMAGE
    token, found = mx.array([[IMAGE]]), []
    for picture, size in zip(pixels, inputs["image_sizes"].tolist(), strict=True):
        height, width = select_best_resolution(size, POINTS)
        views = 1 + height // 16 * (width // 16)
        made = [  # `get_input_embeddings` gives token i the row i
            model.get_input_embeddings(
                mx.repeat(token, 400, axis=1), picture[None, :views], image_sizes=mx.array([size])
            )
        ]
        deep = np.array(made[0].deepstack_visual_embeds)
        last = (deep != deep[:, -1:]).any(axis=(0, 2)).nonzero()[0][-1] + 2
        found.append(deep[:, :last])  # rows after the last one repeat it
    deep = np.zeros((found[0].shape[0], ids.shape[1], found[0].shape[2]), np.float32)
    deep[:, places] = np.concatenate(found, axis=1)
    rows = np.array(model.language_model.model.embed_tokens(ids))
    rows[0, places] = 0
    return SimpleNamespace(
        inputs_embeds=mx.array(rows), deepstack_visual_embeds=mx.array(deep),
        visual_pos_masks=mx.array(places[None]),
    )  # fmt: skip


def _granite4() -> Specimen:
    old = _any_res("granite_vision", GRANITE, model_type=SIGLIP)
    text = {
        **TEXT, **GRANITE, "model_type": "granitemoehybrid", "num_hidden_layers": 4,
        "shared_intermediate_size": 96, "layer_types": ["attention"] * 4,
        "position_embedding_type": "rope",
    }  # fmt: skip
    vision = {**old.config["vision_config"], "hidden_size": 64}
    return replace(
        old,
        config={
            **old.config, "model_type": "granite4_vision", "text_config": text,
            "vision_config": vision, "downsample_rate": "2/4", "use_spatial_sampling": True,
            "deepstack_layer_map": [[-1, 0], [-2, 2]], "spatial_vision_layer": -1,
            "spatial_target_layers": [1, 2, 3, 3], "vision_feature_select_strategy": "full",
        },
        processor="granite4_vision.processing_granite4_vision:Granite4VisionProcessor",
        documents={
            "processor_config.json": {
                "patch_size": 4, "vision_feature_select_strategy": "full",
                "num_additional_image_tokens": 0, "downsample_rate": "2/4",
            },
        },
        embed=_granite4_features,
    )  # fmt: skip


def _call_paddle(processor: Any, images: list[Any], text: str) -> dict[str, Any]:
    """Process one picture at a time: mlx-vlm's stacks them, whatever their shapes."""
    made = [processor.image_processor(image) for image in images]
    grids = np.concatenate([each["image_grid_thw"] for each in made])
    pixels = np.concatenate([each["pixel_values"] for each in made], axis=1)
    first, *parts = text.split("<|IMAGE_PLACEHOLDER|>")
    for grid, part in zip(grids, parts, strict=True):
        first += "<|IMAGE_PLACEHOLDER|>" * (int(np.prod(grid)) // 4) + part
    ids = processor.tokenizer.encode(first, add_special_tokens=False)
    return {"input_ids": np.array([ids]), "pixel_values": pixels, "image_grid_thw": grids}


def _paddle() -> Specimen:
    return Specimen(
        config={
            **TEXT, "model_type": "paddleocr_vl", "vocab_size": VOCABULARY_LATER, "head_dim": 16,
            "hidden_size": 1024, "use_bias": False, "image_token_id": PADDLE,
            "video_token_id": VIDEO,
            "vision_start_token_id": PADDLE_START, "vision_end_token_id": PADDLE_START + 1,
            "rope_scaling": {
                "rope_type": "default", "type": "default", "mrope_section": [2, 3, 3],
            },
            "vision_config": {
                **VISION, "model_type": "paddleocr_vl", "image_size": 32, "spatial_merge_size": 2,
            },
        },
        settings={
            "image_processor_type": "PaddleOCRVLImageProcessor", "patch_size": 4, "merge_size": 2,
            "temporal_patch_size": 1, "min_pixels": 1024, "max_pixels": 2048,
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        },
        processor="paddleocr_vl.processing_paddleocr_vl:PaddleOCRVLProcessor",
        prompt="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        call=_call_paddle, seed=1,
        stored=_dots_stored,
    )  # fmt: skip


def _mage() -> Specimen:
    return Specimen(
        config={
            "model_type": "mage_vl", "image_token_id": PAD, "video_token_id": VIDEO,
            "vision_start_token_id": START, "vision_end_token_id": END,
            "text_config": {
                **{name: value for name, value in TEXT.items() if name != "rope_theta"},
                "model_type": "qwen3", "head_dim": 16,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "vision_config": {
                "model_type": "mage_vl_vision", "hidden_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 2, "intermediate_size": 48, "patch_size": 4,
                "out_hidden_size": 64, "text_hidden_size": 64,
            },
        },
        settings={
            "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2,
            "temporal_patch_size": 1, "min_pixels": 1024, "max_pixels": 2048,
            "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
        },
        processor="mage_vl.processing_mage_vl:MageVLProcessor",
        prompt="<|vision_start|><|image_pad|><|vision_end|>",
        stored=_stored_mage,
    )  # fmt: skip


def _stored_mage(name: str) -> str:
    name = name.replace("language_model.model.", "model.language_model.")
    name = name.replace("language_model.lm_head.", "lm_head.")
    return name.replace("vision_tower.", "model.visual.")


def _muse() -> Specimen:
    settings = {
        "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "max_image_tokens": 16,
        "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
    }  # fmt: skip
    return Specimen(
        config={
            "model_type": "muse_glimmer", "image_token_id": LATER_IDS["<|patch|>"],
            "video_token_id": VIDEO, "out_hidden_size": 128, "projector_hidden_size": 48,
            "text_config": {
                **{name: value for name, value in TEXT.items() if name != "rope_theta"},
                "model_type": "muse_glimmer_text", "head_dim": 16, "num_hidden_layers": 4,
                "sliding_window": 24, "vocab_size": VOCABULARY_LATER, "qk_scale_factor": 2.0,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "vision_config": {
                "model_type": "muse_glimmer_vision", "patch_size": 4, "pos_emb_height": 8,
                "pos_emb_width": 8, "hidden_size": 32, "intermediate_size": 48,
                "num_attention_heads": 2, "num_hidden_layers": 4,
            },
        },
        settings=settings,
        processor="muse_glimmer.processing_muse_glimmer:MuseGlimmerProcessor",
        prompt="<|patch|>",
        documents={"processor_config.json": {"image_processor": settings}},
        stored=_stored_muse,
    )  # fmt: skip


def _stored_muse(name: str) -> str:
    name = f"model.{name}".replace("language_model.model.", "language_model.")
    return name.replace("model.language_model.lm_head.", "lm_head.")


def _call_llama4(processor: Any, images: list[Any], text: str) -> dict[str, Any]:
    """Give mlx-vlm's model the tiles of transformers' processor, whose last is the picture."""
    specimen = SPECIMENS["llama4"]
    made = [PROCESSORS["llama4"](specimen.config, specimen.settings)([image]) for image in images]
    first, *parts = text.split("<|image|>")
    for each, part in zip(made, parts, strict=True):
        first += processor._prompt_split_image(each["aspect_ratios"][0], 4) + part
    return {
        "input_ids": np.array([processor.tokenizer.encode(first, add_special_tokens=False)]),
        "pixel_values": np.concatenate([each["pixel_values"] for each in made]),
    }


def _llama4() -> Specimen:
    return Specimen(
        config={
            "model_type": "llama4", "image_token_index": LATER_IDS["<|patch|>"],
            "text_config": {
                **TEXT, "model_type": "llama4_text", "vocab_size": VOCABULARY_LATER,
                "head_dim": 16, "num_hidden_layers": 4, "intermediate_size_mlp": 96,
                "num_experts_per_tok": 1, "num_local_experts": 4, "use_qk_norm": True,
                "interleave_moe_layer_step": 2, "no_rope_layers": [1, 1, 1, 0],
                "attention_chunk_size": 512, "attn_temperature_tuning": True, "floor_scale": 8192,
                "attn_scale": 0.1, "attention_bias": False,
            },
            "vision_config": {
                **VISION, "model_type": "llama4_vision_model", "initializer_range": 0.02,
                "norm_eps": 1e-5, "pixel_shuffle_ratio": 0.5, "projector_dropout": 0.0,
                "projector_input_dim": 48, "projector_output_dim": 48, "rope_theta": 10000.0,
                "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
                "vision_output_dim": 48, "intermediate_size": 128,
            },
        },
        settings={
            "image_processor_type": "Llama4ImageProcessor", "max_patches": 4,
            "size": {"height": 16, "width": 16}, "resize_to_max_canvas": False,
            "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
        },
        processor="llama4.processing_llama4:Llama4Processor",
        prompt="<|image|>",
        call=_call_llama4,
    )  # fmt: skip


def _call_molmo(processor: Any, images: list[Any], text: str) -> dict[str, Any]:
    """Put pictures first, as the authors' processor does; mlx-vlm's takes one."""
    tokens = range(LATER_IDS["<im_patch>"], LATER_IDS["<im_end>"] + 1)
    encode = partial(processor.tokenizer.encode, add_special_tokens=False)
    ids, parts = encode("<|endoftext|>"), []
    for image in images:
        pixels = np.asarray(image, np.float32) / 255
        with np.errstate(divide="ignore"):
            patches, made, places, masks = processor.image_processor.preprocess(pixels, *tokens)
        parts.append((patches, np.where(places < 0, places, places + len(ids)), masks))
        ids = [*ids, *made.tolist()]
    ids += encode(" " + text.replace("<|image|>", "").lstrip())
    names = ("pixel_values", "image_input_idx", "image_masks")
    arrays = (np.concatenate(each).astype(np.float32) for each in zip(*parts, strict=True))
    given = dict(zip(names, arrays, strict=True))
    return {
        **given, "input_ids": np.array([ids]),
        "image_input_idx": given["image_input_idx"].astype(np.int32),
    }  # fmt: skip


def _stored_molmo(name: str) -> str:
    name = name.replace("language_model.model.", "model.transformer.")
    return name.replace("vision_tower.", "model.vision_backbone.")


def _molmo() -> Specimen:
    """As published, its tokens for pictures have embeddings of their own, and no logits.

    mlx-vlm's names of fields are beside those of config.json, which it does not read.
    """
    fields = {
        "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 192,
    }  # fmt: skip
    return Specimen(
        config={
            "model_type": "molmo", "hidden_size": 64, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 192,
            "layer_norm_eps": 1e-6, "rope_theta": 10000.0, "vocab_size": VOCABULARY,
            "embedding_size": VOCABULARY, "additional_vocab_size": 32, "qkv_bias": True,
            "norm_after": False, "attention_layer_norm": False, "layer_norm_type": "rms",
            "weight_tying": False, "max_position_embeddings": 1024, **fields,
            "vision_config": {
                "image_default_input_size": [32, 32], "image_patch_size": 4,
                "image_pos_patch_size": 4, "image_emb_dim": 32, "image_num_heads": 2,
                "image_num_key_value_heads": 2, "image_head_dim": 16, "image_num_layers": 3,
                "image_mlp_dim": 48, "image_num_pos": 65, "vit_layers": [-1, -2],
                "d_model": 64, "hidden_size": 96,
            },
        },
        settings={
            "image_processor_type": "MolmoImageProcessor", "max_crops": 4,
            "base_image_input_size": [32, 32], "image_patch_size": 4, "overlap_margins": [2, 2],
            "image_token_length_h": 4, "image_token_length_w": 4,
            "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
        },
        processor="molmo.processing_molmo:MolmoProcessor",
        prompt="<|image|>",
        call=_call_molmo, stored=_stored_molmo,
    )  # fmt: skip


def _call_mllama(processor: Any, images: list[Any], text: str) -> dict[str, Any]:
    processor.bos_token = ""  # it would add one
    return dict(processor(images=[images], text=[text]))


def _mllama() -> Specimen:
    """As published, the token of pictures has an embedding, and no logit."""
    return Specimen(
        config={
            "model_type": "mllama", "image_token_index": GLM_IMAGE,
            "text_config": {
                **TEXT, "model_type": "mllama_text_model", "vocab_size": GLM_IMAGE,
                "num_hidden_layers": 5, "cross_attention_layers": [1, 3],
            },
            "vision_config": {
                **VISION, "model_type": "mllama_vision_model", "attention_heads": 2,
                "num_global_layers": 2, "intermediate_layers_indices": [0, 1],
                "vision_output_dim": 96, "max_num_tiles": 4,
            },
        },
        settings={
            "image_processor_type": "MllamaImageProcessor", "size": {"height": 16, "width": 16},
            "max_image_tiles": 4, "do_pad": True, "do_resize": True, "do_normalize": True,
            "do_rescale": True, "do_convert_rgb": True, "rescale_factor": 1 / 255, "resample": 2,
            "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
        },
        processor="mllama.processing_mllama:MllamaProcessor",
        prompt="<|image|>",
        call=_call_mllama, seed=6,
    )  # fmt: skip


PADDLE_START = IMGPAD + 1
PADDLE = IMGPAD + 3


_SMALL: set[Any] = set()


#: Settings for videos of tiny models of Gemma 4.
GEMMA_FRAMES = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70, "num_frames": 8}


def _gemma4_unified() -> Specimen:
    settings = {
        "image_processor_type": "Gemma4UnifiedImageProcessor", "patch_size": 4,
        "pooling_kernel_size": 2, "max_soft_tokens": 70,
    }  # fmt: skip
    return Specimen(
        config={
            "model_type": "gemma4_unified", "vocab_size": VOCABULARY, "image_token_id": SOFT4,
            "video_token_id": GLM_VIDEO, "tie_word_embeddings": True, "audio_config": None,
            "hidden_size": 64,
            "text_config": {
                "model_type": "gemma4_unified_text", "hidden_size": 64, "intermediate_size": 96,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                "num_global_key_value_heads": 1, "global_head_dim": 32, "num_hidden_layers": 4,
                "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
                "attention_k_eq_v": True, "vocab_size": VOCABULARY,
                "vocab_size_per_layer_input": VOCABULARY, "max_position_embeddings": 1024,
                "rms_norm_eps": 1e-6, "final_logit_softcapping": 30.0,
                "use_bidirectional_attention": "vision",
                "rope_parameters": {
                    "full_attention": {
                        "partial_rotary_factor": 0.25, "rope_theta": 1000000.0,
                        "rope_type": "proportional",
                    },
                    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
                },
            },
            "vision_config": {
                "model_type": "gemma4_unified_vision", "patch_size": 4, "pooling_kernel_size": 2,
                "model_patch_size": 8, "mm_embed_dim": 48, "mm_posemb_size": 80,
                "num_soft_tokens": 70, "output_proj_dims": 48,
            },
        },
        settings=settings,
        processor="gemma4_unified.processing_gemma4_unified:Gemma4UnifiedProcessor",
        prompt="<|image|>",
        documents={
            "processor_config.json": {
                "image_processor": settings, "image_seq_length": 70,
                "video_processor": GEMMA_FRAMES,
            },
        },
    )  # fmt: skip


def _minicpmo() -> Specimen:
    text = {name: value for name, value in TEXT.items() if name != "model_type"}
    return Specimen(
        config={
            **text, "model_type": "minicpmo", "head_dim": 16, "attention_bias": False,
            "hidden_act": "silu", "vocab_size": VOCABULARY, "query_num": 16, "image_size": 16,
            "patch_size": 4, "init_tts": False, "init_audio": True,
            "vision_config": {**VISION, "model_type": "siglip_vision_model", "image_size": 24},
            "audio_config": {
                "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32, "num_mel_bins": 16,
            },
        },
        settings={
            "image_processor_type": "MiniCPMOImageProcessor", "patch_size": 4,
            "scale_resolution": 16, "image_feature_size": 16, "norm_mean": [0.5, 0.4, 0.5],
            "norm_std": [0.5, 0.5, 0.4], "slice_mode": True, "max_slice_nums": 9,
        },
        processor="minicpmo.processing_minicpmo:MiniCPMOProcessor",
        prompt="<image>",
        peer="<image>",
        call=lambda processor, images, text: processor(images=images, text=text),
        stored=_stored_minicpmo,
    )  # fmt: skip


def _stored_minicpmo(name: str) -> str:
    """Return the name of a tensor in published files, without the joined ones of the resampler."""
    for ours, published in (("language_model.", "llm."), ("vision_tower.", "vpm."),
                            ("audio_tower.", "apm.")):  # fmt: skip
        if name.startswith(ours):
            return name.replace(ours, published, 1)
    return name


def _qwen3_omni() -> Specimen:
    text = {
        **TEXT, "model_type": "qwen3_omni_moe_text", "head_dim": 16, "attention_bias": False,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
        "vocab_size": VOCABULARY_LATER,
        "rope_scaling": {
            "rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 3, 3],
        },
    }  # fmt: skip
    return Specimen(
        config={
            "model_type": "qwen3_omni_moe", "enable_audio_output": False,
            "thinker_config": {
                "model_type": "qwen3_omni_moe_thinker", "text_config": text,
                "image_token_id": PAD, "video_token_id": VIDEO, "audio_token_id": AUDIO,
                "vision_start_token_id": START, "vision_end_token_id": END,
                "vision_config": {
                    "model_type": "qwen3_omni_moe_vision_encoder", "depth": 3, "hidden_size": 32,
                    "intermediate_size": 48, "out_hidden_size": 64, "num_heads": 2,
                    "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
                    "num_position_embeddings": 16, "in_channels": 3,
                    "deepstack_visual_indexes": [0, 1],
                },
                "audio_config": {
                    "model_type": "qwen3_omni_moe_audio_encoder", "d_model": 32,
                    "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
                    "num_mel_bins": 16, "output_dim": 64, "downsample_hidden_size": 8,
                    "n_window": 50, "n_window_infer": 200,
                },
            },
            "talker_config": {"text_config": text, "code_predictor_config": {}},
            "code2wav_config": {},
        },
        settings={
            "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2,
            "temporal_patch_size": 2, "min_pixels": 1024, "max_pixels": 2048,
            "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
            "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 16,
            "hop_length": 160, "n_fft": 400, "sampling_rate": 16_000, "chunk_length": 300,
            "return_attention_mask": True, "dither": 0.0,
        },
        processor="qwen3_omni_moe.processing_qwen3_omni_moe:Qwen3OmniMoeProcessor",
        prompt="<|image_pad|>",
        stored=_stored_omni,
        seed=2,
    )  # fmt: skip


def _stored_omni(name: str) -> str:
    """Return the name of a tensor in published files, with the experts as mlx-vlm stacks them."""
    name = name.replace("thinker.language_model.model.", "thinker.model.")
    name = name.replace("thinker.language_model.", "thinker.")
    name = name.replace("thinker.vision_tower.", "thinker.visual.")
    if "merger" in name:
        name = name.replace("deepstack_merger_list", "merger_list").replace(".norm.", ".ln_q.")
        name = name.replace("linear_fc1", "mlp.0").replace("linear_fc2", "mlp.2")
    return name


def _skipping(
    layer: Any,
    native: Any,
    x: mx.array,
    cross_attention_states: mx.array | None = None,
    full_text_row_masked_out_mask: mx.array | None = None,
    **given: Any,
) -> mx.array:
    """Call a layer for the rows that see a picture, as Meta's code does.

    mlx-vlm takes keys and values from the queries if there is no picture.
    """
    sees = full_text_row_masked_out_mask
    if cross_attention_states is None or sees is None:
        return x
    made = native(layer, x, cross_attention_states, full_text_row_masked_out_mask=sees, **given)
    return mx.where(sees[:, 0], made, x)


def shrink(package: Any) -> None:
    """Make the towers smaller whose size mlx-vlm fixes."""
    name = package.__name__.rpartition(".")[2]
    if name == "gemma3n" and package not in _SMALL:
        vision = package.vision
        vision.gemma3n_mobilenet_def = lambda: [
            [vision._er(3, 32, 2, 1.0)], [vision._uir(3, 5, 32, 2, 2.0)],
            [vision._uir(5, 5, 640, 2, 1.0), vision._mmqa(2, 16, 2)],
            [vision._uir(5, 5, 1280, 2, 1.0), vision._mmqa(2, 16, 1)],
        ]  # fmt: skip
        adapter = vision.MobileNetV5MultiScaleFusionAdapter
        vision.MobileNetV5MultiScaleFusionAdapter = partial(adapter, expansion_ratio=0.02)
    elif name == "phi3_v":
        fixed = package.VisionModel.CLIP_VIT_LARGE_PATCH14_336_CONFIG
        fixed.num_hidden_layers, fixed.intermediate_size = 2, 32
    elif name == "mllama" and package not in _SMALL:
        layer = package.language.MllamaCrossAttentionDecoderLayer
        layer.__call__ = partialmethod(_skipping, layer.__call__)
    _SMALL.add(package)


SIGLIP = "siglip_vision_model"
GRANITE = {
    "model_type": "granite", "embedding_multiplier": 2.0, "attention_multiplier": 0.25,
    "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
SPECIMENS: Mapping[str, Specimen] = {
    "aya_vision": _aya(),
    "deepseek_vl_v2": _deepseek(latent=False),
    "minicpmo": _minicpmo(),
    "minicpmv4_6": _minicpm(),
    "dots_ocr": _dots(),
    "gemma3n": _gemma3n(),
    "gemma4_unified": _gemma4_unified(),
    "kimi_k25": _kimi_k25(),
    "idefics2": _idefics2(),
    "kimi_vl": _kimi(),
    "lfm2_vl": _lfm2(),
    "glm4v": _glm(moe=False),
    "glm4v_moe": _glm(moe=True),
    "glm_ocr": _glm_ocr(),
    "granite4_vision": _granite4(),
    "granite_vision": _any_res("granite_vision", GRANITE, model_type=SIGLIP),
    "internvl": _internvl_hf(),
    "internvl_chat": _internvl(),
    "llava_next": _any_res("llava_next", {"model_type": "mistral"}, model_type="clip_vision_model"),
    "llama4": _llama4(),
    "mage_vl": _mage(),
    "mllama": _mllama(),
    "molmo": _molmo(),
    "muse_glimmer": _muse(),
    "paddleocr_vl": _paddle(),
    "qwen3_omni_moe": _qwen3_omni(),
    "paligemma": _paligemma(),
    "phi3_v": _phi3(),
    "llava_onevision": _any_res("llava_onevision", {"model_type": "qwen2"}, model_type=SIGLIP),
    "deepseek_vl_v2_latent": _deepseek(latent=True),
}
