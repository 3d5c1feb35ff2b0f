"""GGUF projectors (mmproj): an encoder of pictures beside a GGUF language model.

`GGUFProjector` returns what a directory of safetensors has for mlx-vlm's classes: the config.json,
the preprocessor_config.json and the weights of the vision tower. `PROJECTORS` has a row for each
type of projector that runs. Sources: llama.cpp's tools/mtmd/clip.cpp and conversion/*.py for the
contents of a file, mlx_vlm/models/*/config.py for the fields of a class.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from modelpack.errors import ModelpackError
from modelpack.formats.gguf import GGUFHeader, read_gguf_header
from modelpack.formats.projector import (
    PROJECTOR_ARCHITECTURE,
    architecture_of,
    projected_width,
    projector_type,
)
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models.gguf import TensorPlan, arrays_of
from modelpack_engine.models.gguf_blocks import Floats
from modelpack_engine.models.gguf_file import Bytes, GGUFFile
from modelpack_engine.models.gguf_hyperparameters import Config, Hyperparameters
from modelpack_engine.models.gguf_tensors import Parameter, Source, Target, halves, minus_one
from modelpack_engine.models.load_budget import TensorBounds
from modelpack_engine.models.precision import named
from modelpack_engine.patches.mlx_vlm_imports import is_installed
from modelpack_engine.vision.layouts import MAX_SIDE
from modelpack_engine.vision.models import CLASSES, Encode
from modelpack_engine.vision.towers import open_tower

#: From the stem of a tensor's name to the path that safetensors have.
Names = Mapping[str, str | Target]
_BLOCK = re.compile(r"v\.blk\.([0-9]{1,6})\.(.+)")
_DEEP = re.compile(r"v\.deepstack\.([0-9]{1,6})\.(.+)")
#: The limits that llama.cpp sets for Qwen's pictures, in tokens.
_QWEN_TOKENS = (8, 4096)
_DEFAULT_WINDOW = 112
_MAX_PATCHES = 1024  # a side
_GELU, _QUICK_GELU, _SILU = "gelu", "gelu_quick", "silu"
_PIXEL_STEPS: Config = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
    "rescale_factor": 1 / 255,
}  # fmt: skip
_BILINEAR, _LANCZOS, _BICUBIC = 2, 1, 3


@dataclass(frozen=True, slots=True)
class Encoder:
    """The hyperparameters of an encoder of pictures: `values`, without the prefix "clip.vision.".

    `feed_forward` is the width of hidden layers by the tensors: the metadata of Qwen2-VL have the
    width of the language model there. `text` is the config of the language model.
    """

    values: Hyperparameters
    feed_forward: int
    text: Config

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return the shape of a tensor, in numpy's order; raise `ModelLoadError` without it."""
        if tensor not in self.values.file:
            raise self.values.metadata.error(f"the tensor {tensor!r} is missing")
        return self.values.file[tensor].shape

    @property
    def sizes(self) -> Config:
        """The fields that most vision configs have."""
        values = self.values
        return {
            "hidden_size": values.integer("embedding_length"),
            "intermediate_size": self.feed_forward,
            "num_attention_heads": values.integer("attention.head_count"),
            "num_hidden_layers": values.integer("block_count"),
            "num_channels": 3,
            "image_size": values.integer("image_size"),
            "patch_size": values.integer("patch_size"),
            "layer_norm_eps": values.number("attention.layer_norm_epsilon"),
        }

    @property
    def merge(self) -> int:
        """The rows and columns of patches that become one token of Qwen's."""
        return self.values.integer("spatial_merge_size", 2)

    @property
    def text_width(self) -> int:
        return int(self.text["hidden_size"])


