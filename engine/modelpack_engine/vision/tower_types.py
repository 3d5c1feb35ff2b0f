"""What the towers of single model types are made of, and how these encode a file.

Each type has an entry in the tables: `PARTS` and `SOUND_PARTS` for types whose modules are those of
mlx-vlm's model, `RENAMED` for the names of their tensors; `ROWS` and `PREPARED` for those that call
mlx-vlm's model otherwise. `towers` builds towers by them.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.base import Module

from modelpack_engine.vision.grids import tower_class

#: Before the names of Phi-4 Multimodal's tensors of its audio tower, after "model.".
PHI4 = "embed_tokens_extend.audio_embed."


def _gemma4_unified_parts(package: Any, config: Any) -> dict[str, Module]:
    vision, width = config.vision_config, config.text_config.hidden_size
    embedder = package.gemma4_unified.MultimodalEmbedder
    return {
        "vision_embedder": package.VisionEmbedder(vision),
        "embed_vision": embedder(vision.output_proj_dims, width, vision.rms_norm_eps),
    }


def _gemma4_unified_audio(package: Any, audio: Mapping[str, Any], config: Any) -> dict[str, Module]:
    made = package.AudioConfig.from_dict({**audio})
    embedder = package.gemma4_unified.MultimodalEmbedder
    width = config.text_config.hidden_size
    return {"embed_audio": embedder(made.output_proj_dims, width, made.rms_norm_eps)}


def _gemma4_unified_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    """The language model multiplies embeddings by what these are divided by."""
    if "input_features" in inputs:
        rows = tower.embed_audio(inputs["input_features"])
    else:
        names = ("pixel_values", "image_position_ids")
        if "pixel_values_videos" in inputs:
            names = ("pixel_values_videos", "video_position_ids")
        rows = tower.embed_vision(tower.vision_embedder(*(inputs[name] for name in names)))
    return cast(mx.array, rows.flatten(0, 1) / tower._width**0.5)


def _gemma3n_parts(package: Any, config: Any) -> dict[str, Module]:
    embedder = package.gemma3n.Gemma3nMultimodalEmbedder
    return {
        "vision_tower": package.VisionModel(config.vision_config),
        "embed_vision": embedder(config.vision_config, text_config=config.text_config),
    }


def _gemma3n_audio(package: Any, audio: Mapping[str, Any], config: Any) -> dict[str, Module]:
    made = importlib.import_module(f"{package.__name__}.config").AudioConfig.from_dict({**audio})
    embedder = package.gemma3n.Gemma3nMultimodalEmbedder
    return {
        "audio_tower": package.gemma3n.AudioModel(made),
        "embed_audio": embedder(made, text_config=config.text_config),
    }


def _gemma3n_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    """mlx-vlm's tower returns columns of rows; transformers' and the model's order is rows."""
    if "input_features" in inputs:
        return _gemma3n_sound(tower, inputs)
    states = tower.vision_tower(inputs["pixel_values"], output_hidden_states=True).swapaxes(1, 2)
    rows = states.reshape(1, -1, states.shape[-1]) * states.shape[-1] ** 0.5
    return cast(mx.array, tower.embed_vision(inputs_embeds=rows)[0])


