"""Vision towers of mlx-vlm beside a language model of mlx-lm: what `open_tower` makes.

Each has `embed`, which encodes a picture, as `VisionModel` says. `tower_types` has what single
model types need.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.layers.cross_attention import Crossing
from modelpack_engine.patches import mlx_vlm_imports
from modelpack_engine.patches.corrections import TEXT_PARTS
from modelpack_engine.vision.grids import tower_class
from modelpack_engine.vision.models import (
    CLASSES,
    GEMMA3_TOKENS,
    GEMMA3N_AUDIO,
    GEMMA4_AUDIO,
    INSTALL_HINT,
)
from modelpack_engine.vision.tower_corrections import correct
from modelpack_engine.vision.tower_types import (
    PARTS,
    PHI4,
    PREPARED,
    RENAMED,
    ROWS,
    SOUND_PARTS,
)


class _Text:
    """The part of a language model that mlx-vlm's `get_input_embeddings` uses."""

    def __init__(self, embed_tokens: Any) -> None:
        self.model, self.embed_tokens = self, embed_tokens
        self.embed_scale, self.hidden_size_per_layer_input = 1.0, 0  # of Gemma 4

    def get_rope_index(self, *_: Any, **__: Any) -> tuple[None, None]:
        """Return no positions: the engine counts them."""
        return None, None


#: Names of the tensors of audio towers.
_SOUNDS = ("audio_tower.", "embed_audio.", "audio_encoder.", PHI4)
#: What mlx-vlm's classes raise for a config or weights that do not fit them.
_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
#: Elements of a row, in whose multiples a GPU multiplies matrices fastest.
_ALIGNMENT = 64
#: Names of the tensors of vision towers, after an optional "model.", and of audio towers.
_PREFIXES = (
    "embed_vision.",
    "vision_embedder.",
    "mm_projector.",
    "multi_modal_projector.",
    "vision_adapter.",
    "vision_model.",
    "vision_projection.",
    "vision_tower.",
    "visual.",
    *_SOUNDS,
)
#: Names of tensors that are not of the vision tower of a type with `language`.
_LANGUAGE = (
    "language_model.",
    "language.",
    "text_model.",
    "lm_head.",
    "layers.",
    "embed_tokens.",
    "norm.",
    "mtp.",
    "talker.",
    "code2wav.",
    "llm.",
    "tts.",
    "transformer.",
)


def tower_weights(paths: Sequence[Path], kind: str) -> dict[str, mx.array]:
    """Return the weights of the vision tower in safetensors files, by the names of `open_tower`.

    `kind` is the model type.
    """
    language = CLASSES[kind].language is not None
    return {
        name.replace("visual.", "vision_tower.", 1): array
        for path in paths
        for stored, array in cast(
            dict[str, mx.array], mx.load(str(path), format="safetensors")
        ).items()
        if (name := stored.removeprefix("thinker.").removeprefix("model."))
        and name.startswith(_LANGUAGE if language else _PREFIXES) != language
    }


def open_tower(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    model: Module,
    dtype: mx.Dtype | None,
) -> Any:
    """Return the vision tower, not evaluated, of a model whose language model is loaded.

    `config` is its config.json, `weights` are those of `tower_weights` or of a GGUF projector, and
    `dtype` is the type that they get, None for their own. Raises `ModelLoadError` if the extra
    `vision` is not installed, or tensors are missing or of the wrong shape.
    """
    kind = config["model_type"]
    if not mlx_vlm_imports.is_installed():
        raise ModelLoadError("the extra 'vision' is not installed", hint=INSTALL_HINT)
    if CLASSES[kind].mrope:
        _check_mrope(config)
    if kind == "gemma3":
        _check_pool(config)
    mlx_vlm_imports.prepare()
    # Its own class for experts is for the language model.
    needs = CLASSES[kind]
    module = "qwen3_5" if kind == "qwen3_5_moe" else needs.folder(config)
    package: Any = importlib.import_module(f"mlx_vlm.models.{module}")
    table = next(m for name, m in model.named_modules() if name.endswith("embed_tokens"))
    if not weights:
        raise ModelLoadError("the files have no vision tower")
    if not any(name.startswith(_SOUNDS) for name in weights):
        config = {**config, "audio_config": None}
    try:
        if kind in PARTS:
            tower = _PartsTower(package, config, table)
        elif needs.language is None:
            tower = _tower_class(package)(config, table)
        else:
            tower = _cut_class(package, any_res=needs.any_res)(config, table)
        correct(tower, config)
        given = tower.sanitize(dict(weights))
        if any(name.endswith(".scales") for name in given):
            _quantise(tower, config, given)
        tower.load_weights(list(given.items()), strict=True)
    except _FAILURES as error:
        raise ModelLoadError(f"cannot build mlx-vlm's {kind}: {error}") from error
    if needs.cross:
        tower.crossing = cast(Any, model).crossing
    _align(tower)
    if dtype is not None:
        tower.set_dtype(dtype)
    tower.eval()
    tower.pixel_type = _type_of(tower)
    return tower


