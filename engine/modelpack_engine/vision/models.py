"""The model types that read pictures, and mlx-vlm's classes for those that mlx-lm lacks.

Where mlx-lm has the language model, it runs as without pictures, and `towers.open_tower` adds
mlx-vlm's vision tower to it. Where mlx-lm has none, `vision_classes` returns a subclass of
mlx-vlm's whole model, whose `language_tower` the runners run. Both are a `VisionModel`.
`CLASSES` says what each type needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import mlx.core as mx
from mlx.nn.layers.base import Module

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.patches import mlx_vlm_imports

#: Returns the token ids of a text, in which special tokens are recognised.
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class VisionClass:
    """What a class of mlx-vlm needs.

    `text_types` are the language models that it computes; without any, mlx-lm runs the language
    model, and mlx-vlm's tower and `projector` are added, which its class names as `parts` says.
    `placeholder` stands for a picture in chat templates. With `mrope`, tokens have three positions
    each; with `in_rows`, tokens of a picture stand in rows that end with a token of their own; in
    both, a token is `merge` x `merge` patches unless the config says otherwise. Qwen3-VL's towers
    also return what is added to the output of the first layers (DeepStack).

    With `soft`, a picture's tokens are `begins`, tokens `soft`, and `ends`, with the text `around`
    before and after them. With `bidirectional`, its tokens `soft` attend to each other in both
    directions; in Gemma 4, if config.json says so, and in layers with a window. Its text model
    scales all embeddings, and has layers with embeddings of their own, where tokens of pictures are
    `hidden_id`.

    With `language`, mlx-lm has no class for the type, and its classes for language models run those
    of `text_config`: mlx-lm's model types, by the one in the config. The tower then is mlx-vlm's
    model without its own language model. `package` is mlx-vlm's folder if its name is not the type,
    `siglip` the one for towers of SigLIP's, and `part` the token of a part of a picture, if not the
    placeholder. With `any_res`, embeddings of tiles are put together as LLaVA-OneVision's are,
    which mlx-vlm does for that class only. Where `language` has the type itself, the fields of the
    language model are those of the whole config, and `vision_part` is the field of the tower's.

    With `prefix`, all tokens of a prompt with pictures attend to each other in both directions;
    `ends` comes after the last picture, and a newline after the text. With `joins`, a picture right
    after another one shares its last token, and a text right after a picture begins with a space.

    With `first`, pictures come before the text of a prompt, and this text before them.

    Without `pictures`, the type reads sounds only, and has no placeholder of pictures.

    With `cross`, a picture is one token, and layers attend to its keys and values from there to the
    next picture, or the one after pictures that follow each other.

    With `batched`, one call encodes several pictures, or groups of frames, whose inputs have the
    same shapes, joined along the first axis. It is not set for towers that hide a call's other
    pictures by a mask: their work grows with the square of the number of pictures, and NaN of one
    reaches the others. All audio towers encode several sounds.
    """

    text_types: tuple[str, ...] = ()
    placeholder: str = "<image>"
    projector: str = "LlavaMultiModalProjector"
    parts: tuple[str, str] = ("vision_tower", "multi_modal_projector")
    mrope: bool = False
    in_rows: bool = False
    merge: int = 2
    begins: str = ""
    soft: str = ""
    ends: str = ""
    around: str = ""
    bidirectional: bool = False
    hidden_id: int | None = None
    language: Mapping[str, str] | None = None
    package: str = ""
    siglip: str = ""
    part: str = ""
    any_res: bool = False
    vision_part: str = "vision_config"
    prefix: bool = False
    joins: bool = False
    cross: bool = False
    batched: bool = False
    first: str = ""
    pictures: bool = True

    def folder(self, config: Mapping[str, Any]) -> str:
        """Return the name of mlx-vlm's package for the model of `config`."""
        siglip = (config.get("vision_config") or {}).get("model_type") == "siglip_vision_model"
        return (siglip and self.siglip) or self.package or str(config["model_type"])

    def merged(self, config: Mapping[str, Any]) -> int:
        """Return the rows and columns of patches that are one token in the model of `config`."""
        vision = config["vision_config"]
        return int(config.get("spatial_merge_size", vision.get("spatial_merge_size", self.merge)))


