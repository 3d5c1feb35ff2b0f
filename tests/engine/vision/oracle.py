"""Write transformers.json: the tokens of transformers' models for the tiny models of `tiny.py`.

Needs torch, which the engine and its tests do not:

    python -m tests.engine.vision.oracle
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from modelpack_engine.request import EngineRequest
from tests.engine.vision import tiny
from tests.engine.vision.tiny import picture, request

#: Kinds that transformers has, too, and among them all that mlx-vlm computes otherwise, but for
#: gemma3n and granite4_vision.
ORACLE_KINDS = (
    "aya_vision", "gemma3", "gemma4", "glm4v", "glm_ocr", "granite_vision", "idefics2", "idefics3",
    "internvl", "lfm2_vl", "llava", "llava_next", "llava_onevision", "mistral3", "mllama",
    "muse_glimmer", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl", "smolvlm",
)  # fmt: skip
#: Parts whose names in transformers begin with "model.".
_PARTS = (
    "connector.", "embed_vision.", "image_newline", "multi_modal_projector.", "vision_model.",
    "vision_tower.", "visual.",
)  # fmt: skip
_VISUAL = ("vision_tower.", "visual.")
_FLAT = ("vision_tower.vision_model.", "vision_tower.")
#: What else differs in names of tensors, by kind.
_RENAMED = {
    **dict.fromkeys(("glm4v", "glm_ocr", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl"), _VISUAL),
    **dict.fromkeys(("lfm2_vl", "mistral3"), _FLAT),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), ("language_model.", "model.text_model.")),
    "mllama": ("vision_tower.", "vision_model."),
}
#: What configs of published models have, and the tiny ones leave to mlx-vlm.
_VISION = {"internvl": {"attention_bias": True}, "mistral3": {"hidden_act": "silu"}}
#: Kinds of which transformers gets a type of each token: 1 for those of pictures.
_TYPED = ("gemma3", "gemma4", "glm4v", "glm_ocr", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl")
ANSWERS = Path(__file__).parent / "transformers.json"
_SHIFTED = ("layernorm.weight", "model.norm.weight", "q_norm.weight", "k_norm.weight")


def prompt(kind: str) -> EngineRequest:
    """Return a prompt with two pictures of different shapes."""
    engine = tiny.tiny_engine(kind)
    text = "this is <image> and that is <image>, see?"
    if kind == "mllama":  # transformers lets text before the first picture see all of them
        text = "<image> is this, and that is <image>, see?"
    return request(engine, text, [picture(1), picture(2, 31, 17)], 24)


def _config(kind: str) -> dict[str, Any]:
    config = tiny.config_of(kind)
    if kind == "mllama":  # its defaults are larger than this vocabulary
        config["text_config"] |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "granite_vision":
        config["model_type"] = "llava_next"
    config["vision_config"] |= _VISION.get(kind, {})
    if "text_config" not in config:  # Qwen2-VL's
        return config
    text = config["text_config"]
    tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    config["text_config"] = {**text, "use_double_wide_mlp": True, "tie_word_embeddings": tied}
    return {**config, "tie_word_embeddings": tied}


def _weights(kind: str) -> dict[str, mx.array]:
    """Return a model's weights in the layout of transformers."""
    found = mx.load(str(tiny.directory(kind) / "model.safetensors"))
    assert isinstance(found, dict)
    made = {}
    for name, value in found.items():
        if kind == "qwen3_5" and name.startswith("language_model.") and name.endswith(_SHIFTED):
            value = value - 1
        if "conv1d" in name or ".conv.conv." in name:
            value = value.moveaxis(2, 1)
        elif value.ndim > 3:  # channels first
            value = value.moveaxis(-1, 1)
        if kind != "gemma3":
            name = name.replace("language_model.model.", "model.language_model.")
            name = name.replace("language_model.lm_head", "lm_head")
            if name.startswith(_PARTS):
                name = f"model.{name}"
            name = name.replace(*_RENAMED.get(kind, ("", "")))
            name = name.replace("head.attention.in_proj.", "head.attention.in_proj_")
        made[name] = mx.contiguous(value)
    return made