@dataclass(frozen=True, slots=True)
class Projector:
    """How a type of projector becomes a tower of mlx-vlm.

    `model_type` is the class. `layer` maps the names of tensors inside a block to paths inside
    `layers`, `outer` those of other tensors; `left_out` are tensors that mlx-vlm's class does not
    need, and `unread` norms that it has, whose output nothing reads and which files lack.
    `config` returns the vision_config, and fields of the config.json beside it; `settings` those of
    the preprocessor_config.json. `activation` is that of the class. `text_types` are mlx-lm's
    classes that it needs; without any, all that take embeddings will do.
    """

    model_type: str
    layers: str
    layer: Names
    outer: Names
    config: Callable[[Encoder], tuple[Config, Config]]
    settings: Callable[[Encoder], Config]
    activation: str = _GELU
    left_out: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    text_types: tuple[str, ...] = ()


def _stacked(config: Mapping[str, Any], parts: Sequence[Bytes]) -> Bytes:
    """Join the kernels of two frames, [out, channels, rows, bytes], as one over frames."""
    return np.stack(parts, axis=2)


def _row_of_one(values: Floats) -> Floats:
    return values.reshape(1, *values.shape[-2:]) if values.ndim > 1 else values.reshape(1, 1, -1)


def _parameter(path: str, values: Callable[[Floats], Floats] | None = None) -> Target:
    return Target(path, values=values, is_parameter=True)


_VIT: Names = {
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_QKV: Names = {
    "attn_qkv": "attn.qkv",
    "attn_q": "attn.qkv",
    "attn_k": Target("attn.qkv", place=1),
    "attn_v": Target("attn.qkv", place=2),
    "attn_out": "attn.proj",
    "ln1": "norm1",
    "ln2": "norm2",
}


def _vit_outer(prefix: str) -> Names:
    return {
        "v.patch_embd": f"{prefix}.embeddings.patch_embedding",
        "v.position_embd": f"{prefix}.embeddings.position_embedding",
        "v.post_ln": f"{prefix}.post_layernorm",
    }


def _idefics3(encoder: Encoder) -> tuple[Config, Config]:
    scale = encoder.values.integer("projector.scale_factor", 2)
    return {**encoder.sizes, "model_type": "idefics3_vision"}, {"scale_factor": scale}


def _idefics3_settings(encoder: Encoder) -> Config:
    """A picture is cut into tiles if the longest edge is longer than that of a tile."""
    edge = encoder.values.integer("image_size")
    longest = encoder.values.integer("preproc_image_size", edge)
    return {
        "image_processor_type": "Idefics3ImageProcessor",
        "do_pad": True,
        "do_image_splitting": longest > edge,
        "size": {"longest_edge": longest},
        "max_image_size": {"longest_edge": edge},
        "resample": _LANCZOS,
    }


def _llava(encoder: Encoder) -> tuple[Config, Config]:
    """The layer of the features: the last, as files have no later ones, unless they name another.

    Encoders with an embedding of the whole picture (CLIP) leave it out. LLaVA 1.6 cuts pictures
    into tiles.
    """
    if "image_grid_pinpoints" in encoder.values:
        raise encoder.values.metadata.error("pictures in tiles (LLaVA 1.6) are not supported")
    is_clip = "v.class_embd" in encoder.values.file
    key = "clip.vision.feature_layer"
    layer = encoder.values.integer("block_count")
    if encoder.values.metadata.is_array(key):
        layers = encoder.values.metadata.numbers(key).tolist()
        if len(layers) != 1 or not 0 <= layers[0] <= layer:
            raise encoder.values.metadata.error(
                f"features of the layers {layers} are not supported"
            )
        layer = int(layers[0])
    kind = "clip_vision_model" if is_clip else "siglip_vision_model"
    # Files with another activation are refused.
    return {**encoder.sizes, "model_type": kind, "hidden_act": "quick_gelu"}, {
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "default" if is_clip else "full",
    }


def _llava_settings(encoder: Encoder) -> Config:
    edge = encoder.values.integer("image_size")
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "crop_size": {"height": edge, "width": edge},
        "size": {"shortest_edge": edge},
        "resample": _BICUBIC,
    }