_QWEN = VisionClass(  # the tower projects
    placeholder="<|image_pad|>", projector="", mrope=True, batched=True
)
_LFM2 = VisionClass(
    language={"lfm2": "lfm2", "lfm2_moe": "lfm2_moe"}, package="lfm2_vl", batched=True
)
_LLAMAS = {"llama": "llama", "mistral": "llama"}
_QWENS = {"qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3_moe"}
_INTERNVL = VisionClass(placeholder="<IMG_CONTEXT>", language=_QWENS | _LLAMAS, batched=True)
#: The tokens of sounds, unless config.json says otherwise.
GEMMA3N_AUDIO, GEMMA4_AUDIO, QWEN3_OMNI_AUDIO = 262_273, 258_881, 151_675
PHI4_AUDIO = 200_011
#: The parts of towers that encode sounds, of which each has one.
AUDIO_PARTS = ("audio_tower", "embed_audio", "audio_encoder")
#: The tokens of a picture of Gemma 3, unless config.json says otherwise.
GEMMA3_TOKENS = 256
#: The classes by the model type of config.json.
CLASSES: Mapping[str, VisionClass] = {
    "aya_vision": VisionClass(language={"cohere2": "cohere2"}, part="<|IMG_PATCH|>", batched=True),
    "deepseek_vl_v2": VisionClass(language={"deepseek_v2": "deepseek_v2"}),
    "dots_ocr": VisionClass(placeholder="<|imgpad|>", language={"dots_ocr": "qwen2"}, batched=True),
    "gemma3": VisionClass(
        placeholder="<start_of_image>",
        projector="Gemma3MultiModalProjector",
        begins="<start_of_image>",
        soft="<image_soft_token>",
        ends="<end_of_image>",
        around="\n\n",
        bidirectional=True,
        batched=True,
    ),
    "gemma3n": VisionClass(
        placeholder="<image_soft_token>",
        begins="<start_of_image>",
        soft="<image_soft_token>",
        ends="<end_of_image>",
        around="\n\n",
        hidden_id=0,
        batched=True,
    ),
    "gemma4": VisionClass(
        placeholder="<|image|>",
        projector="MultimodalEmbedder",
        begins="<|image>",
        soft="<|image|>",
        ends="<image|>",
        hidden_id=0,
        batched=True,
    ),
    "gemma4_unified": VisionClass(
        placeholder="<|image|>",
        begins="<|image>",
        soft="<|image|>",
        ends="<image|>",
        hidden_id=0,
        batched=True,
    ),
    "glm4v": VisionClass(
        placeholder="<|image|>",
        mrope=True,
        language={"glm4v_text": "glm4", "glm4v": "glm4"},
        batched=True,
    ),
    "glm4v_moe": VisionClass(
        placeholder="<|image|>",
        mrope=True,
        language={"glm4v_moe_text": "glm4_moe", "glm4v_moe": "glm4_moe"},
        batched=True,
    ),
    "glm_ocr": VisionClass(
        placeholder="<|image|>", mrope=True, language={"glm_ocr_text": "glm4"}, batched=True
    ),
    "granite4_vision": VisionClass(
        language={"granite": "granite", "granitemoehybrid": "granitemoehybrid"}
    ),
    "granite_vision": VisionClass(language={"granite": "granite"}, any_res=True, batched=True),
    "idefics3": VisionClass(  # the tower alone runs for GGUF
        ("idefics3", "llama", "vllama3"),
        projector="Idefics3Connector",
        parts=("vision_model", "connector"),
        batched=True,
    ),
    "idefics2": VisionClass(language=_LLAMAS, joins=True),
    "internvl": _INTERNVL,
    "internvl_chat": _INTERNVL,
    "kimi_k25": VisionClass(placeholder="<|media_pad|>", batched=True),
    "kimi_vl": VisionClass(placeholder="<|media_pad|>", language={"deepseek_v3": "deepseek_v3"}),
    "lfm2-vl": _LFM2,
    "lfm2_vl": _LFM2,
    "llama4": VisionClass(placeholder="<|image|>", projector="", part="<|patch|>", batched=True),
    "llava": VisionClass(batched=True),
    "llava_next": VisionClass(
        language=_LLAMAS | _QWENS | {"granite": "granite"},
        siglip="granite_vision",
        any_res=True,
        batched=True,
    ),
    "llava_onevision": VisionClass(language=_LLAMAS | _QWENS, any_res=True, batched=True),
    "mage_vl": VisionClass(placeholder="<|image_pad|>", language={"qwen3": "qwen3"}),
    "minicpmo": VisionClass(part="<unk>", language={"minicpmo": "qwen3"}),
    "minicpmv4_6": VisionClass(
        placeholder="<|image_pad|>", language={"qwen3_5_text": "qwen3_5.TextModel"}
    ),
    "mistral3": VisionClass(
        placeholder="[IMG]", projector="Mistral3MultiModalProjector", in_rows=True
    ),
    "mllama": VisionClass(
        placeholder="<|image|>", language={"mllama_text_model": "llama"}, cross=True
    ),
    "molmo": VisionClass(
        placeholder="<|image|>",
        language={"molmo": "qwen2"},
        part="<im_patch>",
        first="<|endoftext|>",
    ),
    "muse_glimmer": VisionClass(placeholder="<|patch|>", projector="", batched=True),
    "paddleocr_vl": VisionClass(
        placeholder="<|IMAGE_PLACEHOLDER|>", mrope=True, language={"paddleocr_vl": "ernie4_5"}
    ),
    "paligemma": VisionClass(
        language={"gemma": "gemma", "gemma2": "gemma2"}, prefix=True, ends="<bos>"
    ),
    "phi3_v": VisionClass(
        placeholder="<|image|>", language={"phi3_v": "phi3"}, vision_part="img_processor"
    ),
    "phi4mm": VisionClass(placeholder="", language={"phi4mm": "phi3"}, pictures=False),
    "pixtral": VisionClass(placeholder="[IMG]", in_rows=True, merge=1),
    "qwen2_5_vl": _QWEN,
    "qwen2_vl": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen3_omni_moe": VisionClass(
        placeholder="<|image_pad|>",
        mrope=True,
        language=dict.fromkeys(("qwen3_omni_moe_text", "qwen3_omni_moe_text_encoder"), "qwen3_moe"),
        batched=True,
    ),
    "smolvlm": VisionClass(("llama", "smolvlm"), batched=True),
}
#: The model types that mlx-vlm runs, and those whose language model mlx-lm runs.
WHOLE_TYPES = tuple(kind for kind, needs in CLASSES.items() if needs.text_types)
TOWER_TYPES = tuple(kind for kind, needs in CLASSES.items() if not needs.text_types)