def tokens(kind: str) -> list[int]:
    """Return the greedy tokens of transformers' model."""
    import torch
    from transformers import AutoModelForImageTextToText

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        mx.save_safetensors(str(path / "model.safetensors"), _weights(kind), {"format": "pt"})
        (path / "config.json").write_text(json.dumps(_config(kind)))
        model, info = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
    unread = [name for names in info.values() for name in names if "vision_tower.head." not in name]
    assert not unread, unread  # nothing reads SigLIP's head
    made = prompt(kind)
    ids = np.array([made.prompt_token_ids])
    if kind == "mllama":
        given = _crossing(ids[0].tolist(), made)
        return _generated(model, ids, given, made.params.max_tokens)
    given = {}
    if kind == "paligemma":
        given["token_type_ids"] = np.zeros_like(ids)
    elif kind in _TYPED:
        soft = {"gemma3": tiny.SOFT, "gemma4": tiny.SOFT4}.get(kind)
        soft = tiny.config_of(kind)["image_token_id"] if soft is None else soft
        types = "token_type_ids" if kind == "gemma3" else "mm_token_type_ids"
        given[types] = (ids == soft).astype(np.int64)
    for name in made.media[0].inputs:
        parts = [np.asarray(media.inputs[name]) for media in made.media]
        if kind in ("idefics2", "idefics3", "smolvlm"):  # padded to the largest picture
            given[name] = np.concatenate(_padded(parts, 2), axis=1)
            continue
        if kind == "lfm2_vl":
            if name == "image_sizes":
                continue
            parts = _padded(parts, 1)
        if kind == "mistral3" and name == "pixel_values":
            parts = _padded(parts, 2)
        if kind == "gemma4":  # padded to the most patches of a picture, with positions of -1
            fill = -1 if name == "image_position_ids" else 0
            parts = [
                np.pad(part, [(0, 0), (0, 280 - part.shape[1]), (0, 0)], constant_values=fill)
                for part in parts
            ]
        given[name] = np.concatenate(parts)
    return _generated(model, ids, given, made.params.max_tokens)


def _padded(parts: list[Any], first: int) -> list[Any]:
    """Return arrays padded with zeros, from axis `first` on, to the size of the largest."""
    most = np.max([part.shape for part in parts], axis=0)
    return [
        np.pad(
            part, [(0, int(n) if axis >= first else 0) for axis, n in enumerate(most - part.shape)]
        )
        for part in parts
    ]


def _crossing(ids: list[int], made: EngineRequest) -> dict[str, Any]:
    """Return the pictures of a prompt, with the mask of what its tokens see."""
    from mlx_vlm.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    given = {
        name: np.concatenate([media.inputs[name] for media in made.media], axis=1)
        for name in made.media[0].inputs
    }
    sparse: Any = get_cross_attention_token_mask
    dense: Any = convert_sparse_cross_attention_mask_to_dense
    tiles = given["aspect_ratio_mask"].sum(axis=-1).tolist()
    token = tiny.config_of("mllama")["image_token_index"]
    mask = dense([sparse(ids, token)], num_tiles=tiles, max_num_tiles=4, length=len(ids))
    return {**given, "cross_attention_mask": mask}


def _generated(model: Any, ids: Any, given: dict[str, Any], count: int) -> list[int]:
    """Return the greedy tokens of a model."""
    import torch

    given = given | {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with torch.no_grad():
        found = model.eval().generate(
            **{name: torch.tensor(value) for name, value in given.items()},
            max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return [int(token) for token in found[0, ids.shape[1] :]]


if __name__ == "__main__":
    answers = {kind: tokens(kind) for kind in ORACLE_KINDS}
    lines = [f' "{kind}": {json.dumps(found)}' for kind, found in answers.items()]
    ANSWERS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