def _type_of(tower: Module) -> mx.Dtype:
    """Return the type of most weights, or of their scales if they are quantised."""
    counts = Counter[mx.Dtype]()
    for value in dict(tree_flatten(tower.parameters())).values():
        if mx.issubdtype(value.dtype, mx.floating):
            counts[value.dtype] += value.size
    return counts.most_common(1)[0][0] if counts else mx.float32


def _typed(inputs: Mapping[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """Return inputs with pixels in bfloat16 if weights are, as in transformers.

    The layers after them would otherwise compute in float32, and convert their weights each time.
    float16 might be too small for what they compute.
    """
    if dtype != mx.bfloat16:
        return {**inputs}
    return {
        name: value.astype(dtype) if name.startswith("pixel_values") else value
        for name, value in inputs.items()
    }


def _align(tower: Module) -> None:
    """Widen the hidden layers of gated MLPs with zeros, to a multiple of `_ALIGNMENT`.

    The result is the same, and a GPU multiplies faster: twice as fast for Qwen2.5-VL's 3,420.
    """
    for module in tower.modules():
        layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(type(layer) is nn.Linear for layer in layers):
            continue
        gate, up, down = cast(list[Any], layers)
        missing = -len(gate.weight) % _ALIGNMENT
        for layer in (gate, up):
            for name, value in layer.parameters().items():
                layer[name] = mx.pad(value, [(0, missing), *[(0, 0)] * (value.ndim - 1)])
        down.weight = mx.pad(down.weight, [(0, 0), (0, missing)])


def _check_mrope(config: Mapping[str, Any]) -> None:
    """Raise `ModelLoadError` unless the language model rotates by M-RoPE without an extension."""
    text = config.get("text_config") or config
    rope = text.get("rope_scaling")
    rope = rope if isinstance(rope, Mapping) else {}
    kinds = {rope.get("rope_type", "mrope"), rope.get("type", "mrope")}
    sections, heads = rope.get("mrope_section"), text.get("num_attention_heads")
    width = text.get("head_dim")
    if not isinstance(width, int):
        width = text["hidden_size"] // heads if isinstance(heads, int) and heads > 0 else 0
    if config["model_type"].startswith(("qwen3_5", "qwen3_omni")):  # mlx-vlm takes it to be
        kinds |= set() if rope.get("mrope_interleaved") is True else {"not interleaved"}
    if config["model_type"].startswith("qwen3_5"):
        factor = text.get("partial_rotary_factor")
        width = int(width * factor) if isinstance(factor, int | float) else 0
    elif config["model_type"].startswith("glm4v"):
        factor = text.get("partial_rotary_factor", 0.5)
        width = int(width * factor) if isinstance(factor, int | float) else 0
    if (
        not kinds <= {"default", "mrope"}
        or not isinstance(sections, list)
        or [type(size) for size in sections] != [int] * 3
        or min(sections) < 0
        or sum(sections) != width // 2
    ):
        raise ModelLoadError(
            f"config.json: the rotation of {config['model_type']} is not M-RoPE with three sections"
        )


def _check_pool(config: Mapping[str, Any]) -> None:
    """Raise `ModelLoadError` unless a picture's square of patches is pooled to its tokens."""
    vision, tokens = config["vision_config"], config.get("mm_tokens_per_image", GEMMA3_TOKENS)
    patches, patch = vision.get("image_size", 224), vision.get("patch_size")
    sizes = (tokens, patches, patch)
    if all(type(size) is int and size > 0 for size in sizes):
        side = math.isqrt(tokens)
        if side * side == tokens and patches // patch >= side and patches // patch % side == 0:
            return
    raise ModelLoadError(
        f"config.json: mm_tokens_per_image {str(tokens)[:100]} does not divide the patches of a"
        " picture"
    )


def _quantise(tower: Any, config: Mapping[str, Any], given: Mapping[str, mx.array]) -> None:
    settings = config["quantization"]
    nn.quantize(
        tower,
        group_size=settings["group_size"],
        bits=settings["bits"],
        mode=settings.get("mode", "affine"),
        class_predicate=lambda path, _: f"{path}.scales" in given,
    )


def _tower_class(package: Any) -> Any:
    """Return a subclass of mlx-vlm's model without its language model."""
    base = package.Model

    def initialise(self: Any, config: Mapping[str, Any], table: Any) -> None:
        Module.__init__(self)
        needs = CLASSES[config["model_type"]]
        text = config.get("text_config") or config
        self.config = SimpleNamespace(
            model_type=config["model_type"],
            text_config=SimpleNamespace(
                hidden_size=text["hidden_size"],
                rms_norm_eps=text.get("rms_norm_eps", 1e-5),
                tie_word_embeddings=bool(text.get("tie_word_embeddings")),
                mm_tokens_per_image=config.get("mm_tokens_per_image", GEMMA3_TOKENS),
            ),
            # mlx-vlm's Gemma 3 divides embeddings by its root, as the language model multiplies by
            # that of its own. config.json has none, and mlx-vlm would take 2048.
            hidden_size=text["hidden_size"],
            pad_token_id=config.get("pad_token_id"),
            vision_config=package.VisionConfig.from_dict(dict(config["vision_config"])),
            image_token_index=config.get("image_token_index", config.get("image_token_id")),
            image_token_id=config.get("image_token_id"),
            audio_token_id=config.get("audio_token_id", GEMMA4_AUDIO),
            audio_config=None,
            video_token_id=config.get("video_token_id"),
            video_token_index=config.get("video_token_id"),
            spatial_merge_size=needs.merged(config),
            scale_factor=config.get("scale_factor", 2),
            multimodal_projector_bias=config.get("multimodal_projector_bias", False),
            vision_feature_layer=config.get("vision_feature_layer", -1 if needs.in_rows else -2),
            vision_feature_select_strategy=config.get("vision_feature_select_strategy", "default"),
        )
        self.language_model = _Text(table)
        tower, projector = needs.parts
        setattr(self, tower, tower_class(package.VisionModel)(self.config.vision_config))
        self.audio_tower = self.embed_audio = None
        self.feature_scale = 1.0
        if config["model_type"] == "gemma4":
            vision = self.config.vision_config
            width = text["hidden_size"]
            self.embed_vision = package.gemma4.MultimodalEmbedder(
                vision.hidden_size, width, vision.rms_norm_eps
            )
            self.feature_scale = width**-0.5  # the language model multiplies by its inverse
            if isinstance(config.get("audio_config"), Mapping):
                _add_audio_tower(self, package, config["audio_config"], width)
        elif needs.projector:
            module = getattr(package, config["model_type"])
            setattr(self, projector, getattr(module, needs.projector)(self.config))
        self.masks_inputs = needs.bidirectional
        self.vision_feature_layer = self.config.vision_feature_layer
        self.vision_feature_select_strategy = self.config.vision_feature_select_strategy

    def embed(self: Any, token_ids: mx.array, inputs: Mapping[str, mx.array]) -> mx.array:
        inputs = _typed(inputs, self.pixel_type)
        if inputs and (rows_of := ROWS.get(self.config.model_type)) is not None:
            rows = rows_of(self, inputs)
            if rows.shape[-2] != token_ids.size:
                raise ValueError(f"{rows.shape[-2]} embeddings for {token_ids.size} tokens")
            return rows
        given = dict(inputs)
        if self.masks_inputs:  # the mask that it returns is not used
            given["mask"] = mx.ones((1, token_ids.size), mx.int32)
        made = base.get_input_embeddings(self, token_ids[None], **given)
        rows = cast(mx.array, made.inputs_embeds[0])
        if inputs and self.feature_scale != 1:
            is_soft = token_ids == self.config.image_token_id
            is_soft |= token_ids == self.config.audio_token_id
            if self.config.video_token_id is not None:
                is_soft |= token_ids == self.config.video_token_id
            rows = mx.where(is_soft[:, None], rows * self.feature_scale, rows)
        deep = getattr(made, "deepstack_visual_embeds", None)
        return rows if deep is None else mx.stack([rows, *deep])

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        if hasattr(base, "sanitize"):
            weights = base.sanitize(self, weights)
        tower = getattr(self, CLASSES[self.config.model_type].parts[0])
        return cast(dict[str, mx.array], tower.sanitize(weights))

    body = {
        "__init__": initialise,
        "__module__": base.__module__,
        "embed": embed,
        "sanitize": sanitize,
    }
    return type("VisionTower", (base,), body)


def _add_audio_tower(tower: Any, package: Any, config: Mapping[str, Any], width: int) -> None:
    """Add Gemma 4's audio tower and its projection to a tower.

    It returns the rows of all sounds before those of their padding: mlx-vlm puts the rows after a
    sound's own in the places of the next one.
    """
    base = package.gemma4.AudioEncoder

    def encode(self: Any, features: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
        states, padding = base.__call__(self, features, mask)
        places = mx.arange(padding.size)
        order = mx.argsort(mx.where(padding.flatten(), places + padding.size, places))
        return states.reshape(1, -1, states.shape[-1])[:, order], padding

    made = package.AudioConfig.from_dict(dict(config))
    tower.config.audio_config = made
    tower.audio_tower = type("AudioEncoder", (base,), {"__call__": encode})(made)
    tower.embed_audio = package.gemma4.MultimodalEmbedder(
        made.output_proj_dims or made.hidden_size, width, made.rms_norm_eps
    )


def _cut_class(package: Any, *, any_res: bool = False) -> Any:
    """Return a subclass of mlx-vlm's model without its language model.

    mlx-vlm's LLaVA-NeXT and Granite Vision put a whole tile in the place of each token of a
    picture; with `any_res`, LLaVA-OneVision's methods take their place, without its limit.
    """
    base = encoding = package.Model

    def initialise(self: Any, config: Mapping[str, Any], table: Any) -> None:
        base.__init__(self, _short_config(package, config))
        self.language_model = _Text(table)
        self.multiplier = _text_of(config).get("embedding_multiplier", 1.0)

    def embed(self: Any, token_ids: mx.array, inputs: Mapping[str, mx.array]) -> mx.array:
        inputs = _typed(inputs, self.pixel_type)
        given: dict[str, Any] = dict(inputs)
        if "pixel_values_videos" in inputs:  # the last frame has one more row, for a new line
            frames = inputs["pixel_values_videos"][:, None]
            rows = encoding.get_video_features(self, frames)
            rows = rows.reshape(len(frames), -1, rows.shape[-1])
            return cast(mx.array, rows[:, : token_ids.size // len(frames)].flatten(0, 1))
        if inputs and (rows := ROWS.get(self.config.model_type)) is not None:
            return rows(self, inputs)
        if inputs and (prepared := PREPARED.get(self.config.model_type)) is not None:
            given = prepared(token_ids == self.config.image_token_index, inputs)
        made = encoding.get_input_embeddings(self, token_ids[None], **given)
        return cast(mx.array, made.inputs_embeds[0])

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        own: Any = super(tower, self)
        if hasattr(own, "sanitize"):
            weights = own.sanitize(weights)
        part: Any = next(m for m in self.modules() if isinstance(m, package.VisionModel))
        return cast(dict[str, mx.array], part.sanitize(weights))

    body: dict[str, Any] = {
        "__init__": initialise,
        "__module__": base.__module__,
        "embed": embed,
        "sanitize": sanitize,
    }
    if any_res:
        encoding = importlib.import_module("mlx_vlm.models.llava_onevision").Model
        if encoding is not base:
            body["max_num_patches"] = _MOST_PATCHES
    tower = type("VisionTower", tuple(dict.fromkeys((encoding, base))), body)
    return tower


class _PartsTower(Module):  # type: ignore[misc]
    """The modules of mlx-vlm's model that encode pictures: those of `tower_types.PARTS`."""

    def __init__(self, package: Any, config: Mapping[str, Any], table: Any) -> None:
        super().__init__()
        text = _text_of(config)
        parts, self._encode, scale = PARTS[str(config["model_type"])]
        self.config = _made_config(package, {**config, "text_config": {**text}})
        for name, module in parts(package, self.config).items():
            setattr(self, name, module)
        self._width, self._table = int(text["hidden_size"]), _Text(table)
        self.crossing: Crossing | None = None
        self.pixel_type = mx.float32
        self._scale = self._width**0.5 if scale else 1.0
        self._soft_ids = [
            config.get("image_token_id"),
            config.get("audio_token_id", GEMMA3N_AUDIO),
            config.get("video_token_id"),
        ]
        if isinstance(audio := config.get("audio_config"), Mapping):
            add = SOUND_PARTS[str(config["model_type"])]
            for name, module in add(package, audio, self.config).items():
                setattr(self, name, module)

    @property
    def picture_bytes(self) -> int:
        """The most bytes of the keys and values of a picture; 0 without cross-attention."""
        if self.crossing is None:
            return 0
        vision = self.config.vision_config
        tokens = vision.max_num_tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)
        return int(tokens * self.crossing.bytes_per_token)

    def embed(self, token_ids: mx.array, inputs: Mapping[str, mx.array]) -> mx.array:
        """Return the embeddings of tokens, with those of a picture in their places."""
        inputs = _typed(inputs, self.pixel_type)
        if inputs and self.crossing is not None:
            states = self._encode(self, inputs)
            return self.crossing.keys_and_values(states)
        rows = self._table.embed_tokens(token_ids)
        rows = rows * self._scale if self._scale != 1 else rows
        if not inputs:
            return cast(mx.array, rows)
        parts: list[Any] = [getattr(self, name, None) for name in ("embed_vision", "embed_audio")]
        for part in parts:
            if hasattr(part, "vocab_offset"):  # Gemma 3n: the token after a file has its own table
                own = (token_ids >= part.vocab_offset) & (
                    token_ids < part.vocab_offset + part.vocab_size
                )
                found = part(input_ids=mx.where(own, token_ids, part.vocab_offset))
                rows = mx.where(own[:, None], found.astype(rows.dtype), rows)
        made = self._encode(self, inputs).astype(rows.dtype)
        kind = 2 if "pixel_values_videos" in inputs else int("input_features" in inputs)
        soft = self._soft_ids[kind]
        (places,) = np.nonzero(np.array(token_ids) == soft)
        if len(places) != made.shape[-2]:
            raise ValueError(f"{made.shape[-2]} embeddings for {len(places)} tokens of a file")
        if made.ndim > rows.ndim:  # DeepStack
            rows = mx.concatenate([rows[None], mx.zeros((len(made) - 1, *rows.shape), rows.dtype)])
        rows[..., mx.array(places), :] = made
        return cast(mx.array, rows)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return weights by the names and in the layout of the modules."""
        if (rename := RENAMED.get(self.config.model_type)) is not None:
            weights = rename(weights)
        for part in self.children().values():
            if hasattr(part, "sanitize"):
                weights = part.sanitize(weights)
        return weights


#: More than any picture has: no picture is scaled down.
_MOST_PATCHES = 1 << 60


def _text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the language model inside a config."""
    parts = (config[part] for part in TEXT_PARTS if isinstance(config.get(part), Mapping))
    return next(parts, config)


def _short_config(package: Any, config: Mapping[str, Any]) -> Any:
    """Return mlx-vlm's config of a model whose language model has one layer: it is replaced."""
    text = {"eos_token_id": None, **_text_of(config), "num_hidden_layers": 1}
    if config["model_type"] == "glm_ocr":  # its class rejects fields that it does not know
        known = package.TextConfig.__dataclass_fields__
        text = {name: value for name, value in text.items() if name in known}
    return _made_config(package, {**config, "text_config": text})


def _made_config(package: Any, config: Mapping[str, Any]) -> Any:
    """Return mlx-vlm's config, with those of all parts."""
    given = copy.deepcopy(dict(config))  # mlx-vlm's classes change it
    if hasattr(package, "ThinkerConfig"):
        vision = package.VisionConfig.from_dict(given["vision_config"])
        return SimpleNamespace(model_type=given["model_type"], vision_config=vision)
    if given["model_type"] == "phi4mm":
        return package.ModelConfig.from_dict(given)
    if given.get("audio_config") is None:
        given["audio_config"] = {}
    if given["model_type"] == "molmo":  # the language model's sizes, which its tower needs
        width, hidden = given["hidden_size"], given["intermediate_size"] // 2
        given["vision_config"] = {"d_model": width, "hidden_size": hidden, **given["vision_config"]}
    if "attention_heads" in given["vision_config"]:  # of mllama
        given["vision_config"]["num_attention_heads"] = given["vision_config"]["attention_heads"]
    made = package.ModelConfig.from_dict(given)
    for name in ("text", "vision", "perceiver", "projector"):
        kind = getattr(package, f"{name.title()}Config", None)
        if kind is not None:
            setattr(made, f"{name}_config", kind.from_dict(dict(given.get(f"{name}_config") or {})))
    made.image_grid_pinpoints = given.get("image_grid_pinpoints")
    made.image_token_index = given.get("image_token_index", given["image_token_id"])
    return made