def _gemma3n_sound(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    """Fill up the rows of sounds with the embedding of the last token, as transformers does."""
    states, padding = tower.audio_tower(inputs["input_features"], ~inputs["input_features_mask"])
    last = tower.embed_audio.vocab_offset + tower.embed_audio.vocab_size - 1
    filling = tower.embed_audio(input_ids=mx.array([[last]]))[0]
    rows = mx.where(padding[..., None], filling, tower.embed_audio(inputs_embeds=states))
    count, length, width = rows.shape
    missing = tower.config.audio_soft_tokens_per_image - length
    filled = mx.concatenate([rows, mx.broadcast_to(filling, (count, missing, width))], axis=1)
    return filled.flatten(0, 1)


def _qwen_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    """Qwen's: mlx-vlm puts them among the tokens, and has the host wait for the GPU meanwhile."""
    kind = "image" if "pixel_values" in inputs else "video"
    pixels = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
    made = tower.vision_tower(pixels, inputs[f"{kind}_grid_thw"])
    rows, deep = made if isinstance(made, tuple) else (made, [])
    if tower.config.model_type.startswith("qwen3_5"):
        deep = []  # its config may name layers, but the language model adds nothing to them
    return mx.stack([rows, *deep]) if deep else cast(mx.array, rows)


def _omni_parts(package: Any, config: Any) -> dict[str, Module]:
    return {"vision_tower": tower_class(package.VisionModel)(config.vision_config)}


def _omni_audio(package: Any, audio: Mapping[str, Any], config: Any) -> dict[str, Module]:
    made = package.AudioConfig.from_dict({**audio})
    if made.n_window != 50:  # mlx-vlm and transformers count tokens by windows of 100 frames
        raise ValueError(f"audio_config.n_window is {made.n_window}, expected 50")
    return {"audio_tower": package.AudioModel(made)}


def _omni_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    """Return the rows of sounds, or of pictures or frames with what DeepStack adds to layers."""
    if "input_features" in inputs:
        features = inputs["input_features"]
        lengths = mx.array([features.shape[-1]] * len(features))
        joined = features.swapaxes(0, 1).flatten(1)
        return cast(mx.array, tower.audio_tower(joined, lengths))
    return _qwen_rows(tower, inputs)


def _omni_names(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    names = {
        ".merger_list.": ".deepstack_merger_list.", ".ln_q.": ".norm.", ".mlp.0.": ".linear_fc1.",
        ".mlp.2.": ".linear_fc2.",
    }  # fmt: skip
    found = {}
    for name, value in weights.items():
        if "merger" in name:
            for old, new in names.items():
                name = name.replace(old, new)
        found[name] = value
    return found


def _minicpmo_parts(package: Any, config: Any) -> dict[str, Module]:
    vision, width = config.vision_config, config.text_config.hidden_size
    resampler = package.minicpmo.Resampler(
        config.query_num, width, max(1, width // 128), vision.hidden_size
    )
    return {"vision_tower": package.VisionModel(vision), "resampler": resampler}


def _minicpmo_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    pixels, sizes = inputs["pixel_values"].transpose(1, 2, 0)[None], inputs["tgt_sizes"]
    seen = mx.ones((1, 1, int(mx.prod(sizes))), mx.bool_)
    states = tower.vision_tower(pixels, patch_attention_mask=seen, tgt_sizes=sizes)
    return cast(mx.array, tower.resampler(states, sizes)[0])


def _minicpmo_names(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    found = {}
    for name, value in weights.items():
        name = name.replace("vpm.", "vision_tower.", 1) if name.startswith("vpm.") else name
        if name.startswith(("resampler.", "vision_tower.")) and "position_ids" not in name:
            found[name] = value
    for kind in ("weight", "bias"):
        if (joined := found.pop(f"resampler.attn.in_proj_{kind}", None)) is not None:
            for part, value in zip("qkv", mx.split(joined, 3), strict=True):
                found[f"resampler.attn.{part}_proj.{kind}"] = value
    return found


def _paligemma_parts(package: Any, config: Any) -> dict[str, Module]:
    return {
        "vision_tower": package.VisionModel(config.vision_config),
        "multi_modal_projector": package.paligemma.PaliGemmaMultiModalProjector(config),
    }


def _paligemma_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    """The language model multiplies embeddings by what these are divided by."""
    pixels = inputs["pixel_values"].transpose(0, 2, 3, 1)
    states = [tower.vision_tower(each[None])[0] for each in pixels]  # it takes one picture
    return cast(mx.array, tower.multi_modal_projector(mx.concatenate(states)) / tower._width**0.5)


def _llama4_parts(package: Any, config: Any) -> dict[str, Module]:
    return {
        "vision_model": package.VisionModel(config.vision_config),
        "multi_modal_projector": package.vision.Llama4MultiModalProjector(config),
    }


def _llama4_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    rows = tower.multi_modal_projector(tower.vision_model(inputs["pixel_values"]))
    return cast(mx.array, rows.reshape(-1, tower._width))


def _mage_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    module: Any = importlib.import_module("mlx_vlm.models.mage_vl.mage_vl")
    grids = np.array(inputs["image_grid_thw"]).tolist()
    positions = module._positions_from_grid(grids, tower.config.vision_config)
    if "frame_number" in inputs:  # of a video
        positions[:, 0] = inputs["frame_number"]
    return cast(mx.array, tower.vision_tower(inputs["pixel_values"], positions, grids))


def _mllama_parts(package: Any, config: Any) -> dict[str, Module]:
    vision = config.vision_config
    return {
        "vision_tower": package.VisionModel(vision),
        "multi_modal_projector": nn.Linear(
            vision.vision_output_dim, config.text_config.hidden_size
        ),
    }


def _mllama_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    """Return the states of all tiles but those of padding, which no text sees."""
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    states = tower.vision_tower(*(inputs[name] for name in names))[0, 0]
    states = states[: int(inputs["aspect_ratio_mask"].sum())]
    return cast(mx.array, tower.multi_modal_projector(states).reshape(-1, tower._width))


def _mllama_names(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    return {n.replace("vision_model.", "vision_tower.", 1): value for n, value in weights.items()}


def _molmo_parts(package: Any, config: Any) -> dict[str, Module]:
    return {"vision_tower": package.VisionModel(config.vision_config)}


def _molmo_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    """Return the rows of a picture in the order of its tokens, whose embedding is added to each."""
    embedding = tower._table.embed_tokens(mx.array(tower._soft_ids[:1]))
    pixels = inputs["pixel_values"][None].astype(embedding.dtype)
    rows, _ = tower.vision_tower(pixels, inputs["image_masks"][None])
    places = np.array(inputs["image_input_idx"]).ravel()
    order = np.argsort(places, kind="stable")[(places < 0).sum() :]
    return cast(mx.array, rows.reshape(-1, tower._width)[mx.array(order)] + embedding)


def _molmo_names(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    return {n.replace("vision_backbone.", "vision_tower.", 1): v for n, v in weights.items()}


def _muse_parts(package: Any, config: Any) -> dict[str, Module]:
    text = config.text_config
    return {
        "vision_tower": package.VisionModel(config.vision_config),
        "vision_adapter": package.muse_glimmer.VisionAdapter(config),
        "vision_projection": nn.Linear(config.projector_hidden_size, text.hidden_size, bias=False),
    }


def _muse_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    """Return rows that the language model normalises, as those of all tokens."""
    states = tower.vision_tower(inputs["pixel_values"], inputs["image_grid_thw"])
    return cast(mx.array, tower.vision_projection(tower.vision_adapter(states)))


def _phi4_audio(package: Any, audio: Mapping[str, Any], config: Any) -> dict[str, Module]:
    made = config._audio_config
    if made.time_reduction != 8 or made.chunk_size != -1:
        raise ValueError("audio_processor.config: time_reduction is not 8, or chunk_size is not -1")
    # `_phi4_names` has brought the weights into the layout of MLX.
    body = {"sanitize": lambda self, weights: weights}
    encoder = type("AudioEncoder", (package.ConformerEncoder,), body)
    projection = package.audio.AudioProjection(made.attention_dim, config.hidden_size)
    return {"audio_encoder": encoder(made), "audio_projection": projection}


def _phi4_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    """Return the rows of sounds of one length, for prompts without pictures."""
    states, _ = tower.audio_encoder(inputs["input_features"])
    return cast(mx.array, tower.audio_projection(states, mode="speech").flatten(0, 1))


def _phi4_names(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return those of the audio tower; files of mlx-vlm have them by the names of its modules."""
    audio = {n.removeprefix(PHI4): v for n, v in weights.items() if n.startswith(PHI4)}
    if not audio:
        return {n: value for n, value in weights.items() if n.startswith("audio_")}
    module: Any = importlib.import_module("mlx_vlm.models.phi4mm")
    encoder = {
        n.replace("encoder.", "audio_encoder.", 1): value
        for n, value in audio.items()
        if n.startswith("encoder.")
    }
    projection = {
        re.sub(r"\.([02])\.", r".proj_\1.", n): value
        for n, value in audio.items()
        if n.startswith("audio_projection.")
    }
    return {**module.ConformerEncoder.sanitize(None, encoder), **projection}


def _phi3_parts(package: Any, config: Any) -> dict[str, Module]:
    return {"vision_embed_tokens": package.VisionModel(config)}


def _phi3_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    """mlx-vlm's tower writes its rows into those of a text."""
    rows, columns = (np.array(inputs["image_sizes"])[0] // 336).tolist()
    count = (rows * columns + 1) * 144 + 1 + (rows + 1) * 12
    made = tower.vision_embed_tokens(
        inputs["pixel_values"],
        mx.zeros((1, count, tower._width), inputs["pixel_values"].dtype),
        inputs["image_sizes"],
        [(0, 0)],
    )
    return cast(mx.array, made[0])


def _dots_parts(package: Any, config: Any) -> dict[str, Module]:
    return {"vision_tower": package.VisionModel(config.vision_config)}


def _dots_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    return cast(mx.array, tower.vision_tower(inputs["pixel_values"], inputs["image_grid_thw"]))


def _kimi_parts(package: Any, config: Any) -> dict[str, Module]:
    return {
        "vision_tower": package.VisionModel(config.vision_config),
        "mm_projector": package.kimi_k25.KimiK25MultiModalProjector(config),
    }


def _kimi_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    pixels, grid = inputs["pixel_values"].transpose(0, 2, 3, 1), inputs["image_grid_hws"]
    return mx.concatenate(tower.mm_projector(tower.vision_tower(pixels, grid_thw=grid)))


def _idefics2_parts(package: Any, config: Any) -> dict[str, Module]:
    return {
        "vision_model": package.VisionModel(config.vision_config),
        "connector": package.idefics2.Idefics2Connector(config),
    }


def _idefics2_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    """Encode each view without its padding, which mlx-vlm's tower attends to.

    Patches with padding are left out, as in transformers.
    """
    patch, found = tower.config.vision_config.patch_size, []
    masks = np.array(inputs["pixel_attention_mask"])[0]
    for pixels, mask in zip(inputs["pixel_values"][0], masks, strict=True):
        height, width = (
            int(seen.sum()) // patch * patch for seen in (mask.any(axis=1), mask.any(axis=0))
        )
        view = pixels[:, :height, :width].transpose(1, 2, 0)[None]
        found.append(tower.connector(tower.vision_model(view)[0])[0])
    return mx.concatenate(found)


def _paddle_parts(package: Any, config: Any) -> dict[str, Module]:
    return {"visual": package.VisionModel(config.vision_config)}


def _paddle_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    rows: mx.array = tower.visual(inputs["pixel_values"][None], inputs["image_grid_thw"])
    return rows.reshape(-1, rows.shape[-1])


def _paddle_names(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    module: Any = importlib.import_module("mlx_vlm.models.paddleocr_vl")
    given = {name.replace("vision_tower.", "visual.", 1): value for name, value in weights.items()}
    return cast(dict[str, mx.array], module.Model.sanitize(None, given))


def _kimi_names(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    return {name.replace("encoder.", ""): value for name, value in weights.items()}


#: By model type, what gives tensors the names of mlx-vlm's modules.
RENAMED: Mapping[str, Callable[[dict[str, mx.array]], dict[str, mx.array]]] = {
    "kimi_k25": _kimi_names,
    "minicpmo": _minicpmo_names,
    "mllama": _mllama_names,
    "molmo": _molmo_names,
    "paddleocr_vl": _paddle_names,
    "phi4mm": _phi4_names,
    "qwen3_omni_moe": _omni_names,
}
#: By model type, the modules that encode sounds.
SOUND_PARTS: Mapping[str, Callable[[Any, Mapping[str, Any], Any], dict[str, Module]]] = {
    "gemma3n": _gemma3n_audio,
    "gemma4_unified": _gemma4_unified_audio,
    "phi4mm": _phi4_audio,
    "qwen3_omni_moe": _omni_audio,
}
#: By model type: the modules that encode pictures, by the names of their tensors; how they do it;
#: and whether the language model gets embeddings that are multiplied by the root of the width.
PARTS: Mapping[
    str,
    tuple[
        Callable[[Any, Any], dict[str, Module]],
        Callable[[Any, Mapping[str, mx.array]], mx.array],
        bool,
    ],
] = {
    "dots_ocr": (_dots_parts, _dots_rows, False),
    "gemma3n": (_gemma3n_parts, _gemma3n_rows, True),
    "gemma4_unified": (_gemma4_unified_parts, _gemma4_unified_rows, False),
    "idefics2": (_idefics2_parts, _idefics2_rows, False),
    "kimi_k25": (_kimi_parts, _kimi_rows, False),
    "llama4": (_llama4_parts, _llama4_rows, False),
    "mage_vl": (_dots_parts, _mage_rows, False),
    "mllama": (_mllama_parts, _mllama_rows, False),
    "molmo": (_molmo_parts, _molmo_rows, False),
    "muse_glimmer": (_muse_parts, _muse_rows, False),
    "minicpmo": (_minicpmo_parts, _minicpmo_rows, False),
    "paddleocr_vl": (_paddle_parts, _paddle_rows, False),
    "paligemma": (_paligemma_parts, _paligemma_rows, False),
    "phi3_v": (_phi3_parts, _phi3_rows, False),
    "phi4mm": (lambda package, config: {}, _phi4_rows, False),
    "qwen3_omni_moe": (_omni_parts, _omni_rows, False),
}


def _deepseek_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    """Return the embeddings of a picture: its rows, a separator, and the rows of all tiles.

    mlx-vlm's own function gave two different results for one picture, in turns (0.7.10, on a CPU).
    """
    pixels = inputs["pixel_values"][0].transpose(0, 2, 3, 1)
    features = tower.projector(tower.vision(pixels)[0])
    columns, rows = np.array(inputs["images_spatial_crop"])[0, 0].tolist()
    side, width = math.isqrt(features.shape[1]), features.shape[-1]

    def ended(grid: mx.array) -> mx.array:
        ends = mx.broadcast_to(tower.image_newline, (grid.shape[0], 1, width))
        return mx.concatenate([grid, ends], axis=1).reshape(-1, width)

    tiles = features[1:].reshape(rows, columns, side, side, width).swapaxes(1, 2)
    parts = [
        ended(features[0].reshape(side, side, width)),
        tower.view_separator[None],
        ended(tiles.reshape(rows * side, columns * side, width)),
    ]
    return mx.concatenate(parts if tower.global_view_pos == "head" else parts[::-1])


def _granite4_rows(tower: Any, inputs: Mapping[str, mx.array]) -> mx.array:
    """Return what is added before each layer of `added_layers`, the first one's as embeddings."""
    config, sizes = tower.config, np.array(inputs["image_sizes"]).tolist()
    pixels = inputs["pixel_values"][0].transpose(0, 2, 3, 1)
    *_, states = tower.vision_tower(pixels, output_hidden_states=True)
    first = 1 if config.vision_feature_select_strategy == "default" else 0
    projected = [
        (target, projector(states[layer][:, first:]))
        for projector, (layer, target) in zip(
            tower.layerwise_projectors, config.deepstack_layer_map or [], strict=True
        )
    ]
    if config.use_spatial_sampling and config.spatial_target_layers:
        chosen = states[config.spatial_vision_layer][:, first:]
        projected += [
            (target, projector(chosen))
            for target, projector in zip(
                config.spatial_target_layers, tower.spatial_projectors, strict=True
            )
        ]
    added: dict[int, mx.array] = {}
    for target, made in projected:
        (packed,) = tower._pack_and_unpad_image_features(
            [made], sizes, config.vision_feature_select_strategy
        )
        added[target] = added[target] + packed if target in added else packed
    shape = next(iter(added.values())).shape
    rows = added.pop(0, mx.zeros(shape)) / tower.multiplier  # the language model multiplies by it
    return mx.stack([rows, *(added[target] for target in sorted(added))])


def _minicpm_arguments(placed: mx.array, inputs: Mapping[str, mx.array]) -> dict[str, Any]:
    """Return the views, whose patches are in one array, as a list."""
    patch = inputs["pixel_values"].shape[1]
    ends = np.cumsum(np.prod(np.array(inputs["tgt_sizes"]), axis=1) * patch)[:-1].tolist()
    (rows,) = np.nonzero(np.array(placed))
    return {
        "pixel_values": [mx.split(inputs["pixel_values"], ends, axis=-1)],
        "tgt_sizes": [inputs["tgt_sizes"]],
        "image_bound": [np.stack([rows, rows + 1], axis=-1)],
    }


#: By model type, how a picture is encoded if each of its tokens stands for a part of it.
ROWS: Mapping[str, Callable[[Any, Mapping[str, mx.array]], mx.array]] = {
    "deepseek_vl_v2": _deepseek_rows,
    "granite4_vision": _granite4_rows,
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        _qwen_rows,
    ),
}
#: By model type, what mlx-vlm's model is called with: from the rows of a picture, bool [rows], and
#: the inputs of the encoder.
PREPARED: Mapping[str, Callable[[mx.array, Mapping[str, mx.array]], dict[str, Any]]] = {
    "minicpmv4_6": _minicpm_arguments,
}