def _pixtral(encoder: Encoder) -> tuple[Config, Config]:
    sizes = encoder.sizes
    heads = sizes["num_attention_heads"]
    vision_config = {
        **sizes,
        "model_type": "pixtral",
        "head_dim": sizes["hidden_size"] // heads if heads > 0 else 0,
        "rms_norm_eps": sizes["layer_norm_eps"],
        "rope_theta": 10000.0,
    }
    is_merged = "mm.patch_merger.weight" in encoder.values.file
    return vision_config, {
        "model_type": "mistral3" if is_merged else "pixtral",
        "vision_feature_layer": -1,
        "multimodal_projector_bias": "mm.1.bias" in encoder.values.file,
        "spatial_merge_size": encoder.values.integer("spatial_merge_size", 1),
    }


def _pixtral_settings(encoder: Encoder) -> Config:
    edge = encoder.values.integer("patch_size")
    return {
        "image_processor_type": "PixtralImageProcessor",
        "size": {"longest_edge": encoder.values.integer("image_size")},
        "patch_size": {"height": edge, "width": edge},
        "resample": _BICUBIC,
    }


def _qwen_sizes(encoder: Encoder) -> Config:
    sizes = encoder.sizes
    return {
        "depth": sizes["num_hidden_layers"],
        "num_heads": sizes["num_attention_heads"],
        "patch_size": sizes["patch_size"],
        "in_channels": 3,
        "temporal_patch_size": 2,
        "spatial_merge_size": encoder.merge,
    }


def _qwen2(encoder: Encoder) -> tuple[Config, Config]:
    width = encoder.sizes["hidden_size"]
    return {
        **_qwen_sizes(encoder),
        "model_type": "qwen2_vl",
        "embed_dim": width,
        "hidden_size": encoder.text_width,
        "mlp_ratio": encoder.feed_forward / width if width > 0 else 0,
    }, {}


def _qwen25(encoder: Encoder) -> tuple[Config, Config]:
    """Every n-th block attends to the whole picture, the others in windows."""
    depth = encoder.sizes["num_hidden_layers"]
    period = encoder.values.integer("n_wa_pattern")
    if period < 1:
        raise encoder.values.metadata.error(f"clip.vision.n_wa_pattern is {period}")
    return {
        **_qwen_sizes(encoder),
        "model_type": "qwen2_5_vl",
        "hidden_size": encoder.sizes["hidden_size"],
        "intermediate_size": encoder.feed_forward,
        "out_hidden_size": encoder.text_width,
        "window_size": encoder.values.integer("window_size", _DEFAULT_WINDOW),
        "fullatt_block_indexes": list(range(period - 1, depth, period)),
    }, {}


def _qwen3(encoder: Encoder) -> tuple[Config, Config]:
    return {
        **_qwen_sizes(encoder),
        "model_type": encoder.text["model_type"],
        "hidden_size": encoder.sizes["hidden_size"],
        "intermediate_size": encoder.feed_forward,
        "out_hidden_size": encoder.text_width,
        "num_position_embeddings": encoder.shape("v.position_embd.weight")[0],
        "deepstack_visual_indexes": _deep_blocks(encoder.values),
    }, {"model_type": encoder.text["model_type"]}


def _deep_blocks(values: Hyperparameters) -> list[int]:
    """Return the blocks whose output is added to the first layers of the language model."""
    return [at for at, is_deep in enumerate(values.flags("is_deepstack_layers") or []) if is_deep]


def _qwen_settings(encoder: Encoder) -> Config:
    edge = encoder.values.integer("patch_size")
    fewest, most = (count * (edge * encoder.merge) ** 2 for count in _QWEN_TOKENS)
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": edge,
        "merge_size": encoder.merge,
        "temporal_patch_size": 2,
        "min_pixels": encoder.values.integer("image_min_pixels", fewest),
        "max_pixels": encoder.values.integer("image_max_pixels", most),
        "resample": _BICUBIC,
    }