INSTALL_HINT = "run pip install 'modelpack[vision]'"

#: Fields of `text_config` that change the output and that mlx-vlm's classes do not read, with the
#: values that they compute.
_UNREAD: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "hidden_act": (None, "silu"),
    "mlp_bias": (None, False),
    "pretraining_tp": (None, 1),
    "rope_scaling": (None,),
    "sliding_window": (None,),
}


def may_read_files(config: Mapping[str, Any]) -> bool:
    """Return whether models of this config.json read files here, if their own are complete.

    They are pictures, sounds or videos.
    """
    return config.get("model_type") in CLASSES and mlx_vlm_imports.is_installed()


def may_read_pictures(config: Mapping[str, Any]) -> bool:
    """Return whether models of this config.json read pictures here, if their files are complete."""
    return may_read_files(config) and CLASSES[str(config["model_type"])].pictures


def sees_ahead_in_windows(config: Mapping[str, Any]) -> bool:
    """Return whether tokens of a picture of Gemma 4 attend to each other in layers with a window.

    A frame of a video is a picture.
    """
    text = config.get("text_config") or {}
    sees_ahead = text.get("use_bidirectional_attention") == "vision"
    return sees_ahead and str(config["model_type"]).startswith("gemma4")


class VisionModel(Protocol):
    """What encodes pictures."""

    def embed(self, token_ids: mx.array, inputs: Mapping[str, mx.array]) -> mx.array:
        """Return the embeddings [tokens, width] of a prompt's tokens, with a picture's `inputs`.

        With DeepStack they are [1 + layers, tokens, width]: embeddings, then what is added to the
        output of each of the first layers. With cross-attention, `Crossing.keys_and_values` of a
        picture take their place. The tokens and inputs may be those of several sounds, or with
        `VisionClass.batched`, of several pictures or groups of frames.
        """