def _gemma3(encoder: Encoder) -> tuple[Config, Config]:
    sizes = encoder.sizes
    scale = encoder.values.integer("projector.scale_factor", 4)
    side = sizes["image_size"] // max(sizes["patch_size"] * scale, 1)
    return {**sizes, "model_type": "siglip_vision_model"}, {"mm_tokens_per_image": side**2}


def _gemma3_settings(encoder: Encoder) -> Config:
    edge = encoder.values.integer("image_size")
    return {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": edge, "width": edge},
        "resample": _BILINEAR,
    }


def _internvl(encoder: Encoder) -> tuple[Config, Config]:
    scale = encoder.values.integer("projector.scale_factor", 2)
    file = encoder.values.file
    vision_config = {
        **encoder.sizes,
        "model_type": "intern_vit_6b",
        "qkv_bias": "v.blk.0.attn_q.bias" in file,
        "qk_normalization": "v.blk.0.attn_q_norm.weight" in file,
        "norm_type": "layer_norm" if "v.blk.0.ln1.bias" in file else "rms_norm",
    }
    return vision_config, {"downsample_ratio": 1 / scale if scale > 0 else 0}


def _internvl_settings(encoder: Encoder) -> Config:
    edge = encoder.values.integer("image_size")
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": True,
        "min_patches": encoder.values.integer("preproc_min_tiles", 1),
        "max_patches": encoder.values.integer("preproc_max_tiles", 12),
        "size": {"height": edge, "width": edge},
        "resample": _BICUBIC,
    }


_PIXTRAL_TOWER = "vision_tower.transformer.layers"
_PIXTRAL = Projector(
    "pixtral",
    _PIXTRAL_TOWER,
    {
        "attn_q": Target("attention.q_proj", rows=halves("num_attention_heads")),
        "attn_k": Target("attention.k_proj", rows=halves("num_attention_heads")),
        "attn_v": "attention.v_proj",
        "attn_out": "attention.o_proj",
        "ln1": "attention_norm",
        "ln2": "ffn_norm",
        **{f"ffn_{part}": f"feed_forward.{part}_proj" for part in ("gate", "up", "down")},
    },
    {
        "v.patch_embd": "vision_tower.patch_conv",
        "v.pre_ln": "vision_tower.ln_pre",
        "mm.1": "multi_modal_projector.linear_1",
        "mm.2": "multi_modal_projector.linear_2",
        "mm.input_norm": "multi_modal_projector.norm",
        "mm.patch_merger": "multi_modal_projector.patch_merger.merging_layer",
    },
    _pixtral,
    _pixtral_settings,
    activation=_SILU,
    left_out=("v.token_embd.img_break",),  # the language model has it
)
_QWEN_OUTER: Names = {
    "v.patch_embd.weight": Target("vision_tower.patch_embed.proj.weight", join=_stacked,
                                  is_parameter=True),
    "v.patch_embd.weight.1": Target("vision_tower.patch_embed.proj.weight", join=_stacked,
                                    place=1, is_parameter=True),
    "v.patch_embd": "vision_tower.patch_embed.proj",
    "v.post_ln": "vision_tower.merger.ln_q",
    "mm.0": "vision_tower.merger.mlp.0",
    "mm.2": "vision_tower.merger.mlp.2",
}  # fmt: skip
_VIT_TOWER = "vision_tower.vision_model"

#: The projectors that run, by their types.
PROJECTORS: Mapping[str, Projector] = {
    "idefics3": Projector(
        "idefics3",
        "vision_model.encoder.layers",
        _VIT,
        {**_vit_outer("vision_model"), "mm.model.fc": "connector.modality_projection.proj"},
        _idefics3,
        _idefics3_settings,
    ),
    "mlp": Projector(
        "llava",
        f"{_VIT_TOWER}.encoder.layers",
        _VIT,
        {
            **_vit_outer(_VIT_TOWER),
            "v.class_embd": _parameter(f"{_VIT_TOWER}.embeddings.class_embedding"),
            "v.pre_ln": f"{_VIT_TOWER}.pre_layrnorm",
            "mm.0": "multi_modal_projector.linear_1",
            "mm.2": "multi_modal_projector.linear_2",
        },
        _llava,
        _llava_settings,
        activation=_QUICK_GELU,
        unread=(f"{_VIT_TOWER}.post_layernorm",),
    ),
    "pixtral": _PIXTRAL,
    "qwen2vl_merger": Projector(
        "qwen2_vl",
        "vision_tower.blocks",
        {**_QKV, "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
        _QWEN_OUTER,
        _qwen2,
        _qwen_settings,
        text_types=("qwen2_vl",),
        activation=_QUICK_GELU,
    ),
    "qwen2.5vl_merger": Projector(
        "qwen2_5_vl",
        "vision_tower.blocks",
        {**_QKV, **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}},
        _QWEN_OUTER,
        _qwen25,
        _qwen_settings,
        text_types=("qwen2_vl",),
        activation=_SILU,
    ),
    "qwen3vl_merger": Projector(
        "qwen3_vl",
        "vision_tower.blocks",
        {**_QKV, "ffn_up": "mlp.linear_fc1", "ffn_down": "mlp.linear_fc2"},
        {
            **_QWEN_OUTER,
            "v.position_embd": "vision_tower.pos_embed",
            "v.post_ln": "vision_tower.merger.norm",
            "mm.0": "vision_tower.merger.linear_fc1",
            "mm.2": "vision_tower.merger.linear_fc2",
        },
        _qwen3,
        _qwen_settings,
        text_types=("qwen3_vl", "qwen3_vl_moe"),
    ),
    "gemma3": Projector(
        "gemma3",
        f"{_VIT_TOWER}.encoder.layers",
        _VIT,
        {
            **_vit_outer(_VIT_TOWER),
            "mm.input_projection.weight": _parameter(
                "multi_modal_projector.mm_input_projection_weight"
            ),
            "mm.soft_emb_norm": Target("multi_modal_projector.mm_soft_emb_norm", values=minus_one),
        },
        _gemma3,
        _gemma3_settings,
    ),
    "internvl": Projector(
        "internvl_chat",
        "vision_model.encoder.layers",
        {
            **_QKV,
            "attn_q_norm": "attn.q_norm",
            "attn_k_norm": "attn.k_norm",
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
            "ls1.weight": _parameter("ls1"),
            "ls2.weight": _parameter("ls2"),
        },
        {
            "v.patch_embd": "vision_model.embeddings.patch_embedding",
            "v.class_embd": _parameter("vision_model.embeddings.class_embedding", _row_of_one),
            "v.position_embd.weight": _parameter(
                "vision_model.embeddings.position_embedding", _row_of_one
            ),
            **{f"mm.model.mlp.{at}": f"mlp1.{at}" for at in (0, 1, 3)},
        },
        _internvl,
        _internvl_settings,
    ),
}


def runs(path: Path) -> bool:
    """Return whether the projector in a file runs here, by its header."""
    try:
        _checked_header(path)
    except ModelpackError:
        return False
    return is_installed()


def _checked_header(path: Path) -> tuple[GGUFHeader, str]:
    """Return the header of a projector, and its type. Raises `ModelLoadError` if it does not run.

    Raises what `read_gguf_header` raises for a damaged file.
    """
    header = read_gguf_header(path)
    architecture, kind = architecture_of(header), projector_type(header)
    if architecture != PROJECTOR_ARCHITECTURE:
        raise ModelLoadError(
            f"the projector is a GGUF of the architecture {str(architecture)[:100]!r}, expected"
            f" {PROJECTOR_ARCHITECTURE!r}"
        )
    if kind is None:
        raise ModelLoadError("the projector has no encoder of pictures")
    row = PROJECTORS.get(kind)
    if row is None or row.model_type not in CLASSES:
        supported = sorted(name for name, row in PROJECTORS.items() if row.model_type in CLASSES)
        raise ModelLoadError(
            f"the projector type {kind[:100]!r} is not supported; supported types are"
            f" {', '.join(supported)}"
        )
    return header, kind