def vision_classes(config: Mapping[str, Any]) -> tuple[type[Module], type] | None:
    """Return the model class for `config`, and that of its arguments; None for other models.

    Raises `ModelLoadError` for a model that needs the extra `vision` where it is not installed, and
    for fields that mlx-vlm does not support.
    """
    kind = config.get("model_type")
    if kind not in WHOLE_TYPES:
        return None
    if not mlx_vlm_imports.is_installed():
        raise ModelLoadError(
            f"the architecture {kind!r} needs the extra 'vision', which is not installed",
            hint=INSTALL_HINT,
        )
    _check(config)
    mlx_vlm_imports.prepare()
    package: Any = importlib.import_module(f"mlx_vlm.models.{kind}")
    return _model_class(package), _arguments_class(package)


def _check(config: Mapping[str, Any]) -> None:
    """Raise `ModelLoadError` for a field that changes the output and that mlx-vlm does not read."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ModelLoadError("config.json: text_config is missing")
    if not isinstance(config.get("vision_config"), Mapping):
        raise ModelLoadError("config.json: vision_config is missing")
    checks = {**_UNREAD, "model_type": CLASSES[config["model_type"]].text_types}
    heads, width = text.get("num_attention_heads"), text.get("hidden_size")
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        checks["head_dim"] = (None, width // heads)
    given = dict(text)
    rope = given.get("rope_parameters")  # transformers 5: settings of the default kind are read
    if isinstance(rope, Mapping) and rope.get("rope_type", "default") != "default":
        given["rope_scaling"] = rope
    for name, allowed in checks.items():
        value = given.get(name)
        if value in allowed:
            continue
        is_plain = isinstance(value, str | int | float)
        shown = f" = {str(value)[:100]!r}" if is_plain else ""  # others may be nested deeply
        raise ModelLoadError(
            f"config.json: text_config.{name}{shown} changes the model's output, and mlx-vlm's"
            f" {config['model_type']} does not support it"
        )


def _arguments_class(package: Any) -> type:
    """Return a class whose `from_dict` makes mlx-vlm's config with those of its parts."""

    class Arguments:
        @classmethod
        def from_dict(cls, config: Mapping[str, Any]) -> Any:
            made = package.ModelConfig.from_dict(dict(config))
            made.text_config = package.TextConfig.from_dict(config["text_config"])
            made.vision_config = package.VisionConfig.from_dict(config["vision_config"])
            return made

    Arguments.__module__ = package.ModelConfig.__module__
    return Arguments


def language_tower(model: Any) -> Module:
    """Return the language model of a model of `vision_classes`, with the interface of mlx-lm's.

    The runners adapt its modules, and leave those of the vision tower as they are.
    """
    language: Any = model.language_model

    def call(self: Any, inputs: mx.array, cache: Any = None, input_embeddings: Any = None) -> Any:
        return self.language_model(inputs, inputs_embeds=input_embeddings, cache=cache).logits

    body: dict[str, Any] = {
        "__call__": call,
        "__module__": type(model).__module__,
        "layers": property(lambda self: self.language_model.layers),
    }
    if hasattr(language, "make_cache"):
        body["make_cache"] = lambda self: self.language_model.make_cache()
    tower: Any = type("LanguageTower", (Module,), body)()
    tower.language_model = language
    return cast(Module, tower)


def _model_class(package: Any) -> type[Module]:
    """Return a subclass of mlx-vlm's model with `embed`, which loads the weights of all parts."""
    base = package.Model

    def embed(self: Any, token_ids: mx.array, inputs: Mapping[str, mx.array]) -> mx.array:
        made = base.get_input_embeddings(self, token_ids[None], **inputs)
        return cast(mx.array, made.inputs_embeds[0])

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        if hasattr(base, "sanitize"):
            weights = base.sanitize(self, weights)
        for kind in (package.VisionModel, package.LanguageModel):
            part: Any = next(module for module in self.modules() if isinstance(module, kind))
            if hasattr(part, "sanitize"):
                weights = part.sanitize(weights)
        return _with_tied_head(weights, self.parameters())

    body = {"__module__": base.__module__, "embed": embed, "sanitize": sanitize}
    return type(base.__name__, (base,), body)


def _with_tied_head(
    weights: dict[str, mx.array], parameters: Mapping[str, Any]
) -> dict[str, mx.array]:
    """Return the weights with a head for a class that has no tied one, where they lack it."""
    head, table = "language_model.lm_head", "language_model.embed_tokens"
    if "lm_head" not in parameters.get("language_model", {}) or f"{head}.weight" in weights:
        return weights
    tied = {
        name.replace(table, head): value
        for name, value in weights.items()
        if name.startswith(f"{table}.")
    }
    return {**weights, **tied}