class GGUFProjector:
    """A projector that is opened for the language model with the config `text`.

    `config` is what config.json would be, `settings` what preprocessor_config.json would be.
    """

    def __init__(self, path: Path, text: Config, encode: Encode) -> None:
        """Read the metadata; `encode` is the language model's tokenizer.

        Raises `ModelLoadError`, naming the cause, for a projector that does not run here or does
        not fit the language model, and `WeightFormatError` for a damaged file.
        """
        header, kind = _checked_header(path)
        text = {**(text.get("text_config") or text), "model_type": text["model_type"]}
        self._row = row = PROJECTORS[kind]
        self._file = GGUFFile.open([path])
        self._values = Hyperparameters("clip.vision", self._file.metadata, self._file)
        self._error = self._file.metadata.error
        width, wanted = projected_width(header), int(text["hidden_size"])
        if width is None:
            raise ModelLoadError(f"the tensors are not those of a projector of the type {kind!r}")
        if width != wanted:
            raise ModelLoadError(
                f"the projector makes embeddings of width {width}, the model takes {wanted}",
                hint="use the mmproj file that is published with the model",
            )
        if row.text_types and text["model_type"] not in row.text_types:
            raise ModelLoadError(
                f"the projector type {kind!r} does not fit a language model of the class"
                f" {text['model_type']!r}"
            )
        self._check_blocks()
        self._check_sizes()
        self._is_swapped, feed_forward = self._feed_forward()
        self._check_activation()
        encoder = Encoder(self._values, feed_forward, text)
        vision_config, extra = row.config(encoder)
        TensorBounds.of((name, self._file[name].shape) for name in self._file.names).check(
            vision_config, str(path)
        )
        self.settings = {**_PIXEL_STEPS, **self._normalisation(), **row.settings(encoder)}
        self.config: Config = {
            **text,  # where Qwen2-VL's config.json has them
            "model_type": row.model_type,
            "text_config": text,
            "vision_config": vision_config,
            **extra,
        }
        self.config |= self._token_ids(encode)

    def tower(self, model: Module, dtype: mx.Dtype) -> Any:
        """Return the vision tower, not evaluated, beside the language model `model`."""
        bounds = TensorBounds.of((name, self._file[name].shape) for name in self._file.names)
        with bounds.building(str(self._file.metadata.path)):
            return open_tower(self.config, self.weights(dtype), model, dtype)

    def weights(self, dtype: mx.Dtype) -> dict[str, mx.array]:
        """Return the dequantised weights by the names that safetensors have.

        Raises `ModelLoadError`, naming the tensors, if they are not those of this projector.
        """
        found: dict[tuple[str, str], list[Source]] = {}
        unknown = []
        for name in self._file.names:
            target = self._target(name)
            if target is None:
                unknown.append(name)
                continue
            parameter = name.rpartition(".")[2]
            path, parameter = target.resolved("", parameter)
            source = Source(self._file[name], target, self.config["vision_config"])
            found.setdefault((path, parameter), []).append(source)
        left = [name for name in unknown if not name.startswith(("a.", "mm.a."))]
        left = [name for name in left if name not in self._row.left_out]
        if left:
            raise self._error(f"this projector type has no such tensors: {named(left)}")
        try:
            plans = [
                TensorPlan(Parameter(*key, tuple(sorted(sources, key=lambda s: s.target.place))))
                for key, sources in found.items()
            ]
            made = dict(arrays_of(plans, dtype))
        except (ArithmeticError, ValueError) as error:
            raise self._error(f"the tensors do not fit the metadata: {error}") from error
        width = self._values.integer("embedding_length")
        for path in self._row.unread:
            made.setdefault(f"{path}.weight", mx.ones(width, dtype))
            made.setdefault(f"{path}.bias", mx.zeros(width, dtype))
        return made

    def _target(self, name: str) -> Target | None:
        """Return what a tensor becomes, with the whole path; None for unknown tensors."""
        stem, _, parameter = name.rpartition(".")
        if parameter not in ("weight", "bias"):
            stem, parameter = name, ""
        prefix, names = "", self._row.outer
        if block := _BLOCK.fullmatch(stem):
            prefix, names = f"{self._row.layers}.{int(block[1])}.", self._row.layer
            stem = block[2]
            if self._is_swapped:
                stem = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}.get(stem, stem)
        elif deep := _DEEP.fullmatch(stem):
            return self._deep_target(int(deep[1]), deep[2])
        full = f"{stem}.{parameter}" if parameter else stem
        found = names.get(full, names.get(stem))
        if found is None:
            return None
        target = Target(found) if isinstance(found, str) else found
        if not parameter and not target.is_parameter:
            return None
        return replace(target, path=prefix + target.path)

    def _deep_target(self, block: int, part: str) -> Target | None:
        blocks = _deep_blocks(self._values)
        names = {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"}
        if block not in blocks or part not in names:
            return None
        return Target(f"vision_tower.deepstack_merger_list.{blocks.index(block)}.{names[part]}")

    def _check_blocks(self) -> None:
        found = {int(block[1]) for name in self._file.names if (block := _BLOCK.match(name))}
        count = self._values.integer("block_count")
        if len(found) != count or max(found, default=-1) != count - 1:
            raise self._error(f"the metadata name {count} blocks, the tensors are of {len(found)}")

    def _check_sizes(self) -> None:
        """Raise `ModelLoadError` for pictures of so many patches that tables of them are large."""
        size, patch = (self._values.integer(f"{name}_size") for name in ("image", "patch"))
        if not 0 < patch <= size <= MAX_SIDE or size // patch > _MAX_PATCHES:
            raise self._error(
                f"patches of {patch} in pictures of {size} pixels a side are not supported;"
                f" the limits are {_MAX_PATCHES} patches and {MAX_SIDE} pixels"
            )

    def _feed_forward(self) -> tuple[bool, int]:
        """Return whether files have the names of the two layers of an MLP swapped, and its width.

        llama.cpp's converters named them so until May 2025.
        """
        width = self._values.integer("embedding_length")
        shapes = []
        for name in ("v.blk.0.ffn_up.weight", "v.blk.0.ffn_down.weight"):
            if name not in self._file or len(self._file[name].shape) != 2:
                raise self._error(f"the tensor {name!r} is missing, or is not a matrix")
            shapes.append(self._file[name].shape)
        up, down = shapes
        is_swapped = down[1] == width != down[0]
        return is_swapped, down[0] if is_swapped else up[0]

    def _check_activation(self) -> None:
        metadata, used = self._file.metadata, _QUICK_GELU
        for name in (_GELU, _SILU):
            if metadata.flag(f"clip.use_{name}", False):
                used = name
        if used != self._row.activation:
            raise self._error(
                f"the activation {used} is not supported: mlx-vlm's {self._row.model_type} has"
                f" {self._row.activation}"
            )

    def _normalisation(self) -> Config:
        """Return the mean and the standard deviation of each colour."""
        made: Config = {}
        for name in ("image_mean", "image_std"):
            numbers = self._file.metadata.numbers(f"clip.vision.{name}").tolist()
            if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
                raise self._error(f"clip.vision.{name} is {numbers[:5]}, expected three numbers")
            made[name] = numbers
        if min(made["image_std"]) <= 0:
            raise self._error(f"clip.vision.image_std is {made['image_std']}, expected above 0")
        return made

    def _token_ids(self, encode: Encode) -> Config:
        """Return the ids of the tokens that stand for pictures and for videos."""
        needs = CLASSES[self.config["model_type"]]
        placeholder = needs.soft or needs.placeholder
        ids = encode(placeholder)
        if len(ids) != 1:
            raise ModelLoadError(f"the model's tokenizer has no token {placeholder}")
        video = encode("<|video_pad|>")
        return {
            "image_token_id": ids[0],
            "image_token_index": ids[0],
            "video_token_id": video[0] if len(video) == 1 else ids[0],
        }
